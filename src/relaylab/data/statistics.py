"""What is subtracted from images, and along which colours they vary: sums over a training set's centre crops.

Note [Statistics]
Everything follows from integer sums, which are exact: the result does not depend on how many workers took part or in
which order they were done. The workers add up whole batches, and send sums instead of images. int64 is enough for 10^9
images of 224 x 224.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import Dataset

from relaylab.data.augment import ColourComponents
from relaylab.data.batches import ImageBatches, OrderedBatches, Pairs
from relaylab.data.faults import Fault
from relaylab.data.geometry import View
from relaylab.data.loader import Workers
from relaylab.data.sources.cache import written
from relaylab.data.sources.source import Source
from relaylab.errors import InputError
from relaylab.progress import Silent, Task

FORMAT = "relaylab image statistics 1"
IMAGES_AT_ONCE = 16  # in float64, within the processor's caches

Sums = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageStatistics:
    """Exact sums over the pixels of images, in 0 to 255, and what follows from them.

    Attributes:
        sums: int64 (size, size, 3), of each pixel over the images.
        products: int64 (3, 3), of products of two channels over all pixels of all images.
        count: of images.
        unreadable: names of those that were left out.
    """

    sums: Sums
    products: Sums
    count: int
    unreadable: tuple[str, ...] = ()

    @property
    def mean_image(self) -> NDArray[np.float32]:
        """(size, size, 3): what the paper subtracts."""
        return (self.sums / self.count).astype(np.float32)

    @property
    def mean(self) -> NDArray[np.float64]:
        """(3,), of each channel."""
        return self.sums.sum((0, 1)) / self._pixels

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(3, 3), of the channels over all pixels."""
        totals: list[int] = self.sums.sum((0, 1)).tolist()
        pixels = self._pixels
        # In Python's integers of any length: the difference of two large numbers keeps all its digits.
        rows = [
            [(pixels * product - one * other) / pixels**2 for product, other in zip(row, totals, strict=True)]
            for row, one in zip(self.products.tolist(), totals, strict=True)
        ]
        return np.array(rows)

    @property
    def std(self) -> NDArray[np.float64]:
        """(3,), of each channel over all pixels."""
        return np.sqrt(np.diag(self.covariance))

    def components(self) -> ColourComponents:
        """For the colour shift: principal components of pixels in [0, 1], the largest first."""
        values, vectors = np.linalg.eigh(self.covariance / 255**2)
        signs = np.sign(vectors[np.abs(vectors).argmax(0), range(3)])  # either sign is one; this makes it one only
        return ColourComponents(values[::-1].copy(), (vectors * signs)[:, ::-1].copy())

    @property
    def _pixels(self) -> int:
        return self.count * self.sums.shape[0] * self.sums.shape[1]


def image_statistics(
    source: Source,
    view: View,
    *,
    key: str,
    folder: Path,
    limit: int | None = None,
    workers: int = 0,
    batch_size: int = 64,
    task: Task | None = None,
) -> ImageStatistics:
    """The statistics of a training set, from an earlier run if there was one.

    Args:
        source: of encoded images.
        view: whose centre crops are meant.
        key: anything that names the data, such as its index's fingerprint. Other data need another key.
        folder: where the sums are kept.
        limit: take so many images, spread evenly, instead of all.
        workers: processes that decode; 0 decodes in this one.
        batch_size: images that are added up at once.
        task: counts images.

    Raises:
        InputError: a limit below 1, no image can be read, or the folder cannot be written to.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    about = {"format": FORMAT, "key": key, "view": json.dumps(asdict(view)), "limit": str(limit)}
    about["images"] = str(len(source))
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    file = folder / f"statistics-{digest}.safetensors"
    found = _read(file, about, view.size)
    if found is None:
        found = compute(source, view, limit=limit, workers=workers, batch_size=batch_size, task=task)
        with written(file) as temporary:
            tensors = {"sums": found.sums, "products": found.products, "count": np.array([found.count])}
            save_file(tensors, temporary, metadata=about | {"unreadable": json.dumps(found.unreadable)})
    return found


def compute(
    source: Source,
    view: View,
    *,
    limit: int | None = None,
    workers: int = 0,
    batch_size: int = 64,
    task: Task | None = None,
) -> ImageStatistics:
    """The statistics, from the images. See `image_statistics`.

    Raises:
        InputError: no image can be read.
    """
    task = task or Silent()
    chosen = min(limit or len(source), len(source))
    numbers = np.arange(chosen, dtype=np.int64) * len(source) // max(chosen, 1)
    sums, products = np.zeros((view.size, view.size, 3), np.int64), np.zeros((3, 3), np.int64)
    faults: list[Fault] = []
    dataset = _BatchSums(ImageBatches(source, view, training=False))
    for part in Workers(count=workers).loader(dataset, OrderedBatches(numbers, batch_size)):
        sums += part.sums
        products += part.products
        faults += part.faults
        task.advance(part.asked)
    if len(faults) == chosen:
        first = f": {faults[0].name}: {faults[0].reason}" if faults else ""
        raise InputError(f"none of {chosen} images can be read{first}")
    return ImageStatistics(sums, products, chosen - len(faults), tuple(fault.name for fault in faults))


@dataclass(frozen=True, eq=False)
class _Part:
    sums: NDArray[np.int32]
    products: Sums
    faults: tuple[Fault, ...]
    asked: int


class _BatchSums(Dataset[_Part]):
    """Batches added up where they are decoded."""

    def __init__(self, crops: ImageBatches) -> None:
        self.crops = crops

    def __getitems__(self, pairs: Pairs) -> _Part:
        """Unreadable images are rows of zeros, which add nothing."""
        size = self.crops.view.size
        images = torch.empty(len(pairs), size, size, 3, dtype=torch.uint8)
        faults = self.crops.fill(pairs, images).faults
        sums, products = sum_batch(images)
        return _Part(sums, products, faults, len(pairs))


def sum_batch(images: Tensor) -> tuple[NDArray[np.int32], Sums]:
    """Exact sums over a batch.

    Args:
        images: uint8 (n, size, size, 3), n below 2^23, on any device.

    Returns:
        Sums of each pixel, (size, size, 3), and of the products of two channels, (3, 3).
    """
    if images.device.type != "cpu":
        return _sum_on_device(images)
    pixels = images.numpy()
    sums = np.zeros(pixels.shape[1:], np.int32)
    products = np.zeros((3, 3))
    for first in range(0, len(pixels), IMAGES_AT_ONCE):
        some = pixels[first : first + IMAGES_AT_ONCE]
        for image in some:
            sums += image
        rows = some.reshape(-1, 3).astype(np.float64)
        products += rows.T @ rows  # whole numbers far below 2^53: exact in whatever order they are added
    return sums, products.astype(np.int64)


def _sum_on_device(images: Tensor) -> tuple[NDArray[np.int32], Sums]:
    rows = images.reshape(-1, 3).double()  # again whole numbers below 2^53
    return images.sum(0, dtype=torch.int32).cpu().numpy(), (rows.T @ rows).long().cpu().numpy()


def _read(file: Path, about: dict[str, str], size: int) -> ImageStatistics | None:
    """What an earlier run has found, unless the file is absent, damaged or of something else."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="numpy") as stored:
            told: dict[str, Any] = stored.metadata() or {}
            sums, products, count = (stored.get_tensor(name) for name in ("sums", "products", "count"))
        unreadable = tuple(json.loads(told.pop("unreadable")))
        fits = told == about and sums.shape == (size, size, 3) and products.shape == (3, 3)
        return ImageStatistics(sums, products, int(count[0]), unreadable) if fits else None
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
