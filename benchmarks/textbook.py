"""Second-order pooling written from the papers' formulas, with PyTorch's layers and autograd, to compare ours with."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

Function = Callable[..., torch.Tensor]


def centring_covariance(x: torch.Tensor) -> torch.Tensor:
    """Σ = X Ī Xᵀ with Ī = (I - 11ᵀ/M) / M, a matrix M×M for each image (iSQRT-COV, equation 1)."""
    x = x.flatten(2)
    batch, _, positions = x.shape
    centring = torch.eye(positions, dtype=x.dtype, device=x.device) - 1 / positions
    centring = (centring / positions).repeat(batch, 1, 1)
    return x.bmm(centring).bmm(x.transpose(1, 2))


def plain_newton_schulz(cov: torch.Tensor, num_iters: int = 5, product: Function = torch.bmm) -> torch.Tensor:
    """Newton–Schulz iteration as printed (iSQRT-COV, equations 4 to 7), with any matrix product."""
    trace = cov.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    eye = torch.eye(cov.shape[1], dtype=cov.dtype, device=cov.device).expand_as(cov)
    y, z = cov / trace, eye
    for _ in range(num_iters):
        t = 0.5 * (3 * eye - product(z, y))
        y, z = product(y, t), product(t, z)
    return trace.sqrt() * y


def exact_root(cov: torch.Tensor) -> torch.Tensor:
    """Square root by PyTorch's eigen-decomposition."""
    eigenvalues, eigenvectors = torch.linalg.eigh(cov)
    return (eigenvectors * eigenvalues.clamp_min(0).sqrt()[:, None]) @ eigenvectors.mT


def reduction(channels: int, dim: int) -> nn.Sequential:
    """1×1 convolution, BN, ReLU."""
    conv = nn.Conv2d(channels, dim, 1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim), act=nn.ReLU()))


class TextbookChannelGsop(nn.Module):
    """Channel-wise GSoP (GSoP, Table 2 left), without the shortcut; its weights are named as ours."""

    def __init__(self, channels: int, cov_dim: int = 128) -> None:
        super().__init__()
        self.reduction = reduction(channels, cov_dim)
        self.excitation = nn.Sequential()
        self.excitation.cov_bn = nn.BatchNorm2d(cov_dim)
        self.excitation.row_conv = nn.Conv2d(cov_dim, 4 * cov_dim, (cov_dim, 1), groups=cov_dim, bias=False)
        self.excitation.row_conv_bn = nn.BatchNorm2d(4 * cov_dim)
        self.excitation.act = nn.LeakyReLU(0.1)
        self.excitation.expand_conv = nn.Conv2d(4 * cov_dim, channels, 1)
        self.excitation.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels of ``x``."""
        return x * self.excitation(centring_covariance(self.reduction(x))[..., None])


class TextbookCovPool2d(nn.Module):
    """Covariance pooling with any square root; its weights are named as ours."""

    def __init__(self, in_features: int, dim: int, cov: Function = centring_covariance, root: Function | None = None):
        super().__init__()
        self.reduction, self.cov, self.root = reduction(in_features, dim), cov, root or plain_newton_schulz

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the root's upper triangle."""
        root = self.root(self.cov(self.reduction(x)))
        rows, columns = torch.triu_indices(*root.shape[1:], device=x.device)
        return root[:, rows, columns]
