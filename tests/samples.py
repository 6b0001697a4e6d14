"""Real images for tests: the first 500 of Fashion-MNIST's test set, and a photo of a cat."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
FASHION_MNIST = ROOT / "tests/data/fashion_mnist_test.npz"


def fashion_mnist() -> tuple[torch.Tensor, torch.Tensor]:
    """Images as the networks take them, normalized, (B, 3, 28, 28), and their labels."""
    stored = np.load(FASHION_MNIST)
    images = torch.tensor(stored["images"], dtype=torch.float32).div(255).sub(0.286).div(0.353)
    return images[:, None].expand(-1, 3, -1, -1), torch.tensor(stored["labels"], dtype=torch.long)


def cat() -> Image.Image:
    """The photo that README classifies, 128×128 pixels."""
    return Image.open(ROOT / "docs/figures/cat.png").convert("RGB")
