"""A pool of buffers in shared memory that workers fill with batches over and over.

Note [Buffers]
1. A new piece of shared memory for each batch costs a worker a tenth of its time: the system clears and maps it page by
   page. So there is one piece, as long as the loader lives, with a slot for each batch in flight.
2. The main process gives each request a slot, and takes the slot back when it has copied the batch out of it, into
   pinned memory if there is a GPU. What the user holds is a copy, which nothing overwrites.
3. A DataLoader delivers in order and asks for at most `workers * prefetch` batches in advance, one of which may just be
   on its way to the user. When it is iterated anew, its workers first finish what they were asked for.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_keys = itertools.count()
_known: "WeakValueDictionary[int, BufferPool]" = WeakValueDictionary()


class BufferPool:
    """Buffers in shared memory, found by the key of their pool in the main process.

    Attributes:
        key: number of this pool, the same in all processes.
        images: uint8 (count, batch_size, size, size, 3).
    """

    def __init__(self, count: int, batch_size: int, size: int) -> None:
        self.key = next(_keys)
        self.images = torch.empty(count, batch_size, size, size, 3, dtype=torch.uint8).share_memory_()
        _known[self.key] = self

    @staticmethod
    def copied(key: int, slot: int, count: int, *, pin: bool) -> Tensor:
        """Return a copy of the first `count` images of a slot, on request in pinned memory."""
        images = _known[key].images[slot, :count]
        return torch.empty(images.shape, dtype=images.dtype, pin_memory=pin).copy_(images)


class SlottedBatches:
    """A batch sampler that yields each batch of another one together with a free slot of `slots`."""

    def __init__(self, batches: Iterable[NDArray[np.int64]], slots: int) -> None:
        self.batches, self.slots = batches, slots
        self._taken: deque[int] = deque()
        self._free: deque[int] = deque()

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        self._taken, self._free = deque(), deque(range(self.slots))
        for pairs in self.batches:
            self._taken.append(self._free.popleft())
            yield self._taken[-1], pairs

    def release(self) -> None:
        """Take back the slot of the oldest batch."""
        self._free.append(self._taken.popleft())
