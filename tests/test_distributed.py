"""Two processes with synchronized batch normalization make the step of one process with both batches.

And what is sharded (FSDP) makes the steps of what is not.
"""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

from tests.versions import skip_before_torch_2_6
from timm_gsop import ChannelGsop, GsopBlock

ROOT = Path(__file__).parents[1]
NARROW = dict(channels=(8, 16, 24, 32), cov_dim=6, isqrt_dim=5, num_classes=4)
NETWORKS = {
    "gsop_resnet26_net1": dict(NARROW),
    "gsop_resnet26_net2": dict(NARROW, gsop_type="concat", spatial_size=3),
    "gsop_preresnet20_net2": dict(cov_dim=6, isqrt_dim=5, num_classes=4, isqrt_drop=0.0),
}


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 48, 48, generator=generator, dtype=torch.float64), torch.arange(8) % 4


def step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()


def create(model_name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(f"{model_name}.untrained", **NETWORKS[model_name]).double().train()


def one_of_two(path: str) -> None:
    """What each process does."""
    from timm.layers import convert_sync_batchnorm

    from tests.cpu_distributed import DistributedDataParallel

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    states = {}
    for model_name in NETWORKS:
        model = convert_sync_batchnorm(create(model_name))
        plain = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
        assert not plain, plain
        parallel = DistributedDataParallel(model)
        x, target = data()
        step(parallel, x[4 * rank : 4 * rank + 4], target[4 * rank : 4 * rank + 4])
        states[model_name] = model.state_dict()
    if rank == 0:
        torch.save(states, path)
    dist.destroy_process_group()


def test_two_processes_make_the_step_of_one(tmp_path):
    program = f"from tests.test_distributed import one_of_two; one_of_two({str(tmp_path / 'two.pth')!r})"
    (tmp_path / "program.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, tmp_path / "program.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    together = torch.load(tmp_path / "two.pth", weights_only=True)
    for model_name in NETWORKS:
        alone = create(model_name)
        before = {name: value.clone() for name, value in alone.state_dict().items()}
        step(alone, *data())
        for name, value in alone.state_dict().items():
            message = f"{name} of {model_name}: {{}}".format
            torch.testing.assert_close(together[model_name][name], value, rtol=1e-7, atol=1e-9, msg=message)
        moved = [name for name, value in alone.named_parameters() if not torch.equal(value, before[name])]
        assert any("cov_bn.weight" in name for name in moved), model_name


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    """This process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@skip_before_torch_2_6(reason="FSDP2 has another name")
@pytest.mark.parametrize("sharded", ["gsop", "gsop.reduction", "gsop.reduction.bn", "gsop.excitation", ""])
def test_a_block_whose_parts_are_sharded_makes_the_same_steps(sharded, process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (1,))
    plain = GsopBlock(ChannelGsop(6, 4), scale=2 / 3).train()
    block, x = copy.deepcopy(plain), torch.randn(4, 6, 5, 5)
    for name in dict.fromkeys((sharded, "")):
        fully_shard(block.get_submodule(name), mesh=mesh)
    assert all(isinstance(p, DTensor) for p in block.parameters())
    for module in (plain, block):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
    for (name, value), expected in zip(block.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value.full_tensor(), expected, msg=lambda m, name=name: f"{name}: {m}")
