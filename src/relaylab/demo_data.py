"""What the demo trains on: scikit-learn's digits, or a train and a val part of any source, in memory where they fit."""

import io
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from relaylab.data.faults import FaultLog
from relaylab.data.geometry import View
from relaylab.data.memory import DecodedImages, decode_all, free_memory
from relaylab.data.parts import InMemory, OnDisk, Part
from relaylab.data.sampling import SAMPLERS, KeyedSampler
from relaylab.data.sources.opening import LISTS, open_source
from relaylab.data.sources.source import Source
from relaylab.data.sources.subset import Thinned, few_per_class, long_tail
from relaylab.data.statistics import ImageStatistics
from relaylab.errors import InputError
from relaylab.options import DemoConfig
from relaylab.progress import progress

DIGITS_TRAIN = 1000  # of 1,797; the rest is the validation part
LONG_TAIL_SEED = 0  # the thinned set is a data set: it is the same for all seeds of training
MEMORY_SHARE = 0.5  # of what is free may be filled with images; beyond that they are decoded as they are needed


@dataclass(frozen=True)
class ImageSet:
    """A data set of two parts.

    Attributes:
        name: for the report.
        classes: names, in the order of the labels.
        train: training part.
        val: validation part.
        training_images: where each training image is, if the set was thinned out.
    """

    name: str
    classes: tuple[str, ...]
    train: Part
    val: Part
    training_images: tuple[str, ...] = ()

    @cached_property
    def statistics(self) -> ImageStatistics:
        """Of the training images; found once for all runs."""
        return self.train.statistics()


def load(config: DemoConfig) -> ImageSet:
    """Open the data that the options name, and decode it if it fits into memory.

    Args:
        config: resolved options.

    Raises:
        InputError: a path, folder or image that cannot be used.
    """
    return _load_files(config) if config.data else _load_digits(config)


def view_of(config: DemoConfig) -> View:
    """Crops of `--size` from images a little larger."""
    size = cast(int, config.size)
    return View(size=size, short_side=stored_side(size) if config.data else size + 2)


def stored_side(size: int) -> int:
    """Side of the images that crops of `size` are cut from: the paper's 256 for 224, to a multiple of 4.

    The multiple of 4 lets the centre crop sit in the centre, and keeps 64-pixel crops of 72-pixel images from resizing
    them to 73.
    """
    return max(size, 4 * round(size * 256 / 224 / 4))


def make_sampler(data: ImageSet, config: DemoConfig, seed: int, kind: str | None = None) -> KeyedSampler:
    """The sampler that `--sampling` names, or another kind.

    Raises:
        InputError: a class without training images.
    """
    return SAMPLERS[kind or config.sampling](data.train.labels, seed=seed, classes=data.classes)


def epoch_draws(data: ImageSet, config: DemoConfig) -> dict[str, list[int]]:
    """How often each class comes up in an epoch, shuffled and as sampled here."""
    numbers = np.arange(len(data.train.labels))
    kinds = dict.fromkeys(["shuffled", config.sampling])
    draws = {kind: make_sampler(data, config, config.seed, kind).draw(numbers) for kind in kinds}
    count = len(data.classes)
    return {kind: np.bincount(data.train.labels[images], minlength=count).tolist() for kind, images in draws.items()}


def sample(data: ImageSet, config: DemoConfig) -> bytes | None:
    """A PNG with twelve of the digits of each class, or None: other people's images stay out of reports."""
    if config.data:
        return None
    images, labels = cast(InMemory, data.train).decoded.images[..., 0], torch.from_numpy(data.train.labels)
    rows = [images[labels == label][:12] for label in range(len(data.classes))]
    blank = torch.zeros_like(images[:1])
    full = torch.stack([torch.cat([row, blank.expand(12 - len(row), -1, -1)]) for row in rows])
    tiles = 255 - full.permute(0, 2, 1, 3)
    file = io.BytesIO()
    sheet = Image.fromarray(tiles.flatten(2).flatten(0, 1).numpy())
    sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def _load_digits(config: DemoConfig) -> ImageSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = cast("tuple[np.ndarray, np.ndarray]", load_digits(return_X_y=True))
    grey = torch.from_numpy(np.round(pixels * 255 / 16).astype(np.uint8)).reshape(-1, 8, 8)
    grey = torch.nn.functional.pad(grey, (1, 1, 1, 1))  # crops of 8 out of 10 shift by one pixel
    images = grey[..., None].expand(-1, -1, -1, 3).contiguous()
    # The split does not depend on --seed: seeds then differ in training only.
    train, val = train_test_split(np.arange(len(labels)), train_size=DIGITS_TRAIN, stratify=labels, random_state=0)
    classes = tuple(str(digit) for digit in range(_class_count(config, 10)))
    rows = {
        "train": train[_chosen(labels[train], len(classes), config.train_per_class, config.long_tail)],
        "val": val[_chosen(labels[val], len(classes), config.val_per_class, None)],
    }
    target = torch.from_numpy(labels.astype(np.int64))
    parts = {name: InMemory(DecodedImages(images[r], target[r], classes), view_of(config)) for name, r in rows.items()}
    return ImageSet("scikit-learn's handwritten digits", classes, parts["train"], parts["val"])


