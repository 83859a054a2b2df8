"""Mean image, standard deviation and principal colours, from sums over the centre crops of a training set.

Note [Statistics]
All statistics are computed from integer sums, which are exact, so the result depends neither on the number of workers
nor on their order. The workers add up complete batches and return sums instead of images. int64 is sufficient for 10^9
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
from relaylab.data.batches import ImageBatches, OrderedBatches, Pairs, spread
from relaylab.data.faults import Fault
from relaylab.data.geometry import CropSpec
from relaylab.data.loader import Workers
from relaylab.data.sources.cache import atomic_cache_write
from relaylab.data.sources.source import Source
from relaylab.errors import InputError
from relaylab.outside.folders import is_our_own
from relaylab.outside.reading import parse
from relaylab.progress import Task

FORMAT = "relaylab image statistics 2"
IMAGES_AT_ONCE = 16  # in float64, fits the processor's caches

Sums = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageStatistics:
    """Exact sums over the pixels of images, in 0 to 255, and the statistics derived from them.

    Attributes:
        sums: int64 (size, size, 3), sum of each pixel over the images.
        products: int64 (3, 3), sums of the products of two channels over all pixels of all images.
        count: number of images.
        unreadable: names of images that were omitted.
    """

    sums: Sums
    products: Sums
    count: int
    unreadable: tuple[str, ...] = ()

    @property
    def mean_image(self) -> NDArray[np.float32]:
        """Mean of each pixel, (size, size, 3), which the paper subtracts."""
        return (self.sums / self.count).astype(np.float32)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of each channel, (3,)."""
        return self.sums.sum((0, 1)) / self._pixels

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Covariance of the channels over all pixels, (3, 3)."""
        # Python's integers are exact: the difference of two large numbers loses no digits.
        totals, products = self.sums.sum((0, 1)).astype(object), self.products.astype(object)
        return ((self._pixels * products - np.outer(totals, totals)) / self._pixels**2).astype(np.float64)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of each channel over all pixels, (3,)."""
        return np.sqrt(np.diag(self.covariance))

    def components(self) -> ColourComponents:
        """Return the principal components of pixels in [0, 1] for the colour shift, largest first."""
        values, vectors = np.linalg.eigh(self.covariance / 255**2)
        signs = np.sign(vectors[np.abs(vectors).argmax(0), range(3)])  # eigenvectors have an arbitrary sign; fix it
        return ColourComponents(values[::-1].copy(), (vectors * signs)[:, ::-1].copy())

    @property
    def _pixels(self) -> int:
        return self.count * self.sums.shape[0] * self.sums.shape[1]


