"""Global covariance pooling: heads that turn a feature map into a normalized covariance matrix, as a vector."""

import torch
from torch import nn

from timm_gsop.checks import check_ndim, check_positive_int
from timm_gsop.layers.channel_reduction import ChannelReduction
from timm_gsop.layers.covariance import covariance_pool, triu_vectorize
from timm_gsop.layers.covariance_sqrt import covariance_sqrt
from timm_gsop.layers.matrix_sqrt import eigh_power, newton_schulz_sqrt

__all__ = ["IsqrtCovPool2d", "MpnCovPool2d"]

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in ("check_ndim", "covariance_pool", "covariance_sqrt", "eigh_power", "newton_schulz_sqrt", "triu_vectorize"):
    torch.fx.wrap(_leaf)


class _CovPool2d(nn.Module):
    """1×1 convolution, BN, ReLU, covariance, a matrix power that subclasses define, upper triangle."""

    pool_type: str  # the name that `global_pool` calls it by, read by timm when it saves a model

    def __init__(
        self,
        in_features: int,
        dim: int = 256,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("in_features", in_features)
        check_positive_int("dim", dim)
        self.in_features = in_features
        self.out_features = dim * (dim + 1) // 2
        self.reduction = ChannelReduction(in_features, dim, device=device, dtype=dtype)

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance between the reduced channels of ``x``: (B, C, H, W) to (B, dim, dim)."""
        return covariance_pool(self.reduction(x))

    def normalize(self, cov: torch.Tensor) -> torch.Tensor:
        """Matrix power of the covariance, (B, dim, dim)."""
        raise NotImplementedError

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Normalized covariance, (B, C, H, W) to (B, dim, dim)."""
        return self.normalize(self.squeeze(x))

    def vectorize(self, mat: torch.Tensor) -> torch.Tensor:
        """Triangle of the symmetric matrix, (B, dim, dim) to (B, dim·(dim+1)/2), in the order that the weights have."""
        return triu_vectorize(mat)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool (B, C, H, W) to (B, dim·(dim+1)/2), in the dtype of the weights."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
        vectors = self.vectorize(self.pool(x))
        return vectors.to(self.reduction.conv.weight.dtype)


class IsqrtCovPool2d(_CovPool2d):
    """Pooling of iSQRT-COV (CVPR 2018), the end of GSoP-Net2: the covariance's square root by Newton–Schulz.

    Args:
        in_features: Channels of the input.
        dim: Channels after reduction, the size of the covariance matrix; the output has dim·(dim+1)/2 features.
        num_iters: Newton–Schulz iterations.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions.

    Examples:
        >>> pool = IsqrtCovPool2d(64, dim=16)
        >>> pool(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 136])
    """

    pool_type = "isqrt"

    def __init__(
        self,
        in_features: int,
        dim: int = 256,
        num_iters: int = 5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("num_iters", num_iters)
        super().__init__(in_features, dim, device=device, dtype=dtype)
        self.num_iters = int(num_iters)  # TorchScript knows no integers of NumPy's

    def normalize(self, cov: torch.Tensor) -> torch.Tensor:
        """Approximate square root, (B, dim, dim)."""
        return newton_schulz_sqrt(cov, self.num_iters)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Approximate square root of the covariance; on small maps without computing the covariance."""
        return covariance_sqrt(self.reduction(x), self.num_iters)


class MpnCovPool2d(_CovPool2d):
    """Pooling of MPN-COV (ICCV 2017): the covariance's square root by eigen-decomposition.

    Args:
        in_features: Channels of the input.
        dim: Channels after reduction, the size of the covariance matrix; the output has dim·(dim+1)/2 features.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions.

    Examples:
        >>> pool = MpnCovPool2d(64, dim=16)
        >>> pool(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 136])
    """

    pool_type = "mpn"

    def normalize(self, cov: torch.Tensor) -> torch.Tensor:
        """Square root, (B, dim, dim)."""
        return eigh_power(cov, 0.5)