def _load_files(config: DemoConfig) -> ImageSet:
    if any(path.is_file() and path.suffix.lower() in LISTS for path in config.data):
        raise InputError("the demo takes folders and tar files with train/ and val/; for lists see docs/data.md")
    train = open_source(config.data, split="train", watch=progress)
    val = open_source(config.data, split="val", classes=train.folders, watch=progress)
    count = _class_count(config, len(train.classes))
    _check_classes(train, val, count)
    limits = config.train_per_class, config.val_per_class
    numbers = {
        "train": _chosen(np.asarray(train.labels), count, limits[0], config.long_tail),
        "val": _chosen(np.asarray(val.labels), count, limits[1], None),
    }
    sources = {"train": Thinned(train, numbers["train"]), "val": Thinned(val, numbers["val"])}
    view = view_of(config)
    needed = sum(len(source) for source in sources.values()) * 3 * view.short_side**2
    if needed <= MEMORY_SHARE * free_memory("cpu"):
        with progress("decoding", sum(len(source) for source in sources.values())) as task:
            workers = min(cast(int, config.workers), len(numbers["train"]) // 500)  # to start one takes seconds
            faults = FaultLog(len(sources["train"]))  # evaluation needs all images, training does not
            decoded = {
                "train": decode_all(sources["train"], view, workers=workers, faults=faults, task=task),
                "val": decode_all(sources["val"], view, workers=workers, task=task),
            }
            parts: dict[str, Part] = {name: InMemory(images, view) for name, images in decoded.items()}
    else:
        parts = {name: OnDisk(source, view, cast(int, config.workers)) for name, source in sources.items()}
    title = " + ".join(path.name for path in config.data)
    names = tuple(map(sources["train"].name, range(len(sources["train"])))) if config.long_tail is not None else ()
    return ImageSet(title, tuple(train.classes[:count]), parts["train"], parts["val"], names)


def _class_count(config: DemoConfig, there_are: int) -> int:
    if config.classes is not None and config.classes > there_are:
        raise InputError(f"--classes {config.classes}: there are only {there_are}")
    return config.classes or there_are


def _chosen(labels: NDArray[np.integer], classes: int, per_class: int | None, ratio: float | None) -> NDArray[np.int64]:
    """Numbers of the images to use: those of the first classes, a few of each, thinned out to a long tail."""
    numbers = np.flatnonzero(labels < classes)
    if per_class is not None:
        numbers = numbers[few_per_class(labels[numbers], per_class)]
    if ratio is not None:
        numbers = numbers[long_tail(labels[numbers], ratio=ratio, seed=LONG_TAIL_SEED)]
    return numbers


def _check_classes(train: Source, val: Source, count: int) -> None:
    counts = [np.bincount(np.asarray(source.labels), minlength=len(train.classes))[:count] for source in (train, val)]
    for (split, here), (other, there) in zip(
        (("train", counts[0]), ("val", counts[1])), (("val", counts[1]), ("train", counts[0])), strict=True
    ):
        alone = [train.classes[label] for label in np.flatnonzero((here > 0) & (there == 0)).tolist()]
        if alone:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            raise InputError(f"classes with {split} images but no {other} images: {', '.join(alone[:3])}{more}")
    if count < 2:
        raise InputError(f"one class only ({train.classes[0]}) in {train.title}: expected at least 2")
