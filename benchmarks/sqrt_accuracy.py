"""How exact the Newton–Schulz square root is, against the condition number: python -m benchmarks.sqrt_accuracy.

Two errors, both relative and in norm, of covariances of size 256 whose eigenvalues are spread evenly on a logarithmic
scale. *Truncation*: of N iterations in float64 to the exact root. *Rounding*: of N iterations in float32, and with
operands rounded to TF32 or bfloat16, to the same N iterations in float64. ``--json`` keeps the figures; ``--figure``
draws them.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import keep, parse, parser
from benchmarks.paired import machine
from benchmarks.textbook import exact_root, plain_newton_schulz
from timm_gsop.layers import newton_schulz_sqrt
from timm_gsop.viz.figure import new_figure, save_figure

SIZE, BATCH = 256, 4
ITERATIONS = (1, 3, 5, 7, 10, 15)
CONDITIONS = tuple(10.0**exponent for exponent in range(9))
TF32_BITS, BFLOAT16_BITS = 10, 7


def covariances(condition: float) -> torch.Tensor:
    """Random symmetric matrices with this condition number, in float64."""
    basis, _ = torch.linalg.qr(torch.randn(BATCH, SIZE, SIZE, dtype=torch.float64))
    eigenvalues = torch.logspace(0, -torch.tensor(condition).log10().item(), SIZE, dtype=torch.float64)
    return (basis * eigenvalues) @ basis.mT


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Float32 to the nearest value with that many bits of mantissa, ties to even, as matrix units read it."""
    drop = 23 - bits
    raw = x.view(torch.int32)
    half = (1 << (drop - 1)) - 1 + ((raw >> drop) & 1)
    return (((raw + half) >> drop) << drop).view(torch.float32)


def product_of_rounded(a: torch.Tensor, b: torch.Tensor, bits: int) -> torch.Tensor:
    """Operands rounded, sums in float32: what a matrix unit computes."""
    return rounded(a, bits) @ rounded(b, bits)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in norm; the worst of the batch."""
    difference = (found.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    return difference.max().item()


ROUNDINGS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "float32": newton_schulz_sqrt,
    "TF32": partial(plain_newton_schulz, product=partial(product_of_rounded, bits=TF32_BITS)),
    "bfloat16": partial(plain_newton_schulz, product=partial(product_of_rounded, bits=BFLOAT16_BITS)),
}


@torch.no_grad()
def measure() -> dict[str, Any]:
    """Everything."""
    torch.manual_seed(0)
    truncation: dict[str, list[float]] = {str(n): [] for n in ITERATIONS}
    rounding: dict[str, dict[str, list[float]]] = {name: {str(n): [] for n in ITERATIONS} for name in ROUNDINGS}
    for condition in CONDITIONS:
        cov = covariances(condition)
        exact = exact_root(cov)
        for n in ITERATIONS:
            truncated = newton_schulz_sqrt(cov, n)
            truncation[str(n)].append(error(truncated, exact))
            for name, root in ROUNDINGS.items():
                rounding[name][str(n)].append(error(root(cov.float(), n), truncated))
    return dict(machine=machine(), size=SIZE, conditions=CONDITIONS, truncation=truncation, rounding=rounding)


def draw(result: dict[str, Any], path: Path) -> None:
    """Both errors against the condition number."""
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    for n, errors in result["truncation"].items():
        left.plot(result["conditions"], errors, "o-", label=f"{n} iterations")
    left.set(title="truncation: to the exact root", ylim=(1e-8, 2))
    for style, (name, errors_by_n) in zip(("-", "--", ":"), result["rounding"].items(), strict=True):
        for n, color in zip(("3", "5", "10", "15"), ("C1", "C2", "C4", "C5"), strict=True):
            right.plot(result["conditions"], errors_by_n[n], style, color=color, label=f"{name}, {n} iterations")
    right.set(title="rounding: to the same iterations in float64", ylim=(1e-8, 2))
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="condition number", ylabel="relative error")
        axis.legend(fontsize=7, ncol=3, loc="lower right")
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=100)


def main() -> None:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--figure", type=Path, help="draw them into this file")
    args = parse(options)
    result = measure()
    keep(result, args.json)
    if args.figure:
        draw(result, args.figure)
    for n in ITERATIONS:
        print(f"{n} iterations: truncation {', '.join(f'{e:.1e}' for e in result['truncation'][str(n)])}")
        for name, errors in result["rounding"].items():
            print(f"    rounding, {name}: {', '.join(f'{e:.1e}' for e in errors[str(n)])}")


if __name__ == "__main__":
    main()
