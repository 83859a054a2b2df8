"""Images to evaluate on: given by the user, or recorded by the networks' runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relaylab.data.sources.classes import Classes, classes_of, match
from relaylab.data.sources.listing import NoSplitError
from relaylab.data.sources.opening import open_source
from relaylab.data.sources.source import Source
from relaylab.data.sources.subset import Subset, held_out
from relaylab.errors import InputError
from relaylab.evaluate.scores import ScoreFolder, describe_images
from relaylab.evaluate.trained import Trained
from relaylab.models.file import ModelFile
from relaylab.progress import progress
from relaylab.train.images import CHOICE_SEED, open_training
from relaylab.train.options import RuntimeOptions


def open_images(
    data: Sequence[Path], split: str | None, networks: Sequence[Trained], models: Mapping[str, ModelFile]
) -> Source:
    """Open the images to evaluate networks on, labelled in the class order of the first network; see `open_split`.

    Raises:
        InputError: the images cannot be used, or have classes that the networks do not have.
    """
    if not data and not networks[0].data[0]:
        raise InputError("--data is required: a model file does not record its images")
    return open_split(data, networks[0].about, split, models[networks[0].name].identity)


def output_orders(networks: Sequence[Trained], models: Mapping[str, ModelFile]) -> dict[str, list[int]]:
    """Return, for each network, the output index of each class of the first network.

    Raises:
        InputError: networks with different classes.
    """
    first, orders = models[networks[0].name].identity, dict[str, list[int]]()
    for network in networks:
        classes = models[network.name].identity
        try:
            if len(classes.keys) != len(first.keys):
                raise InputError(f"{len(first.keys)} and {len(classes.keys)}")
            orders[network.name] = list(match(first, classes, title=networks[0].name)[0])
        except InputError as error:
            reason = f"{networks[0].name} and {network.name} have different classes ({error})"
            raise InputError(f"{reason}: they cannot be compared in one table") from None
    return orders


def held_out_images(about: Mapping[str, Any]) -> Source | None:
    """Open the training images that a run has held out for validation; None if there are none.

    Args:
        about: description of the run, from `relaylab.evaluate.trained.describe_run`.

    Raises:
        InputError: images that cannot be used.
    """
    count = about.get("values", {}).get("images.held_out")
    if count is None:
        return None
    data, val_data = (tuple(map(Path, about[name])) for name in ("data", "val_data"))
    train = open_training(RuntimeOptions(data=data, val_data=val_data))
    return Subset(train, held_out(train.labels, count=count, seed=CHOICE_SEED, classes=train.classes)[1])


def open_split(data: Sequence[Path], about: Mapping[str, Any], split: str | None, classes: Classes) -> Source:
    """Open a split of the given images, or of a run's images, labelled in the class order of a network.

    Args:
        data: paths; empty to use the run's images.
        about: description of the run, from `relaylab.evaluate.trained.describe_run`.
        split: name of the split, or "all". None stands for the validation split of the run; if the data do not have
            it, for the held-out images.
        classes: classes of the network.

    Raises:
        InputError: images that cannot be used.
    """
    run_data, run_val = (tuple(map(Path, about.get(name, ()))) for name in ("data", "val_data"))
    part = split or validation_split(about)
    try:
        if not data and run_val and part == "val":
            return open_source(run_val, split=None, classes=classes, watch=progress)
        part = None if part == "all" else part
        return open_source(data or run_data, split=part, classes=classes, watch=progress)
    except NoSplitError:
        aside = held_out_images(about) if split is None and not data else None
        if aside is None:
            raise
        if list(match(classes_of(aside), classes, title=aside.title)[0]) != list(range(len(classes.keys))):
            raise InputError(f"the classes of {aside.title} have changed since the network was trained") from None
        return aside


def validation_split(about: Mapping[str, Any]) -> str:
    """Return the validation split of a run, from its description."""
    return about.get("values", {}).get("images.val_split") or "val"


def images_of(folder: ScoreFolder, name: str, data: Sequence[Path] = ()) -> Source:
    """Open the images of a folder of scores, from the given paths or those that the network's run records.

    Raises:
        InputError: the images have moved or changed.
    """
    about = folder.about(name)
    options = [(data or tuple(map(Path, about.get("data", ()))), validation_split(about))]
    options += [(paths, None) for paths in (data, tuple(map(Path, about.get("val_data", ())))) if paths]
    for paths, split in options:
        try:
            source = open_source(paths, split=split, classes=folder.images.identity, watch=progress)
        except InputError:
            continue
        if describe_images(source).is_same(folder.images):
            return source
    aside = None if data else held_out_images(about)
    if aside is not None and describe_images(aside).is_same(folder.images):
        return aside
    raise InputError(f"the images of the scores in {folder.path} have moved or changed: give their path with --data")
