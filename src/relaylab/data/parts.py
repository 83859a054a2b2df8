"""A labelled part of a data set, in memory or on disk, ready to be cut into batches."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from relaylab.data.geometry import View
from relaylab.data.loader import EvaluationLoader, TrainingLoader, evaluation_loader, training_loader
from relaylab.data.memory import DecodedImages, MemoryEvaluationLoader, MemoryTrainingLoader, decoded_statistics
from relaylab.data.sampling import KeyedSampler
from relaylab.data.sources.cache import cache_folder
from relaylab.data.sources.source import Source
from relaylab.data.sources.subset import Thinned
from relaylab.data.statistics import ImageStatistics, image_statistics
from relaylab.progress import progress

Training = TrainingLoader | MemoryTrainingLoader
Evaluation = EvaluationLoader | MemoryEvaluationLoader


class Part(Protocol):
    """Labelled images, ready to be cut into batches."""

    @property
    def labels(self) -> NDArray[np.integer]:
        """(n,) class numbers."""
        ...

    def training(self, sampler: KeyedSampler, batch_size: int, seed: int) -> Training:
        """Random crops, an epoch each time it is iterated."""
        ...

    def evaluation(self, batch_size: int) -> Evaluation:
        """All centre crops in order."""
        ...

    def some(self, numbers: NDArray[np.int64]) -> "Part":
        """A part of the part."""
        ...

    def statistics(self) -> ImageStatistics:
        """Of the centre crops."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A part that is decoded already."""

    decoded: DecodedImages
    view: View

    @property
    def labels(self) -> NDArray[np.integer]:
        """See `Part`."""
        return self.decoded.labels.cpu().numpy()

    def training(self, sampler: KeyedSampler, batch_size: int, seed: int) -> Training:
        """See `Part`."""
        return MemoryTrainingLoader(self.decoded, sampler, self.view, batch_size=batch_size, seed=seed)

    def evaluation(self, batch_size: int) -> Evaluation:
        """See `Part`."""
        return MemoryEvaluationLoader(self.decoded, self.view, batch_size=batch_size)

    def some(self, numbers: NDArray[np.int64]) -> "InMemory":
        """See `Part`."""
        rows = torch.from_numpy(numbers).to(self.decoded.labels.device)
        return InMemory(
            DecodedImages(self.decoded.images[rows], self.decoded.labels[rows], self.decoded.classes), self.view
        )

    def statistics(self) -> ImageStatistics:
        """See `Part`."""
        return decoded_statistics(self.decoded, self.view)


@dataclass(frozen=True)
class OnDisk:
    """A part that is decoded by worker processes as it is needed.

    Attributes:
        source: of encoded images.
        view: of them.
        workers: processes that decode; 0 decodes in this one.
        pin_memory: for copies to a GPU that do not wait.
        fault_file: where the list of unreadable images goes if there are too many.
    """

    source: Source
    view: View
    workers: int
    pin_memory: bool = False
    fault_file: Path | None = None

    @property
    def labels(self) -> NDArray[np.integer]:
        """See `Part`."""
        return self.source.labels

    def training(self, sampler: KeyedSampler, batch_size: int, seed: int) -> Training:
        """See `Part`."""
        return training_loader(
            self.source,
            sampler,
            self.view,
            batch_size=batch_size,
            workers=self.workers,
            seed=seed,
            pin_memory=self.pin_memory,
            fault_file=self.fault_file,
        )

    def evaluation(self, batch_size: int) -> Evaluation:
        """See `Part`."""
        return evaluation_loader(
            self.source, self.view, batch_size=batch_size, workers=self.workers, pin_memory=self.pin_memory
        )

    def some(self, numbers: NDArray[np.int64]) -> "OnDisk":
        """See `Part`."""
        return replace(self, source=Thinned(self.source, numbers))

    def statistics(self) -> ImageStatistics:
        """See `Part`."""
        with progress("mean image", len(self.source)) as task:
            return image_statistics(
                self.source,
                self.view,
                key=self.source.fingerprint,
                folder=cache_folder() / "statistics",
                workers=self.workers,
                task=task,
            )
