"""Shared memory that workers fill with batches over and over.

Note [Slots]
1. A new piece of shared memory for each batch costs a worker a tenth of its time: the system clears and maps it page by
   page. So there is one piece, as long as the loader lives, with a slot for each batch in flight.
2. The main process gives each request a slot, and takes the slot back when it has copied the batch out of it, into
   pinned memory where there is a GPU. What the user holds is a copy, which nothing overwrites.
3. A DataLoader delivers in order and asks for at most `workers * prefetch` batches in advance, one of which may just be
   on its way to the user. When it is iterated anew, its workers first finish what they were asked for.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_keys = itertools.count()
_known: "WeakValueDictionary[int, Slots]" = WeakValueDictionary()


class Slots:
    """The shared memory. In the main process it can be found by its key.

    Args:
        count: of slots.
        batch_size: images in each.
        size: side of the images in pixels.

    Attributes:
        key: of this object, the same in all processes.
        images: uint8 (count, batch_size, size, size, 3).
    """

    def __init__(self, count: int, batch_size: int, size: int) -> None:
        self.key = next(_keys)
        self.images = torch.empty(count, batch_size, size, size, 3, dtype=torch.uint8).share_memory_()
        _known[self.key] = self

    @staticmethod
    def copied(key: int, slot: int, count: int, *, pin: bool) -> Tensor:
        """The first images of a slot, copied out of it.

        Args:
            key: of the slots.
            slot: which.
            count: of images.
            pin: into pinned memory.
        """
        images = _known[key].images[slot, :count]
        return torch.empty(images.shape, dtype=images.dtype, pin_memory=pin).copy_(images)


class _Batches(Protocol):
    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[NDArray[np.int64]]: ...


class SlottedBatches:
    """A batch sampler that gives each batch of another one a slot.

    Args:
        batches: that other one.
        slots: how many there are.
    """

    def __init__(self, batches: _Batches, slots: int) -> None:
        self.batches, self.slots = batches, slots
        self._taken: deque[int] = deque()
        self._free: deque[int] = deque()

    def __len__(self) -> int:
        """Batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Slot and batch."""
        self._taken, self._free = deque(), deque(range(self.slots))
        for pairs in self.batches:
            self._taken.append(self._free.popleft())
            yield self._taken[-1], pairs

    def release(self) -> None:
        """Take back the slot of the oldest batch."""
        self._free.append(self._taken.popleft())
