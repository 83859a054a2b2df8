"""Loaders with worker processes: an endless, resumable training stream, and evaluation in order.

Note [Loading]
1. The result depends neither on the number of workers nor on how they are started, since randomness is keyed by
   (seed, draw).
2. PyTorch requests batches from its sampler before they are used. The loader counts batches when it yields them, and
   checkpoints store this count.
3. Batches in flight are in shared memory: (workers * prefetch + 1) * batch_size * 3 * size * size bytes.
"""

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from relaylab.data.batches import Batch, Delivery, ImageBatches, OrderedBatches
from relaylab.data.buffers import BufferPool, SlottedBatches
from relaylab.data.crops import Crops
from relaylab.data.faults import FaultLog
from relaylab.data.geometry import CropSpec
from relaylab.data.sampling import DrawBatches, KeyedSampler
from relaylab.data.sources.source import Source
from relaylab.errors import InputError, LabError

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Settings of the processes that decode images.

    Attributes:
        count: number of processes; 0 decodes in this process.
        prefetch: batches that each process prepares in advance.
        pin_memory: return batches in pinned memory, for asynchronous copies to a GPU; ignored without a GPU.
        start: "fork", "spawn" or "forkserver"; None for the platform's default.

    Raises:
        InputError: the count is below 0, the prefetch below 1, or the start method is not available.
    """

    count: int = 0
    prefetch: int = 4
    pin_memory: bool = False
    start: str | None = None

    def __post_init__(self) -> None:
        if self.count < 0 or self.prefetch < 1:
            raise InputError(f"workers {self.count}, prefetch {self.prefetch}: expected workers >= 0, prefetch >= 1")
        if self.start not in (None, *multiprocessing.get_all_start_methods()):
            raise InputError(f"start {self.start!r}: expected one of {multiprocessing.get_all_start_methods()}")

    def loader(self, dataset: Dataset[Any], batches: Any, *, keep: bool = False) -> "DataLoader[Any]":
        """Return a PyTorch DataLoader of a data set that makes complete batches.

        Args:
            dataset: data set with `__getitems__`.
            batches: batch sampler; each of its items is passed to `dataset`.
            keep: keep the processes between iterations.
        """
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.count,
            collate_fn=_as_it_is,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.prefetch if self.count else None,
            persistent_workers=keep and self.count > 0,
            multiprocessing_context=self.start if self.count else None,
            generator=torch.Generator(),  # not the default generator, which the model uses
        )


class TrainingLoader:
    """Training batches, one epoch per iteration. An interrupted epoch continues in the next iteration.

    Example::

        for batch in loader:                      # one epoch of `Batch`
            train_step(augment(batch.images, batch.draws), batch.labels)
        state = loader.state_dict()               # continue from here: other.load_state_dict(state)

    Iterating raises TooManyFaultsError if too many images cannot be read, and InputError if an unreadable image cannot
    be replaced, or if the iterator has been replaced by a later one.

    Args:
        batches: starts an iteration over the batches of `draws`.
        draws: batch sampler; the stream starts at its position.
        faults: log of unreadable images.

    Attributes:
        faults: log of unreadable images.
        position: number of draws of this rank that have been used.
    """

    def __init__(self, batches: Callable[[], Iterator[Batch]], draws: DrawBatches, faults: FaultLog) -> None:
        self._batches, self._draws, self.faults = batches, draws, faults
        self.position = draws.sampler.position
        self._iterations = 0

    def __len__(self) -> int:
        return len(self._draws)

    def __iter__(self) -> Iterator[Batch]:
        self._draws.sampler.seek(self.position)
        self._iterations += 1
        iteration = self._iterations
        for batch in self._batches():
            self.faults.record(batch.faults)
            self.position += len(batch)
            yield batch
            if iteration != self._iterations:
                raise InputError("a later iterator of this training loader has replaced this one: use one at a time")

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream after the batches used so far, and the faults so far."""
        sampler = self._draws.sampler
        state = {**sampler.state_dict(), "draw": self.position * sampler.num_replicas}
        return {"sampler": state, "faults": self.faults.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where an earlier loader stopped. Call this between iterations.

        Raises:
            InputError: the state is from a different stream.
        """
        self._draws.sampler.load_state_dict(state["sampler"])
        self.position = self._draws.sampler.position
        if "faults" in state:  # absent in older checkpoints of images in memory
            self.faults.load_state_dict(state["faults"])


class EvaluationLoader:
    """All images in order, in each iteration. The last batch may be smaller.

    Iterating raises InputError if an image cannot be read.

    Args:
        batches: starts an iteration over the batches.
        length: number of batches.
    """

    def __init__(self, batches: Callable[[], Iterator[Batch]], length: int) -> None:
        self._batches, self._length = batches, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches():
            for fault in batch.faults:
                raise InputError(f"unreadable image {fault.name}: {fault.reason}; evaluation requires all images")
            yield batch


def training_loader(
    source: Source,
    sampler: KeyedSampler,
    crop_spec: CropSpec,
    *,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    crops: Crops | None = None,
    prefetch: int = 4,
    pin_memory: bool = False,
    max_fault_share: float = 0.001,
    fault_file: Path | None = None,
    start: str | None = None,
) -> TrainingLoader:
    """Return a loader of random crops of the images that a sampler selects.

    Example::

        source = open_source("places2", split="train")
        sampler = ClassAwareSampler(source.labels, seed=0)
        loader = training_loader(source, sampler, CropSpec(), batch_size=256, workers=8)
        batch = next(iter(loader))         # batch.images: uint8 (256, 224, 224, 3)

    Args:
        source: encoded images.
        sampler: selects the images; the stream starts at its position.
        crop_spec: size of the crops.
        batch_size: images per batch of this rank.
        workers: processes that decode; 0 decodes in this process.
        seed: seed of the crops; pass the same seed to `Augmentation`.
        crops: settings of the crops; None for the paper's crops.
        prefetch: batches that each worker prepares in advance.
        pin_memory: return batches in pinned memory, for asynchronous copies to a GPU; ignored without a GPU.
        max_fault_share: fraction of the images that may be unreadable; see `FaultLog`.
        fault_file: file for the list of unreadable images if there are too many.
        start: how to start workers, "fork", "spawn" or "forkserver"; None for the platform's default.

    Raises:
        InputError: the batch size is below 1, or the batches in flight do not fit in shared memory.
    """
    draws = DrawBatches(sampler, batch_size)
    with_workers = Workers(count=workers, prefetch=prefetch, pin_memory=pin_memory, start=start)
    dataset = ImageBatches(source, crop_spec, training=True, seed=seed, crops=crops)
    faults = FaultLog(len(source), max_share=max_fault_share, file=fault_file)
    return TrainingLoader(_batches(dataset, draws, with_workers, keep=True), draws, faults)


def evaluation_loader(
    source: Source, crop_spec: CropSpec, *, batch_size: int, workers: int = 0, pin_memory: bool = False
) -> EvaluationLoader:
    """Return a loader of the centre crops of all images in order. The arguments are the same as for `training_loader`.

    Example::

        for batch in evaluation_loader(source, CropSpec(), batch_size=256, workers=8):
            scores = model(augment.eval()(batch.images))

    Raises:
        InputError: the batch size is below 1, or, while iterating, the batches in flight do not fit in shared memory.
    """
    with_workers = Workers(count=workers, pin_memory=pin_memory)
    ordered = OrderedBatches(range(len(source)), batch_size)

    def batches() -> Iterator[Batch]:  # iterations share no processes
        return _batches(ImageBatches(source, crop_spec, training=False), ordered, with_workers)()

    return EvaluationLoader(batches, len(ordered))


def _batches(
    dataset: ImageBatches, batches: DrawBatches | OrderedBatches, workers: Workers, *, keep: bool = False
) -> Callable[[], Iterator[Batch]]:
    """Set up workers and return a function that iterates over their batches, copied out of their slots."""
    slotted = None
    if workers.count:
        slots, size = workers.count * workers.prefetch + 1, dataset.crop_spec.size
        _check_shared_memory(slots * batches.batch_size * 3 * size**2)
        dataset.pool = BufferPool(slots, batches.batch_size, size)
        slotted = SlottedBatches(batches, slots)
    loader = workers.loader(dataset, slotted or batches, keep=keep)

    def iterate() -> Iterator[Batch]:
        for item in loader:
            if isinstance(item, LabError):
                try:
                    raise item
                finally:
                    del item  # breaks the cycle of error and frame, which would delay the workers' exit by 10 s
            batch = item.received() if isinstance(item, Delivery) else item
            if slotted is not None:
                slotted.release()
            del item
            yield batch

    return iterate


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_shared_memory(needed: int) -> None:
    """Check the space in shared memory, since a worker that exhausts it is killed by a bus error without a message."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise InputError(
            f"batches in flight need {needed / 1e6:.0f} MB of shared memory; {SHARED_MEMORY} has {free / 1e6:.0f} MB "
            "free: use fewer workers, a smaller prefetch or smaller batches, or enlarge it (docker run --shm-size)"
        )
