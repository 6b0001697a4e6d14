"""Square roots and powers of covariance matrices, with their gradients."""

from typing import Any

import torch

from timm_gsop.layers.checks import check_positive, check_positive_int, check_square
from timm_gsop.layers.precision import at_least_float32, autocast_disabled

__all__ = ["eigh_power", "newton_schulz_sqrt"]


def newton_schulz_sqrt(cov: torch.Tensor, num_iters: int = 5) -> torch.Tensor:
    r"""Approximate square root by Newton–Schulz iterations (iSQRT-COV, CVPR 2018, equations 4 to 7).

    The matrix is divided by its trace; from :math:`Y_0 = A = \Sigma / \mathrm{tr} \Sigma, Z_0 = I` the coupled
    iteration runs

    .. math:: Y_k = \tfrac12 Y_{k-1} (3I - Z_{k-1} Y_{k-1}), \qquad Z_k = \tfrac12 (3I - Z_{k-1} Y_{k-1}) Z_{k-1}

    and :math:`\sqrt{\mathrm{tr} \Sigma} \, Y_N` undoes the division. At ``num_iters`` of 3 or 5 the result is far from
    the exact root where eigenvalues are small; the truncation is part of the model, and regularises it.

    Args:
        cov: Symmetric positive semi-definite matrices, (B, C, C). A zero matrix gives zeros, and zero gradients.
        num_iters: Number of iterations N.

    Returns:
        (B, C, C), in float32, or in float64 if ``cov`` is. Autocast has no effect; PyTorch's TF32 setting has.

    Raises:
        ValueError: If ``cov`` is not a batch of square matrices, or ``num_iters`` < 1.
    """
    if torch.jit.is_scripting():  # knows neither autocast nor our checks
        return _newton_schulz(at_least_float32(cov), num_iters)
    check_square("cov", cov)
    check_positive_int("num_iters", num_iters)
    with autocast_disabled(cov.device):
        return _newton_schulz(at_least_float32(cov), num_iters)


def _newton_schulz(cov: torch.Tensor, num_iters: int) -> torch.Tensor:
    trace = cov.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    # A zero covariance (a constant map). The bound guards 0/0 only, far below every real trace; NaN passes through.
    is_zero = trace <= 1e-30
    trace = torch.where(is_zero, torch.ones_like(trace), trace)
    a = cov / trace
    # Every step is one fused product: Y (3I - P) / 2 = 1.5 Y - 0.5 Y P, with P = Z Y; and P_0 = A, since Z_0 = I.
    y = torch.baddbmm(a, a, a, beta=1.5, alpha=-0.5)
    if num_iters > 1:
        z = 1.5 * torch.eye(cov.shape[1], dtype=cov.dtype, device=cov.device) - 0.5 * a
        for _ in range(num_iters - 2):
            p = torch.bmm(z, y)
            y, z = torch.baddbmm(y, y, p, beta=1.5, alpha=-0.5), torch.baddbmm(z, p, z, beta=1.5, alpha=-0.5)
        y = torch.baddbmm(y, y, torch.bmm(z, y), beta=1.5, alpha=-0.5)  # the last Z is not needed
    return y * torch.where(is_zero, torch.zeros_like(trace), trace.sqrt())


def eigh_power(cov: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    r"""Matrix power by eigen-decomposition (MPN-COV, ICCV 2017), :math:`U \Lambda^p U^\top`.

    Eigenvalues up to C · eps times the largest are numerically zero: they stay zero, and no gradient flows between two
    of them. The gradient is the Daleckii–Krein formula, finite for repeated eigenvalues also, where that of
    ``torch.linalg.eigh`` is not.

    Args:
        cov: Symmetric positive semi-definite matrices, (B, C, C). A zero matrix gives zeros, and zero gradients.
        power: The exponent, > 0.

    Returns:
        (B, C, C), in float32, or in float64 if ``cov`` is. Autocast has no effect.

    Raises:
        ValueError: If ``cov`` is not a batch of square matrices, or ``power`` is not positive.
    """
    if torch.jit.is_scripting():  # knows neither autocast nor our checks, nor our gradient
        eigenvalues, eigenvectors = torch.linalg.eigh(at_least_float32(cov))
        return _power_from_eigh(eigenvalues, eigenvectors, power)
    check_square("cov", cov)
    check_positive("power", power)
    with autocast_disabled(cov.device):
        return _EighPower.apply(at_least_float32(cov), power)


def _nonzero_eigenvalues(eigenvalues: torch.Tensor) -> torch.Tensor:
    bound = eigenvalues.shape[1] * _eps(eigenvalues) * eigenvalues[:, -1:]
    return torch.where(eigenvalues > bound, eigenvalues, torch.zeros_like(eigenvalues))


def _eps(x: torch.Tensor) -> float:
    """``torch.finfo(x.dtype).eps``, which TorchScript does not know."""
    return 2.0**-23 if x.dtype == torch.float32 else 2.0**-52


def _power_from_eigh(eigenvalues: torch.Tensor, eigenvectors: torch.Tensor, power: float) -> torch.Tensor:
    powers = _nonzero_eigenvalues(eigenvalues) ** power
    return torch.bmm(eigenvectors * powers[:, None, :], eigenvectors.transpose(1, 2))


class _EighPower(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cov: torch.Tensor, power: float) -> torch.Tensor:
        eigenvalues, eigenvectors = torch.linalg.eigh(cov)
        ctx.power = power
        ctx.save_for_backward(cov, eigenvalues, eigenvectors)
        return _power_from_eigh(eigenvalues, eigenvectors, power)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        cov, eigenvalues, eigenvectors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: let it see how these depend on cov
            eigenvalues, eigenvectors = torch.linalg.eigh(cov)
        quotients = _difference_quotients(_nonzero_eigenvalues(eigenvalues), ctx.power)
        inner = torch.bmm(eigenvectors.transpose(1, 2), torch.bmm(grad, eigenvectors))
        return torch.bmm(eigenvectors, torch.bmm(quotients * inner, eigenvectors.transpose(1, 2))), None


def _difference_quotients(values: torch.Tensor, power: float) -> torch.Tensor:
    """(a^p - b^p) / (a - b) for every pair of eigenvalues, p · a^(p-1) where they meet, 0 where both are zero."""
    a, b = values[:, :, None], values[:, None, :]
    middle = (a + b) / 2
    is_zero = middle == 0
    middle = torch.where(is_zero, torch.ones_like(middle), middle)
    meet = (a - b).abs() <= _eps(values) ** 0.5 * middle  # closer, the quotient loses half its digits
    difference = torch.where(meet, torch.ones_like(middle), a - b)
    quotient = torch.where(meet, power * middle ** (power - 1), (a**power - b**power) / difference)
    return torch.where(is_zero, torch.zeros_like(quotient), quotient)
