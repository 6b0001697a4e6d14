"""Global pooling, first-order (timm's) or second-order (ours), and the classifier after it, for networks of timm."""

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype
from torch import nn

from timm_gsop.checks import check_choice, check_fraction
from timm_gsop.layers import (
    SECOND_ORDER_POOLS,
    CovPool2d,
    accepted_arguments,
    check_pool_kwargs,
    check_second_order_pool,
    create_second_order_pool,
)
from timm_gsop.layers.second_order_pool import FIRST_ORDER_POOLS

__all__ = ["GlobalPoolMixin"]

_logger = logging.getLogger(__name__)


def check_global_pool(pool_type: str) -> None:
    """Raise ``ValueError`` unless it is a pool of timm's or a registered head."""
    check_choice("global_pool", pool_type, (*FIRST_ORDER_POOLS, *SECOND_ORDER_POOLS))


class GlobalPoolMixin:
    """Gives a network of timm its global pooling, dropout and classifier, with covariance pooling among the choices.

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
        compact_bilinear_dim: int = 8192,
        pool_kwargs: Mapping[str, Any] | None = None,
        isqrt_drop: float = 0.0,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create pooling, dropout and classifier.

        Args:
            num_classes: Number of classes, 0 for none.
            global_pool: One of timm's pools, one of ``SECOND_ORDER_POOLS``, or ``""`` for none.
            isqrt_dim: Channels after reduction, in every second-order pool that reduces.
            isqrt_iters: Newton–Schulz iterations; None for the flavor's own.
            flavor: ``"paper"`` or ``"official"``.
            compact_bilinear_dim: Features of ``"compact_bilinear"``.
            pool_kwargs: Options of ``global_pool``'s own, and ``"rank"``. Another pool that :meth:`reset_classifier`
                sets has its defaults.
            isqrt_drop: Dropout after covariance pooling; other pools ignore it.
            drop_rate: Dropout after any pooling. There is one dropout: the larger of the two rates applies.
            device: Device of the weights.
            dtype: Precision of the weights.

        Raises:
            ValueError: If ``global_pool`` is unknown, a number < 1, ``pool_kwargs`` has what is no option of
                ``global_pool``, or ``isqrt_drop`` is not in [0, 1).
        """
        check_second_order_pool(isqrt_dim, isqrt_iters, compact_bilinear_dim)
        check_global_pool(global_pool)
        check_pool_kwargs(global_pool, pool_kwargs)
        check_fraction("isqrt_drop", isqrt_drop)
        self.isqrt_dim = isqrt_dim
        self.isqrt_iters = isqrt_iters
        self.isqrt_drop = isqrt_drop
        self.drop_rate = drop_rate
        self.flavor = flavor
        self.compact_bilinear_dim = compact_bilinear_dim
        self.pool_kwargs = pool_kwargs
        self.global_pool: Any = nn.Identity()
        # No child: as in timm's ResNet, the last two are pooling and classifier, in the order of their calls.
        if hasattr(self, "head_drop"):
            del self.head_drop
        backbone = _count_parameters(self)
        self._set_global_pool(num_classes, global_pool, device=device, dtype=dtype)
        self._say_if_large(backbone)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes, 0 for none.
            global_pool: New pooling; None keeps the present one, with its weights.

        Raises:
            ValueError: If ``global_pool`` is unknown.
        """
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        if pool_type != self.global_pool.pool_type:
            self.pool_kwargs = None
            getattr(self, "_model_args", {}).pop("pool_kwargs", None)  # what timm records: they are the old pool's
        self._set_global_pool(num_classes, pool_type, **get_device_dtype(self))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm: those of the network, and those of the pooling."""
        of_network: set[str] = getattr(super(), "no_weight_decay", set)()
        of_pool: set[str] = getattr(self.global_pool, "no_weight_decay", set)()
        return {*of_network, *(f"global_pool.{name}" for name in of_pool)}

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool features (B, C, H, W) and classify them: (B, num_classes), or what the classifier would read."""
        x = F.dropout(self._pool(x), p=self.head_drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        return self.global_pool(x)

    def _set_global_pool(self, num_classes: int, pool_type: str, **dd: Any) -> None:
        check_global_pool(pool_type)
        drop_rate = self.drop_rate
        if pool_type in SECOND_ORDER_POOLS:
            if not self._has_pool(pool_type):
                shared = {name: getattr(self, name) for name in accepted_arguments(pool_type)}
                self.global_pool = create_second_order_pool(
                    pool_type, self.num_features, **shared, pool_kwargs=self.pool_kwargs, **dd
                )
            self.head_hidden_size = self.global_pool.out_features
            _, classifier = create_classifier(self.head_hidden_size, num_classes, **dd)
            if isinstance(getattr(self.global_pool, "head", self.global_pool), CovPool2d):
                drop_rate = max(drop_rate, self.isqrt_drop)
        else:
            self.global_pool, classifier = create_classifier(self.num_features, num_classes, pool_type, **dd)
            self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop_rate = float(drop_rate)
        setattr(self, self.classifier_name, classifier.train(self.training))
        self.global_pool.train(self.training)
        self.num_classes = num_classes

    def _say_if_large(self, backbone: int) -> None:
        """Log where the head has more parameters than the rest of the network, and the width that has fewer."""
        head = _count_parameters(self) - backbone
        pool_type = self.global_pool.pool_type if self.num_classes > 0 else ""
        if pool_type not in SECOND_ORDER_POOLS or head <= backbone or not _logger.isEnabledFor(logging.INFO):
            return  # nobody would read it: the widths need not be tried
        widths = [name for name in ("isqrt_dim", "compact_bilinear_dim") if name in accepted_arguments(pool_type)]
        advice = 'pool_kwargs={"rank": N} makes it smaller'
        for name in widths:
            for width in _halves(getattr(self, name)):
                shared = {**{n: getattr(self, n) for n in accepted_arguments(pool_type)}, name: width}
                options: dict[str, Any] = dict(pool_kwargs=self.pool_kwargs, device="meta")
                pool = create_second_order_pool(pool_type, self.num_features, **shared, **options)
                if _count_parameters(pool) + (pool.out_features + 1) * self.num_classes <= backbone:
                    advice = f"{name}={width} has fewer; {advice} too"
                    break
        _logger.info(
            "The head global_pool=%r has %.1f M parameters, the network before it %.1f M. %s (docs/backbones.md).",
            *(pool_type, head / 1e6, backbone / 1e6, advice),
        )

    def _has_pool(self, pool_type: str) -> bool:
        pool = self.global_pool
        same_type = getattr(pool, "pool_type", None) == pool_type
        return same_type and pool.in_features == self.num_features  # pruning may change the latter


def _count_parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def _halves(width: int) -> Iterator[int]:
    """Half of a width, half of that, and so on."""
    while width := width // 2:
        yield width
