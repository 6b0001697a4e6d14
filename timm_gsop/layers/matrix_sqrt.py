"""Square roots and powers of covariance matrices, with their gradients."""

from typing import Any

import torch

from timm_gsop.checks import check_positive, check_positive_int, check_square
from timm_gsop.layers import kernels
from timm_gsop.layers.exporting import is_exporting
from timm_gsop.layers.gradients import evaluate, without_autocast
from timm_gsop.layers.precision import at_least_float32

__all__ = ["eigh_power", "newton_schulz_inverse_sqrt", "newton_schulz_sqrt"]


def newton_schulz_sqrt(cov: torch.Tensor, num_iters: int = 5) -> torch.Tensor:
    r"""Approximate square root by Newton–Schulz iterations (iSQRT-COV, CVPR 2018, equations 4 to 7).

    The matrix is divided by its trace; from :math:`Y_0 = A = \Sigma / \mathrm{tr} \Sigma, Z_0 = I` the coupled
    iteration runs

    .. math:: Y_k = \tfrac12 Y_{k-1} (3I - Z_{k-1} Y_{k-1}), \qquad Z_k = \tfrac12 (3I - Z_{k-1} Y_{k-1}) Z_{k-1}

    and :math:`\sqrt{\mathrm{tr} \Sigma} \, Y_N` undoes the division. At ``num_iters`` of 3 or 5 the result is far from
    the exact root where eigenvalues are small; the truncation is part of the model, and regularises it.

    Args:
        cov: Symmetric positive semi-definite matrices, (B, C, C), of which the symmetric part is read. A zero matrix
            gives zeros, and zero gradients.
        num_iters: Number of iterations N.

    Returns:
        (B, C, C), in float32, or in float64 if ``cov`` is. Autocast has no effect; PyTorch's TF32 setting has.

    Raises:
        ValueError: If ``cov`` is not a batch of square matrices, or ``num_iters`` < 1.

    Examples:
        >>> cov = torch.diag(torch.tensor([4.0, 1.0]))[None]
        >>> torch.allclose(newton_schulz_sqrt(cov, num_iters=20), torch.diag(torch.tensor([2.0, 1.0])))
        True
    """
    return _root(cov, num_iters, False)


def newton_schulz_inverse_sqrt(cov: torch.Tensor, num_iters: int = 5) -> torch.Tensor:
    r"""Approximate inverse square root by Newton–Schulz iterations, :math:`Z_N / \sqrt{\mathrm{tr} \Sigma}`.

    It is the other half of the iteration of :func:`newton_schulz_sqrt`: Σ times it is what that function returns.
    Arguments, dtypes and errors are the same.

    Examples:
        >>> cov = torch.diag(torch.tensor([4.0, 1.0]))[None]
        >>> torch.allclose(newton_schulz_inverse_sqrt(cov, num_iters=20), torch.diag(torch.tensor([0.5, 1.0])))
        True
    """
    return _root(cov, num_iters, True)


def _root(cov: torch.Tensor, num_iters: int, inverse: bool) -> torch.Tensor:
    if torch.jit.is_scripting():  # knows neither autocast nor our checks, nor our gradient
        return _newton_schulz(at_least_float32(cov), num_iters, inverse)
    check_square("cov", cov)
    check_positive_int("num_iters", num_iters)
    return evaluate(_NewtonSchulz, _newton_schulz, at_least_float32(cov), num_iters, inverse)


def _newton_schulz(cov: torch.Tensor, num_iters: int, inverse: bool) -> torch.Tensor:
    """Two steps at a time: ten products for five steps, where one at a time takes twelve."""
    a, trace, is_zero = _normalize(cov)
    y, z, p = a, a, a  # Z_0 = I, which saves two products
    for k in range(0, num_iters - 1, 2):
        if k > 0:
            p = torch.bmm(z, y)
        factor = _two_factors(p)
        is_last = k >= num_iters - 2  # then one of Y and Z is not needed
        if not (inverse and is_last):
            y = torch.bmm(y, factor)
        if inverse or not is_last:
            z = torch.bmm(factor, z) if k > 0 else factor
    if num_iters == 1:
        z = _first_factor(a)
        y = z if inverse else torch.bmm(a, z)
    elif num_iters % 2 == 1:
        y = torch.bmm(_factor(z, y), z) if inverse else torch.bmm(y, _factor(z, y))
    elif inverse:
        y = z
    return y * _scale(trace, is_zero, inverse)


