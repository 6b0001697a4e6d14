"""Global covariance pooling: heads that turn a feature map into a covariance matrix, as a vector."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from timm_gsop.checks import check_choice, check_ndim, check_positive_int, warn_of_one_position
from timm_gsop.layers.channel_reduction import ChannelReduction, can_fuse, fused_covariance
from timm_gsop.layers.covariance import covariance_pool
from timm_gsop.layers.gram_sqrt import covariance_sqrt
from timm_gsop.layers.matrix_sqrt import eigh_power, newton_schulz_sqrt
from timm_gsop.layers.second_order_pool import SecondOrderPool2d, register_pool
from timm_gsop.layers.triangle import triu_vectorize

__all__ = ["CovPool2d", "IsqrtCovPool2d", "MpnCovPool2d"]

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in (
    *("check_ndim", "warn_of_one_position", "triu_vectorize"),
    *("covariance_pool", "covariance_sqrt", "eigh_power", "newton_schulz_sqrt"),
):
    torch.fx.wrap(_leaf)

ACT_LAYERS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}
"""Activations before the covariance, by timm's names."""


@register_pool
class CovPool2d(SecondOrderPool2d):
    """Plain covariance pooling: 1×1 convolution, BN, ReLU, covariance, upper triangle, no normalization.

    It is DropCov (NeurIPS 2022) in evaluation, and what the matrix powers of the subclasses are compared with.
    Statistics are computed in at least float32, also under autocast; the output has the dtype of the weights.

    Args:
        in_features: Channels of the input.
        dim: Channels after reduction, the size of the covariance matrix; the output has dim·(dim+1)/2 features.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions.

    Examples:
        >>> pool = CovPool2d(64, dim=16)
        >>> pool(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 136])
    """

    pool_type = "cov"
    take_when = "you want a covariance without a root to compare with"
    normalization = "not normalized"  # what `normalize` gives, in words
    shared: ClassVar[Mapping[str, str]] = {"isqrt_dim": "dim"}

    def __init__(
        self,
        in_features: int,
        dim: int = 256,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("dim", dim)
        super().__init__(in_features, dim * (dim + 1) // 2)
        self.reduction = ChannelReduction(in_features, dim, device=device, dtype=dtype)

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance between the reduced channels of ``x``: (B, C, H, W) to (B, dim, dim)."""
        if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
            if can_fuse(self.reduction, x):
                return fused_covariance(self.reduction, x)
        return covariance_pool(self.reduction(x))

    def normalize(self, cov: torch.Tensor) -> torch.Tensor:
        """What is made of the covariance, (B, dim, dim): here nothing."""
        return cov

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
            warn_of_one_position("Covariance pooling", x)
        vectors = self.vectorize(self.pool(x))
        return vectors.to(self.reduction.conv.weight.dtype)


@register_pool
class IsqrtCovPool2d(CovPool2d):
    """Pooling of iSQRT-COV (CVPR 2018), the end of GSoP-Net2: the covariance's square root by Newton–Schulz.

    Everything after the reduction is computed in at least float32, also under autocast; the output has the dtype of the
    weights.

    Args:
        in_features: Channels of the input.
        dim: Channels after reduction, the size of the covariance matrix; the output has dim·(dim+1)/2 features.
        num_iters: Newton–Schulz iterations.
        act_layer: Activation before the covariance: ``"relu"``, as in the paper, or ``"relu6"``, as in its authors'
            later MobileNetV2 (https://github.com/ZhangLi-CS/GCP_Optimization).

    Raises:
        ValueError: If an argument < 1, or ``act_layer`` is unknown; in ``forward``, if the input does not have
            four dimensions.

    Examples:
        >>> pool = IsqrtCovPool2d(64, dim=16)
        >>> pool(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 136])
    """

    pool_type = "isqrt"
    take_when = "you want second-order statistics: start here"
    citation = """
    @inproceedings{li2018towards,
      title     = {Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root
                   Normalization},
      author    = {Li, Peihua and Xie, Jiangtao and Wang, Qilong and Gao, Zilin},
      booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
      year      = {2018}
    }
    """
    normalization = "square root"
    shared: ClassVar[Mapping[str, str]] = {"isqrt_dim": "dim", "isqrt_iters": "num_iters"}

    def __init__(
        self,
        in_features: int,
        dim: int = 256,
        num_iters: int = 5,
        act_layer: str = "relu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("num_iters", num_iters)
        check_choice("act_layer", act_layer, ACT_LAYERS)
        super().__init__(in_features, dim, device=device, dtype=dtype)
        self.num_iters = int(num_iters)  # TorchScript knows no integers of NumPy's
        self.reduction.act = ACT_LAYERS[act_layer](inplace=True)

    def normalize(self, cov: torch.Tensor) -> torch.Tensor:
        """Approximate square root, (B, dim, dim)."""
        return newton_schulz_sqrt(cov, self.num_iters)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Approximate square root of the covariance; on small maps without computing the covariance."""
        if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
            if can_fuse(self.reduction, x) and 2 * x.shape[2] * x.shape[3] > self.reduction.conv.out_channels:
                return self.normalize(self.squeeze(x))
        return covariance_sqrt(self.reduction(x), self.num_iters)


@register_pool
class MpnCovPool2d(CovPool2d):
    """Pooling of MPN-COV (ICCV 2017): the covariance's square root by eigen-decomposition.

    Everything after the reduction is computed in at least float32, also under autocast; the output has the dtype of the
    weights.

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
    take_when = "you want the exact root; not for ONNX"
    citation = """
    @inproceedings{li2017second,
      title     = {Is Second-order Information Helpful for Large-scale Visual Recognition?},
      author    = {Li, Peihua and Xie, Jiangtao and Wang, Qilong and Zuo, Wangmeng},
      booktitle = {IEEE International Conference on Computer Vision (ICCV)},
      year      = {2017}
    }
    """
    normalization = "square root"

    def normalize(self, cov: torch.Tensor) -> torch.Tensor:
        """Square root, (B, dim, dim)."""
        return eigh_power(cov, 0.5)
