"""Global second-order pooling (GSoP) blocks: a covariance decides how the features are scaled."""

import torch
from torch import nn

from timm_gsop.layers.checks import check_batch_for_training, check_ndim, check_positive_int
from timm_gsop.layers.covariance import covariance_pool

__all__ = ["ChannelGsop", "CovarianceExcitation", "GsopBlock"]


class CovarianceExcitation(nn.Module):
    """Excitation module: from a covariance matrix to weights between 0 and 1 (paper sections 3.1 and 3.4, Table 2).

    Row-wise batch normalization (one channel a row, statistics over batch and columns); row-wise convolution (a group
    a row, its kernel the whole row), from C to 4·C channels, with BN and LeakyReLU(0.1); 1×1 convolution and sigmoid.

    Args:
        cov_dim: Rows of the covariance matrix, C.
        out_features: Number of weights.
    """

    def __init__(
        self,
        cov_dim: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * cov_dim
        self.cov_bn = nn.BatchNorm2d(cov_dim, device=device, dtype=dtype)
        self.row_conv = nn.Conv2d(cov_dim, hidden, (cov_dim, 1), groups=cov_dim, bias=False, device=device, dtype=dtype)
        self.row_conv_bn = nn.BatchNorm2d(hidden, device=device, dtype=dtype)
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.expand_conv = nn.Conv2d(hidden, out_features, 1, device=device, dtype=dtype)
        self.gate = nn.Sigmoid()
        self.init_weights()

    def init_weights(self) -> None:
        """He initialization, as in the paper's experiments (section 4)."""
        for conv in (self.row_conv, self.expand_conv):
            nn.init.kaiming_normal_(conv.weight, a=0.1, nonlinearity="leaky_relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, cov: torch.Tensor) -> torch.Tensor:
        """Map (B, C, C) to weights (B, out_features, 1, 1), in the dtype of the convolutions."""
        # Rows are channels, columns are positions: the row-wise operations are ordinary ones then.
        x = self.cov_bn(cov.to(self.row_conv.weight.dtype).unsqueeze(-1))
        x = self.act(self.row_conv_bn(self.row_conv(x)))
        return self.gate(self.expand_conv(x))


class ChannelGsop(nn.Module):
    """Channel-wise GSoP: the covariance between channels scales the channels (paper section 3.1, Table 2 left).

    Squeeze: 1×1 convolution to ``cov_dim`` channels, BN, ReLU, covariance over all positions. Excitation: see
    :class:`CovarianceExcitation`. There is no shortcut in here (see :class:`GsopBlock`), so it serves as timm's
    attention layers do, for one ``create_model("resnet26", block_args=dict(attn_layer=ChannelGsop))``.

    Args:
        channels: Channels of the input, C.
        cov_dim: Channels after reduction, the size of the covariance matrix.

    Raises:
        ValueError: If ``channels`` or ``cov_dim`` < 1; in ``forward``, if the input has not four dimensions, or is a
            batch of one in training.
    """

    def __init__(
        self,
        channels: int,
        cov_dim: int = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("channels", channels)
        check_positive_int("cov_dim", cov_dim)
        self.reduce_conv = nn.Conv2d(channels, cov_dim, 1, bias=False, device=device, dtype=dtype)
        self.reduce_bn = nn.BatchNorm2d(cov_dim, device=device, dtype=dtype)
        self.reduce_act = nn.ReLU(inplace=True)
        self.excitation = CovarianceExcitation(cov_dim, channels, device=device, dtype=dtype)
        self.init_weights()

    def init_weights(self) -> None:
        """He initialization, as in the paper's experiments (section 4)."""
        nn.init.kaiming_normal_(self.reduce_conv.weight, nonlinearity="relu")
        self.excitation.init_weights()

    def channel_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights between 0 and 1 of the channels of ``x``: (B, C, H, W) to (B, C, 1, 1)."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
            check_batch_for_training("input", x, self.excitation.row_conv_bn)
        x = self.reduce_act(self.reduce_bn(self.reduce_conv(x)))
        return self.excitation(covariance_pool(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels of ``x``, (B, C, H, W)."""
        return x * self.channel_weights(x)


class GsopBlock(nn.Module):
    """The paper's residual block: a shortcut adds the input to the scaled features (Table 2, "shortcut connections").

    Args:
        gsop: The scaling layer, from (B, C, H, W) to the same shape; a :class:`ChannelGsop`, for one.
    """

    def __init__(self, gsop: nn.Module) -> None:
        super().__init__()
        self.gsop = gsop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x + gsop(x)``, (B, C, H, W)."""
        return x + self.gsop(x)
