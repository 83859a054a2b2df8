"""The images of a run: open, check against the recipe, batch and normalise them."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from relaylab.data.augment import Augmentation
from relaylab.data.crops import Crops
from relaylab.data.datasets import ImageDataset, OnDiskDataset
from relaylab.data.geometry import CropSpec
from relaylab.data.mixing import MIXES, Mixing
from relaylab.data.policies import Policy
from relaylab.data.sampling import SAMPLERS, KeyedSampler
from relaylab.data.sources.classes import Classes, classes_of, look_alikes
from relaylab.data.sources.index import IndexedImages
from relaylab.data.sources.listing import NoSplitError, few
from relaylab.data.sources.opening import open_source
from relaylab.data.sources.source import UNLABELLED, Source, class_counts, images_by_class, targets_of
from relaylab.data.sources.subset import Indices, Subset, held_out, held_out_size, long_tail
from relaylab.data.statistics import ImageStatistics
from relaylab.errors import InputError, raise_all
from relaylab.files import available_cores
from relaylab.progress import progress
from relaylab.recipes.schema import ImagesConfig, Recipe, value_text
from relaylab.train.options import RuntimeOptions, TrainOptions
from relaylab.train.storage import decode_in_memory, fits_memory, storage_devices

log = logging.getLogger("relaylab.train")

LEAST_STD = 1.0  # minimum standard deviation of a channel
SHOWN = 3  # similar class names in a message
CHOICE_SEED = 0  # held-out images and rare classes do not depend on the seed of the run


@dataclass(frozen=True)
class RunImages:
    """The training and validation images of a run.

    Attributes:
        statistics: statistics of the training images.
        in_memory: whether all images are decoded once and kept in memory, resized.
        identity: the classes, in the order of the labels.
    """

    train: ImageDataset
    val: ImageDataset
    crop_spec: CropSpec
    statistics: ImageStatistics
    in_memory: bool
    identity: Classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Display names of the classes, in the order of the labels."""
        return self.identity.names

    def sampler(self, recipe: Recipe, seed: int, rank: int = 0, ranks: int = 1) -> KeyedSampler:
        """Return the sampler of one process, with all iterations of the recipe as one epoch."""
        draws = recipe.optimizer.iterations * recipe.optimizer.batch_size // ranks
        make = SAMPLERS[recipe.images.sampling]
        labels, classes = self.train.labels, self.classes
        if labels.ndim == 2:  # all multi-label images are drawn with equal probability
            labels, classes = np.zeros(len(labels), np.int64), None
        return make(labels, seed=seed, rank=rank, num_replicas=ranks, num_samples=draws, classes=classes)

    def counts(self) -> dict[str, list[int]]:
        """Return the number of images per class, for training and validation."""
        return {name: images_by_class(labels, len(self.classes)).tolist() for name, labels in self._labels.items()}

    def sizes(self) -> dict[str, int]:
        """Return the numbers of training and validation images."""
        return {name: len(labels) for name, labels in self._labels.items()}

    @property
    def has_several_labels(self) -> bool:
        """Whether the images are multi-label."""
        return self.train.labels.ndim == 2

    @property
    def _labels(self) -> dict[str, NDArray[Any]]:
        return {"train": self.train.labels, "val": self.val.labels}

    def augmentation(self, recipe: Recipe, seed: int) -> Augmentation:
        """Return the recipe's augmentation, which only normalises in evaluation mode."""
        config, statistics = recipe.augmentation, self.statistics
        mean = statistics.mean_image if config.mean == "pixel" else statistics.mean
        return Augmentation(
            torch.from_numpy(mean),
            torch.from_numpy(statistics.std).clamp(min=LEAST_STD) if config.divide else None,
            seed=seed,
            flip=config.flip,
            components=statistics.components() if config.colour_shift else None,
            strength=config.colour_shift,
            erasing=config.erasing,
        )


