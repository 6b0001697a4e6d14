"""The later heads from their formulas, in float64, one sample at a time (autograd differentiates them)."""

import itertools
import math

import torch


def triangle(mat: torch.Tensor) -> torch.Tensor:
    """Upper triangle of one matrix, row by row."""
    return torch.stack([mat[i, j] for i in range(len(mat)) for j in range(i, len(mat))])


def covariance(pixels: torch.Tensor) -> torch.Tensor:
    """Covariance of (d, M)."""
    return torch.cov(pixels, correction=0).reshape(len(pixels), len(pixels))


def dropcov(z: torch.Tensor, kernel: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, float]:
    """DropCov in training, of reduced features (B, d, M), and its rate; a channel stays where noise is no less."""
    dim = z.shape[1]
    weighed, cosines = [], []
    for sample in z:
        padded = torch.cat([sample.new_zeros(1), sample.mean(1), sample.new_zeros(1)])
        logits = torch.stack([(padded[i : i + 3] * kernel).sum() for i in range(dim)])
        importance = logits.exp() / logits.exp().sum()
        weighed.append(torch.stack([sample[i] * (1 + importance[i]) for i in range(dim)]))
        row_sums = covariance(weighed[-1]) @ sample.new_ones(dim)
        cosines.append((importance @ row_sums / (importance.norm() * row_sums.norm())).item())
    rate = min(max(1 - 10 / math.log2(dim) * sum(cosines) / len(cosines), 0.0), 1 - 1 / dim)
    kept = (noise >= rate).double()[:, :, None]
    return torch.stack([triangle(covariance(s)) for s in torch.stack(weighed) * kept / (1 - rate)]), rate


def bdc(z: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Brownian distance covariance of (B, d, M): distances by differences, centring by a matrix."""
    found = []
    for sample in z:
        squares = (sample[:, None] - sample[None]).square().sum(2)
        root = (scale * squares + 1e-5).sqrt()
        centring = torch.eye(len(sample), dtype=torch.float64) - 1 / len(sample)
        found.append(triangle(centring @ root @ centring))
    return torch.stack(found)


def svpn(
    x: torch.Tensor, weight: torch.Tensor, vector: torch.Tensor, heads: int, by_channel: bool, steps: int
) -> torch.Tensor:
    """SoT's head without first moment, of (B, C, M); its linear map is (2·heads·w, C), with the power one half."""
    width, found = len(vector), []
    for sample in x:
        for head in range(heads):
            q = weight[head * width : (head + 1) * width] @ sample
            k = weight[(heads + head) * width : (heads + head + 1) * width] @ sample
            q, k = (t - (t.mean(1, keepdim=True) if by_channel else t.mean()) for t in (q, k))
            mat, v = q @ k.T / sample.shape[1], vector
            for _ in range(steps):
                u = mat @ v / (mat @ v).norm()
                v = mat.T @ u / (mat.T @ u).norm()
            s = u @ mat @ v
            found.append((s.sqrt() * torch.outer(u, v) + (mat - s * torch.outer(u, v)) / (s.sqrt() + 1e-5)).flatten())
    return torch.stack(found).reshape(len(x), -1)


def moment(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Moment probing's second moments, of (B, C, M), after the convolutions."""
    found = []
    for sample in x:
        pixels = weights["proj.weight"][:, :, 0, 0] @ sample + weights["proj.bias"][:, None]
        heads = []
        for head in pixels.chunk(4):
            mean, var = head.mean(0), head.var(0, correction=0)
            head = (head - mean) / (var + 1e-5).sqrt() * weights["norm.weight"][:, None] + weights["norm.bias"][:, None]
            heads.append(head - head.mean())
        image = []
        for first, second in itertools.pairwise(heads):
            mat = first @ second.T / sample.shape[1]
            image.append(torch.stack([column / column.norm() for column in mat.T], dim=1))
        hidden = convolve(torch.stack(image), weights["convs.0.weight"])
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        found.append(convolve(hidden, weights["convs.2.weight"]).flatten())
    return torch.stack(found)


def convolve(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """A 3×3 convolution with stride 2, no padding and no bias."""
    size = (image.shape[1] - 3) // 2 + 1
    patches = [image[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] for i in range(size) for j in range(size)]
    return torch.einsum("pcij,ocij->op", torch.stack(patches), kernel).reshape(-1, size, size)
