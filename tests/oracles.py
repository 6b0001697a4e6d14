"""Independent references, each by another formula than the package's, in float64."""

import torch

AFFINE = ("weight", "bias")


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
    """The channel-wise block in evaluation, with its shortcut: paper Table 2, one sample and one row at a time."""
    w = {name: value.double() for name, value in weights.items() if value.is_floating_point()}

    def batch_norm(values: torch.Tensor, name: str) -> torch.Tensor:
        """Normalize (channels, values) in evaluation."""
        mean, var, weight, bias = (w[f"{name}.{key}"][:, None] for key in ("running_mean", "running_var", *AFFINE))
        return (values - mean) / (var + 1e-5).sqrt() * weight + bias

    outputs = []
    for sample in x.double():
        reduced = batch_norm(w["reduce_conv.weight"][:, :, 0, 0] @ sample.flatten(1), "reduce_bn").clamp_min(0)
        d = len(reduced)
        cov = batch_norm(torch.cov(reduced, correction=0).view(d, d), "excitation.cov_bn")
        kernels = w["excitation.row_conv.weight"][:, 0, :, 0]
        hidden = torch.stack([kernels[k] @ cov[k // 4] for k in range(4 * d)])  # row r feeds outputs 4r … 4r+3
        hidden = batch_norm(hidden[:, None], "excitation.row_conv_bn")[:, 0]
        hidden = torch.where(hidden > 0, hidden, 0.1 * hidden)
        logits = w["excitation.expand_conv.weight"][:, :, 0, 0] @ hidden + w["excitation.expand_conv.bias"]
        outputs.append(sample + sample * (1 / (1 + (-logits).exp()))[:, None, None])
    return torch.stack(outputs)
