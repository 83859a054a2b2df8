"""Data sets made from others: chosen images, an artificial long tail, images set aside, labels of other classes."""

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
    """A subset of a source, as a `Source` of its own.

    Args:
        source: contains the images.
        indices: (m,) indices in the source; image i of the subset is image `indices[i]` of the source.

    Raises:
        InputError: no indices, or one that the source does not have.
    """

    def __init__(self, source: Source, indices: ArrayLike) -> None:
        indices = np.asarray(indices)
        if indices.ndim != 1 or not indices.size or not np.issubdtype(indices.dtype, np.integer):
            raise InputError(f"image numbers of shape {indices.shape}, {indices.dtype}: expected some, whole, in a row")
        if indices.min() < 0 or indices.max() >= len(source):
            raise InputError(f"image numbers {indices.min()} .. {indices.max()}: expected 0 .. {len(source) - 1}")
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
        """Return the size of an encoded image in bytes, where the source knows it."""
        return self.source.size(int(self.indices[index]))  # pyright: ignore[reportAttributeAccessIssue]

    def name(self, index: int) -> str:
        """Return the path of an image, for messages and lists."""
        return self.source.name(int(self.indices[index]))


class Relabelled:
    """A source with labels in the order of other classes, as a `Source` of its own.

    Args:
        source: contains the images.
        wanted: classes, such as those of the training images.

    Raises:
        InputError: a class with images that is not among them.
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
        self.targets = None if targets is None else moved(targets, places, len(wanted.keys))
        self.fingerprint = sha256(f"{source.fingerprint} {wanted}".encode(errors="backslashreplace")).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image; raises OSError if it cannot be read."""
        return self.source.read(index)

    def name(self, index: int) -> str:
        """Return the path of an image, for messages and lists."""
        return self.source.name(index)


def long_tail(labels: ArrayLike, *, ratio: float, seed: int) -> Indices:
    """Choose images so that class sizes fall exponentially, from the largest class's to that divided by `ratio`.

    The order of the classes is drawn from the seed. A class that has fewer images than it may keep keeps them all;
    every class that has any keeps at least one.

    Args:
        labels: (n,) class indices from 0.
        ratio: largest to smallest class, at least 1.
        seed: 0 or more; the same seed keeps the same images.

    Returns:
        Indices (m,) of the images to keep, rising.

    Raises:
        InputError: a ratio below 1, a negative seed, or images without labels.
    """
    labels = np.asarray(labels)
    if not 1 <= ratio < np.inf or seed < 0:
        raise InputError(f"long tail of ratio {ratio:g} and seed {seed}: expected a ratio of at least 1, a seed from 0")
    members = [group for group in _members(labels) if len(group)]
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(members))
    largest = max(len(group) for group in members)
    kept = []
    for rank, label in enumerate(order.tolist()):
        size = max(1, round(largest * ratio ** (-rank / max(1, len(members) - 1))))
        draw = np.random.Generator(np.random.PCG64([seed, label]))
        kept.append(draw.permutation(members[label])[:size])
    return np.sort(np.concatenate(kept))


def held_out(labels: ArrayLike, *, count: float, seed: int) -> tuple[Indices, Indices]:
    """Set images of each class aside, chosen by the seed; return the rising indices of the others and of these.

    `count` is their number, or below 1 their share, which is rounded, and at least one image.

    Raises:
        InputError: a count of 0 or less, a negative seed, images without labels, or a class that would be left empty.
    """
    if count <= 0 or seed < 0:
        raise InputError(f"{count} images of each class to set aside, seed {seed}: expected at least 1, a seed from 0")
    stay, aside = list[Indices](), list[Indices]()
    for label, members in enumerate(_members(np.asarray(labels))):
        size = int(count) if count >= 1 else max(1, round(count * len(members)))
        if 0 < len(members) <= size:
            raise InputError(f"class {label} has {len(members)} images: {size} set aside would leave none")
        order = np.random.Generator(np.random.PCG64([seed, label])).permutation(members)
        aside.append(order[:size])
        stay.append(order[size:])
    return np.sort(np.concatenate(stay)), np.sort(np.concatenate(aside))


def _members(labels: NDArray[np.integer]) -> list[Indices]:
    """Return the rising image indices of each class."""
    if not labels.size or labels.min() < 0:
        raise InputError("images without labels cannot be chosen by class")
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])
