"""Kernels without a GPU: Triton interprets them in a process of its own, and compiles them for GPUs elsewhere."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from timm_gsop import ChannelGsop, GsopBlock
from timm_gsop.layers import kernels

ROOT = Path(__file__).parents[1]

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or kernels._torch_is_too_old(),
    reason="Triton comes with PyTorch on Linux only, and kernels are used from PyTorch 2.8 on",
)


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", **env}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@needs_triton
def test_interpreted_kernels_give_the_answers_of_float64():
    """Every operator × precision × layout × odd size, and what decides where they are used (kernel_cases.py)."""
    cases = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/kernel_cases.py")
    done = run(*cases, TRITON_INTERPRET="1", TIMM_GSOP_KERNELS="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile_for_gpus(capability, tmp_path):
    """And fit in their shared memory: 163, 99 and 227 KB."""
    done = run("-m", "tests.compile_kernels", str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("KB") >= 12


def test_triton_is_imported_at_the_first_use():
    """Only then is an operator's module; timm imports Triton itself by way of the compiler."""
    code = "import sys, timm_gsop; print([name for name in sys.modules if name.startswith('timm_gsop.layers.kernels')])"
    assert run("-c", code).stdout == "['timm_gsop.layers.kernels']\n"


def test_on_a_cpu_the_plain_path_is_taken(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda operator: pytest.fail(f"{operator} is used"))
    block = GsopBlock(ChannelGsop(6, 4).bfloat16())
    block(torch.randn(2, 6, 5, 5, dtype=torch.bfloat16)).sum().backward()


def test_why_no_kernel_is_used(monkeypatch):
    monkeypatch.setenv("TIMM_GSOP_KERNELS", "0")
    assert kernels.why_off() == "TIMM_GSOP_KERNELS=0"
    monkeypatch.delenv("TIMM_GSOP_KERNELS")
    monkeypatch.setattr(kernels, "_triton_is_installed", lambda: False)
    assert kernels.why_off() == "triton is not installed"
    monkeypatch.setattr(kernels, "_triton_is_installed", lambda: True)
    monkeypatch.setattr(kernels, "_torch_is_too_old", lambda: True)
    assert kernels.why_off().startswith("PyTorch before 2.8")
    monkeypatch.setattr(kernels, "_torch_is_too_old", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.why_off() == "no NVIDIA GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    kernels._why_not_on.cache_clear()
    assert kernels.why_off() == "not an NVIDIA GPU from Ampere on"
    kernels._why_not_on.cache_clear()


def test_a_triton_that_fails_is_said_once_and_not_used(monkeypatch):
    """Without a C compiler, say."""

    def fail(operator: str):
        raise RuntimeError("Failed to find C compiler.\nMore")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(kernels, "load", fail)
    kernels._why_not_on.cache_clear()
    with pytest.warns(UserWarning, match="uses no GPU kernels, and is slower. Triton fails: Failed to find C compiler"):
        assert kernels._why_not_on(0) == "Triton fails: Failed to find C compiler."
    assert kernels._why_not_on(0)  # no second warning, which would be an error
    kernels._why_not_on.cache_clear()
