"""How fast encoded images become batches, against torchvision's own way and against bare libjpeg-turbo.

    python -m benchmarks.input [--quick] [--json FILE]

Data: JPEGs of 500 x 375 pixels, 4:2:0, quality 75 to 95, cut from the photographs that come with scikit-learn and
scikit-image, in a temporary folder, read before. All contenders take images in random order in batches of 64, with as
many worker processes as there are cores, started beforehand; they take turns (`benchmarks.measure`). Figures per core
are per worker process.

| contender   | what it is                                                                                          |
| ----------- | --------------------------------------------------------------------------------------------------- |
| torchvision | ImageFolder, RandomResizedCrop(224, antialias), flip, float, Normalize, the DataLoader's own collate |
| ours        | `training_loader` with class-aware sampling, to the batch of uint8                                  |
| ours_float  | the same and `Augmentation` on the CPU, which runs in the main process                              |
| libjpeg     | libjpeg-turbo by simplejpeg at full scale into one buffer, from bytes in memory; nothing else       |
| ours_10k    | `ours` with an index of 10,000 entries, over the same files again and again                         |
| ours_8m     | likewise with 8,000,000 entries in 401 classes                                                      |
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

from benchmarks.measure import (
    Figures,
    Step,
    Target,
    environment,
    interleave,
    parse_arguments,
    publish,
    ratio,
)
from benchmarks.plain_crops import plain_training_crop
from relaylab.data.augment import Augmentation
from relaylab.data.batches import OrderedBatches
from relaylab.data.geometry import CropSpec
from relaylab.data.loader import Workers, training_loader
from relaylab.data.sampling import ClassAwareSampler
from relaylab.data.sources.index import IndexedImages, write_index
from relaylab.data.sources.listing import Listing, Place

SEED = 20160916  # any will do
CLASSES = 401
SMALL, LARGE = 10_000, 8_000_000
LEAST_PSNR = 55.0  # dB between our crops and Pillow's

OVER_TORCHVISION_LIMIT = 2.5
OVER_LIBJPEG_LIMIT = 0.62
SLOWDOWN_LIMIT = 1.05


class WrongPixelsError(RuntimeError):
    """Crops that are not what they should be: their time would mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much to run.

    Args:
        files: distinct JPEGs.
        images: in one measurement of one contender.
        batch: images in a batch.
        rounds: of every timing, at most.
        budget_s: stop the comparison of the contenders after so long.
        slowdown_budget_s: stop that of the two indexes after so long.
        large: entries of the large index.
    """

    files: int = 400
    images: int = 2048
    batch: int = 64
    rounds: int = 60
    budget_s: float = 200
    slowdown_budget_s: float = 60
    large: int = LARGE


FULL = Settings()
QUICK = Settings(budget_s=17, slowdown_budget_s=6)


def write_photographs(folder: Path, count: int) -> list[str]:
    """Make the data.

    Args:
        folder: to write to, as ImageFolder reads it: class folders with images.
        count: of images.

    Returns:
        Their names below the folder.
    """
    from skimage import data as skimage_data
    from sklearn.datasets import load_sample_image

    originals = [load_sample_image("china.jpg"), load_sample_image("flower.jpg"), skimage_data.astronaut()]
    originals += [skimage_data.coffee(), skimage_data.rocket(), skimage_data.chelsea()]
    rng = np.random.default_rng(SEED)
    names: list[str] = []
    for index in range(count):
        image = Image.fromarray(originals[index % len(originals)])
        width, height = (500, 375) if rng.random() < 0.75 else (375, 500)
        # Never blown up by more than a quarter, so that there is detail to decode.
        scale = rng.uniform(0.8, 1.0) * min(image.width / width, image.height / height, 1.0)
        across, down = round(width * scale), round(height * scale)
        left = int(rng.integers(image.width - across + 1))
        top = int(rng.integers(image.height - down + 1))
        cut = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + across, top + down))
        name = f"class{index % 20:02}/{index:06}.jpg"
        (folder / name).parent.mkdir(exist_ok=True)
        cut.save(folder / name, quality=int(rng.integers(75, 96)), subsampling="4:2:0")
        names.append(name)
    return names


def indexed(folder: Path, names: Sequence[str], entries: int, index: Path) -> IndexedImages:
    """An index of so many entries over the files, again and again, in 401 classes.

    Args:
        folder: with the images.
        names: below it.
        entries: how many.
        index: file to write.
    """
    encoded = [name.encode() for name in names]
    repeats = -(-entries // len(names))
    sizes = np.tile(np.array([len(name) for name in encoded]), repeats)[:entries]
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint32)
    blob = np.tile(np.frombuffer(b"".join(encoded), np.uint8), repeats)[: int(bounds[-1])]
    classes = tuple(f"class {label}" for label in range(CLASSES))
    listing = Listing(
        title="photographs",
        classes=classes,
        folders=classes,
        places=(Place(str(folder), folder.name),),
        labels=(np.arange(entries) % CLASSES).astype(np.int16),
        names=blob,
        bounds=bounds,
        place=np.zeros(entries, np.uint16),
        spans=None,
        ignored={},
        file_states=(),
    )
    write_index(index, listing)
    return IndexedImages(index)


class BareDecoding(Dataset[int]):
    """The least that anyone can do: decode each image at full scale into one buffer, and return nothing of it.

    Args:
        files: their contents.
    """

    def __init__(self, files: Sequence[bytes]) -> None:
        self.files = files
        self.buffer = np.empty(max(simplejpeg.decode_jpeg(data).size for data in files), np.uint8)

    def __getitems__(self, pairs: NDArray[np.int64]) -> int:
        """Decode a batch."""
        for index in pairs[:, 1].tolist():
            simplejpeg.decode_jpeg(self.files[index], fastdct=False, fastupsample=False, buffer=self.buffer)
        return len(pairs)


def torchvision_loader(folder: Path, settings: Settings, workers: int) -> "DataLoader[Any]":
    """The reference training of torchvision's classification models: its preset, with antialiasing."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    dataset = ImageFolder(str(folder), transform)
    sampler = RandomSampler(dataset, replacement=True, num_samples=settings.images)
    return DataLoader(
        dataset, settings.batch, sampler=sampler, num_workers=workers, persistent_workers=True, prefetch_factor=4
    )


