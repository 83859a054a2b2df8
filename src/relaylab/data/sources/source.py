"""What the rest of the lab knows of a data set: how many images, their labels, and the bytes of each."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int16] | NDArray[np.int32]
UNLABELLED = -1


class Source(Protocol):
    """Encoded images with labels, by number.

    Implementations can be pickled into worker processes at the cost of a path, and hold no Python object per image.

    Attributes:
        title: a name for people, without folders.
        classes: names in the order of the labels.
        labels: (n,) class numbers; `UNLABELLED` in a test set.
        fingerprint: another for other images, labels or classes: what is computed from them is kept under it.
    """

    title: str
    classes: Sequence[str]
    labels: Labels
    fingerprint: str

    def __len__(self) -> int:
        """The number of images."""
        ...

    def read(self, number: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            OSError: it cannot be read, or not any more.
        """
        ...

    def name(self, number: int) -> str:
        """Where an image is, for messages and lists: printable whatever bytes the name is made of."""
        ...
