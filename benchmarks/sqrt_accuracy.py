"""How exact the Newton–Schulz square root is, against the condition number: python -m benchmarks.sqrt_accuracy.

Two errors, both relative and in norm, of covariances of size 256 whose eigenvalues are spread evenly on a logarithmic
scale. *Truncation*: of N iterations in float64 to the exact root. *Rounding*: of N iterations in float32, and with
operands rounded to TF32 or bfloat16, to the same N iterations in float64. ``--json`` keeps the figures; ``--figure``
draws them.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import machine
from timm_gsop.layers import newton_schulz_sqrt

SIZE, BATCH = 256, 4
ITERATIONS = (1, 3, 5, 7, 10, 15)
CONDITIONS = tuple(10.0**exponent for exponent in range(9))
TF32_BITS, BFLOAT16_BITS = 10, 7


def covariances(condition: float) -> torch.Tensor:
    """Random symmetric matrices with this condition number, in float64."""
    basis, _ = torch.linalg.qr(torch.randn(BATCH, SIZE, SIZE, dtype=torch.float64))
    eigenvalues = torch.logspace(0, -torch.tensor(condition).log10().item(), SIZE, dtype=torch.float64)
    return (basis * eigenvalues) @ basis.mT


def exact_root(cov: torch.Tensor) -> torch.Tensor:
    """By eigen-decomposition."""
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    return (eigenvectors * eigenvalues.clamp_min(0).sqrt()[:, None]) @ eigenvectors.mT


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Float32 to the nearest value with that many bits of mantissa, ties to even, as matrix units read it."""
    drop = 23 - bits
    raw = x.view(torch.int32)
    half = (1 << (drop - 1)) - 1 + ((raw >> drop) & 1)
    return (((raw + half) >> drop) << drop).view(torch.float32)


def root_with_rounded_operands(cov: torch.Tensor, num_iters: int, bits: int) -> torch.Tensor:
    """The iteration in float32, operands of every product rounded, sums in float32: what a matrix unit computes."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return rounded(a, bits) @ rounded(b, bits)

    trace = cov.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    eye = torch.eye(SIZE).expand_as(cov)
    y, z = cov / trace, eye
    for _ in range(num_iters):
        factor = 1.5 * eye - 0.5 * product(z, y)
        y, z = product(y, factor), product(factor, z)
    return y * trace.sqrt()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in norm; the worst of the batch."""
    difference = (found.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    return difference.max().item()


ROUNDINGS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "float32": newton_schulz_sqrt,
    "TF32": lambda cov, n: root_with_rounded_operands(cov, n, TF32_BITS),
    "bfloat16": lambda cov, n: root_with_rounded_operands(cov, n, BFLOAT16_BITS),
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
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
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    parser.add_argument("--figure", type=Path, help="draw them into this file")
    args = parser.parse_args()
    result = measure()
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.figure:
        draw(result, args.figure)
    for n in ITERATIONS:
        print(f"{n} iterations: truncation {', '.join(f'{e:.1e}' for e in result['truncation'][str(n)])}")
        for name, errors in result["rounding"].items():
            print(f"    rounding, {name}: {', '.join(f'{e:.1e}' for e in errors[str(n)])}")


if __name__ == "__main__":
    main()
