"""A pool of reusable buffers in shared memory, which workers fill with batches.

Note [Buffers]
1. Allocating shared memory for each batch would cost a worker a tenth of its time, since the system clears and maps it
   page by page. The pool is therefore allocated once per loader, with a slot for each batch in flight.
2. The main process assigns a slot to each request and frees it after copying the batch out of it, to pinned memory if
   there is a GPU. The user gets a copy, which is never overwritten.
3. A DataLoader delivers batches in order and requests at most `workers * prefetch` in advance, one of which may be on
   its way to the user. When it is iterated again, its workers first finish their pending requests.
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
    """Buffers in shared memory. The main process finds a pool by its key.

    Attributes:
        key: identifier of this pool, the same in all processes.
        images: uint8 (count, batch_size, size, size, 3).
    """

    def __init__(self, count: int, batch_size: int, size: int) -> None:
        self.key = next(_keys)
        self.images = torch.empty(count, batch_size, size, size, 3, dtype=torch.uint8).share_memory_()
        _known[self.key] = self

    @staticmethod
    def copied(key: int, slot: int, count: int, *, pin: bool) -> Tensor:
        """Return a copy of the first `count` images of a slot, in pinned memory if `pin` is set."""
        images = _known[key].images[slot, :count]
        return torch.empty(images.shape, dtype=images.dtype, pin_memory=pin).copy_(images)


class SlottedBatches:
    """A batch sampler that yields each batch of another sampler together with one of `slots` free slots."""

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
        """Free the slot of the oldest batch."""
        self._free.append(self._taken.popleft())
