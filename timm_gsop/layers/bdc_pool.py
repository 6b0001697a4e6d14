"""Deep Brownian distance covariance: centred distances between channels.

Paper: Joint Distribution Matters: Deep Brownian Distance Covariance for Few-Shot Classification, CVPR 2022 -
https://arxiv.org/abs/2204.04567. The released code is https://github.com/Fei-Long121/DeepBDC; it has the
same formulas.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from timm_gsop.checks import check_ndim, check_positive_int
from timm_gsop.layers.channel_reduction import ChannelReduction
from timm_gsop.layers.gradients import at_least_float32, evaluate, function_of_input
from timm_gsop.layers.second_order_pool import SecondOrderPool2d, register_pool
from timm_gsop.layers.triangle import triu_vectorize

__all__ = ["BdcPool2d", "channel_distances", "double_centre"]

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in ("channel_distances", "check_ndim", "double_centre", "triu_vectorize"):
    torch.fx.wrap(_leaf)


def channel_distances(x: torch.Tensor) -> torch.Tensor:
    r"""Squared distances between channels, divided by the number of positions.

    .. math:: D_{kl} = \frac{1}{M} \sum_m (x_{km} - x_{lm})^2

    They come from products, so that nothing of the size C²·M is made. Each position is centred over the channels
    first, which changes no distance: without that, an offset that all channels have would cancel the digits. On CUDA
    the products are in float64, so that neither TF32 nor autocast reaches them.

    Args:
        x: Features, (B, C, M), M positions.

    Returns:
        (B, C, C), symmetric, zero on the diagonal, in float32, or in float64 if ``x`` is.
    """
    if torch.jit.is_scripting():  # knows neither autocast nor our gradient
        return _distances(x)
    return evaluate(_Distances, _distances, x)


def _centre(x: torch.Tensor) -> torch.Tensor:
    x = x.double() if x.is_cuda else at_least_float32(x)
    return x - x.mean(dim=1, keepdim=True)


def _distances(x: torch.Tensor) -> torch.Tensor:
    centred = _centre(x)
    products = torch.bmm(centred, centred.transpose(1, 2)) / x.shape[2]
    # Of the product itself, so that the diagonal of the distances is zero exactly; OpenVINO lacks aten::diagonal.
    squares = (products * torch.eye(x.shape[1], dtype=products.dtype, device=x.device)).sum(dim=2)
    distances = squares.unsqueeze(1) + squares.unsqueeze(2) - 2 * products
    return distances.clamp_min(0).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _distances_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    centred = _centre(x)
    both = (grad + grad.transpose(1, 2)).to(centred.dtype)
    found = both.sum(dim=2, keepdim=True) * centred - torch.bmm(both, centred)
    return (found * 2 / x.shape[2]).to(x.dtype)


_Distances = function_of_input(_distances, _distances_gradient)


def double_centre(mat: torch.Tensor) -> torch.Tensor:
    """Subtract the means of rows and columns of (B, C, C), and add that of all: every row and column then sums to 0."""
    return mat - mat.mean(dim=1, keepdim=True) - mat.mean(dim=2, keepdim=True) + mat.mean(dim=(1, 2), keepdim=True)


@register_pool
class BdcPool2d(SecondOrderPool2d):
    r"""Pooling of DeepBDC (CVPR 2022): the Brownian distance covariance between channels.

    .. math:: E = \sqrt{\frac{e^t}{2} D + 10^{-5}}, \qquad A = E - \text{row means} - \text{column means} + \text{mean}

    D are the squared distances between the reduced channels (:func:`channel_distances`), t is learned, and the output
    is the upper triangle of A. Distances see every dependence of channels, where covariances see linear ones.

    The released code scales by :math:`e^{t'}`, without dividing by the number M of positions, and starts with
    :math:`t' = -\ln(2 M)` of the training size. This t is :math:`t' + \ln(2 M)`: the function is the same at that
    size, and does not depend on the size otherwise. Weight decay would pull the scale to one and spares it, by
    ``no_weight_decay``. The authors train t with a rate of 1e-3 where the network has 0.05; docs/backbones.md has the
    parameter group.

    A batch of one keeps its axis, and distances are exact, where the released code loses the one and rounds the other
    to TF32 on some cards. Everything after the reduction is computed in at least float32, also under autocast; the
    output has the dtype of the input.

    Args:
        in_features: Channels of the input, C.
        dim: Channels after reduction (1×1 convolution, BN, ReLU), the size of the matrix; the output has
            dim·(dim+1)/2 features. Where it is C, or None, nothing is reduced, as released.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions.

    Examples:
        >>> pool = BdcPool2d(64, dim=16)
        >>> pool(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 136])
    """

    pool_type = "bdc"
    take_when = "you have few images a class"
    citation = """
    @inproceedings{xie2022joint,
      title     = {Joint Distribution Matters: Deep {Brownian} Distance Covariance for Few-Shot Classification},
      author    = {Xie, Jiangtao and Long, Fei and Lv, Jiaming and Wang, Qilong and Li, Peihua},
      booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
      year      = {2022}
    }
    """
    shared: ClassVar[Mapping[str, str]] = {"isqrt_dim": "dim"}

    def __init__(
        self,
        in_features: int,
        dim: int | None = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dim is not None:
            check_positive_int("dim", dim)
        check_positive_int("in_features", in_features)
        size = dim or in_features
        super().__init__(in_features, size * (size + 1) // 2)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.reduction = ChannelReduction(in_features, size, **dd) if size != in_features else nn.Identity()
        self.temperature = nn.Parameter(torch.empty((), **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization by the fan out, as in the released code; the scale starts at 1/2."""
        if isinstance(self.reduction, ChannelReduction):
            nn.init.kaiming_normal_(self.reduction.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.temperature)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The temperature."""
        return {"temperature"}

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Brownian distance covariance of the reduced channels of ``x``: (B, C, H, W) to (B, dim, dim)."""
        distances = channel_distances(self.reduction(x).flatten(2))
        scale = self.temperature.to(distances.dtype).exp() / 2
        # The constant is under the root, as released: it bounds the slope where two channels are equal.
        return double_centre((scale * distances + 1e-5).sqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool (B, C, H, W) to (B, dim·(dim+1)/2)."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
        return triu_vectorize(self.squeeze(x)).to(x.dtype)
