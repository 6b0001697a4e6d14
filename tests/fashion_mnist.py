"""Real images for tests: the first 500 of Fashion-MNIST's test set."""

from pathlib import Path

import numpy as np
import torch


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Images as the networks take them, normalized, (B, 3, 28, 28), and their labels."""
    stored = np.load(Path(__file__).parent / "data/fashion_mnist_test.npz")
    images = torch.tensor(stored["images"], dtype=torch.float32).div(255).sub(0.286).div(0.353)
    return images[:, None].expand(-1, 3, -1, -1), torch.tensor(stored["labels"], dtype=torch.long)