def our_loader(source: IndexedImages, settings: Settings, workers: int) -> Any:
    """Ours, as a training would make it."""
    sampler = ClassAwareSampler(source.labels, seed=SEED, num_samples=settings.images)
    return training_loader(source, sampler, CropSpec(), batch_size=settings.batch, workers=workers, seed=SEED)


def check_pixels(source: IndexedImages) -> float:
    """Compare our crops with Pillow's.

    Returns:
        The worst PSNR of some draws, in dB.

    Raises:
        WrongPixelsError: too low.
    """
    sampler = ClassAwareSampler(source.labels, seed=SEED, num_samples=32)
    batch = next(iter(training_loader(source, sampler, CropSpec(), batch_size=32, seed=SEED)))
    worst = np.inf
    for image, draw, index in zip(batch.images, batch.draws.tolist(), batch.indices.tolist(), strict=True):
        expected = plain_training_crop(source.read(index), CropSpec(), seed=SEED, draw=draw)
        error = np.mean((image.numpy().astype(float) - expected) ** 2)
        worst = min(worst, 10 * np.log10(255**2 / max(error, 1e-12)))
    if worst < LEAST_PSNR:
        raise WrongPixelsError(
            f"expected at least {LEAST_PSNR} dB between our crops and Pillow's; received {worst:.1f}"
        )
    return float(worst)


def _drain(loader: Any) -> Step:
    def step() -> None:
        for _ in loader:
            pass

    return step


def _drain_through(loader: Any, augmentation: Augmentation) -> Step:
    def step() -> None:
        for batch in loader:
            augmentation(batch.images, batch.draws)

    return step


def _random_batches(files: int, settings: Settings) -> OrderedBatches:
    return OrderedBatches(np.random.default_rng(SEED).integers(files, size=settings.images), settings.batch)


