"""What is compared in benchmarks computes the same, and what they measure of memory is right."""

import pytest
import torch
from torch import nn

from benchmarks import performance
from benchmarks.growth import exponent
from benchmarks.page import update
from benchmarks.paired import peak_bytes, saved_bytes, time_paired
from benchmarks.textbook import EighPool2d, TextbookChannelGsop, TextbookIsqrtCovPool2d
from timm_gsop.layers import ChannelGsop, IsqrtCovPool2d, MpnCovPool2d

PAIRS = {
    "block": (lambda: ChannelGsop(12, 8), lambda: TextbookChannelGsop(12, 8)),
    "head": (lambda: IsqrtCovPool2d(12, 8), lambda: TextbookIsqrtCovPool2d(12, 8)),
    "eigh": (lambda: MpnCovPool2d(12, 8), lambda: EighPool2d(12, 8)),
}
MATRIX = 4 * 64**2 * 2  # bytes of two float32 matrices of 64²


@pytest.mark.parametrize("pair", PAIRS)
def test_the_textbook_computes_the_same(pair):
    ours, textbook = (create().double() for create in PAIRS[pair])
    textbook.load_state_dict(ours.state_dict())
    x = torch.randn(4, 12, 7, 7, dtype=torch.float64, requires_grad=True)
    results = [module(x) for module in (ours, textbook)]
    weight = torch.randn_like(results[0])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad((result * weight).sum(), x) for result in results))


def test_the_head_keeps_less_than_half_of_the_textbooks_memory():
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    assert saved_bytes(IsqrtCovPool2d(16, 64), x) < 0.5 * saved_bytes(TextbookIsqrtCovPool2d(16, 64), x)


def test_saved_memory_by_hand():
    x = torch.randn(2, 64, 64, requires_grad=True)
    assert saved_bytes(nn.Sigmoid(), x) == MATRIX  # its output
    assert saved_bytes(nn.Linear(64, 64), x) == 0  # its input and weight, which exist anyway


def test_peak_memory_by_hand():
    x = torch.randn(2, 64, 64)
    assert peak_bytes(lambda: x.clone()) == MATRIX
    assert peak_bytes(lambda: (x.clone(), x.clone())) == 2 * MATRIX
    assert peak_bytes(lambda: [x.clone() is None for _ in range(3)]) == MATRIX


def test_timings_are_relative_to_the_reference():
    timings = time_paired({"a": lambda: sum(range(10_000)), "b": lambda: sum(range(200_000))}, "a", rounds=5)
    assert timings["a"].ratio == timings["a"].low == timings["a"].high == 1
    assert timings["b"].ratio > 2


def test_the_page_says_what_was_measured():
    page = performance.PAGE.read_text()
    assert update(page, performance.contents()) == page
    assert all(text in page for text in performance.contents().values())


def test_exponent_by_hand():
    assert exponent([1, 2, 4], [7.0, 3.0, 24.0]) == pytest.approx(3)
