"""Batches of decoded crops, each made in one call by a worker of the loader.

Note [Batches]
1. The data set receives the indices of a whole batch and writes the crops into the rows of one tensor, which is in
   shared memory if a worker makes the batch (Note [Buffers]). Nothing has to be stacked.
2. In training, an image that cannot be read is replaced by a different image of its class, which the draw determines.
   The batch stays full, the class keeps its share, and the result remains a function of (seed, draw).
3. Errors for the user are returned, not raised, since a DataLoader would wrap them in a worker's traceback. The loaders
   (`relaylab.data.loader`) raise them in the main process.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from relaylab.data.augment import Column
from relaylab.data.buffers import BufferPool
from relaylab.data.crops import Crops
from relaylab.data.decode import decode
from relaylab.data.faults import Fault, ImageFault
from relaylab.data.geometry import CropSpec, centre_box, cut_box, cut_window
from relaylab.data.keyed import uniforms
from relaylab.data.sources.source import UNLABELLED, Source, targets_of
from relaylab.errors import InputError, LabError

ATTEMPTS = 8  # at replacing an unreadable image
READ_AT_ONCE = 32
Pairs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of crops with their labels.

    Attributes:
        images: uint8 (n, size, size, 3), RGB, cropped but not augmented otherwise; see `Augmentation`.
        labels: int64 (n,); `UNLABELLED` in a test set. If images are multi-label, float32 (n, classes) of 0 and
            1. On the device of the images.
        draws: int64 (n,), on the CPU: the draws that selected the images; in evaluation, the indices of the images.
        indices: int64 (n,), on the CPU: indices of the images in their source, after replacements.
        faults: images that could not be read.
    """

    images: Tensor
    labels: Tensor
    draws: Tensor
    indices: Tensor
    faults: tuple[Fault, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with images and labels on a device. From pinned memory the copy is asynchronous."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def pin_memory(self) -> "Batch":
        """Return the batch with images and labels in pinned memory."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True, eq=False)
class Columns:
    """A batch without its images; see `Batch`. It has arrays, since sending a tensor to a process costs a file."""

    labels: NDArray[np.int64] | NDArray[np.float32]
    draws: NDArray[np.int64]
    indices: NDArray[np.int64]
    faults: tuple[Fault, ...]

    def batch(self, images: Tensor) -> Batch:
        """Return the batch with its images."""
        labels, draws, indices = map(torch.from_numpy, (self.labels, self.draws, self.indices))
        return Batch(images, labels, draws, indices, self.faults)


@dataclass(frozen=True, eq=False)
class Delivery:
    """A batch that a worker sends to the main process. Its images are in a slot of shared memory."""

    key: int
    slot: int
    columns: Columns

    def received(self, *, pin: bool = False) -> Batch:
        """Return the batch, copied out of its slot."""
        batch = self.columns.batch(BufferPool.copied(self.key, self.slot, len(self.columns.labels), pin=pin))
        return replace(batch, labels=batch.labels.pin_memory()) if pin else batch

    def pin_memory(self) -> Batch:
        """Return the batch, copied out of its slot into pinned memory. The DataLoader's pinning thread calls this."""
        return self.received(pin=True)


class ImageBatches(Dataset[Batch]):
    """A PyTorch data set that decodes and crops a batch of a source's images at a time. See Note [Batches].

    Args:
        source: encoded images.
        crop_spec: size of the crops.
        training: cut random windows and replace unreadable images by others; otherwise cut centre crops, and return
            zeros for unreadable images.
        seed: seed of the training crops.
        crops: settings of the training crops; None for the paper's crops.

    Attributes:
        pool: shared buffers for the batches of workers; None to allocate memory for each batch.
    """

    def __init__(
        self, source: Source, crop_spec: CropSpec, *, training: bool, seed: int = 0, crops: Crops | None = None
    ) -> None:
        self.source, self.crop_spec, self.training, self.seed = source, crop_spec, training, seed
        self.crops = crops or Crops()
        self.pool: BufferPool | None = None

    def __getitems__(self, request: Pairs | tuple[int, Pairs]) -> Batch | Delivery | LabError:
        """Make a batch of (n, 2) draws and image indices, which a slot precedes if there is a pool. Returns errors."""
        try:
            if isinstance(request, tuple):
                assert self.pool is not None, "a request for a slot needs a pool"
                slot, pairs = request
                return Delivery(self.pool.key, slot, self.fill(pairs, self.pool.images[slot]))
            images = torch.empty(len(request), self.crop_spec.size, self.crop_spec.size, 3, dtype=torch.uint8)
            return self.fill(request, images).batch(images)
        except LabError as error:
            return error

    def fill(self, pairs: Pairs, images: Tensor) -> Columns:
        """Make a batch in existing memory.

        Args:
            pairs: (n, 2) draws and image indices.
            images: uint8 (n or more, size, size, 3); receives the crops.

        Returns:
            The batch without its images.

        Raises:
            InputError: no replacement could be read for an unreadable training image.
        """
        draws, indices = np.array(pairs).T.copy()
        labels = np.asarray(self.source.labels[indices]).astype(np.int64)
        places = self.crops.random_numbers(self.seed, draws).tolist()
        faults: list[Fault] = []
        requested = indices.tolist()
        for first in range(0, len(requested), READ_AT_ONCE):
            # Read several files, then decode them: alternating would evict code and data from the processor's caches.
            block = requested[first : first + READ_AT_ONCE]
            for row, (index, data) in enumerate(zip(block, list(map(self._read, block)), strict=True), first):
                fault = self._cut(index, data, places[row], images[row])
                if fault is None:
                    continue
                if self.training:
                    indices[row], tried = self._replace(fault, int(draws[row]), places[row], images[row])
                    faults += tried
                else:
                    images[row] = 0
                    faults.append(fault)
        if self.training:
            self.crops.finish(images, self.seed, draws)
        targets = targets_of(self.source)
        truth = labels if targets is None else targets[indices].astype(np.float32)  # of the replacements, if any
        return Columns(truth, draws, indices, tuple(faults))

    def _read(self, index: int) -> bytes | OSError:
        try:
            return self.source.read(index)
        except OSError as error:
            return error

    def _cut(self, index: int, data: bytes | OSError, place: Sequence[float], out: Tensor) -> Fault | None:
        """Decode an image and cut its window into `out`; return a fault if the image cannot be read."""
        if isinstance(data, OSError):
            return Fault(index, self.source.name(index), data.strerror or str(data))
        try:
            pixels = decode(data, short_side=self.crop_spec.short_side if self.crop_spec.reduced_decoding else None)
        except ImageFault as error:
            return Fault(index, self.source.name(index), str(error))
        height, width, _ = pixels.shape
        if self.training:
            cut_window(pixels, self.crops.window(self.crop_spec, height, width, place), out)
        else:
            cut_box(pixels, centre_box(self.crop_spec, height, width), out)
        return None

    def _replace(self, fault: Fault, draw: int, place: Sequence[float], out: Tensor) -> tuple[int, list[Fault]]:
        """Cut a different image of the same class; return its index and all faults, including the given one.

        Multi-label images have no single class, so any other image can replace them.
        """
        label = self.source.labels[fault.index]
        others = np.flatnonzero(self.source.labels == label)
        others = others[others != fault.index]
        faults = [fault]
        for chance in uniforms(self.seed, [draw], Column.REPLACEMENT + ATTEMPTS)[0, Column.REPLACEMENT :]:
            if not len(others):
                break
            at = int(chance * len(others))
            index = int(others[at])
            another = self._cut(index, self._read(index), place, out)
            if another is None:
                return index, [replace(fault, draw=draw, replacement=index) for fault in faults]
            faults.append(another)
            others = np.delete(others, at)
        of_class, what = ("", "them") if label == UNLABELLED else (f"class {self.source.classes[label]}: ", "the class")
        raise InputError(
            f"{of_class}{fault.name} cannot be read ({fault.reason}), nor can any of the {len(faults) - 1} images that "
            f"were tried instead; repair the images or remove {what}"
        )


def spread(count: int, limit: int | None) -> NDArray[np.int64]:
    """Return at most `limit` indices below `count`, evenly spread; all of them if `limit` is None."""
    chosen = count if limit is None else min(limit, count)
    return np.arange(chosen, dtype=np.int64) * count // max(chosen, 1)


class OrderedBatches:
    """A batch sampler of image indices in order. Yields arrays (batch, 2) of each index, twice.

    The last batch may be smaller. A batch size below 1 raises InputError.
    """

    def __init__(self, indices: Sequence[int] | NDArray[np.int64], batch_size: int) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        self.indices, self.batch_size = indices, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[Pairs]:
        for first in range(0, len(self.indices), self.batch_size):
            indices = np.asarray(self.indices[first : first + self.batch_size], np.int64)
            yield np.stack([indices, indices], axis=1)