def image_statistics(
    source: Source,
    crop_spec: CropSpec,
    *,
    key: str,
    folder: Path,
    limit: int | None = None,
    workers: int = 0,
    batch_size: int = 64,
    task: Task | None = None,
) -> ImageStatistics:
    """Return the statistics of a training set, from the cache if they have been computed before.

    Example::

        statistics = image_statistics(source, CropSpec(), key=source.fingerprint, folder=cache_folder() / "statistics")
        augment = Augmentation(torch.from_numpy(statistics.mean_image), components=statistics.components())

    Args:
        source: encoded images.
        crop_spec: size of the centre crops.
        key: identifies the data, such as `source.fingerprint`. Different data must have a different key.
        folder: cache folder for the sums.
        limit: maximum number of images to use, evenly spread; None for all.
        workers: processes that decode; 0 decodes in this process.
        batch_size: images that are added up at once.
        task: progress display, which counts images.

    Raises:
        InputError: the limit is below 1, no image can be read, or the folder cannot be written to.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    about = {"format": FORMAT, "key": key, "view": json.dumps(asdict(crop_spec)), "limit": str(limit)}
    about["images"] = str(len(source))
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    file = folder / f"statistics-{digest}.safetensors"
    statistics = _read(file, about, crop_spec.size)
    if statistics is None:
        statistics = compute(source, crop_spec, limit=limit, workers=workers, batch_size=batch_size, task=task)
        with atomic_cache_write(file) as temporary:
            count = np.array([statistics.count])
            tensors = {"sums": statistics.sums, "products": statistics.products, "count": count}
            unreadable = json.dumps(statistics.unreadable)
            digest = _digest(statistics.sums, statistics.products, count, unreadable)
            save_file(tensors, temporary, metadata=about | {"unreadable": unreadable, "digest": digest})
    return statistics


def compute(
    source: Source,
    crop_spec: CropSpec,
    *,
    limit: int | None = None,
    workers: int = 0,
    batch_size: int = 64,
    task: Task | None = None,
) -> ImageStatistics:
    """Compute the statistics like `image_statistics`, without a cache. Raises InputError if no image can be read."""
    indices = spread(len(source), limit)
    sums, products = np.zeros((crop_spec.size, crop_spec.size, 3), np.int64), np.zeros((3, 3), np.int64)
    faults: list[Fault] = []
    dataset = _BatchSums(ImageBatches(source, crop_spec, training=False))
    batches = OrderedBatches(indices, batch_size)
    for count, batch_sums, batch_products, batch_faults in Workers(count=workers).loader(dataset, batches):
        sums += batch_sums
        products += batch_products
        faults += batch_faults
        if task is not None:
            task.advance(count)
    if len(faults) == len(indices):
        first = f": {faults[0].name}: {faults[0].reason}" if faults else ""
        raise InputError(f"none of {len(indices)} images can be read{first}")
    return ImageStatistics(sums, products, len(indices) - len(faults), tuple(fault.name for fault in faults))


class _BatchSums(Dataset[Any]):
    """A PyTorch data set of sums over batches, computed in the process that decodes the images."""

    def __init__(self, crops: ImageBatches) -> None:
        self.crops = crops

    def __getitems__(self, pairs: Pairs) -> tuple[int, NDArray[np.int32], Sums, tuple[Fault, ...]]:
        """Return count, sums, products and faults. Unreadable images are zeros, which do not change the sums."""
        size = self.crops.crop_spec.size
        images = torch.empty(len(pairs), size, size, 3, dtype=torch.uint8)
        faults = self.crops.fill(pairs, images).faults
        return len(pairs), *sum_batch(images), faults


def sum_batch(images: Tensor) -> tuple[NDArray[np.int32], Sums]:
    """Return exact sums over uint8 images (n, size, size, 3), n below 2^23, on any device.

    Returns:
        The sum of each pixel, (size, size, 3), and the sums of the products of two channels, (3, 3).
    """
    if images.device.type != "cpu":
        return _sum_on_device(images)
    pixels = images.numpy()
    sums = np.zeros(pixels.shape[1:], np.int32)
    products = np.zeros((3, 3))
    for first in range(0, len(pixels), IMAGES_AT_ONCE):
        block = pixels[first : first + IMAGES_AT_ONCE]
        for image in block:
            sums += image
        rows = block.reshape(-1, 3).astype(np.float64)
        products += rows.T @ rows  # integers far below 2^53, so exact in any order of summation
    return sums, products.astype(np.int64)


def _sum_on_device(images: Tensor) -> tuple[NDArray[np.int32], Sums]:
    rows = images.reshape(-1, 3).double()  # integers below 2^53, as above
    return images.sum(0, dtype=torch.int32).cpu().numpy(), (rows.T @ rows).long().cpu().numpy()


def _read(file: Path, about: dict[str, str], size: int) -> ImageStatistics | None:
    """Read cached statistics; return None if the file is absent, damaged or for different data."""
    if not is_our_own(file):
        return None
    try:
        with safe_open(file, framework="numpy") as stored:
            metadata: dict[str, str] = stored.metadata() or {}
            sums, products, count = (stored.get_tensor(name) for name in ("sums", "products", "count"))
        unreadable, digest = metadata.pop("unreadable"), metadata.pop("digest")
        fits = metadata == about and sums.shape == (size, size, 3) and products.shape == (3, 3)
        if not fits or digest != _digest(sums, products, count, unreadable):
            return None
        return ImageStatistics(sums, products, int(count[0]), parse(unreadable, tuple[str, ...], str(file)))
    except (SafetensorError, OSError, LookupError, ValueError, TypeError, OverflowError, MemoryError):
        return None


def _digest(sums: NDArray[Any], products: NDArray[Any], count: NDArray[Any], unreadable: str) -> str:
    """Return a hash of the content of a statistics file."""
    content = hashlib.sha256(unreadable.encode())
    for tensor in (sums, products, count):
        content.update(f"{tensor.dtype} {tensor.shape}".encode() + tensor.tobytes())
    return content.hexdigest()
