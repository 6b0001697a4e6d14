"""Writes docs/figures/ankle_boot.png, the image that README classifies: the first test image of Fashion-MNIST.

Run ``python docs/figures/ankle_boot.py`` from the root of the repository.
"""

import numpy as np
from PIL import Image

if __name__ == "__main__":
    images = np.load("tests/data/fashion_mnist_test.npz")["images"]
    Image.fromarray(images[0]).save("docs/figures/ankle_boot.png", optimize=True)
