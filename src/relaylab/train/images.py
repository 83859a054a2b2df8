"""The images of a run: opened, checked against the recipe, batched and normalised."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from relaylab.data.augment import Augmentation
from relaylab.data.batches import Batch
from relaylab.data.crops import Crops
from relaylab.data.datasets import ImageDataset, InMemoryDataset, OnDiskDataset
from relaylab.data.faults import FaultLog
from relaylab.data.geometry import CropSpec
from relaylab.data.memory import decode_all, free_memory
from relaylab.data.mixing import MIXES, Mixing
from relaylab.data.policies import Policy
from relaylab.data.sampling import SAMPLERS, KeyedSampler
from relaylab.data.sources.classes import Classes, classes_of, look_alikes
from relaylab.data.sources.index import IndexedImages
from relaylab.data.sources.listing import NoSplitError, few
from relaylab.data.sources.opening import open_source
from relaylab.data.sources.source import UNLABELLED, Labels, Source, class_counts, images_by_class, targets_of
from relaylab.data.sources.subset import Indices, Subset, held_out, long_tail
from relaylab.data.statistics import ImageStatistics
from relaylab.errors import InputError, LabError, raise_all
from relaylab.files import available_cores
from relaylab.progress import progress
from relaylab.recipes.schema import ImagesConfig, Recipe, value_text
from relaylab.train.options import RuntimeOptions, TrainOptions

log = logging.getLogger("relaylab.train")

MEMORY_SHARE = 0.5  # of the free memory may hold images; beyond that they are decoded when they are needed
IMAGES_PER_PROCESS = 2000  # fewer images are decoded before another process has started
DEATHS = 3  # of worker processes without a batch in between
LEAST_STD = 1.0  # of a channel that hardly varies
SHOWN = 3  # pairs of names that are nearly alike
CHOICE_SEED = 0  # which images are held out, and which classes are rare: the same for runs of all seeds


@dataclass(frozen=True)
class RunImages:
    """The training and validation images of a run.

    Attributes:
        identity: the classes, in the order of the labels.
        statistics: of the training images.
        in_memory: whether all are decoded once; crops are then cut from images already resized.
    """

    train: ImageDataset
    val: ImageDataset
    crop_spec: CropSpec
    statistics: ImageStatistics
    in_memory: bool
    identity: Classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Names for people, in the order of the labels."""
        return self.identity.names

    def sampler(self, recipe: Recipe, seed: int, rank: int = 0, ranks: int = 1) -> KeyedSampler:
        """Return the sampler of one process: all iterations of the recipe as one epoch."""
        draws = recipe.optimizer.iterations * recipe.optimizer.batch_size // ranks
        make = SAMPLERS[recipe.images.sampling]
        labels, classes = self.train.labels, self.classes
        if labels.ndim == 2:  # images with several labels are drawn alike
            labels, classes = np.zeros(len(labels), np.int64), None
        return make(labels, seed=seed, rank=rank, num_replicas=ranks, num_samples=draws, classes=classes)

    def counts(self) -> dict[str, list[int]]:
        """Return the number of images of each class, for training and validation."""
        return {name: images_by_class(labels, len(self.classes)).tolist() for name, labels in self._labels.items()}

    def sizes(self) -> dict[str, int]:
        """Return the number of training and of validation images."""
        return {name: len(labels) for name, labels in self._labels.items()}

    @property
    def has_several_labels(self) -> bool:
        """Whether an image may have several labels."""
        return self.train.labels.ndim == 2

    @property
    def _labels(self) -> dict[str, NDArray[Any]]:
        return {"train": self.train.labels, "val": self.val.labels}

    def augmentation(self, recipe: Recipe, seed: int) -> Augmentation:
        """Return the recipe's augmentation, which in evaluation mode only normalises."""
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
) -> RunImages:
    """Open and check the images that the options name, and decode them if they fit into memory.

    Each of `devices_here` processes on this machine holds its own images. One process can go `first`: the context is
    entered while images are listed and counted, and the others find the results in the cache. `fault_file` is for the
    list of unreadable images, if there are too many. `sources` are training and validation images, in place of those
    that the options name.

    Raises:
        InputError: a path, folder or image that cannot be used, or other classes than the recipe's.
    """
    crop_spec = crop_spec_of(recipe)
    workers = max(1, available_cores() // devices_here) if options.workers is None else options.workers
    with first:
        train, val = open_sources(options, recipe.images) if sources is None else _checked_sources(*sources)
        check_images(recipe, train, val)
        for source in dict.fromkeys((train, val)):
            skipped = getattr(source, "skipped", ())
            if skipped:
                log.info("%s: folders passed over: %s", source.title, few(list(skipped)))
        chosen, held = chosen_indices(recipe.images, groups_of(train))
        val = val if held is None else Subset(train, held)
        train = train if chosen is None else Subset(train, chosen)
        in_memory = fits_memory(options, (train, val), crop_spec, devices_here)
        if not in_memory:
            pin = device.type == "cuda"
            datasets = [OnDiskDataset(source, crop_spec, workers, pin, fault_file) for source in (train, val)]
            statistics = datasets[0].statistics()
            return RunImages(datasets[0], datasets[1], crop_spec, statistics, in_memory, classes_of(train))
    decoded = list(_decoded(train, val, crop_spec, workers, fault_file))
    return RunImages(decoded[0], decoded[1], crop_spec, decoded[0].statistics(), in_memory, classes_of(train))


def crop_spec_of(recipe: Recipe) -> CropSpec:
    """Return the sizes of a recipe's images and crops."""
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
    """Return the recipe's mixing of training images, which may be none."""
    alphas = {name: getattr(recipe.augmentation, name) for name in MIXES}
    return Mixing(alphas, recipe.network.num_classes, seed)


class Stream:
    """Training batches, to the end of the sampler's draws; worker processes that die are replaced."""

    def __init__(self, dataset: ImageDataset, sampler: KeyedSampler, batch_size: int, seed: int, crops: Crops) -> None:
        self._make = partial(dataset.training, sampler, batch_size, seed, crops)
        self._loader = self._make()

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches; images that cannot be used and repeated deaths of workers raise `LabError`."""
        deaths = 0
        while True:
            try:
                for batch in self._loader:
                    yield batch
                    deaths = 0
                return
            except RuntimeError as error:
                deaths += 1
                if "DataLoader worker" not in str(error):
                    raise
                if deaths > DEATHS:
                    raise LabError(f"worker processes die again and again: {str(error).partition('. ')[0]}") from None
                log.warning("%s: new ones are started", str(error).partition("\n")[0])
                state = self.state_dict()
                self._loader = self._make()
                self.load_state_dict(state)

    def state_dict(self) -> dict[str, object]:
        """Return the position, in batches used."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Resume from the position of another stream.

        Raises:
            InputError: that stream had other images or another batch size.
        """
        self._loader.load_state_dict(state)


def open_sources(options: RuntimeOptions, images: ImagesConfig | None = None) -> tuple[IndexedImages, IndexedImages]:
    """Open the training and validation images, with the same labels for the same classes.

    Args:
        options: paths.
        images: of the recipe, which says what to validate on. Where it holds training images out, those are the
            second ones, too: `chosen_indices` chooses among them.

    Raises:
        InputError: a path or its contents that cannot be used.
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
    """Return what to validate on where the data have only these splits, none of them val."""
    test = "to validate on the test split, set images.val_split=test (recipes new --val-split test); "
    own = "to validate on a fifth of the training images, set images.held_out=0.2 (recipes new --hold-out 0.2)"
    return f"{test if 'test' in splits else ''}{own}"


def _checked_sources(train: Source, val: Source) -> tuple[Source, Source]:
    """Check sources of the caller's own, and label the validation images by the classes of the training images."""
    train = open_source(train)
    return train, train if val is train else open_source(val, classes=classes_of(train))


def open_training(options: RuntimeOptions) -> IndexedImages:
    """Open the training images: the part train, or all where the data have no parts.

    Raises:
        InputError: a path or its contents that cannot be used.
    """
    try:
        return open_source(options.data, split=None if options.val_data else "train", watch=progress)
    except NoSplitError as error:
        if error.others:
            raise
        return open_source(options.data, split=None, watch=progress)


def check_classes(train: Source, val: Source) -> None:
    """Check that there are two classes, and that each class of one part has images in the other.

    Raises:
        InputError: classes that only one part has, by name.
    """
    classes = classes_of(train)
    if len(classes.keys) < 2:
        found = f"one class only ({classes.keys[0]})" if classes.keys else "no classes"
        raise InputError(f"{found} in {train.title}: expected at least 2")
    in_train, in_val = (np.unique(np.asarray(each.labels)) for each in (train, val))
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
        advice = "rename the folders of one part" if alike else "add their images, or remove their folders"
        raise InputError("; ".join([*problems, *alike[:SHOWN], advice]))
    for text in look_alikes(classes.keys, classes.keys[::-1])[:SHOWN]:
        log.warning("%s: two classes, %s", train.title, text)


def check_images(recipe: Recipe, train: Source, val: Source) -> None:
    """Check that the images are labelled, with the same classes in both parts, as many as the recipe's network.

    Raises:
        InputError: they are not.
    """
    has_several = targets_of(train) is not None or targets_of(val) is not None
    if has_several:
        _check_several(recipe, train, val)
    for source, split in () if has_several else ((train, "training"), (val, "validation")):
        if (np.asarray(source.labels) == UNLABELLED).any():
            raise InputError(f"{source.title}: {split} images without labels cannot be used")
    check_classes(train, val)
    there, expected = len(train.classes), recipe.network.num_classes
    if there != expected:
        raise InputError(
            f"{train.title} has {there} classes, and the recipe's network {expected}: take other images, or "
            f"{_without_images(train) or f'--set network.num_classes={there}'}"
        )


def _without_images(train: Source) -> str:
    """Return what to do about classes without images, which a network could not learn; empty if there are none."""
    keys = classes_of(train).keys
    empty = [keys[label] for label in np.flatnonzero(class_counts(train) == 0)]
    where = "empty folders, further lines of the categories, or gaps between a list's labels"
    return f"remove the {len(empty):,} classes without images ({where}): {few(empty)}" if empty else ""


def _check_several(recipe: Recipe, train: Source, val: Source) -> None:
    """Check that a recipe suits images of which some have several labels.

    Raises:
        InputError: all reasons why it does not.
    """
    problems: list[str] = []
    with_several, other = (train, val) if targets_of(train) is not None else (val, train)
    targets = targets_of(val)
    if targets_of(other) is None:
        problems.append(f"images of {with_several.title} have several labels, those of {other.title} one each")
    elif targets is not None and not targets.any():
        problems.append(f"{val.title}: no validation image has a label")
    wanted = {"loss.function": "binary", "loss.class_weights": None, "images.sampling": "shuffled"}
    wanted |= {"images.long_tail": None}
    values = {name: value for name, value, _ in recipe.fields()}
    problems += [
        f"{name} is {value_text(value)}, which is for images of one class each; {with_several.title} has images with "
        f"several labels, or none: --set {name}={value_text(allowed)}"
        for name, allowed in wanted.items()
        if (value := values.get(name)) != allowed
    ]
    raise_all(problems)


def groups_of(source: Source) -> Labels:
    """Return the groups that images are set aside from alike: classes, or a single one for several labels."""
    return source.labels if targets_of(source) is None else np.zeros(len(source), np.int16)


def chosen_indices(config: ImagesConfig, labels: ArrayLike) -> tuple[Indices | None, Indices | None]:
    """Return the indices of the training images that a recipe trains on, and of those it validates with instead.

    The labels, (n,), are those of all training images. Indices are sorted; None stands for all training images, and
    for the validation images.
    """
    labels = np.asarray(labels)
    chosen, held = None, None
    if config.held_out is not None:
        chosen, held = held_out(labels, count=config.held_out, seed=CHOICE_SEED)
    if config.set_aside is not None:
        rest = np.arange(len(labels)) if chosen is None else chosen
        stay, aside = held_out(labels[rest], count=config.set_aside, seed=CHOICE_SEED)
        chosen, held = rest[stay], rest[aside]
    if config.long_tail is not None:
        rest = np.arange(len(labels)) if chosen is None else chosen
        chosen = rest[long_tail(labels[rest], ratio=config.long_tail, seed=CHOICE_SEED)]
    return chosen, held


def fits_memory(options: RuntimeOptions, sources: Sequence[Source], crop_spec: CropSpec, copies: int) -> bool:
    """Return whether all images are decoded once and kept in memory: as `--images` says, or if they fit.

    Each of `copies` processes on this machine holds all of them.
    """
    if options.images != "auto":
        return options.images == "memory"
    needed = sum(len(source) for source in sources) * 3 * crop_spec.short_side**2
    return needed * copies <= MEMORY_SHARE * free_memory("cpu")


def _decoded(
    train: Source, val: Source, crop_spec: CropSpec, workers: int, fault_file: Path | None
) -> Iterator[InMemoryDataset]:
    with progress("decoding", len(train) + len(val)) as task:
        for source, faults in ((train, FaultLog(len(train), file=fault_file)), (val, None)):
            enough = min(workers, len(source) // IMAGES_PER_PROCESS)
            yield InMemoryDataset(decode_all(source, crop_spec, workers=enough, faults=faults, task=task), crop_spec)
