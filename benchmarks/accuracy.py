"""How exact the Newton–Schulz square root is, against the condition number: python -m benchmarks.accuracy.

Two errors, both relative and in norm, of covariances of size 256 whose eigenvalues are spread evenly on a logarithmic
scale. *Truncation*: of N iterations in float64 to the exact root. *Rounding*: of N iterations in float32, and with
operands rounded to TF32 or bfloat16, to the same N iterations in float64. ``--json`` keeps the figures;
docs/measured.py draws them. (The networks' accuracy is measured by timm's train.py and validate.py.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import table
from benchmarks.textbook import exact_root, plain_newton_schulz
from benchmarks.timing import machine, parser, set_up, write
from timm_gsop.layers import newton_schulz_sqrt

SIZE, BATCH, ITERATIONS = 256, 4, (1, 3, 5, 7, 10, 15)
CONDITIONS = tuple(10.0**exponent for exponent in range(9))


def covariances(condition: float) -> torch.Tensor:
    """Random symmetric matrices with this condition number, in float64."""
    basis, _ = torch.linalg.qr(torch.randn(BATCH, SIZE, SIZE, dtype=torch.float64))
    eigenvalues = torch.logspace(0, -torch.tensor(condition).log10().item(), SIZE, dtype=torch.float64)
    return (basis * eigenvalues) @ basis.mT


def product_of_rounded(a: torch.Tensor, b: torch.Tensor, bits: int) -> torch.Tensor:
    """Operands rounded, sums in float32: what a matrix unit computes."""
    return rounded(a, bits) @ rounded(b, bits)


def rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Float32 to the nearest value with that many bits of mantissa, ties to even, as matrix units read it."""
    drop = 23 - bits
    raw = x.view(torch.int32)
    half = (1 << (drop - 1)) - 1 + ((raw >> drop) & 1)
    return (((raw + half) >> drop) << drop).view(torch.float32)


ROUNDINGS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "float32": newton_schulz_sqrt,
    "TF32": partial(plain_newton_schulz, product=partial(product_of_rounded, bits=10)),
    "bfloat16": partial(plain_newton_schulz, product=partial(product_of_rounded, bits=7)),
}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in norm; the worst of the batch."""
    difference = (found.double() - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    return difference.max().item()


@torch.no_grad()
def measure() -> dict[str, Any]:
    """Both errors, for every condition number."""
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
    return dict(machine=machine("cpu"), size=SIZE, conditions=CONDITIONS, truncation=truncation, rounding=rounding)


def main() -> None:
    """The command line."""
    args = parser(__doc__).parse_args()
    set_up(args.float32_products)
    result = measure()
    write(result, args.json)
    errors = {"truncation": result["truncation"], **result["rounding"]}
    rows = [[n, name, *(f"{e:.1e}" for e in found[n])] for n in result["truncation"] for name, found in errors.items()]
    print(table(["iterations", "error", *(f"{condition:.0e}" for condition in CONDITIONS)], rows))


if __name__ == "__main__":
    main()
