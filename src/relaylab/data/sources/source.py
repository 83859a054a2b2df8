"""The interface of a data set: its images' labels, names and bytes."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int16] | NDArray[np.int32]
UNLABELLED = -1


class Source(Protocol):
    """Encoded images with labels, by index.

    Implementations can be pickled into worker processes at the cost of a path, and hold no Python object per image.

    Attributes:
        title: display name, without folders.
        classes: names in the order of the labels.
        labels: (n,) class indices; `UNLABELLED` in a test set.
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
