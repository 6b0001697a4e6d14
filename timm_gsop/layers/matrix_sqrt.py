"""Square roots and powers of covariance matrices, with their gradients."""

from typing import Any

import numpy as np
import torch

from timm_gsop.checks import check_nonnegative, check_positive, check_positive_int, check_real_matrices
from timm_gsop.layers import kernels
from timm_gsop.layers.exporting import is_exporting, makes_graph
from timm_gsop.layers.gradients import at_least_float32, evaluate, without_autocast
from timm_gsop.layers.leading_dims import as_batch, with_leading_dims

__all__ = ["eigh_log", "eigh_power", "newton_schulz_inverse_sqrt", "newton_schulz_sqrt"]


def newton_schulz_sqrt(cov: torch.Tensor, num_iters: int = 5) -> torch.Tensor:
    r"""Approximate square root by Newton–Schulz iterations (iSQRT-COV, CVPR 2018, equations 4 to 7).

    The matrix is divided by its trace; from :math:`Y_0 = A = \Sigma / \mathrm{tr} \Sigma, Z_0 = I` the coupled
    iteration runs

    .. math:: Y_k = \tfrac12 Y_{k-1} (3I - Z_{k-1} Y_{k-1}), \qquad Z_k = \tfrac12 (3I - Z_{k-1} Y_{k-1}) Z_{k-1}

    and :math:`\sqrt{\mathrm{tr} \Sigma} \, Y_N` undoes the division. At ``num_iters`` of 3 or 5 the result is far from
    the exact root where eigenvalues are small; the truncation is part of the model, and regularises it. Derivatives are
    those of the iteration, first and second ones by reverse mode. Forward mode (``jvp``, ``jacfwd``) works alone, but
    not over reverse mode: for second derivatives take ``jacrev(jacrev(f))`` and not ``hessian``.

    Args:
        cov: Symmetric positive semi-definite matrices, (…, C, C), of which the symmetric part is read. A zero matrix
            gives zeros, and zero gradients.
        num_iters: Number of iterations N.

    Returns:
        (…, C, C), in float32, or in float64 if ``cov`` is. Autocast has no effect; PyTorch's TF32 setting has.

    Raises:
        ValueError: If ``cov`` has no square matrices or is complex, or ``num_iters`` < 1.

    Examples:
        >>> cov = torch.diag(torch.tensor([4.0, 1.0]))
        >>> torch.allclose(newton_schulz_sqrt(cov, num_iters=20), torch.diag(torch.tensor([2.0, 1.0])))
        True
    """
    return _root(cov, num_iters, False)


def newton_schulz_inverse_sqrt(cov: torch.Tensor, num_iters: int = 5) -> torch.Tensor:
    r"""Approximate inverse square root by Newton–Schulz iterations, :math:`Z_N / \sqrt{\mathrm{tr} \Sigma}`.

    It is the other half of the iteration of :func:`newton_schulz_sqrt`: Σ times it is what that function returns. It
    whitens: with the features X, centred, the covariance of :math:`\Sigma^{-1/2} X` is near I.

    Args:
        cov: Symmetric positive semi-definite matrices, (…, C, C), of which the symmetric part is read. A zero matrix
            gives zeros, and zero gradients.
        num_iters: Number of iterations N.

    Returns:
        (…, C, C), in float32, or in float64 if ``cov`` is. Autocast has no effect; PyTorch's TF32 setting has.

    Raises:
        ValueError: If ``cov`` has no square matrices or is complex, or ``num_iters`` < 1.

    Examples:
        >>> cov = torch.diag(torch.tensor([4.0, 1.0]))
        >>> torch.allclose(newton_schulz_inverse_sqrt(cov, num_iters=20), torch.diag(torch.tensor([0.5, 1.0])))
        True
    """
    return _root(cov, num_iters, True)


def _root(cov: torch.Tensor, num_iters: int, inverse: bool) -> torch.Tensor:
    if not torch.jit.is_scripting():  # does not know our checks
        check_real_matrices("cov", cov)
        check_positive_int("num_iters", num_iters)
    batch = at_least_float32(as_batch(cov))
    if torch.jit.is_scripting():  # knows neither autocast nor our gradient
        root = _newton_schulz(batch, num_iters, inverse)
    else:
        root = evaluate(_NewtonSchulz, _newton_schulz, batch, int(num_iters), inverse)
    return with_leading_dims(root, list(cov.shape[:-2]))


