"""`Source`, the interface of a data set: labels, names and encoded bytes of its images."""

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
    """Encoded images with labels, accessed by index. `open_source` returns one for data on disk.

    To train on data in a different form, implement this protocol and pass the object to `open_source` or to the
    loaders. An implementation is pickled into worker processes, so keep its pickled state small, such as a path, and do
    not keep a Python object per image.

    Example::

        source = open_source("photos", split="train")
        data = source.read(0)              # encoded bytes of the first image
        name = source.classes[source.labels[0]]

    Attributes:
        title: display name, without folders.
        classes: class names in the order of the labels.
        labels: (n,) int16 or int32 class indices. `UNLABELLED` in a test set, and if images have `targets` (see
            `targets_of`).
        fingerprint: text that changes with the images, labels or classes. Caches of computed values use it as key.
    """

    title: str
    classes: Sequence[str]
    labels: Labels
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of the image with this index; raises OSError if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """Return the path of an image for messages and lists, with unprintable characters escaped."""
        ...


def is_source(value: object) -> TypeGuard[Source]:
    """Return whether a value is a `Source` rather than a path."""
    return hasattr(value, "read") and hasattr(value, "labels")


def check_source(source: Source) -> None:
    """Check the attributes of a source.

    Raises:
        InputError: an attribute is missing or has a wrong type, or the labels do not fit the images or the classes.
    """
    lacking = [name for name in ("title", "classes", "fingerprint", "name", "__len__") if not hasattr(source, name)]
    if lacking:
        raise InputError(f"{type(source).__name__} is not a Source: it lacks {', '.join(lacking)}")
    labels, count = source.labels, len(source.classes)
    if not isinstance(labels, np.ndarray) or labels.dtype not in (np.int16, np.int32) or labels.shape != (len(source),):
        found = f"{labels.dtype} {labels.shape}" if isinstance(labels, np.ndarray) else type(labels).__name__
        raise InputError(f"{source.title}: labels are {found}; expected an array of int16 or int32, ({len(source)},)")
    if not len(source) or labels.min() < UNLABELLED or labels.max() >= max(1, count):
        found = f"labels {labels.min()} .. {labels.max()}" if len(source) else "no images"
        raise InputError(f"{source.title}: {found}; expected labels {UNLABELLED} .. {count - 1} for {count} classes")


def targets_of(source: Source) -> Targets | None:
    """Return a source's targets (n, classes), 1 for each label of an image; None if images have one label each."""
    return getattr(source, "targets", None)


def images_by_class(labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the number of images of each of `count` classes, from class indices (n,) or targets (n, classes)."""
    if labels.ndim == 2:
        return labels.sum(axis=0, dtype=np.float64).astype(np.int64)
    return np.bincount(labels[labels >= 0], minlength=count)


def class_counts(source: Source) -> NDArray[np.int64]:
    """Return the number of images of each class, (classes,). Images without a label are not counted."""
    targets = targets_of(source)
    return images_by_class(np.asarray(source.labels) if targets is None else targets, len(source.classes))
