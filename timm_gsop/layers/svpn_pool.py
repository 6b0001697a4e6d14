"""svPN: cross-covariances of several heads, normalized by the largest singular value.

Paper: SoT: Delving Deeper into Classification Head for Transformer, first called So-ViT -
https://arxiv.org/abs/2104.10935. The released code is https://github.com/jiangtaoxie/SoT; the formulas here are those
of that code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_gsop.checks import check_choice, check_fraction, check_ndim, check_positive_int
from timm_gsop.layers.cross_covariance import CENTRINGS, centre_groups, cross_moments
from timm_gsop.layers.second_order_pool import SecondOrderPool2d, check_token, first_moment_of, register_pool

__all__ = ["SvpnPool2d", "singular_value_power_norm"]

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in ("centre_groups", "check_ndim", "check_token", "cross_moments", "first_moment_of"):
    torch.fx.wrap(_leaf)


def singular_value_power_norm(
    mat: torch.Tensor, vector: torch.Tensor, alpha: float = 0.5, num_iters: int = 1
) -> torch.Tensor:
    r"""Raise the largest singular value of matrices to a power, and divide the rest by the same factor (svPN).

    .. math:: \sigma^\alpha u v^\top + \frac{Q - \sigma u v^\top}{\sigma^{1 - \alpha} + 10^{-5}}

    The power method estimates σ, u and v from a given start; its steps are differentiated, the start too. One step
    gives a σ below the largest singular value, and the formula uses this estimate. That is as in the released code,
    except for a floor of 1e-12 under σ, which makes the gradient at zero finite.

    Args:
        mat: Q, (..., w, w).
        vector: Where the power method starts, (w,).
        alpha: The power.
        num_iters: Steps of the power method.

    Returns:
        (..., w, w), in the dtype of ``mat``. Zero matrices stay zero, and their gradient is finite.
    """
    vector = vector.to(mat.dtype)
    # Products as sums: autocast would round those of torch.matmul, in the gradient too.
    u = F.normalize((mat * vector).sum(dim=-1), dim=-1)
    image = (mat * u.unsqueeze(-1)).sum(dim=-2)  # Qᵀu = σv
    for _ in range(num_iters - 1):
        u = F.normalize((mat * F.normalize(image, dim=-1).unsqueeze(-2)).sum(dim=-1), dim=-1)
        image = (mat * u.unsqueeze(-1)).sum(dim=-2)
    sigma = image.square().sum(dim=-1).clamp_min(1e-24).sqrt().unsqueeze(-1).unsqueeze(-1)
    first = u.unsqueeze(-1) * image.unsqueeze(-2)
    return first * sigma ** (alpha - 1) + (mat - first) / (sigma ** (1 - alpha) + 1e-5)


@register_pool
class SvpnPool2d(SecondOrderPool2d):
    """Pooling of SoT (second-order transformers): multi-head cross-covariance, normalized by svPN.

    A linear map makes two groups of ``head_dim`` channels for each head. Their cross-covariance over the positions is
    normalized by :func:`singular_value_power_norm`, which starts from a learned vector that the heads share. The
    matrices, row by row and head after head, come after the first moment, so that one linear classifier computes the
    published sum of two. A class token is the first moment where ``forward`` is given one, else the average is.

    Of the singular values, only the largest is estimated: the released code's further ones are rounding noise after
    one step. Products and normalization are computed in at least float32, also under autocast; the output has the
    dtype of the weights. The order of the positions does not matter: tokens may come as (B, C, N, 1).

    Args:
        in_features: Channels of the input, C.
        num_heads: Heads. SoT-Tiny, -Small and -Base have 6.
        head_dim: Channels of each of a head's two groups, w: 14, 24 and 38 in SoT-Tiny, -Small and -Base. The output
            has num_heads·w² features besides the first moment.
        alpha: The power of the largest singular value.
        num_iters: Steps of the power method.
        centring: What is subtracted before the products: ``"scalar"``, the mean over channels and positions of a
            group, as released; or ``"channel"``, the mean of each channel, which makes them covariances.
        drop: Dropout of the matrices' entries: none, 0.5 and 0.7 in SoT-Tiny, -Small and -Base.
        first_moment: Whether the output begins with the first moment, C features.

    Raises:
        ValueError: If an argument is not among the accepted ones; in ``forward``, if the input does not have four
            dimensions, or the token is not (B, C).

    Examples:
        >>> pool = SvpnPool2d(64, num_heads=2, head_dim=8)
        >>> pool(torch.randn(2, 64, 7, 7)).shape  # 64 + 2·8²
        torch.Size([2, 192])
    """

    pool_type = "svpn"
    take_when = "you train or fine-tune a transformer"
    citation = """
    @article{xie2021sot,
      title   = {{SoT}: Delving Deeper into Classification Head for Transformer},
      author  = {Xie, Jiangtao and Zeng, Ruiren and Wang, Qilong and Zhou, Ziqi and Li, Peihua},
      journal = {arXiv preprint arXiv:2104.10935},
      year    = {2021}
    }
    """
    takes_token = True

    def __init__(
        self,
        in_features: int,
        num_heads: int = 6,
        head_dim: int = 24,
        alpha: float = 0.5,
        num_iters: int = 1,
        centring: str = "scalar",
        drop: float = 0.5,
        first_moment: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("num_heads", num_heads)
        check_positive_int("head_dim", head_dim)
        check_positive_int("num_iters", num_iters)
        check_choice("centring", centring, CENTRINGS)
        check_fraction("alpha", alpha)
        check_fraction("drop", drop)
        check_choice("first_moment", first_moment, (True, False))
        super().__init__(in_features, num_heads * head_dim**2 + (in_features if first_moment else 0))
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.alpha = alpha
        self.num_iters = num_iters
        self.centring = centring
        self.takes_token = first_moment
        self.proj = nn.Conv2d(in_features, 2 * num_heads * head_dim, 1, bias=False, **dd)
        self.vector = nn.Parameter(torch.empty(head_dim, **dd))
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as released: a truncated normal distribution, and a standard normal one for the start."""
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.normal_(self.vector)

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Cross-covariances, not normalized: (B, C, H, W) to (B, num_heads, head_dim, head_dim)."""
        # Channels are ordered by group, then head.
        groups = self.proj(x).flatten(2).unflatten(1, (2, self.num_heads, self.head_dim))
        mats = cross_moments(centre_groups(groups.transpose(1, 2).flatten(0, 1), self.centring))
        return mats.squeeze(1).unflatten(0, (-1, self.num_heads))

    def forward(self, x: torch.Tensor, token: torch.Tensor | None = None) -> torch.Tensor:
        """Pool (B, C, H, W), and the class token (B, C) if there is one, to (B, out_features)."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
            check_token(token, self.in_features)
        mats = singular_value_power_norm(self.squeeze(x), self.vector, self.alpha, self.num_iters)
        vectors = self.drop(mats.flatten(1))
        if self.takes_token:
            vectors = torch.cat([first_moment_of(x, token).to(vectors.dtype), vectors], dim=1)
        return vectors.to(self.proj.weight.dtype)
