"""Batches from worker processes: an endless training stream that can be resumed, and evaluation in order.

Note [Loading]
1. The result does not depend on the number of workers, nor on how they are started: chance is keyed by (seed, draw).
2. PyTorch asks its sampler for batches some time before they are used. What has been used is counted here, where the
   batches come out, and is what a checkpoint holds.
3. Batches in flight lie in shared memory: (workers * prefetch + 1) * batch_size * 3 * size * size bytes.
"""

import multiprocessing
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from relaylab.data.batches import Batch, Delivery, ImageBatches, OrderedBatches
from relaylab.data.faults import FaultLog
from relaylab.data.geometry import View
from relaylab.data.sampling import DrawBatches, KeyedSampler
from relaylab.data.slots import Slots, SlottedBatches
from relaylab.data.sources.source import Source
from relaylab.errors import InputError, LabError

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that decode.

    Attributes:
        count: of them; 0 decodes in this process.
        prefetch: batches that each makes in advance.
        pin_memory: for copies to a GPU that do not wait. Without a GPU it does nothing.
        start: "fork", "spawn" or "forkserver"; None for the platform's own way.
    """

    count: int = 0
    prefetch: int = 4
    pin_memory: bool = False
    start: str | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            InputError: a count below 0, a prefetch below 1, or a way to start that this platform does not have.
        """
        if self.count < 0 or self.prefetch < 1:
            raise InputError(f"{self.count} workers, prefetch {self.prefetch}: expected at least 0 and at least 1")
        if self.start not in (None, *multiprocessing.get_all_start_methods()):
            raise InputError(f"start {self.start!r}: expected one of {multiprocessing.get_all_start_methods()}")

    def loader(self, dataset: Dataset[Any], batches: Any, *, keep: bool = False) -> "DataLoader[Any]":
        """PyTorch's DataLoader around a data set that makes whole batches.

        Args:
            dataset: with `__getitems__`.
            batches: a batch sampler: what the data set is asked for.
            keep: the processes from one iteration to the next.
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
            generator=torch.Generator(),  # of its own: the default one is the model's
        )


class TrainingLoader:
    """Training batches, one epoch for each iteration. An epoch that is broken off goes on with the next iteration.

    Attributes:
        faults: what is known of unreadable images.
        position: draws of this rank that have been used.
    """

    def __init__(self, batches: "_Batches", draws: DrawBatches, faults: FaultLog) -> None:
        self._batches, self._draws, self.faults = batches, draws, faults
        self.position = draws.sampler.position
        self._iterations = 0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._draws)

    def __iter__(self) -> Iterator[Batch]:
        """The batches from `position` to the end of its epoch.

        Raises:
            TooManyFaultsError: too many images cannot be read.
            InputError: a class of which no image can be read.
        """
        self._draws.sampler.seek(self.position)
        self._iterations += 1
        iteration = self._iterations
        for batch in self._batches:
            self.faults.record(batch.faults)
            self.position += len(batch)
            yield batch
            if iteration != self._iterations:
                raise InputError("this iterator of a training loader was replaced by a later one: use one at a time")

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in batches used, and the faults so far."""
        sampler = self._draws.sampler
        state = {**sampler.state_dict(), "draw": self.position * sampler.num_replicas}
        return {"sampler": state, "faults": self.faults.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was. To be called between iterations.

        Raises:
            InputError: a state of another stream.
        """
        self._draws.sampler.load_state_dict(state["sampler"])
        self.position = self._draws.sampler.position
        if "faults" in state:  # a loader from memory has none
            self.faults.load_state_dict(state["faults"])


class EvaluationLoader:
    """All images in order, as often as it is iterated."""

    def __init__(self, source: Source, view: View, batches: OrderedBatches, workers: Workers) -> None:
        self._source, self._view, self._batches, self._workers = source, view, batches, workers

    def __len__(self) -> int:
        """Batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """The batches; the last one may be smaller.

        Raises:
            InputError: an image that cannot be read.
        """
        dataset = ImageBatches(self._source, self._view, training=False)
        for batch in _Batches(dataset, self._batches, self._workers):  # iterations know nothing of each other
            for fault in batch.faults:
                raise InputError(f"unreadable image {fault.name}: {fault.reason}; evaluation needs all images")
            yield batch


def training_loader(
    source: Source,
    sampler: KeyedSampler,
    view: View,
    *,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    prefetch: int = 4,
    pin_memory: bool = False,
    max_fault_share: float = 0.001,
    fault_file: Path | None = None,
    start: str | None = None,
) -> TrainingLoader:
    """Random crops of the images that a sampler chooses.

    Args:
        source: of encoded images.
        sampler: of them; its position is where the stream begins.
        view: of them.
        batch_size: images in a batch of this rank.
        workers: processes that decode; 0 decodes in this one.
        seed: of the windows; give `Augmentation` the same.
        prefetch: batches that each worker makes in advance.
        pin_memory: for copies to a GPU that do not wait. Without a GPU it does nothing.
        max_fault_share: of the images may be unreadable; see `FaultLog`.
        fault_file: where their list goes if there are too many.
        start: "fork", "spawn" or "forkserver"; None for the platform's own way to start workers.

    Raises:
        InputError: a batch size below 1, or more than shared memory holds.
    """
    draws = DrawBatches(sampler, batch_size)
    with_workers = Workers(count=workers, prefetch=prefetch, pin_memory=pin_memory, start=start)
    dataset = ImageBatches(source, view, training=True, seed=seed)
    faults = FaultLog(len(source), max_share=max_fault_share, file=fault_file)
    return TrainingLoader(_Batches(dataset, draws, with_workers, keep=True), draws, faults)


def evaluation_loader(
    source: Source,
    view: View,
    *,
    batch_size: int,
    workers: int = 0,
    prefetch: int = 4,
    pin_memory: bool = False,
    start: str | None = None,
) -> EvaluationLoader:
    """Centre crops of all images in order.

    Args:
        source: of encoded images.
        view: of them, the same as in training.
        batch_size: images in a batch; the last one may have fewer.
        workers: processes that decode; 0 decodes in this one.
        prefetch: batches that each worker makes in advance.
        pin_memory: as for `training_loader`.
        start: as for `training_loader`.

    Raises:
        InputError: a batch size below 1, or more than shared memory holds.
    """
    with_workers = Workers(count=workers, prefetch=prefetch, pin_memory=pin_memory, start=start)
    return EvaluationLoader(source, view, OrderedBatches(range(len(source)), batch_size), with_workers)


class _Batches:
    """Batches of a data set, out of their slots, and errors raised."""

    def __init__(
        self, dataset: ImageBatches, batches: DrawBatches | OrderedBatches, workers: Workers, *, keep: bool = False
    ) -> None:
        self._slotted = None
        if workers.count:
            slots, size = workers.count * workers.prefetch + 1, dataset.view.size
            _check_shared_memory(slots * batches.batch_size * 3 * size**2)
            dataset.slots = Slots(slots, batches.batch_size, size)
            self._slotted = SlottedBatches(batches, slots)
        self._loader = workers.loader(dataset, self._slotted or batches, keep=keep)

    def __iter__(self) -> Iterator[Batch]:
        for item in self._loader:
            if isinstance(item, LabError):
                try:
                    raise item
                finally:
                    del item  # else the error holds this frame, this frame the error, and workers end only after 10 s
            batch = item.received() if isinstance(item, Delivery) else item
            if self._slotted is not None:
                self._slotted.release()
            del item
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_shared_memory(needed: int) -> None:
    """Where it runs out, a worker dies of a bus error that says nothing."""
    if not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise InputError(
            f"batches in flight need {needed / 1e6:.0f} MB of shared memory; {SHARED_MEMORY} has {free / 1e6:.0f} MB "
            "free: use fewer workers, a smaller prefetch or smaller batches, or enlarge it (docker run --shm-size)"
        )
