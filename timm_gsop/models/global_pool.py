"""Global pooling, first-order (timm's) or second-order (ours), and the classifier after it, for networks of timm."""

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import create_classifier, get_device_dtype
from torch import nn

from timm_gsop.checks import check_choice, check_positive_int
from timm_gsop.layers import IsqrtCovPool2d, MpnCovPool2d, OfficialIsqrtCovPool2d

__all__ = ["GLOBAL_POOLS", "GlobalPoolMixin", "init_our_weights"]

GLOBAL_POOLS = (
    *("", "avg", "max", "avgmax", "catavgmax"),
    *("fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"),
    *("isqrt", "mpn"),
)


class GlobalPoolMixin:
    """Gives a network of timm its global pooling and classifier, with covariance pooling among the choices.

    The network calls :meth:`init_global_pool` when its features are built. ``num_features`` are the channels of the
    last feature map; ``head_hidden_size`` is the width that the classifier reads, dim·(dim+1)/2 after covariance
    pooling.
    """

    classifier_name = "fc"

    if TYPE_CHECKING:  # what the network brings

        def __getattr__(self, name: str) -> Any: ...

    def init_global_pool(
        self,
        num_classes: int,
        global_pool: str,
        isqrt_dim: int,
        isqrt_iters: int | None,
        flavor: str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create pooling and classifier.

        Args:
            num_classes: Number of classes, 0 for none.
            global_pool: One of ``GLOBAL_POOLS``.
            isqrt_dim: Channels after reduction in covariance pooling.
            isqrt_iters: Newton–Schulz iterations; None for the flavor's own.
            flavor: ``"paper"`` or ``"official"``.
            device: Device of the weights.
            dtype: Precision of the weights.

        Raises:
            ValueError: If ``global_pool`` is unknown, or ``isqrt_dim`` or ``isqrt_iters`` < 1.
        """
        check_positive_int("isqrt_dim", isqrt_dim)
        if isqrt_iters is not None:
            check_positive_int("isqrt_iters", isqrt_iters)
        self.isqrt_dim = isqrt_dim
        self.isqrt_iters = isqrt_iters
        self.flavor = flavor
        self.global_pool: Any = nn.Identity()
        self._set_global_pool(num_classes, global_pool, device=device, dtype=dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes, 0 for none.
            global_pool: New pooling, one of ``GLOBAL_POOLS``; None keeps the present one, with its weights.

        Raises:
            ValueError: If ``global_pool`` is unknown.
        """
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_global_pool(num_classes, pool_type, **get_device_dtype(self))

    def _set_global_pool(self, num_classes: int, pool_type: str, **dd: Any) -> None:
        check_choice("global_pool", pool_type, GLOBAL_POOLS)
        if pool_type in ("isqrt", "mpn"):
            if not self._has_pool(pool_type):
                self.global_pool = self._create_cov_pool(pool_type, **dd)
            self.head_hidden_size = self.global_pool.out_features
            _, classifier = create_classifier(self.head_hidden_size, num_classes, **dd)
        else:
            self.global_pool, classifier = create_classifier(self.num_features, num_classes, pool_type, **dd)
            self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        setattr(self, self.classifier_name, classifier.train(self.training))
        self.global_pool.train(self.training)
        self.num_classes = num_classes

    def _has_pool(self, pool_type: str) -> bool:
        pool = self.global_pool
        same_type = getattr(pool, "pool_type", None) == pool_type
        return same_type and pool.reduction.conv.in_channels == self.num_features  # pruning may change the latter

    def _create_cov_pool(self, pool_type: str, **dd: Any) -> nn.Module:
        if pool_type == "isqrt":
            pool_class = IsqrtCovPool2d if self.flavor == "paper" else OfficialIsqrtCovPool2d
            if self.isqrt_iters is None:
                return pool_class(self.num_features, self.isqrt_dim, **dd)
            return pool_class(self.num_features, self.isqrt_dim, self.isqrt_iters, **dd)
        return MpnCovPool2d(self.num_features, self.isqrt_dim, **dd)


def init_our_weights(model: nn.Module) -> None:
    """Initialize our layers in a network, as they do themselves when they are created."""
    for module in reversed(list(model.modules())):  # a layer has the last word about the convolutions in it
        reset_parameters: Any = getattr(module, "reset_parameters", None)
        if type(module).__module__.startswith("timm_gsop.layers.") and reset_parameters is not None:
            reset_parameters()
