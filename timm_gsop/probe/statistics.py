"""How sure a difference of two accuracies is."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["Difference", "paired_difference"]

RESAMPLES = 10_000


class Difference(NamedTuple):
    """A difference of accuracies, in points, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_none(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


def paired_difference(correct: ArrayLike, reference: ArrayLike, seed: int = 0) -> Difference:
    """Difference of accuracies of two heads that were tested on the same images, by bootstrap over images and seeds.

    Images and seeds are drawn with replacement, each by themselves, and every image counts with every seed: the
    bootstrap of crossed factors (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 2007), whose interval
    is a little too wide rather than too narrow.

    Args:
        correct: (seeds, images): whether a head is right.
        reference: The same of the other head, in the same order.
        seed: Seed of the bootstrap.

    Examples:
        >>> paired_difference([[1, 1, 1, 0]], [[1, 0, 1, 0]]).mean
        25.0
    """
    difference = np.asarray(correct, float) - np.asarray(reference, float)
    seeds, images = difference.shape
    generator = np.random.default_rng(seed)
    # Images with the same differences are interchangeable, and so few kinds are drawn instead of many images.
    kinds, counts = np.unique(difference, axis=1, return_counts=True)
    of_images = generator.multinomial(images, counts / images, size=RESAMPLES) / images
    of_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    drawn = np.einsum("bs,sk,bk->b", of_seeds, kinds, of_images, optimize=True)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Difference(100 * float(difference.mean()), 100 * float(low), 100 * float(high))