def _newton_schulz(cov: torch.Tensor, num_iters: int, inverse: bool) -> torch.Tensor:
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if makes_graph() and not inverse:
            # The root of a zero matrix is zero whatever it is divided by: a graph needs no choice for it.
            trace = _trace(cov).clamp_min(largest_zero(cov))
            return iterate(_plus_transpose(cov) * (0.5 / trace), num_iters, inverse) * trace.sqrt()
    a, trace, is_zero = _normalize(cov)
    return iterate(a, num_iters, inverse) * _scale(trace, is_zero, inverse)


def iterate(a: torch.Tensor, num_iters: int, inverse: bool) -> torch.Tensor:
    """Y_N, or for an inverse root Z_N, of a symmetric matrix with trace one, or zero.

    Two steps at a time: ten products for five steps, where one at a time takes twelve.
    """
    eye = _eye(a, 1.5)
    y, z, p = a, a, a  # Z_0 = I, which saves two products
    for k in range(0, num_iters - 1, 2):
        if k > 0:
            p = torch.bmm(z, y)
        factor = _two_factors(p, eye)
        is_last = k >= num_iters - 2  # then one of Y and Z is not needed
        if not (inverse and is_last):
            y = torch.bmm(y, factor)
        if inverse or not is_last:
            z = torch.bmm(factor, z) if k > 0 else factor
    if num_iters == 1:
        z = _first_factor(a, eye)
        y = z if inverse else torch.bmm(a, z)
    elif num_iters % 2 == 1:
        y = torch.bmm(_factor(z, y, eye), z) if inverse else torch.bmm(y, _factor(z, y, eye))
    elif inverse:
        y = z
    return y


def inverse_sqrt_of_trace_one(mat: torch.Tensor, num_iters: int) -> torch.Tensor:
    """Inverse root of symmetric matrices (B, C, C) with trace one; that of zero is finite."""
    if torch.jit.is_scripting():  # knows neither autocast nor our gradient
        return iterate(mat, num_iters, True)
    return evaluate(_NewtonSchulz, iterate, mat, int(num_iters), True)


def largest_zero(trace: torch.Tensor) -> float:
    """The largest trace that counts as zero (a constant map's). It guards 0/0 only, far below every real trace."""
    return 1e-30 if trace.dtype == torch.float32 else 1e-300


