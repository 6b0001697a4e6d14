"""Bilinear pooling and its compact form: heads that multiply features at each position, without centring.

Papers:
* Bilinear CNN Models for Fine-grained Visual Recognition, ICCV 2015 - https://arxiv.org/abs/1504.07889
* Compact Bilinear Pooling, CVPR 2016 - https://arxiv.org/abs/1511.06062
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from timm_gsop.checks import check_features, check_ndim, check_positive_int
from timm_gsop.layers.channel_reduction import ChannelReduction
from timm_gsop.layers.covariance import bilinear_pool
from timm_gsop.layers.gradients import at_least_float32, autocast_disabled
from timm_gsop.layers.leading_dims import flatten_positions, leading_dims_of_features, with_leading_dims
from timm_gsop.layers.second_order_pool import SecondOrderPool2d, register_pool

__all__ = [
    "BilinearPool2d",
    "CompactBilinearPool2d",
    "compact_bilinear_pool",
    "signed_sqrt_normalize",
]

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in ("bilinear_pool", "check_ndim", "compact_bilinear_pool"):
    torch.fx.wrap(_leaf)


def compact_bilinear_pool(
    x: torch.Tensor, hashes: torch.Tensor, signs: torch.Tensor, out_features: int
) -> torch.Tensor:
    r"""Tensor Sketch of the products of all pairs of channels, summed over positions (compact bilinear, section 3.2).

    .. math:: \sum_m \mathcal{F}^{-1} (\mathcal{F} \psi_1(x_m) \circ \mathcal{F} \psi_2(x_m))

    where the count sketch ψ adds channel c, times its sign, to the element that its hash says. For two maps X and Y,
    the inner product of their sketches has the expectation :math:`\sum_{m,n} (x_m^\top y_n)^2` over hashes and signs.
    Elements smaller than the rounding of the transforms are zero; their gradients are not changed by that.

    Args:
        x: Features: (B, C, H, W), or (…, C, M) of at most three dimensions.
        hashes: For each of the two sketches, the element of each channel, (2, C), integers from 0 to
            ``out_features`` - 1.
        signs: For each of the two sketches, the sign of each channel, (2, C), 1 or -1.
        out_features: Elements of a sketch, D.

    Returns:
        (…, D), in float32, or in float64 if ``x`` is. Autocast has no effect.

    Raises:
        ValueError: If ``x`` has other dimensions, no positions, or is complex.
    """
    if torch.jit.is_scripting():  # knows neither autocast nor our checks
        sketch = _tensor_sketch(flatten_positions(x, None), hashes, signs, out_features)
    else:
        check_features("x", x)
        with autocast_disabled(x.device):  # nothing in the gradient multiplies matrices: it needs no guard
            sketch = _tensor_sketch(flatten_positions(x, None), hashes, signs, out_features)
    return with_leading_dims(sketch, leading_dims_of_features(x, None))


def _tensor_sketch(x: torch.Tensor, hashes: torch.Tensor, signs: torch.Tensor, out_features: int) -> torch.Tensor:
    x = at_least_float32(x).transpose(1, 2)
    if not _is_tracing() and x.shape[0] == 0:  # which the Fourier transform refuses
        return x.sum(dim=(1, 2)).unsqueeze(1).expand(0, out_features)
    first = torch.fft.rfft(_count_sketch(x, hashes[0], signs[0], out_features))
    second = torch.fft.rfft(_count_sketch(x, hashes[1], signs[1], out_features))
    # The transform is linear: one transform back, of the sum over positions.
    sketch = torch.fft.irfft((first * second).sum(dim=1), n=out_features)
    # What is smaller than the rounding of the transforms is zero, above all an element that no two hashes add up to.
    # Without this, the square root that follows would make it visible: 1e-8 becomes 1e-4, of a sign by chance. NaN is
    # not smaller than anything. The gradient passes: what is subtracted is a constant.
    rounding = (2.0**-22 if x.dtype == torch.float32 else 2.0**-51) * x.square().sum(dim=(1, 2)).unsqueeze(1)
    return sketch - torch.where(sketch.abs() < rounding, sketch, torch.zeros_like(sketch)).detach()


def _is_tracing() -> bool:
    """Whether torch.jit.trace records, for which sizes are tensors; TorchScript does not know that function."""
    if torch.jit.is_scripting():
        return False
    return torch.jit.is_tracing()


def _count_sketch(x: torch.Tensor, hashes: torch.Tensor, signs: torch.Tensor, out_features: int) -> torch.Tensor:
    """(B, M, C) to (B, M, D)."""
    sketch = torch.zeros(x.shape[0], x.shape[1], out_features, dtype=x.dtype, device=x.device)
    return sketch.index_add(2, hashes, x * signs)


def signed_sqrt_normalize(x: torch.Tensor) -> torch.Tensor:
    r"""Signed square root of each element, then division by the Euclidean norm (bilinear pooling, section 3.1).

    .. math:: y = \mathrm{sign}(x) \sqrt{|x| + 10^{-8}}, \qquad z = y / \lVert y \rVert_2

    The constant bounds the gradient, which would grow without limit near zero and stop convergence. At zero the
    function jumps from -1e-4 to 1e-4 (before the division). There it is zero, and its gradient is defined as zero. The
    constant is not relative: elements below about 1e-6 feel it, so scale features that are that small.

    Args:
        x: Vectors, (…, D).

    Returns:
        (…, D), each of length one, or zero where ``x`` is, in the dtype of ``x``.
    """
    return F.normalize(x.sign() * (x.abs() + 1e-8).sqrt(), dim=-1)


@register_pool
class BilinearPool2d(SecondOrderPool2d):
    """Bilinear pooling (ICCV 2015): all products of two channels, signed square root, Euclidean normalization.

    The square root is steep near zero: where features are of both signs, so that products cancel, rounding the features
    to half precision changes the gradient by a quarter (float16) or a half (bfloat16) of its norm. Features after a
    ReLU, such as those of the reduction, do not cancel. Pooling itself is computed in at least float32, also under
    autocast; the output has the dtype of the input.

    Args:
        in_features: Channels of the input, C.
        dim: Channels after a reduction (1×1 convolution, BN, ReLU), which the paper does not have; None for none. The
            output has the square of it as its size: 4 194 304 features for 2048 channels, 65 536 for 256.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions.

    Examples:
        >>> pool = BilinearPool2d(64)
        >>> pool(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 4096])
        >>> BilinearPool2d(64, dim=16)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 256])
    """

    pool_type = "bilinear"
    take_when = "you compare with bilinear CNNs"
    citation = """
    @inproceedings{lin2015bilinear,
      title     = {Bilinear {CNN} Models for Fine-grained Visual Recognition},
      author    = {Lin, Tsung-Yu and RoyChowdhury, Aruni and Maji, Subhransu},
      booktitle = {IEEE International Conference on Computer Vision (ICCV)},
      year      = {2015}
    }
    """
    shared: ClassVar[Mapping[str, str]] = {"isqrt_dim": "dim"}

    def __init__(
        self,
        in_features: int,
        dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dim is not None:
            check_positive_int("dim", dim)
        super().__init__(in_features, (dim or in_features) ** 2)
        self.reduction = ChannelReduction(in_features, dim, device=device, dtype=dtype) if dim else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool (B, C, H, W) to (B, dim²)."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
        return signed_sqrt_normalize(bilinear_pool(self.reduction(x)).flatten(1)).to(x.dtype)


@register_pool
class CompactBilinearPool2d(SecondOrderPool2d):
    """Compact bilinear pooling (CVPR 2016): bilinear pooling, sketched to a fixed number of features.

    The sketch is drawn once from a generator of its own and saved with the weights; the global random state is neither
    used nor changed. Pooling is computed in at least float32, also under autocast; the output has the dtype of the
    input.

    Args:
        in_features: Channels of the input, C.
        out_features: Features of the output; powers of two are transformed fastest, and most exactly in ONNX.
        dim: Channels after a reduction (1×1 convolution, BN, ReLU), which the paper does not have; None for none.
        seed: Seed of the generator of hashes and signs.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions.

    Examples:
        >>> pool = CompactBilinearPool2d(64, out_features=512)
        >>> pool(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 512])
    """

    pool_type = "compact_bilinear"
    take_when = "the classifier must stay small"
    citation = """
    @inproceedings{gao2016compact,
      title     = {Compact Bilinear Pooling},
      author    = {Gao, Yang and Beijbom, Oscar and Zhang, Ning and Darrell, Trevor},
      booktitle = {IEEE Conference on Computer Vision and Pattern Recognition (CVPR)},
      year      = {2016}
    }
    """
    shared: ClassVar[Mapping[str, str]] = {"compact_bilinear_dim": "out_features"}

    def __init__(
        self,
        in_features: int,
        out_features: int = 8192,
        dim: int | None = None,
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dim is not None:
            check_positive_int("dim", dim)
        super().__init__(in_features, out_features)
        self.seed = seed
        self.reduction = ChannelReduction(in_features, dim, device=device, dtype=dtype) if dim else nn.Identity()
        size = (2, dim or in_features)
        self.register_buffer("hashes", torch.empty(size, dtype=torch.int64, device=device))
        self.register_buffer("signs", torch.empty(size, dtype=torch.int8, device=device))
        self.init_weights()

    hashes: torch.Tensor
    signs: torch.Tensor

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw hashes and signs: the same ones each time."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        draw: dict[str, Any] = dict(size=self.hashes.shape, generator=generator, device="cpu")
        self.hashes.copy_(torch.randint(self.out_features, **draw))
        self.signs.copy_(torch.randint(2, **draw) * 2 - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool (B, C, H, W) to (B, out_features)."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
        sketch = compact_bilinear_pool(self.reduction(x), self.hashes, self.signs, self.out_features)
        return signed_sqrt_normalize(sketch).to(x.dtype)