def measure_speed(folder: Path, names: Sequence[str], settings: Settings, workers: int) -> Figures:
    """The figures that compare the contenders."""
    source = indexed(folder, names, SMALL, folder.parent / "speed.safetensors")
    figures: Figures = {"least_psnr_db": check_pixels(source)}
    files = [(folder / name).read_bytes() for name in names]
    figures["kilobytes_per_image"] = statistics.mean(map(len, files)) / 1000
    augmentation = Augmentation(torch.full((224, 224, 3), 117.0), seed=SEED)
    contenders = {
        "torchvision": _drain(torchvision_loader(folder, settings, workers)),
        "ours": _drain(our_loader(source, settings, workers)),
        "ours_float": _drain_through(our_loader(source, settings, workers), augmentation),
        "libjpeg": _drain(
            Workers(count=workers).loader(BareDecoding(files), _random_batches(len(files), settings), keep=True)
        ),
    }
    times = interleave(contenders, rounds=settings.rounds, budget_s=settings.budget_s, warmup=1)
    figures |= _ratio("images_per_core_over_torchvision", times["torchvision"], times["ours"])
    figures |= _ratio("images_per_core_over_libjpeg", times["libjpeg"], times["ours"])
    figures |= _ratio("images_over_torchvision_with_float", times["torchvision"], times["ours_float"])
    figures |= _per_core(times, settings, workers)
    return figures | {"rounds": len(times["ours"])}


def measure_slowdown(folder: Path, names: Sequence[str], settings: Settings, workers: int) -> Figures:
    """What a large index costs."""
    contenders: dict[str, Step] = {}
    figures: Figures = {}
    for name, entries in (("10k", SMALL), ("8m", settings.large)):
        source = indexed(folder, names, entries, folder.parent / f"{name}.safetensors")
        started = time.perf_counter()
        loader = our_loader(source, settings, workers)
        figures[f"start_s_{name}"] = time.perf_counter() - started
        contenders[f"ours_{name}"] = _drain(loader)
    times = interleave(contenders, rounds=settings.rounds, budget_s=settings.slowdown_budget_s, warmup=1)
    figures |= _ratio("slowdown_10k_to_8m", times["ours_8m"], times["ours_10k"])
    return figures | _per_core(times, settings, workers) | {"slowdown_rounds": len(times["ours_8m"])}


def _ratio(key: str, over: Sequence[float], under: Sequence[float]) -> Figures:
    found = ratio(over, under)
    return {key: found.median, f"{key}_iqr": found.iqr, f"{key}_error": found.error}


def _per_core(times: Mapping[str, Sequence[float]], settings: Settings, workers: int) -> Figures:
    return {
        f"images_per_s_per_core_{name}": settings.images / statistics.median(seconds) / workers
        for name, seconds in times.items()
    }


@contextmanager
def photographs(count: int) -> Iterator[tuple[Path, list[str]]]:
    """The data in a temporary folder while it is needed, and their names below it."""
    with tempfile.TemporaryDirectory(prefix="relaylab-input-") as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        yield folder, write_photographs(folder, count)


def measure(settings: Settings, workers: int) -> Figures:
    """All figures."""
    with photographs(settings.files) as (folder, names):
        figures = measure_speed(folder, names, settings, workers)
        return figures | measure_slowdown(folder, names, settings, workers)


TARGETS = {
    "images_per_core_over_torchvision": Target(">", OVER_TORCHVISION_LIMIT),
    "images_per_core_over_libjpeg": Target(">", OVER_LIBJPEG_LIMIT),
    "slowdown_10k_to_8m": Target("<=", SLOWDOWN_LIMIT),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark: figures and environment to the terminal and, if asked for, to a file."""
    arguments = parse_arguments("input", "How fast encoded images become batches.", argv)
    settings = QUICK if arguments.quick else FULL
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        about: dict[str, Any] = environment()
        workers = about["cores"]
        figures = measure(settings, workers)
    finally:
        torch.set_num_threads(threads)
    about |= {
        "benchmark": "input",
        "quick": arguments.quick,
        "seed": SEED,
        "workers": workers,
        "data": f"{settings.files} JPEGs of 500 x 375, 4:2:0, quality 75 to 95, in the page cache",
        "batch": settings.batch,
        "elapsed_s": round(time.perf_counter() - started, 1),
    }
    publish(figures, TARGETS, about, arguments.json)


if __name__ == "__main__":
    main()
