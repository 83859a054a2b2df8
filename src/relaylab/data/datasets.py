"""Labelled images with their crop spec, in memory or on disk, which make training and evaluation loaders."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from relaylab.data.crops import Crops
from relaylab.data.geometry import CropSpec
from relaylab.data.loader import EvaluationLoader, TrainingLoader, evaluation_loader, training_loader
from relaylab.data.memory import DecodedImages, decoded_statistics, memory_evaluation_loader, memory_training_loader
from relaylab.data.sampling import KeyedSampler
from relaylab.data.sources.cache import cache_folder
from relaylab.data.sources.source import Source, targets_of
from relaylab.data.sources.subset import Subset
from relaylab.data.statistics import ImageStatistics, image_statistics
from relaylab.progress import progress


@dataclass(frozen=True)
class InMemoryDataset:
    """Labelled images that have been decoded to memory, on the CPU or a GPU.

    Example::

        dataset = InMemoryDataset(decode_all(source, crop_spec), crop_spec)
        for batch in dataset.evaluation(batch_size=256):
            images, labels = batch.images, batch.labels

    Attributes:
        decoded: the images.
        crop_spec: size of the crops.
        pin_memory: return batches of images on the CPU in pinned memory, for asynchronous copies to a GPU.
    """

    decoded: DecodedImages
    crop_spec: CropSpec
    pin_memory: bool = False

    @property
    def labels(self) -> NDArray[Any]:
        """Class indices (n,); for multi-label images, (n, classes) of 0 and 1."""
        return self.decoded.labels.cpu().numpy()

    def training(self, sampler: KeyedSampler, batch_size: int, seed: int, crops: Crops | None = None) -> TrainingLoader:
        """Return a loader of random crops of the images that the sampler selects."""
        return memory_training_loader(
            self.decoded,
            sampler,
            self.crop_spec,
            batch_size=batch_size,
            seed=seed,
            crops=crops,
            pin_memory=self.pin_memory,
        )

    def evaluation(self, batch_size: int) -> EvaluationLoader:
        """Return a loader of the centre crops of all images, in order."""
        return memory_evaluation_loader(self.decoded, self.crop_spec, batch_size=batch_size, pin_memory=self.pin_memory)

    def subset(self, indices: NDArray[np.int64]) -> "InMemoryDataset":
        """Return the images with these indices, (m,), as a data set."""
        rows = torch.from_numpy(indices).to(self.decoded.labels.device)
        decoded = DecodedImages(self.decoded.images[rows], self.decoded.labels[rows], self.decoded.classes)
        return replace(self, decoded=decoded)

    def statistics(self) -> ImageStatistics:
        """Return the statistics of the centre crops."""
        return decoded_statistics(self.decoded, self.crop_spec)


@dataclass(frozen=True)
class OnDiskDataset:
    """Labelled images that worker processes decode on the fly. It has the methods of `InMemoryDataset`.

    Attributes:
        source: encoded images.
        crop_spec: size of the crops.
        workers: processes that decode; 0 decodes in this process.
        pin_memory: return batches in pinned memory, for asynchronous copies to a GPU.
        fault_file: file for the list of unreadable images if there are too many.
    """

    source: Source
    crop_spec: CropSpec
    workers: int
    pin_memory: bool = False
    fault_file: Path | None = None

    @property
    def labels(self) -> NDArray[Any]:
        """Class indices (n,); for multi-label images, (n, classes) of 0 and 1."""
        targets = targets_of(self.source)
        return self.source.labels if targets is None else targets

    def training(self, sampler: KeyedSampler, batch_size: int, seed: int, crops: Crops | None = None) -> TrainingLoader:
        """Return a loader of random crops of the images that the sampler selects."""
        return training_loader(
            self.source,
            sampler,
            self.crop_spec,
            batch_size=batch_size,
            workers=self.workers,
            seed=seed,
            crops=crops,
            pin_memory=self.pin_memory,
            fault_file=self.fault_file,
        )

    def evaluation(self, batch_size: int) -> EvaluationLoader:
        """Return a loader of the centre crops of all images, in order."""
        return evaluation_loader(
            self.source, self.crop_spec, batch_size=batch_size, workers=self.workers, pin_memory=self.pin_memory
        )

    def subset(self, indices: NDArray[np.int64]) -> "OnDiskDataset":
        """Return the images with these indices, (m,), as a data set."""
        return replace(self, source=Subset(self.source, indices))

    def statistics(self) -> ImageStatistics:
        """Return the statistics of the centre crops, which are computed once and cached."""
        key, folder = self.source.fingerprint, cache_folder() / "statistics"
        with progress("mean image", len(self.source)) as task:
            return image_statistics(
                self.source, self.crop_spec, key=key, folder=folder, workers=self.workers, task=task
            )


ImageDataset = InMemoryDataset | OnDiskDataset
