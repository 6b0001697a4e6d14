"""Independent references, each by another formula than the package's, in float64."""

import torch


def eigh_function(mat: torch.Tensor, fn) -> torch.Tensor:
    """Apply a scalar function to the eigenvalues of symmetric matrices (B, C, C)."""
    eigenvalues, eigenvectors = torch.linalg.eigh(mat.double())
    return torch.einsum("bik,bk,bjk->bij", eigenvectors, fn(eigenvalues), eigenvectors)


def truncated_sqrt(cov: torch.Tensor, num_iters: int) -> torch.Tensor:
    """What N Newton–Schulz steps make of each eigenvalue: matrix iteration as a scalar one, trace-normalized."""
    trace = cov.double().diagonal(dim1=1, dim2=2).sum(1)

    def iterate(eigenvalues: torch.Tensor) -> torch.Tensor:
        y, z = eigenvalues / trace[:, None], torch.ones_like(eigenvalues)
        for _ in range(num_iters):
            t = (3 - z * y) / 2
            y, z = y * t, z * t
        return y * trace.sqrt()[:, None]

    return eigh_function(cov, iterate)


def plain_newton_schulz(cov: torch.Tensor, num_iters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The iteration as published, in the dtype of ``cov``, its gradient by autograd: root and inverse root."""
    trace = cov.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    eye = torch.eye(cov.shape[1], dtype=cov.dtype)
    y, z = cov / trace, eye.expand_as(cov)
    for _ in range(num_iters):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return y * trace.sqrt(), z / trace.sqrt()


def sqrt_gradient(cov: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient of the exact square root S: the solution X of the Sylvester equation S X + X S = grad."""
    eye = torch.eye(cov.shape[1], dtype=torch.float64)
    solutions = []
    for root, rhs in zip(eigh_function(cov, torch.sqrt), grad.double(), strict=True):
        system = torch.kron(root, eye) + torch.kron(eye, root)
        solutions.append(torch.linalg.solve(system, rhs.flatten()).view_as(rhs))
    return torch.stack(solutions)


def random_covariance(batch: int, size: int, rank: int | None = None, condition: float = 10.0) -> torch.Tensor:
    """Random covariance matrices in float64: eigenvalues spread log-uniformly up to ``condition``, or of given rank."""
    eigenvalues = torch.rand(batch, size, dtype=torch.float64).mul(torch.tensor(condition).log()).exp()
    if rank is not None:
        eigenvalues[:, rank:] = 0
    basis, _ = torch.linalg.qr(torch.randn(batch, size, size, dtype=torch.float64))
    return basis @ torch.diag_embed(eigenvalues) @ basis.mT


def channel_gsop(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Channel-wise scaling in evaluation: paper Table 2 left, one sample and one row at a time."""
    scaled = []
    for sample in x.double():
        cov = torch.cov(_reduce(sample.flatten(1), weights), correction=0)
        scaled.append(sample * _excite(cov, weights)[:, None, None])
    return torch.stack(scaled)


def position_gsop(x: torch.Tensor, weights: dict[str, torch.Tensor], side: int) -> torch.Tensor:
    """Position-wise scaling in evaluation: paper Table 2 right, one sample and one row at a time."""
    scaled = []
    for sample in x.double():
        height, width = sample.shape[1:]
        maps = _reduce(sample.flatten(1), weights).view(-1, height, width)
        pooled = pooling_matrix(height, side) @ maps @ pooling_matrix(width, side).T
        cov = torch.cov(pooled.flatten(1).T, correction=0)
        scaled.append(sample * resize_bilinear(_excite(cov, weights).view(side, side), height, width))
    return torch.stack(scaled)


def pooling_matrix(size: int, side: int) -> torch.Tensor:
    """Adaptive average pooling in one dimension: output i is the mean of inputs floor(i·n/s) … ceil((i+1)·n/s) - 1."""
    matrix = torch.zeros(side, size, dtype=torch.float64)
    for i in range(side):
        start, stop = i * size // side, -((-(i + 1) * size) // side)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def resize_bilinear(weights: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear interpolation of a map, pixels as areas: the centre of output i is at (i + 0.5)·s/n - 0.5."""

    def matrix(size: int, side: int) -> torch.Tensor:
        at = ((torch.arange(size, dtype=torch.float64) + 0.5) * side / size - 0.5).clamp(0, side - 1)
        return (1 - (at[:, None] - torch.arange(side)).abs()).clamp_min(0)

    return matrix(height, len(weights)) @ weights @ matrix(width, len(weights)).T


def _batch_norm(values: torch.Tensor, name: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Batch normalization of (channels, values) in evaluation."""
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (weights[f"{name}.{key}"].double()[:, None] for key in names)
    return (values - mean) / (var + 1e-5).sqrt() * weight + bias


def _reduce(pixels: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """1×1 convolution, BN, ReLU: (C, M) to (d, M)."""
    kernel = weights["reduction.conv.weight"][:, :, 0, 0].double()
    return _batch_norm(kernel @ pixels, "reduction.bn", weights).clamp_min(0)


def _excite(cov: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """From a covariance matrix (d, d) to weights, row by row; output channels 4r … 4r+3 belong to row r."""
    size = weights["excitation.cov_bn.weight"].numel()
    rows = _batch_norm(cov.view(size, size), "excitation.cov_bn", weights)
    kernels = weights["excitation.row_conv.weight"][:, 0, :, 0].double()
    hidden = torch.stack([kernels[k] @ rows[k // 4] for k in range(4 * size)])
    hidden = _batch_norm(hidden[:, None], "excitation.row_conv_bn", weights)[:, 0]
    hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)
    logits = weights["excitation.expand_conv.weight"][:, :, 0, 0].double() @ hidden
    return 1 / (1 + (-logits - weights["excitation.expand_conv.bias"].double()).exp())
