"""Targets of multi-label images: arrays (n, classes), 1 for each label of an image."""

from collections.abc import Sequence

import numpy as np
import psutil
from numpy.typing import NDArray

from relaylab.data.sources.source import Targets
from relaylab.errors import InputError

SHARE = 0.4  # largest fraction of the free memory for targets, which are copied when the index is written


def zero_targets(images: int, classes: int, title: str) -> Targets:
    """Return targets without labels; raise InputError if there is too little memory for them."""
    needed, free = images * classes, psutil.virtual_memory().available
    if needed > SHARE * free:
        raise InputError(
            f"{title}: {images:,} multi-label images and {classes:,} classes need {needed / 1e9:.2f} GB; at most "
            f"{SHARE:.0%} of the {free / 1e9:.2f} GB of free memory may be used. If labels are numbers and the numbers "
            "have gaps, number the classes 0, 1, 2, ..., or use names; otherwise use fewer images or classes"
        )
    return np.zeros((images, classes), np.uint8)


def targets_from(indices: Sequence[Sequence[int]], value_of: NDArray[np.int32], classes: int, title: str) -> Targets:
    """Return the targets of images from the class indices of each distinct value and the value of each image.

    Raises:
        InputError: there is too little memory.
    """
    targets = zero_targets(len(value_of), classes, title)
    columns = [np.array(value, np.int64) for value in indices]
    lengths = np.array([len(value) for value in columns])
    rows = np.repeat(np.arange(len(value_of)), lengths[value_of])
    targets[rows, np.concatenate([columns[value] for value in value_of.tolist()])] = 1
    return targets
