"""A head with fewer features: a projection after it, which makes the classifier one of low rank."""

import torch
from torch import nn

from timm_gsop.layers.second_order_pool import SecondOrderPool2d

__all__ = ["ProjectedPool2d"]


class ProjectedPool2d(SecondOrderPool2d):
    """Any head, then a projection of its vectors to ``rank`` features.

    With a linear classifier after it, the matrix from features to classes is a product of two: D·rank + rank·classes
    numbers in place of D·classes. ``pool_kwargs={"rank": 256}`` makes it of any head.

    Args:
        head: The head.
        rank: Features of the output.

    Shape:
        As the head's; the output is (B, rank), in the dtype of the weights.

    Raises:
        ValueError: If ``rank`` < 1.

    Examples:
        >>> from timm_gsop import IsqrtCovPool2d
        >>> ProjectedPool2d(IsqrtCovPool2d(64, dim=16), rank=10)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 10])
    """

    __constants__ = ("takes_token",)  # TorchScript compiles only the call that the head has

    def __init__(
        self,
        head: SecondOrderPool2d,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(head.in_features, rank)
        self.pool_type, self.take_when, self.citation = head.pool_type, head.take_when, head.citation
        self.takes_token = head.takes_token
        self.head = head
        self.projection = nn.Linear(head.out_features, self.out_features, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random projection that keeps lengths on average, so that the classifier sees vectors as long as without."""
        nn.init.normal_(self.projection.weight, std=self.out_features**-0.5)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: the head's."""
        return {f"head.{name}" for name in self.head.no_weight_decay()}

    def forward(self, x: torch.Tensor, token: torch.Tensor | None = None) -> torch.Tensor:
        """Pool (B, C, H, W), with a class token (B, C) if the head takes one, to (B, rank)."""
        if self.takes_token:
            return self.projection(self.head(x, token))
        return self.projection(self.head(x))
