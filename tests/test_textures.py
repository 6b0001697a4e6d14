"""examples/textures.py, smaller: what a block sees that an average does not."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples/textures.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("textures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_with_frozen_filters_an_average_is_at_chance_and_a_block_is_not(script):
    found = {row: script.accuracy(row, False, 1, images=500, epochs=8) for row in script.ROWS}
    chance = {row: value for row, value in found.items() if row in ("average", "SE, average")}
    assert max(chance.values()) < 15  # of ten classes, 1000 images: one standard deviation is 0.9
    assert min(value for row, value in found.items() if row not in chance) > 40


def test_filters_that_are_trained_make_up_for_it(script):
    assert script.accuracy("average", True, 1, images=500, epochs=8) > 40


def test_every_class_has_the_same_averages(script):
    """Of filter responses: mean 0 and variance 1, and so the same mean after a ReLU."""
    x, y = script.textures(2000, 5)
    assert sorted(y.unique().tolist()) == list(range(10))
    filters = torch.randn(8, 1, 7, 7)
    responses = torch.nn.InstanceNorm2d(8)(torch.nn.functional.conv2d(x, filters - filters.mean((2, 3), keepdim=True)))
    averages = torch.stack([responses[y == k].relu().mean((0, 2, 3)) for k in range(10)])
    assert (averages - averages.mean(0)).abs().max() < 0.02 * averages.mean()