def counts_as_zero(trace: torch.Tensor) -> torch.Tensor:
    """Where a covariance is zero (a constant map), by its trace. NaN is not zero, and passes through."""
    return trace <= 1e-30  # guards 0/0 only, far below every real trace


def _normalize(cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The symmetric part of ``cov`` with trace one, its trace before, and whether that was zero (then taken as one)."""
    trace = _trace(cov)
    is_zero = counts_as_zero(trace)
    trace = torch.where(is_zero, torch.ones_like(trace), trace)
    return _plus_transpose(cov) * (0.5 / trace), trace, is_zero


def _scale(trace: torch.Tensor, is_zero: torch.Tensor, inverse: bool) -> torch.Tensor:
    """Undoes the division by the trace: its root, or one over that for an inverse root."""
    return torch.where(is_zero, torch.zeros_like(trace), trace.rsqrt() if inverse else trace.sqrt())


def _first_factor(a: torch.Tensor) -> torch.Tensor:
    """(3I - A) / 2, which is Z_1 too."""
    return torch.sub(1.5 * _eye(a), a, alpha=0.5)


def _factor(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(3I - Z Y) / 2."""
    return _add_product(1.5 * _eye(y), z, y, alpha=-0.5)


def _two_factors(p: torch.Tensor) -> torch.Tensor:
    """Product of the factors of two steps, T = (3I - P) / 2 and (3I - P T²) / 2, in two products of matrices.

    With W = -P T / 2 it is 3/2 T + (3/2 T + W) W, because T² is 3/2 T + W. Both of its terms are small sums of numbers
    of one size, so that no digits are lost.
    """
    t = _first_factor(p)
    w = _add_product(t, p, t, beta=0.0, alpha=-0.5)
    t = 1.5 * t
    return _add_product(t, t + w, w)


def _add_product(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1.0, alpha: float = 1.0
) -> torch.Tensor:
    """Return beta · X + alpha · A B."""
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if torch.jit.is_tracing():  # counters of operations, which trace, know bmm and not baddbmm
            return beta * x + alpha * torch.bmm(a, b)
    return torch.baddbmm(x, a, b, beta=beta, alpha=alpha)


def _eye(mat: torch.Tensor) -> torch.Tensor:
    return torch.eye(mat.shape[2], dtype=mat.dtype, device=mat.device)


def _plus_transpose(mat: torch.Tensor) -> torch.Tensor:
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if not (torch.is_grad_enabled() and mat.requires_grad) and kernels.usable(mat, dtypes=(torch.float32,)):
            return kernels.load("symmetric").plus_transpose(mat)
    return mat + mat.transpose(1, 2)


def _steps(a: torch.Tensor, num_iters: int, inverse: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Y_1, Y_2, ... and Z_1, Z_2, ..., one step at a time: Y_N without Z_N, or for an inverse root the other way."""
    zs = [_first_factor(a)]
    ys = [torch.bmm(a, zs[0])]
    for k in range(1, num_iters):
        factor = _factor(zs[-1], ys[-1])
        is_last = k == num_iters - 1
        if not (inverse and is_last):
            ys.append(torch.bmm(ys[-1], factor))
        if inverse or not is_last:
            zs.append(torch.bmm(factor, zs[-1]))
    return ys, zs


_NUM_EARLY_STEPS = 8  # with the short gradient; at ten, rounding in rank-deficient matrices shows in it


class _NewtonSchulz(torch.autograd.Function):
    """Keeps Y and Z between the steps for the gradient, but the first ones, which are cheap to make again."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(cov: torch.Tensor, num_iters: int, inverse: bool) -> tuple[torch.Tensor, ...]:
        a, trace, is_zero = _normalize(cov)
        ys, zs = _steps(a, num_iters, inverse)
        root = (zs if inverse else ys)[-1] * _scale(trace, is_zero, inverse)
        return root, *ys[1 : num_iters - 1], *zs[1 : num_iters - 1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, int, bool], output: tuple[torch.Tensor, ...]) -> None:
        cov, ctx.num_iters, ctx.inverse = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(cov, *output[1:])
        if not torch.compiler.is_compiling():  # the compiler does not know it, nor need it
            ctx.set_materialize_grads(False)  # no matrices of zeros for the outputs without gradients

    @staticmethod
    @without_autocast
    def backward(
        ctx: Any, grad: torch.Tensor | None, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        cov, *kept = ctx.saved_tensors
        a, trace, is_zero = _normalize(cov)
        if torch.is_grad_enabled():  # a second derivative is wanted: let it see how these depend on cov
            ys, zs = _steps(a, ctx.num_iters, ctx.inverse)
        else:
            ys, zs = _steps(a, 1, ctx.inverse)
            ys, zs = ys + kept[: len(kept) // 2], zs + kept[len(kept) // 2 :]
        ys, zs = ys[: ctx.num_iters - 1], zs[: ctx.num_iters - 1]
        # The root was scaled by sqrt(trace), or an inverse root by one over it, and A by 1 / trace.
        g = _plus_transpose(grad) * torch.where(is_zero, torch.zeros_like(trace), 0.5 * trace.rsqrt())
        if ctx.inverse:
            g = g / trace
        return _gradient(g, a, ys, zs, ctx.inverse), None, None


def _gradient(
    g: torch.Tensor, a: torch.Tensor, ys: list[torch.Tensor], zs: list[torch.Tensor], inverse: bool
) -> torch.Tensor:
    r"""Gradient with respect to the covariance, given A, Y_1 to Y_(N-1), Z_1 to Z_(N-1), and that with respect to Y_N.

    Of an inverse root, it is given that with respect to Z_N. With G and H the gradients with respect to Y and Z after a
    step, those before it are

    .. math:: \tfrac32 G - \mathrm{sym}(Z (U + \tfrac12 V)), \quad \tfrac32 H - \mathrm{sym}((V + \tfrac12 U) Y),
        \qquad U = Y G, \; V = H Z

    where sym is the symmetric part. These are four products; the plain chain rule has six. Two are saved
    because Y and Z are symmetric. Late steps take all of them (:func:`_before_late_steps`).
    """
    if not ys:  # a single step, to A (3I - A) / 2, or to (3I - A) / 2
        u = g if inverse else torch.bmm(a, g)
        half = -0.25 * g if inverse else torch.sub(0.75 * g, u, alpha=0.5)
        inner = 1.5 * _trace(u) - 0.5 * _inner(u, a)
    else:
        if len(ys) < _NUM_EARLY_STEPS:
            half, h, inner = _before_last_step(g, ys.pop(), zs.pop(), inverse)
        else:
            half, h, inner = _before_late_steps(g, ys, zs, inverse)
        for y, z in zip(reversed(ys), reversed(zs), strict=True):
            g = _plus_transpose(half)
            u, v = torch.bmm(y, g), torch.bmm(h, z)
            half = _less_product(g, z, torch.add(u, v, alpha=0.5))
            h = _plus_transpose(_less_product(h, torch.add(v, u, alpha=0.5), y))
        g = _plus_transpose(half)
        half = torch.baddbmm(g, a, g, beta=0.75, alpha=-0.5).sub_(h, alpha=0.25)
    # The trace, which scales both the root and A: `inner` is the inner product of G and Y_N, or of H and Z_N.
    through_trace = (-0.5 if inverse else 0.5) * inner - 2 * _inner(half, a)
    gradient = _plus_transpose(half)
    gradient.diagonal(dim1=1, dim2=2).add_(through_trace[:, :, 0])
    return gradient


def _before_last_step(
    g: torch.Tensor, y: torch.Tensor, z: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Half of the gradient with respect to Y, that with respect to Z, and the inner product of ``g`` and the root."""
    if inverse:  # the last step makes no Y: G and U are zero after it
        v = torch.bmm(g, z)
        inner = 0.75 * _trace(v)
        half = torch.baddbmm(v, z, v, beta=0, alpha=-0.25)
        half_h = _less_product(g, v, y)
        return half, _plus_transpose(half_h), inner + _inner(half_h, z)
    u = torch.bmm(y, g)  # the last step makes no Z: H and V are zero after it
    inner = 0.75 * _trace(u)
    half = _less_product(g, z, u)
    return half, _plus_transpose(torch.baddbmm(u, u, y, beta=0, alpha=-0.25)), inner + _inner(half, y)


def _before_late_steps(
    g: torch.Tensor, ys: list[torch.Tensor], zs: list[torch.Tensor], inverse: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`_before_last_step`, of all late steps, by the plain chain rule. They are taken off the lists.

    Where the covariance has no rank, rounding grows by half in each step, and with it what Y and Z lack to be
    symmetric. The plain chain rule follows that, so that most of it vanishes in the gradient of the features.
    """
    g, h = (torch.zeros_like(g), g) if inverse else (g, torch.zeros_like(g))
    inner = torch.zeros_like(_trace(g))
    is_last = True
    while len(ys) >= _NUM_EARLY_STEPS:
        y, z = ys.pop(), zs.pop()
        factor = _factor(z, y)
        yt, zt, ft = y.transpose(1, 2), z.transpose(1, 2), factor.transpose(1, 2)
        through_factor = torch.baddbmm(torch.bmm(yt, g), h, zt)
        g, h = torch.bmm(g, ft), torch.bmm(ft, h)
        if is_last:
            inner = _inner(h, z) if inverse else _inner(g, y)
            is_last = False
        g = torch.baddbmm(g, zt, through_factor, alpha=-0.5)
        h = torch.baddbmm(h, through_factor, yt, alpha=-0.5)
    return 0.5 * g, 0.5 * _plus_transpose(h), inner


def _less_product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """3/4 X - 1/2 A B, in the place of X where no second derivative needs that."""
    baddbmm = torch.Tensor.baddbmm if torch.is_grad_enabled() else torch.Tensor.baddbmm_
    return baddbmm(x, a, b, beta=0.75, alpha=-0.5)


def _trace(mat: torch.Tensor) -> torch.Tensor:
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if torch.jit.is_tracing() or is_exporting():  # converters lack aten::diagonal
            return (mat * _eye(mat)).sum(dim=(1, 2), keepdim=True)
    return mat.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products of matrices, (B, C, C) and (B, C, C) to (B, 1, 1)."""
    return (a * b).sum(dim=(1, 2), keepdim=True)


def eigh_power(cov: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    r"""Matrix power by eigen-decomposition (MPN-COV, ICCV 2017), :math:`U \Lambda^p U^\top`.

    Eigenvalues up to C · eps times the largest count as zero: they stay zero, and no gradient flows between two of
    them. The gradient is the Daleckii–Krein formula, finite also for repeated eigenvalues, unlike that of
    ``torch.linalg.eigh``.

    Args:
        cov: Symmetric positive semi-definite matrices, (B, C, C). A zero matrix gives zeros, and zero gradients.
        power: The exponent, > 0.

    Returns:
        (B, C, C), in float32, or in float64 if ``cov`` is. Autocast has no effect.

    Raises:
        ValueError: If ``cov`` is not a batch of square matrices, or ``power`` is not positive.

    Examples:
        >>> cov = torch.diag(torch.tensor([4.0, 1.0]))[None]
        >>> torch.allclose(eigh_power(cov) @ eigh_power(cov), cov)
        True
    """
    if torch.jit.is_scripting():  # knows neither autocast nor our checks, nor our gradient
        return _eigh_power(at_least_float32(cov), power)
    check_square("cov", cov)
    check_positive("power", power)
    return evaluate(_EighPower, _eigh_power, at_least_float32(cov), power)


def _eigh_power(cov: torch.Tensor, power: float) -> torch.Tensor:
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    return _power_from_eigh(eigenvalues, eigenvectors, power)


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
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(cov: torch.Tensor, power: float) -> tuple[torch.Tensor, ...]:
        eigenvalues, eigenvectors = torch.linalg.eigh(cov)
        return _power_from_eigh(eigenvalues, eigenvectors, power), eigenvalues, eigenvectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float], output: tuple[torch.Tensor, ...]) -> None:
        cov, ctx.power = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(cov, *output[1:])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
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
