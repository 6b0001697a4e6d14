"""DropCov: covariance pooling without a root, whose channels are dropped in training.

Paper: DropCov: A Simple yet Effective Method for Improving Deep Architectures, NeurIPS 2022. The released code is
https://github.com/mingzeG/DropCov; it has the same formulas.
"""

import math
from typing import Any

import torch
from torch import nn

from timm_gsop.layers.cov_pool import CovPool2d
from timm_gsop.layers.covariance import covariance_pool
from timm_gsop.layers.gradients import at_least_float32
from timm_gsop.layers.second_order_pool import register_pool

__all__ = ["DropCovPool2d", "drop_rate_of", "weigh_and_drop"]

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers.
for _leaf in ("at_least_float32", "covariance_pool", "weigh_and_drop"):
    torch.fx.wrap(_leaf)


def weigh_and_drop(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    r"""Weigh channels by their importance y, then drop whole channels at one rate for the batch.

    .. math:: y = \mathrm{softmax}(\mathrm{logits}), \qquad z_c = x_c (1 + y_c)

    Each channel of each sample is kept with probability 1 - p (:func:`drop_rate_of`), and then divided by 1 - p. The
    rate stays a tensor: nothing waits for the device.

    Args:
        x: Features, (B, d, H, W).
        logits: Importance of the channels before the softmax, (B, d).

    Returns:
        (B, d, H, W), in float32, or in float64 if ``x`` is.
    """
    x = at_least_float32(x)
    importance = logits.to(x.dtype).softmax(dim=1)
    x = x * (1 + importance).unsqueeze(2).unsqueeze(3)
    rate = drop_rate_of(x.detach(), importance.detach())
    kept = torch.rand_like(x[:, :, :1, :1]) >= rate
    return x * (kept / (1 - rate))


def drop_rate_of(x: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    r"""Rate at which channels are dropped, from how well importance agrees with covariance.

    .. math:: p = 1 - \frac{10}{\log_2 d} \, \mathrm{mean}_b \cos(y_b, \Sigma_b 1)

    between 0 and 1 - 1/d, the rate that keeps one channel on average. The released code goes up to 1, which leaves
    nothing of the batch. Σ1, the sum of each row of the covariance, is computed without the covariance.

    Args:
        x: Weighed features, (B, d, H, W).
        importance: y, (B, d).

    Returns:
        The rate p, of no dimension. Samples without covariance, such as those of one position, are left out of the
        mean. If there are no others, the rate is 0; the released code's is NaN.
    """
    dim = x.shape[1]
    x = x.flatten(2)
    centred = x - x.mean(dim=2, keepdim=True)
    row_sums = (centred * centred.sum(dim=1, keepdim=True)).mean(dim=2)
    norm = torch.linalg.vector_norm(row_sums, dim=1)
    # What is not larger is rounding: centred features of a constant map are not exactly zero.
    eps = 2.0**-20 if x.dtype == torch.float32 else 2.0**-49
    rounding = dim * eps**2 * x.square().mean(dim=2).sum(dim=1)
    varies = norm > rounding
    cosines = (importance * row_sums).sum(dim=1) / (torch.linalg.vector_norm(importance, dim=1) * norm)
    mean = torch.where(varies, cosines, 0).sum() / varies.sum().clamp_min(1)
    rate = 1 - 10 * math.log(2) / math.log(max(dim, 2)) * mean  # TorchScript has no log2
    return torch.where(varies.any(), rate, 0).clamp(0, 1 - 1 / dim)


@register_pool
class DropCovPool2d(CovPool2d):
    """Pooling of DropCov (NeurIPS 2022): covariance without a root, with adaptive dropout of channels in training.

    In training an importance of each channel is computed from its mean (a convolution over the channels' index, then
    a softmax), channels are weighed by 1 + importance, and whole channels are dropped at a rate that depends on how
    well importance agrees with covariance (:func:`weigh_and_drop`). In evaluation it is ``"cov"``: weights and dropout
    are in training only, as in the released code. That leaves a bias: in expectation dropout keeps the covariances
    but multiplies the variances by 1/(1 - p).

    Unlike the released code's, the rate is finite for maps of one position, is at most 1 - 1/dim, and needs no
    synchronization with the host. Statistics are computed in at least float32, also under autocast; the output has
    the dtype of the weights.

    Args:
        in_features: Channels of the input.
        dim: Channels after reduction, the size of the covariance matrix; the output has dim·(dim+1)/2 features. The
            released code has 256; its reported sizes of networks are those of 128.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions.

    Examples:
        >>> pool = DropCovPool2d(64, dim=16)
        >>> pool(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 136])
    """

    pool_type = "dropcov"
    take_when = "you train from scratch, without the cost of a root"
    citation = """
    @inproceedings{wang2022dropcov,
      title     = {{DropCov}: A Simple yet Effective Method for Improving Deep Architectures},
      author    = {Wang, Qilong and Gao, Mingze and Zhang, Zhaolin and Xie, Jiangtao and Li, Peihua and Hu, Qinghua},
      booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
      year      = {2022}
    }
    """

    def __init__(
        self,
        in_features: int,
        dim: int = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(in_features, dim, **dd)
        self.importance = nn.Conv1d(1, 1, 3, padding=1, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization by the fan out, as in the released code."""
        nn.init.kaiming_normal_(self.reduction.conv.weight, mode="fan_out", nonlinearity="relu")
        self.importance.reset_parameters()

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance between the reduced channels of ``x``, in training weighed and dropped: (B, dim, dim)."""
        x = self.reduction(x)
        if self.training:
            means = at_least_float32(x).mean(dim=(2, 3)).to(self.importance.weight.dtype)
            x = weigh_and_drop(x, self.importance(means.unsqueeze(1)).squeeze(1))
        return covariance_pool(x)
