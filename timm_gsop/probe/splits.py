"""Which images train a head, which choose its options, and which only test it."""

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import train_test_split

from timm_gsop.probe.images import Images

__all__ = ["Split", "draw_splits", "keep_readable", "take_some"]

TEST_SHARE, VALIDATION_SHARE = 0.25, 0.2


def take_some(images: Images, train_images: int | None, test_images: int | None, seed: int) -> Images:
    """Fewer of the images: so many outside the test part, and so many in it, of each class in proportion.

    Args:
        images: All of them.
        train_images: How many for training and validation; None for all.
        test_images: How many for testing; None for all.
        seed: Draws them.

    Raises:
        ValueError: If there are not so many, or fewer than classes are asked for.
    """
    is_test = _is_test(images)
    if (train_images, test_images) == (None, None):
        return images
    if not is_test.any():
        raise ValueError("train_images and test_images need a data set with a training part and a part for testing.")
    kept = []
    for name, count, chosen in (("train_images", train_images, ~is_test), ("test_images", test_images, is_test)):
        own = np.flatnonzero(chosen)
        if count is not None and count != len(own):
            if not len(images.class_names) <= count < len(own):
                raise ValueError(
                    f"{name}={count!r} is not accepted; accepted: from {len(images.class_names)}, the number of "
                    f"classes, to {len(own)}, the number of images."
                )
            own = _stratified(own, images.targets, count, seed)[0]
        kept.append(own)
    return images.take(np.concatenate(kept))


def _is_test(images: Images) -> np.ndarray:
    """Which images are for testing: the test part, or, as for timm, the validation part where there is no other."""
    given = images.parts == "test"
    return given if given.any() else images.parts == "validation"


def _stratified(indices: np.ndarray, targets: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` of some indices, drawn in every class in proportion, and the rest."""
    drawn, rest = train_test_split(indices, train_size=count, stratify=targets[indices], random_state=seed)
    return np.sort(drawn), np.sort(rest)


@dataclass(frozen=True)
class Split:
    """Indices of the images of one split; the test images are the same in all of them."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def draw_splits(images: Images, count: int, seed: int) -> list[Split]:
    """Divide the images into training, validation and test images, ``count`` times.

    The test images are those of the test part (of the validation part, if there is no other; a quarter of the images,
    if there are no parts), and never change. A given validation part is used as it is. Otherwise each split draws a
    fifth of the other images for validation.

    Args:
        images: The images.
        count: Number of splits.
        seed: Seed of the first split; the following ones have the following seeds.

    Raises:
        ValueError: If a class has fewer images than the parts need.
    """
    is_test = _is_test(images)
    is_validation = (images.parts == "validation") & ~is_test
    draws_test = not is_test.any()
    needed = 1 + (not is_validation.any()) + 2 * draws_test
    counts = np.bincount(images.targets[~is_test & ~is_validation], minlength=len(images.class_names))
    if counts.min() < needed:
        name = images.class_names[int(counts.argmin())]
        raise ValueError(
            f"class {name!r} has {counts.min()} images for training; accepted: at least {needed} of every class, "
            f"{'for a training, a validation and a test part' if draws_test else 'to draw a validation part'}."
        )
    classes = len(images.class_names)
    others = np.flatnonzero(~is_test)
    test = np.flatnonzero(is_test)
    if draws_test:
        test, others = _stratified(others, images.targets, max(classes, round(TEST_SHARE * len(others))), seed)
    splits = []
    for i in range(count):
        if is_validation.any():
            train, validation = np.flatnonzero(images.parts == "train"), np.flatnonzero(is_validation)
        else:
            share = max(classes, round(VALIDATION_SHARE * len(others)))
            validation, train = _stratified(others, images.targets, share, seed + i)
        splits.append(Split(train, validation, test))
    return splits


def keep_readable(images: Images, splits: list[Split], unreadable: np.ndarray) -> list[Split]:
    """Leave images that cannot be read out of every split.

    Raises:
        ValueError: If a class has no image left in a part of a split.
    """
    kept = []
    for split in splits:
        parts = [np.setdiff1d(part, unreadable) for part in (split.train, split.validation, split.test)]
        if len(set(images.targets[parts[0]])) < len(images.class_names) or not all(map(len, parts)):
            raise ValueError("a class has no readable image left to train on; accepted: at least one of every class.")
        kept.append(Split(*parts))
    return kept
