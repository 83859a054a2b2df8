"""The interface of a data set: its images' labels, names and bytes."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from relaylab.errors import InputError

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

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image; raises OSError if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """Return the path of an image, for messages and lists: printable whatever bytes the name is made of."""
        ...


def is_source(value: object) -> TypeGuard[Source]:
    """Return whether a value is a `Source`, and not a path."""
    return hasattr(value, "read") and hasattr(value, "labels")


def check_source(source: Source) -> None:
    """Check what a source says of itself.

    Raises:
        InputError: an attribute that is absent or of another kind, or labels that do not fit the images or the classes.
    """
    lacking = [name for name in ("title", "classes", "fingerprint", "name", "__len__") if not hasattr(source, name)]
    if lacking:
        raise InputError(f"{type(source).__name__} is not a Source: it has no {', '.join(lacking)}")
    labels, count = source.labels, len(source.classes)
    if not isinstance(labels, np.ndarray) or labels.dtype not in (np.int16, np.int32) or labels.shape != (len(source),):
        found = f"{labels.dtype} {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise InputError(f"{source.title}: labels are {found}; expected an array of int16 or int32, ({len(source)},)")
    if not len(source) or labels.min() < UNLABELLED or labels.max() >= max(1, count):
        found = f"{labels.min()} .. {labels.max()}" if len(source) else "of no images"
        raise InputError(f"{source.title}: labels {found}; expected {UNLABELLED} .. {count - 1}, for {count} classes")


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
