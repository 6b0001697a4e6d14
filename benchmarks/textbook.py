"""Second-order pooling as a textbook writes it, to compare with: the formulas, one after the other, with autograd."""

from collections.abc import Callable

import torch
from torch import nn

from timm_gsop.layers import ChannelGsop, IsqrtCovPool2d, MpnCovPool2d

__all__ = [
    "EighPool2d",
    "TextbookChannelGsop",
    "TextbookIsqrtCovPool2d",
    "centring_covariance",
    "exact_root",
    "plain_newton_schulz",
]

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def centring_covariance(x: torch.Tensor) -> torch.Tensor:
    """Σ = X Ī Xᵀ with Ī = (I - 11ᵀ/M) / M, a matrix M×M for each image (iSQRT-COV, equation 1)."""
    x = x.flatten(2)
    batch, _, positions = x.shape
    centring = torch.eye(positions, dtype=x.dtype, device=x.device) - 1 / positions
    centring = (centring / positions).repeat(batch, 1, 1)
    return x.bmm(centring).bmm(x.transpose(1, 2))


def plain_newton_schulz(cov: torch.Tensor, num_iters: int = 5, product: Product = torch.bmm) -> torch.Tensor:
    """iSQRT-COV, equations 4 to 7, as they stand, with a product of matrices as given."""
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


class TextbookChannelGsop(ChannelGsop):
    """The block with an explicit centring matrix, and every convolution as PyTorch's own."""

    def __init__(self, channels: int, cov_dim: int = 128) -> None:
        super().__init__(channels, cov_dim)
        self.excitation.expand_conv = nn.Conv2d(4 * cov_dim, channels, 1)
        self.reduction.conv = nn.Conv2d(channels, cov_dim, 1, bias=False)
        self.excitation.row_conv = nn.Conv2d(cov_dim, 4 * cov_dim, (cov_dim, 1), groups=cov_dim, bias=False)

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance between the reduced channels."""
        return centring_covariance(self.reduction(x))

    def forward(self, x: torch.Tensor, shortcut: bool = False) -> torch.Tensor:
        """Scale the channels, then add the shortcut."""
        scaled = x * self.channel_weights(x)
        return x + scaled if shortcut else scaled


class TextbookIsqrtCovPool2d(IsqrtCovPool2d):
    """The head with an explicit centring matrix, and autograd through the plain iteration."""

    def __init__(self, in_features: int, dim: int = 256) -> None:
        super().__init__(in_features, dim)
        self.reduction.conv = nn.Conv2d(in_features, dim, 1, bias=False)

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance between the reduced channels."""
        return centring_covariance(self.reduction(x))

    def normalize(self, cov: torch.Tensor) -> torch.Tensor:
        """Approximate square root."""
        return plain_newton_schulz(cov, self.num_iters)


class EighPool2d(MpnCovPool2d):
    """The head with an exact square root, and PyTorch's gradient of the eigen-decomposition."""

    def normalize(self, cov: torch.Tensor) -> torch.Tensor:
        """Exact square root."""
        return exact_root(cov)