def open_images(
    recipe: Recipe,
    options: TrainOptions,
    *,
    device: torch.device,
    devices_here: int = 1,
    fault_file: Path | None = None,
    first: AbstractContextManager[object],
    sources: tuple[Source, Source] | None = None,
    runs: int = 1,
) -> RunImages:
    """Open and check the images of a run, and decode them if they fit into memory; see also `storage_devices`.

    Args:
        recipe: recipe of the run.
        options: options, which include the paths of the images.
        device: device to train on.
        devices_here: number of processes on this machine; each holds its own copy of the images.
        fault_file: file for the list of unreadable images, if there are too many to train.
        first: a lock held while images are listed and counted; the other processes find the results in the cache.
        sources: training and validation images, in place of the paths.
        runs: number of concurrent runs that share the device.

    Raises:
        InputError: a path or an image cannot be used, or the classes differ from the recipe's.
    """
    crop_spec = crop_spec_of(recipe)
    workers = max(1, available_cores() // devices_here) if options.workers is None else options.workers
    with first:
        train, val = open_sources(options, recipe.images) if sources is None else _checked_sources(*sources)
        check_images(recipe, train, val)
        for source in dict.fromkeys((train, val)):
            skipped = getattr(source, "skipped", ())
            if skipped:
                log.info("%s: skipped folders: %s", source.title, few(list(skipped)))
        chosen, held = chosen_indices(recipe.images, train)
        val = val if held is None else Subset(train, held)
        train = train if chosen is None else Subset(train, chosen)
        in_memory = fits_memory(options, (train, val), crop_spec, devices_here)
        if not in_memory:
            pin = device.type == "cuda"
            datasets = [OnDiskDataset(source, crop_spec, workers, pin, fault_file) for source in (train, val)]
            statistics = datasets[0].statistics()
            return RunImages(datasets[0], datasets[1], crop_spec, statistics, in_memory, classes_of(train))
    devices = storage_devices(device, (train, val), crop_spec, crops_of(recipe), runs)
    decoded = list(decode_in_memory((train, val), devices, crop_spec, workers, fault_file, pin=device.type == "cuda"))
    return RunImages(decoded[0], decoded[1], crop_spec, decoded[0].statistics(), in_memory, classes_of(train))


def crop_spec_of(recipe: Recipe) -> CropSpec:
    """Return the image size and crop size of a recipe."""
    return CropSpec(size=recipe.network.image_size, short_side=recipe.images.short_side)


def crops_of(recipe: Recipe) -> Crops:
    """Return the settings of a recipe's training crops."""
    config = recipe.augmentation
    policy = None
    if config.policy is not None:
        policy = Policy(name=config.policy, operations=config.policy_operations, magnitude=config.policy_magnitude)
    return Crops(
        kind=config.crop, areas=config.crop_scale, ratios=config.crop_ratio, padding=config.padding, policy=policy
    )


def mixing_of(recipe: Recipe, seed: int) -> Mixing:
    """Return the recipe's mixup and CutMix, if any."""
    alphas = {name: getattr(recipe.augmentation, name) for name in MIXES}
    return Mixing(alphas, recipe.network.num_classes, seed)


def open_sources(options: RuntimeOptions, images: ImagesConfig | None = None) -> tuple[IndexedImages, IndexedImages]:
    """Open the training and validation images, with the same labels for the same classes.

    Args:
        options: options, which include the paths.
        images: settings of the recipe, with the validation split. If they hold out training images, both returned
            sources are the training images; `chosen_indices` divides them.

    Raises:
        InputError: a path or its content cannot be used.
    """
    if images is not None and images.held_out is not None:
        train = open_training(options)
        return train, train
    if options.val_data:
        train = open_source(options.data, split=None, watch=progress)
        return train, open_source(options.val_data, split=None, classes=train.identity, watch=progress)
    try:
        train = open_source(options.data, split="train", watch=progress)
        split = (images and images.val_split) or "val"
        return train, open_source(options.data, split=split, classes=train.identity, watch=progress)
    except NoSplitError as error:
        raise InputError(f"{error}; {_advice(error.others)}") from None


def _advice(splits: Sequence[str]) -> str:
    """Return advice on validation for data with these splits, none of which is val."""
    test = "to validate on the test split, set images.val_split=test (recipes new --val-split test); "
    held = "to validate on a fifth of the training images, set images.held_out=0.2 (recipes new --hold-out 0.2)"
    return f"{test if 'test' in splits else ''}{held}"


def _checked_sources(train: Source, val: Source) -> tuple[Source, Source]:
    """Check custom sources, and label the validation images by the classes of the training images."""
    train = open_source(train)
    return train, train if val is train else open_source(val, classes=classes_of(train))


def open_training(options: RuntimeOptions) -> IndexedImages:
    """Open the training images: the split train, or all images of data without splits.

    Raises:
        InputError: a path or its content cannot be used.
    """
    try:
        return open_source(options.data, split=None if options.val_data else "train", watch=progress)
    except NoSplitError as error:
        if error.others:
            raise
        return open_source(options.data, split=None, watch=progress)


def check_classes(train: Source, val: Source) -> None:
    """Check that there are at least two classes, and that the training and validation images have the same classes.

    Raises:
        InputError: there are not; the message lists the classes.
    """
    classes = classes_of(train)
    if len(classes.keys) < 2:
        count = f"only one class ({classes.keys[0]})" if classes.keys else "no classes"
        raise InputError(f"{count} in {train.title}: expected at least 2")
    in_train, in_val = (np.unique(np.asarray(source.labels)) for source in (train, val))
    alone = {
        "train": [classes.keys[label] for label in np.setdiff1d(in_train, in_val) if label != UNLABELLED],
        "val": [classes.keys[label] for label in np.setdiff1d(in_val, in_train) if label != UNLABELLED],
    }
    problems = [
        f"classes with {split} images but no {other} images: {few(alone[split])}"
        for split, other in (("train", "val"), ("val", "train"))
        if alone[split]
    ]
    if problems:
        alike = look_alikes(alone["train"], alone["val"])
        advice = "rename the folders of one split" if alike else "add their images, or remove their folders"
        raise InputError("; ".join([*problems, *alike[:SHOWN], advice]))
    for text in look_alikes(classes.keys, classes.keys[::-1])[:SHOWN]:
        log.warning("%s: similar class names, %s", train.title, text)


def check_images(recipe: Recipe, train: Source, val: Source) -> None:
    """Check that the images are labelled, with the same classes in both splits, as many as the network's outputs.

    Raises:
        InputError: they are not.
    """
    has_several = targets_of(train) is not None or targets_of(val) is not None
    if has_several:
        _check_several(recipe, train, val)
    for source, split in () if has_several else ((train, "training"), (val, "validation")):
        if (np.asarray(source.labels) == UNLABELLED).any():
            raise InputError(f"{source.title}: {split} images without labels are not supported")
    check_classes(train, val)
    count, expected = len(train.classes), recipe.network.num_classes
    if count != expected:
        raise InputError(
            f"{train.title} has {count} classes, and the recipe's network {expected}: use different images, or "
            f"{_without_images(train) or f'--set network.num_classes={count}'}"
        )


def _without_images(train: Source) -> str:
    """Return advice on classes without images; empty if there are none."""
    keys = classes_of(train).keys
    empty = [keys[label] for label in np.flatnonzero(class_counts(train) == 0)]
    where = "empty folders, extra lines of the categories file, or gaps between the labels of a list"
    return f"remove the {len(empty):,} classes without images ({where}): {few(empty)}" if empty else ""


def _check_several(recipe: Recipe, train: Source, val: Source) -> None:
    """Check that a recipe supports multi-label images.

    Raises:
        InputError: it does not; the message lists all reasons.
    """
    problems: list[str] = []
    with_several, other = (train, val) if targets_of(train) is not None else (val, train)
    targets = targets_of(val)
    if targets_of(other) is None:
        problems.append(f"images of {with_several.title} are multi-label, those of {other.title} single-label")
    elif targets is not None and not targets.any():
        problems.append(f"{val.title}: no validation image has a label")
    wanted = {"loss.function": "binary", "loss.class_weights": None, "images.sampling": "shuffled"}
    wanted |= {"images.long_tail": None}
    values = {name: value for name, value, _ in recipe.fields()}
    problems += [
        f"{name} is {value_text(value)}, which requires single-label images; those of {with_several.title} are "
        f"multi-label: --set {name}={value_text(allowed)}"
        for name, allowed in wanted.items()
        if (value := values.get(name)) != allowed
    ]
    raise_all(problems)


def chosen_indices(config: ImagesConfig, train: Source) -> tuple[Indices | None, Indices | None]:
    """Return the indices of the training images to train on, and of those to validate on.

    Images are chosen by class; multi-label images are one group.

    Args:
        config: settings of the recipe.
        train: all training images.

    Returns:
        Sorted indices. None stands for all training images, and for the separate validation images.
    """
    labels, classes = np.asarray(train.labels), train.classes
    if targets_of(train) is not None:
        labels, classes = np.zeros(len(train), np.int16), ("all images",)
    chosen, held = None, None
    if config.held_out is not None:
        chosen, held = held_out(labels, count=config.held_out, seed=CHOICE_SEED, classes=classes)
    if config.set_aside is not None:
        rest = np.arange(len(labels)) if chosen is None else chosen
        kept, aside = held_out(labels[rest], count=config.set_aside, seed=CHOICE_SEED, classes=classes)
        chosen, held = rest[kept], rest[aside]
    if config.long_tail is not None:
        rest = np.arange(len(labels)) if chosen is None else chosen
        chosen = rest[long_tail(labels[rest], ratio=config.long_tail, seed=CHOICE_SEED)]
    return chosen, held


def check_tuning_images(config: ImagesConfig, train: Source, hold_out: float) -> None:
    """Check that all classes have training images left when images are held out for tuning.

    Raises:
        InputError: a class has too few; the message lists these classes.
    """
    if targets_of(train) is not None:  # multi-label images are one group
        return
    labels = np.asarray(train.labels)
    chosen, _ = chosen_indices(replace(config, set_aside=None, long_tail=None), train)
    counts = np.bincount(labels if chosen is None else labels[chosen]).tolist()
    sizes = [held_out_size(count, hold_out) for count in counts]
    keys = classes_of(train).keys
    short = [
        f"{keys[label]} has {count} and {size} would be held out"
        for label, (count, size) in enumerate(zip(counts, sizes, strict=True))
        if 0 < count <= size
    ]
    if short:
        lower = "lower --tune-hold-out, " if max(counts) > 1 and hold_out >= 1 else ""
        raise InputError(
            f"--tune-hold-out {hold_out:g}: too few training images of a class: {few(short)}; "
            f"add images of these classes, {lower}or compare without --tune"
        )
