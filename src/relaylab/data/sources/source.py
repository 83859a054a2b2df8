"""The interface of a data set: its images' labels, names and bytes."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int16] | NDArray[np.int32]
Targets = NDArray[np.uint8]
LARGEST_FILE = 512 << 20  # bytes of an encoded image
UNLABELLED = -1


class Source(Protocol):
    """Encoded images with labels, by index.

    Implementations can be pickled into worker processes at the cost of a path, and hold no Python object per image.

    Attributes:
        title: display name, without folders.
        classes: names in the order of the labels.
        labels: (n,) class indices; `UNLABELLED` in a test set, and where images have `targets` (see `targets_of`).
        fingerprint: changes with images, labels or classes; caches of computed values use it as their key.
    """

    title: str
    classes: Sequence[str]
    labels: Labels
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, number: int) -> bytes:
        """Return the encoded bytes of an image; raises OSError if it cannot be read."""
        ...

    def name(self, number: int) -> str:
        """Return the path of an image, for messages and lists: printable whatever bytes the name is made of."""
        ...


def targets_of(source: Source) -> Targets | None:
    """Return (n, classes) 1 for each label of an image, of a source whose images may have several; None for others."""
    return getattr(source, "targets", None)


def images_by_class(labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the number of images of each of `count` classes, from class indices (n,) or targets (n, classes)."""
    if labels.ndim == 2:
        return labels.sum(axis=0, dtype=np.float64).astype(np.int64)
    return np.bincount(labels[labels >= 0], minlength=count)


def class_counts(source: Source) -> NDArray[np.int64]:
    """Return the number of images of each class, (classes,); images without a label are not counted."""
    targets = targets_of(source)
    return images_by_class(np.asarray(source.labels) if targets is None else targets, len(source.classes))
