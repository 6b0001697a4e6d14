"""Products between groups of channels: what svPN and moment probing normalize."""

import torch
import torch.nn.functional as F

from timm_gsop.layers.gradients import at_least_float32, evaluate, function_of_input

__all__ = ["CENTRINGS", "centre_groups", "cross_moments"]

CENTRINGS = ("scalar", "channel")


def centre_groups(x: torch.Tensor, centring: str) -> torch.Tensor:
    """Subtract the mean of each group of channels.

    Args:
        x: Features, (B, G, w, M): G groups of w channels, M positions.
        centring: ``"scalar"``: of a group the mean over its channels and positions, one number, as the released code
            of SoT and moment probing does; ``"channel"``: the mean of each channel, which makes the products
            covariances.

    Returns:
        (B, G, w, M), in float32, or in float64 if ``x`` is.
    """
    x = at_least_float32(x)
    return x - (x.mean(dim=(2, 3), keepdim=True) if centring == "scalar" else x.mean(dim=3, keepdim=True))


def cross_moments(x: torch.Tensor) -> torch.Tensor:
    r"""Products of the channels of each group with those of the next, averaged over positions.

    .. math:: Q_i = \frac{1}{M} X_i X_{i+1}^\top

    Args:
        x: Features, (B, G, w, M): G groups of w channels, M positions.

    Returns:
        (B, G-1, w, w), rows from the first group of a pair, in float32, or in float64 if ``x`` is. Autocast has no
        effect.
    """
    if torch.jit.is_scripting():  # knows neither autocast nor our gradient
        return _cross_moments(x)
    return evaluate(_CrossMoments, _cross_moments, x)


def _cross_moments(x: torch.Tensor) -> torch.Tensor:
    x = at_least_float32(x)
    return torch.matmul(x[:, :-1], x[:, 1:].transpose(2, 3)) / x.shape[3]


def _cross_moments_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    wide, grad = at_least_float32(x), grad / x.shape[3]
    of_first = torch.matmul(grad, wide[:, 1:])
    of_second = torch.matmul(grad.transpose(2, 3), wide[:, :-1])
    return (F.pad(of_first, (0, 0, 0, 0, 0, 1)) + F.pad(of_second, (0, 0, 0, 0, 1, 0))).to(x.dtype)


_CrossMoments = function_of_input(_cross_moments, _cross_moments_gradient)