def _normalize(cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The symmetric part of ``cov`` with trace one, its trace before, and whether that was zero (then taken as one)."""
    trace = _trace(cov)
    is_zero = trace <= largest_zero(trace)  # NaN is not, and passes through
    trace = torch.where(is_zero, 1.0, trace)  # a tensor of ones would make a graph ask for its size
    return _plus_transpose(cov) * (0.5 / trace), trace, is_zero


def _scale(trace: torch.Tensor, is_zero: torch.Tensor, inverse: bool) -> torch.Tensor:
    """Undoes the division by the trace: its root, or one over that for an inverse root."""
    return torch.where(is_zero, 0.0, trace.rsqrt() if inverse else trace.sqrt())


def _first_factor(a: torch.Tensor, eye: torch.Tensor) -> torch.Tensor:
    """(3I - A) / 2, which is Z_1 too; ``eye`` is 3I / 2 here and below."""
    return torch.sub(eye, a, alpha=0.5)


def _factor(z: torch.Tensor, y: torch.Tensor, eye: torch.Tensor) -> torch.Tensor:
    """(3I - Z Y) / 2."""
    return _add_product(eye, z, y, alpha=-0.5)


def _two_factors(p: torch.Tensor, eye: torch.Tensor) -> torch.Tensor:
    """Product of the factors of two steps, T = (3I - P) / 2 and (3I - P T²) / 2, in two products of matrices.

    With W = -P T / 2 it is 3/2 T + (3/2 T + W) W, because T² is 3/2 T + W. Both of its terms are small sums of numbers
    of one size, so that no digits are lost.
    """
    t = _first_factor(p, eye)
    w = _add_product(t, p, t, beta=0.0, alpha=-0.5)
    t = 1.5 * t
    return _add_product(t, t + w, w)


def _add_product(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1.0, alpha: float = 1.0
) -> torch.Tensor:
    """Return beta · X + alpha · A B, for beta of zero or one."""
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if makes_graph():  # counters of operations, which trace, know no baddbmm, nor have runtimes one
            product = torch.bmm(a, b) if alpha == 1.0 else alpha * torch.bmm(a, b)
            return product if beta == 0.0 else x + product
    return torch.baddbmm(x, a, b, beta=beta, alpha=alpha)


def _eye(mat: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The identity of the size of ``mat``, times a number."""
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if is_exporting(mat.shape[2]):
            return _constant_eye(mat.shape[2], scale, mat.dtype, mat.device)
    return scale * torch.eye(mat.shape[2], dtype=mat.dtype, device=mat.device)


@torch.compiler.assume_constant_result
def _constant_eye(size: int, scale: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One constant of a graph, in place of the operations that make it."""
    diagonal = np.full(size, scale, dtype=np.float32 if dtype == torch.float32 else np.float64)
    return torch.as_tensor(np.diag(diagonal), device=device)


def _plus_transpose(mat: torch.Tensor) -> torch.Tensor:
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if not (torch.is_grad_enabled() and mat.requires_grad) and kernels.usable(mat, dtypes=(torch.float32,)):
            return kernels.load("symmetric").plus_transpose(mat)
    return mat + mat.transpose(1, 2)


def _steps(a: torch.Tensor, num_iters: int, inverse: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Y_1, Y_2, ... and Z_1, Z_2, ..., one step at a time: Y_N without Z_N, or for an inverse root the other way."""
    eye = _eye(a, 1.5)
    zs = [_first_factor(a, eye)]
    ys = [torch.bmm(a, zs[0])]
    for k in range(1, num_iters):
        factor = _factor(zs[-1], ys[-1], eye)
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
    r"""Gradient with respect to the covariance, from A, Y_1 to Y_(N-1), Z_1 to Z_(N-1) and the result's gradient g.

    The result is Y_N, or Z_N for an inverse root. If G and H are the gradients with respect to Y and Z after a step,
    the gradients before that step are

    .. math:: \tfrac32 G - \mathrm{sym}(Z (U + \tfrac12 V)), \quad \tfrac32 H - \mathrm{sym}((V + \tfrac12 U) Y),
        \qquad U = Y G, \; V = H Z

    where sym is the symmetric part. These are four products; the plain chain rule has six. Two are saved
    because Y and Z are symmetric. Late steps use all six (:func:`_before_late_steps`).
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
        factor = _factor(z, y, _eye(y, 1.5))
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
        if makes_graph():  # converters lack aten::diagonal
            return (mat * _eye(mat)).sum(dim=(1, 2), keepdim=True)
    return mat.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products of matrices, (B, C, C) and (B, C, C) to (B, 1, 1)."""
    return (a * b).sum(dim=(1, 2), keepdim=True)


def eigh_power(cov: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    r"""Matrix power by eigen-decomposition (MPN-COV, ICCV 2017), :math:`U \Lambda^p U^\top`.

    Eigenvalues up to C · eps times the largest count as zero: they stay zero, and no gradient flows between two of
    them. First and second derivatives are divided differences (Daleckii–Krein), finite and right for repeated
    eigenvalues too, unlike those of ``torch.linalg.eigh``. Third derivatives, and what TorchScript or a trace makes of
    gradients, are PyTorch's own, and need eigenvalues that differ; so does forward mode (``jvp``, ``jacfwd``). A second
    derivative takes memory for C³ numbers, and ``jacrev(jacrev(f))``, because ``hessian`` uses forward mode.

    Args:
        cov: Symmetric positive semi-definite matrices, (…, C, C), of which the symmetric part is read. A zero matrix
            gives zeros, and zero gradients. One that is not finite gives NaN, for itself alone.
        power: The exponent, > 0.

    Returns:
        (…, C, C), in float32, or in float64 if ``cov`` is. Autocast has no effect.

    Raises:
        ValueError: If ``cov`` has no square matrices or is complex, or ``power`` is not positive.

    Examples:
        >>> cov = torch.diag(torch.tensor([4.0, 1.0]))
        >>> torch.allclose(eigh_power(cov) @ eigh_power(cov), cov)
        True
    """
    if not torch.jit.is_scripting():  # does not know our checks
        check_positive("power", power)
    return _exact(cov, power, False)


def eigh_log(cov: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    r"""Matrix logarithm by eigen-decomposition, :math:`\log(\Sigma + \epsilon I)`.

    The log-Euclidean distance of two covariances is the norm of the difference of their logarithms (Arsigny et al.,
    2006). Derivatives are those of :func:`eigh_power`, and end where they do.

    Args:
        cov: Symmetric positive semi-definite matrices, (…, C, C), of which the symmetric part is read. Negative
            eigenvalues count as zero. One that is not finite gives NaN, for itself alone.
        eps: ε, >= 0, added to the eigenvalues. With 0, singular matrices give infinities.

    Returns:
        (…, C, C), in float32, or in float64 if ``cov`` is. Autocast has no effect.

    Raises:
        ValueError: If ``cov`` has no square matrices or is complex, or ``eps`` is negative.

    Examples:
        >>> cov = torch.diag(torch.tensor([1.0, 2.718281828])).double()
        >>> torch.allclose(eigh_log(cov, eps=0.0), torch.diag(torch.tensor([0.0, 1.0])).double())
        True
    """
    if not torch.jit.is_scripting():  # does not know our checks
        check_nonnegative("eps", eps)
    return _exact(cov, eps, True)


def _exact(cov: torch.Tensor, parameter: float, log: bool) -> torch.Tensor:
    if not torch.jit.is_scripting():
        check_real_matrices("cov", cov)
    batch = at_least_float32(as_batch(cov))
    if torch.jit.is_scripting():  # knows neither autocast nor our gradient
        result = _eigh_function(batch, parameter, log)
    else:
        result = evaluate(_EighFunction, _eigh_function, batch, parameter, log)
    return with_leading_dims(result, list(cov.shape[:-2]))


def _eigh(cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and eigenvectors of the symmetric part; those of a matrix that is not finite are NaN."""
    twice = _plus_transpose(cov)
    # LAPACK does not converge for some tiny matrices, whose squares underflow, raises for a batch that has one NaN, and
    # CUDA's library returns zeros then.
    largest = torch.linalg.vector_norm(twice.detach(), float("inf"), dim=[1, 2], keepdim=True)
    is_finite = largest.isfinite()
    scale = torch.where(is_finite & (largest > 0), largest, torch.ones_like(largest))
    eigenvalues, eigenvectors = _decompose(torch.where(is_finite, twice / scale, torch.zeros_like(twice)))
    scale = torch.where(is_finite, 0.5 * scale, torch.full_like(scale, float("nan")))
    return eigenvalues * scale[:, :, 0], eigenvectors


def _decompose(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if not (torch.compiler.is_compiling() or makes_graph()):
            return _decompose_eager(symmetric)
    return torch.linalg.eigh(symmetric)


def _decompose_eager(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64 where LAPACK does not converge in float32, which it did not in some training on real images."""
    try:
        return torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:
        if symmetric.dtype == torch.float64:
            raise
        eigenvalues, eigenvectors = torch.linalg.eigh(symmetric.double())
        return eigenvalues.to(symmetric.dtype), eigenvectors.to(symmetric.dtype)


def _eigh_function(cov: torch.Tensor, parameter: float, log: bool) -> torch.Tensor:
    """The logarithm with epsilon ``parameter``, or the power with that exponent."""
    eigenvalues, eigenvectors = _eigh(cov)
    return _assemble(_function(_prepared(eigenvalues, parameter, log), parameter, log), eigenvectors)


def _assemble(values: torch.Tensor, eigenvectors: torch.Tensor) -> torch.Tensor:
    return torch.bmm(eigenvectors * values[:, None, :], eigenvectors.transpose(1, 2))


def _prepared(eigenvalues: torch.Tensor, parameter: float, log: bool) -> torch.Tensor:
    """Eigenvalues as the function takes them: without those that are rounding, for the logarithm with epsilon."""
    if log:
        return eigenvalues.clamp_min(0) + parameter
    bound = eigenvalues.shape[1] * _eps(eigenvalues) * eigenvalues[:, -1:]
    return torch.where(eigenvalues <= bound, torch.zeros_like(eigenvalues), eigenvalues)  # NaN stays


def _function(values: torch.Tensor, parameter: float, log: bool) -> torch.Tensor:
    return values.log() if log else values**parameter


def _eps(x: torch.Tensor) -> float:
    """``torch.finfo(x.dtype).eps``, which TorchScript does not know."""
    return 2.0**-23 if x.dtype == torch.float32 else 2.0**-52


def _quotients(a: torch.Tensor, b: torch.Tensor, parameter: float, log: bool) -> torch.Tensor:
    """Divided differences (f(a) - f(b)) / (a - b) of the power or logarithm, f'(a) where they meet, 0 if both are 0.

    By log1p and expm1 of the relative difference: no digits are lost between neighbours.
    """
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    is_zero = low == 0
    base = torch.where(is_zero, torch.ones_like(low), low)
    relative = torch.where(is_zero, torch.zeros_like(low), (high - base) / base)
    meet = relative == 0
    difference = torch.where(meet, torch.ones_like(relative), relative)
    if log:
        return torch.where(meet, 1 / low, difference.log1p() / (difference * base))
    slope = base ** (parameter - 1)
    quotient = torch.where(meet, parameter * slope, slope * torch.expm1(parameter * difference.log1p()) / difference)
    with_zero = torch.where(high == 0, high, torch.where(high == 0, base, high) ** (parameter - 1))
    return torch.where(is_zero, with_zero, quotient)


def _second_quotients(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, parameter: float, log: bool) -> torch.Tensor:
    """Divided differences of three values, f''(m) / 2 where they meet, 0 if all are 0."""
    low, high = torch.minimum(torch.minimum(a, b), c), torch.maximum(torch.maximum(a, b), c)
    middle = torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    # Nearer than this, the quotient loses more digits than the derivative at the mean lacks.
    meet = high - low <= _eps(a) ** (1 / 3) * high
    mean = (low + middle + high) / 3
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)
    half = -0.5 / mean.square() if log else 0.5 * parameter * (parameter - 1) * mean ** (parameter - 2)
    difference = torch.where(meet, torch.ones_like(high), high - low)
    upper, lower = (_quotients(*pair, parameter, log) for pair in ((middle, high), (low, middle)))
    result = torch.where(meet, half, (upper - lower) / difference)
    return torch.where(high == 0, torch.zeros_like(result), result)


def _first_derivative(
    values: torch.Tensor, eigenvectors: torch.Tensor, direction: torch.Tensor, parameter: float, log: bool
) -> torch.Tensor:
    """Derivative of the function of a matrix in a direction, of which the symmetric part counts: its own adjoint."""
    turned = eigenvectors.transpose(1, 2)
    inner = torch.bmm(turned, torch.bmm(0.5 * _plus_transpose(direction), eigenvectors))
    inner = inner * _quotients(values[:, :, None], values[:, None, :], parameter, log)
    return torch.bmm(eigenvectors, torch.bmm(inner, turned))


class _EighFunction(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(cov: torch.Tensor, parameter: float, log: bool) -> tuple[torch.Tensor, ...]:
        eigenvalues, eigenvectors = _eigh(cov)
        values = _prepared(eigenvalues, parameter, log)
        return _assemble(_function(values, parameter, log), eigenvectors), values, eigenvectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, float, bool], output: tuple[torch.Tensor, ...]) -> None:
        cov, ctx.parameter, ctx.log = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(cov, *output[1:])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cov, values, eigenvectors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            derivative = _EighDerivative.apply(cov, grad, values, eigenvectors, ctx.parameter, ctx.log)
            return derivative, None, None
        return _first_derivative(values, eigenvectors, grad, ctx.parameter, ctx.log), None, None


class _EighDerivative(torch.autograd.Function):
    """The derivative of a function of matrices in a direction, with its own derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        cov: torch.Tensor,
        direction: torch.Tensor,
        values: torch.Tensor,
        eigenvectors: torch.Tensor,
        parameter: float,
        log: bool,
    ) -> torch.Tensor:
        return _first_derivative(values, eigenvectors, direction, parameter, log)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        *tensors, ctx.parameter, ctx.log = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cov, direction, values, eigenvectors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a third derivative may be wanted: let it see how these depend on cov
            eigenvalues, eigenvectors = _eigh(cov)
            values = _prepared(eigenvalues, ctx.parameter, ctx.log)
        turned = eigenvectors.transpose(1, 2)
        first, second = (
            torch.bmm(turned, torch.bmm(0.5 * _plus_transpose(mat), eigenvectors)) for mat in (direction, grad)
        )
        a, b, c = values[:, :, None, None], values[:, None, :, None], values[:, None, None, :]
        quotients = _second_quotients(a, b, c, ctx.parameter, ctx.log)
        inner = torch.einsum("bikj,bik,bkj->bij", quotients, first, second)
        of_cov = torch.bmm(eigenvectors, torch.bmm(_plus_transpose(inner), turned))
        of_direction = _first_derivative(values, eigenvectors, grad, ctx.parameter, ctx.log)
        return of_cov, of_direction, None, None, None, None
