import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

SLOW_MODELS = ("101", "152", "164")
# Programs: one would run where its docstrings are looked for, the other needs Triton.
collect_ignore = ["compile_kernels.py", "stand_in_train.py"]

settings.register_profile("default", deadline=None, max_examples=25)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        model_name = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
        if isinstance(model_name, str) and any(depth in model_name for depth in SLOW_MODELS):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch refuses what is not."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
