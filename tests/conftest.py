import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

SLOW_MODELS = ("101", "152", "164")
# In timm's suite: deeper ones of what is there with fewer layers, and the other net of a family.
SLOW_IN_TIMMS_SUITE = (
    *("resnet34", "resnet50_net", "isqrt_resnet26", "isqrt_resnet50", "preresnet56", "gsop_resnet18_net2"),
    *("gsop_resnet26_net1", "resnext50_32x4d_net1", "densenet121_net1", "inception_v3_net2"),
)
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
        if not isinstance(model_name, str):
            continue
        in_timms_suite = item.path.name == "test_timm_suite.py" and "cfg" not in item.name
        slow = SLOW_MODELS + (SLOW_IN_TIMMS_SUITE if in_timms_suite else ())
        if any(part in model_name for part in slow):
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
