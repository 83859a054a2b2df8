"""Data sets derived from others: subsets, an artificial long tail, held-out images, and relabelled sources."""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
from numpy.typing import ArrayLike, NDArray

from relaylab.data.sources.classes import Classes, classes_of, match, moved
from relaylab.data.sources.listing import label_type
from relaylab.data.sources.source import UNLABELLED, Labels, Source, class_counts, targets_of
from relaylab.errors import InputError

Indices = NDArray[np.int64]


class Subset:
    """A `Source` with a subset of the images of a given one, like `torch.utils.data.Subset`.

    Example::

        train, held = held_out(source.labels, count=50, seed=0)
        train_set, val_set = Subset(source, train), Subset(source, held)

    Args:
        source: source of the images.
        indices: (m,) indices in the source; image i of the subset is image `indices[i]` of the source.

    Raises:
        InputError: there are no indices, or one is out of range.
    """

    def __init__(self, source: Source, indices: ArrayLike) -> None:
        indices = np.asarray(indices)
        if indices.ndim != 1 or not indices.size or not np.issubdtype(indices.dtype, np.integer):
            raise InputError(f"indices are {indices.dtype} {indices.shape}: expected integers (m,), at least one")
        if indices.min() < 0 or indices.max() >= len(source):
            raise InputError(f"indices {indices.min()} .. {indices.max()}: expected 0 .. {len(source) - 1}")
        self.source = source
        self.indices: Indices = indices.astype(np.int64)
        self.title: str = source.title
        self.classes: Sequence[str] = source.classes
        self.identity = classes_of(source)
        self.labels: Labels = source.labels[self.indices]
        targets = targets_of(source)
        self.targets = None if targets is None else targets[self.indices]
        self.fingerprint = sha256(source.fingerprint.encode() + self.indices.tobytes()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image; raises OSError if it cannot be read."""
        return self.source.read(int(self.indices[index]))

    def size(self, index: int) -> int:
        """Return the size of an encoded image in bytes, if the source has `size`."""
        return self.source.size(int(self.indices[index]))  # pyright: ignore[reportAttributeAccessIssue]

    def name(self, index: int) -> str:
        """Return the path of an image for messages and lists."""
        return self.source.name(int(self.indices[index]))


class Relabelled:
    """A `Source` whose labels are remapped to a given class order.

    Args:
        source: source of the images.
        wanted: classes that define the labels, such as those of the training images.

    Raises:
        InputError: a class with images is not among them.
    """

    def __init__(self, source: Source, wanted: Classes) -> None:
        used = np.flatnonzero(class_counts(source)).tolist()
        places, self.remark = match(classes_of(source), wanted, title=source.title, used=used)
        self.source = source
        self.title: str = source.title
        self.identity = wanted
        self.classes: Sequence[str] = wanted.names
        self.labels: Labels = np.array([*places, UNLABELLED])[source.labels].astype(label_type(len(wanted.keys)))
        targets = targets_of(source)
        self.targets = None if targets is None else moved(targets, places, len(wanted.keys), source.title)
        self.fingerprint = sha256(f"{source.fingerprint} {wanted}".encode(errors="backslashreplace")).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image; raises OSError if it cannot be read."""
        return self.source.read(index)

    def name(self, index: int) -> str:
        """Return the path of an image for messages and lists."""
        return self.source.name(index)


def long_tail(labels: ArrayLike, *, ratio: float, seed: int) -> Indices:
    """Choose images so that class sizes decrease exponentially, from the largest class's to 1 / `ratio` of it.

    The order of the classes is drawn from the seed. A class with fewer images than its new size keeps all of them;
    every class with images keeps at least one.

    Args:
        labels: (n,) class indices from 0.
        ratio: size of the largest class divided by the size of the smallest, at least 1.
        seed: at least 0; the same seed keeps the same images.

    Returns:
        Indices (m,) of the images to keep, in ascending order.

    Raises:
        InputError: the ratio is below 1, the seed is negative, or images have no labels.
    """
    labels = np.asarray(labels)
    if not 1 <= ratio < np.inf or seed < 0:
        raise InputError(f"long tail with ratio {ratio:g} and seed {seed}: expected a ratio >= 1 and a seed >= 0")
    members = [group for group in _members(labels) if len(group)]
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(members))
    largest = max(len(group) for group in members)
    kept = []
    for rank, label in enumerate(order.tolist()):
        size = max(1, round(largest * ratio ** (-rank / max(1, len(members) - 1))))
        draw = np.random.Generator(np.random.PCG64([seed, label]))
        kept.append(draw.permutation(members[label])[:size])
    return np.sort(np.concatenate(kept))


def held_out(labels: ArrayLike, *, count: float, seed: int, classes: Sequence[str] = ()) -> tuple[Indices, Indices]:
    """Hold out images of each class, chosen by the seed.

    Args:
        labels: (n,) class indices from 0.
        count: images of each class to hold out or, below 1, a fraction of the class, rounded to at least one image.
        seed: at least 0; the same seed holds out the same images.
        classes: class names for the error message.

    Returns:
        Indices of the remaining images, and of the held-out images, both in ascending order.

    Raises:
        InputError: the count is not positive, the seed is negative, images have no labels, or a class would be left
            without images.
    """
    if count <= 0 or seed < 0:
        raise InputError(f"cannot hold out {count} images per class with seed {seed}: expected count > 0 and seed >= 0")
    stay, aside = list[Indices](), list[Indices]()
    for label, members in enumerate(_members(np.asarray(labels))):
        size = held_out_size(len(members), count)
        if 0 < len(members) <= size:
            name = repr(classes[label]) if classes else label
            raise InputError(f"class {name} has {len(members)} images: holding out {size} would leave none")
        order = np.random.Generator(np.random.PCG64([seed, label])).permutation(members)
        aside.append(order[:size])
        stay.append(order[size:])
    return np.sort(np.concatenate(stay)), np.sort(np.concatenate(aside))


def held_out_size(images: int, count: float) -> int:
    """Return the number of images that `held_out` holds out of a class of this size."""
    return int(count) if count >= 1 else max(1, round(count * images))


def _members(labels: NDArray[np.integer]) -> list[Indices]:
    """Return the image indices of each class, in ascending order."""
    if not labels.size or labels.min() < 0:
        raise InputError("cannot choose images by class: some have no label")
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])
