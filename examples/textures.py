"""Textures that no average tells apart, and a GSoP block that does: python examples/textures.py takes a minute."""

import torch
from timm.layers import SEModule
from torch import nn

from timm_gsop import ChannelGsop, GsopBlock, covariance_pool, covariance_sqrt, eigh_power, triu_vectorize
from timm_gsop.viz.figure import new_figure

BLOCKS = {"SE, average": lambda: SEModule(24, 1.0), "GSoP block, average": lambda: ChannelGsop(24, 24)}
POOLS = {"covariance": covariance_pool, "iSQRT": covariance_sqrt}
POOLS["exact root"] = lambda x: eigh_power(covariance_pool(x))
ROWS = ["average", *BLOCKS, *POOLS]


def textures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian noise, and which of ten classes it is: where its spectrum, of any slope, has a weak peak."""
    random, axis, k = torch.Generator().manual_seed(seed), torch.fft.fftfreq(32), torch.arange(10)
    y, at = torch.randint(10, (count,), generator=random), torch.stack(torch.meshgrid(axis, axis, indexing="ij"))
    peak = (torch.stack([(0.314 * k).sin(), (0.314 * k).cos()]) * (0.16 + 0.08 * (k % 3)))[:, :, None, None]
    peaks = sum((-(at[:, None] - place).square().sum(0) / 0.005).exp() for place in (peak, -peak))[y]
    slopes = at.square().sum(0).clamp_min(1e-3) ** -(0.6 + 1.2 * torch.rand(count, 1, 1, generator=random))
    power = slopes / slopes.mean((1, 2), keepdim=True) + 0.12 * peaks / peaks.mean((1, 2), keepdim=True)
    return torch.fft.ifft2(torch.fft.fft2(torch.randn(count, 32, 32, generator=random)) * power.sqrt()).real[:, None], y


def accuracy(row: str, trained: bool, seed: int, images: int = 1000, epochs: int = 20, lr: float = 0.1) -> float:
    """Percentage of new images that filters, a block, pooling and a linear classifier get right."""
    (x, y), (new_x, new_y) = textures(images, 10 * seed), textures(2 * images, 10 * seed + 1)
    bank = nn.AvgPool2d(3, 1)(torch.randn(24, 1, 9, 9, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 24, 7, 2, bias=False), (nn.BatchNorm2d if trained else nn.InstanceNorm2d)(24))
    net[0].weight = nn.Parameter(bank - bank.mean((2, 3), keepdim=True), requires_grad=trained)
    net.extend([nn.ReLU(), GsopBlock(BLOCKS[row]()) if row in BLOCKS else nn.Identity(), nn.Flatten(2)])
    head = nn.Linear(300 if row in POOLS else 24, 10)
    logits = lambda x: head(triu_vectorize(POOLS[row](net(x))) if row in POOLS else net(x).mean(2))  # noqa: E731
    optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * (images // 50))
    for batch in (i for _ in range(epochs) for i in torch.randperm(images).view(-1, 50)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    net.eval()
    return 100 * (logits(new_x).argmax(1) == new_y).float().mean().item()


if __name__ == "__main__":
    (x, y), figure = textures(100, 0), new_figure(9, 5)
    pictures, bars = figure.subplots(2, 1, height_ratios=(1, 3))
    pictures.imshow(torch.hstack([nn.ZeroPad2d(2)(x[y == k][0, 0]) for k in range(10)]), cmap="gray")
    pictures.set_axis_off()
    for i, filters in enumerate(("frozen filters", "trained filters")):
        scores = torch.tensor([[accuracy(row, bool(i), seed) for seed in (1, 2, 3)] for row in ROWS])
        print(filters, ROWS, "mean", scores.mean(1), "standard deviation", scores.std(1))
        bars.bar_label(bars.barh(torch.arange(6) + 0.4 * i, scores.mean(1), 0.4, label=filters), fmt="%.1f")
    bars.set(yticks=torch.arange(6) + 0.2, yticklabels=ROWS, xlabel="accuracy (%)", xlim=(0, 109), ylim=(6, -1))
    bars.legend(loc="upper right", ncols=2)
    figure.savefig("textures.png", dpi=100)
