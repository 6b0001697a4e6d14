"""Moment probing: a head for frozen backbones, of first and second moments.

Paper: Tuning Pre-trained Model via Moment Probing, ICCV 2023 - https://arxiv.org/abs/2307.11342. The released code is
https://github.com/mingzeG/Moment-Probing; it has the same formulas.
"""

from typing import Any

import torch
from torch import nn

from timm_gsop.checks import check_choice, check_ndim
from timm_gsop.layers.cross_covariance import centre_groups, cross_moments
from timm_gsop.layers.second_order_pool import SecondOrderPool2d, check_token, first_moment_of, register_pool

__all__ = ["MomentPool2d", "normalize_columns"]

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in ("centre_groups", "check_ndim", "check_token", "cross_moments", "first_moment_of"):
    torch.fx.wrap(_leaf)

NUM_HEADS = 4  # three pairs of neighbours: the channels of the convolutions
SMALLEST = 4 * 7  # two convolutions of size 3 and stride 2 leave one element of 7


def normalize_columns(mats: torch.Tensor) -> torch.Tensor:
    """Divide each column of matrices (..., w, w) by its Euclidean norm; columns of zeros stay, with finite gradients.

    The floor is under the square of the norm, where released code has it under the norm, with a gradient of 1e12.
    """
    return mats * mats.square().sum(dim=-2, keepdim=True).clamp_min(1e-24).rsqrt()


@register_pool
class MomentPool2d(SecondOrderPool2d):
    r"""Pooling of moment probing (ICCV 2023), for frozen backbones: multi-head convolutional cross-covariance.

    A linear map with layer normalization makes four heads. The second moments between neighbouring heads, three
    matrices whose columns have length one, are an image of three channels that two convolutions of stride 2 make small.
    The first moment f comes before the result F:

    .. math:: \frac{1}{2} [f, F]

    One linear classifier of these features computes the published mean of two classifiers. The first moment is the
    class token if ``forward`` is given one, else the average. The released code also applies layer normalization to the
    average of ConvNeXt's maps; this class does not.

    There is neither dropout nor batch normalization: training is as evaluation. Products and column norms are computed
    in at least float32, also under autocast; the output has the dtype of the weights. The order of the positions does
    not matter, so tokens may come as (B, C, N, 1). The order of the channels of ``proj`` matters.

    Args:
        in_features: Channels of the input, C.
        hidden_dim: Channels of the four heads together; a multiple of 4. With 512, F has 2883 features.
        first_moment: Whether the output begins with the first moment, C features. Without it the output is F.

    Raises:
        ValueError: If an argument is not among the accepted ones; in ``forward``, if the input does not have four
            dimensions, or the token is not (B, C).

    Examples:
        >>> pool = MomentPool2d(768)
        >>> pool(torch.randn(2, 768, 14, 14)).shape  # 768 + 3·31²
        torch.Size([2, 3651])
    """

    pool_type = "moment"
    take_when = "the backbone stays frozen"
    citation = """
    @inproceedings{gao2023tuning,
      title     = {Tuning Pre-trained Model via Moment Probing},
      author    = {Gao, Mingze and Wang, Qilong and Lin, Zhenyi and Zhu, Pengfei and Hu, Qinghua and Zhou, Jingbo},
      booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
      year      = {2023}
    }
    """
    takes_token = True

    def __init__(
        self,
        in_features: int,
        hidden_dim: int = 512,
        first_moment: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(hidden_dim, int) or isinstance(hidden_dim, bool) or hidden_dim % 4 or hidden_dim < SMALLEST:
            raise ValueError(
                f"hidden_dim={hidden_dim!r} is not accepted; it must be a multiple of 4, {SMALLEST} or more."
            )
        check_choice("first_moment", first_moment, (True, False))
        head_dim = hidden_dim // NUM_HEADS
        size = ((head_dim - 3) // 2 + 1 - 3) // 2 + 1
        super().__init__(in_features, (NUM_HEADS - 1) * size**2 + (in_features if first_moment else 0))
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.takes_token = first_moment
        self.proj = nn.Conv2d(in_features, hidden_dim, 1, **dd)
        self.norm = nn.LayerNorm(head_dim, **dd)
        self.convs = nn.Sequential(
            nn.Conv2d(3, 3, 3, stride=2, bias=False, **dd),
            nn.GELU(),
            nn.Conv2d(3, 3, 3, stride=2, bias=False, **dd),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as released: the linear map by a truncated normal distribution, the rest as PyTorch does."""
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]
        self.norm.reset_parameters()
        for layer in self.convs:
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Second moments between neighbouring heads, their columns normalized: (B, C, H, W) to (B, 3, w, w)."""
        heads = self.proj(x).flatten(2).transpose(1, 2).unflatten(2, (4, -1))  # (B, M, 4, w)
        groups = self.norm(heads).permute(0, 2, 3, 1)
        return normalize_columns(cross_moments(centre_groups(groups, "scalar")))

    def forward(self, x: torch.Tensor, token: torch.Tensor | None = None) -> torch.Tensor:
        """Pool (B, C, H, W), and the class token (B, C) if there is one, to (B, out_features)."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
            check_token(token, self.in_features)
        dtype = self.proj.weight.dtype
        vectors = self.convs(self.squeeze(x).to(dtype)).flatten(1)
        if self.takes_token:
            vectors = torch.cat([first_moment_of(x, token).to(vectors.dtype), vectors], dim=1) / 2
        return vectors.to(dtype)
