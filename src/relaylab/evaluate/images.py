"""The images for evaluation: those that the user names, or else those of the networks' runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relaylab.data.sources.classes import Classes, classes_of, match
from relaylab.data.sources.listing import NoSplitError
from relaylab.data.sources.opening import open_source
from relaylab.data.sources.source import Source
from relaylab.data.sources.subset import Thinned, held_out
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
    """Open the images to evaluate networks on, labelled in the order of the first network's classes; see `open_split`.

    Raises:
        InputError: images that cannot be used, or with classes that the networks do not have.
    """
    if not data and not networks[0].data[0]:
        raise InputError("--data is required: a model file does not record its images")
    return open_split(data, networks[0].about, split, models[networks[0].name].identity)


def output_orders(networks: Sequence[Trained], models: Mapping[str, ModelFile]) -> dict[str, list[int]]:
    """Return, for each network, the output of each class in the order of the first network's classes.

    Raises:
        InputError: networks with different classes.
    """
    first, orders = models[networks[0].name].identity, dict[str, list[int]]()
    for each in networks:
        own = models[each.name].identity
        try:
            if len(own.keys) != len(first.keys):
                raise InputError(f"{len(first.keys)} and {len(own.keys)}")
            orders[each.name] = list(match(first, own, title=networks[0].name)[0])
        except InputError as error:
            what = f"{networks[0].name} and {each.name} have different classes ({error})"
            raise InputError(f"{what}: they cannot be compared in one table") from None
    return orders


def held_out_images(about: Mapping[str, Any]) -> Source | None:
    """Open the training images that a run has set aside; None if it has not.

    Args:
        about: the description of the run.

    Raises:
        InputError: images that cannot be used.
    """
    count = about.get("values", {}).get("images.held_out")
    if count is None:
        return None
    data, val_data = (tuple(map(Path, about[name])) for name in ("data", "val_data"))
    train = open_training(RuntimeOptions(data=data, val_data=val_data))
    return Thinned(train, held_out(train.labels, count=count, seed=CHOICE_SEED)[1])


def open_split(data: Sequence[Path], about: Mapping[str, Any], split: str | None, classes: Classes) -> Source:
    """Open one split, or "all", of the given images, or else of a run's, labelled in the order of a network's classes.

    Args:
        data: paths; none for those of the run.
        about: the description of the run.
        split: None for the one that the run validates on; where the data lack it, for the images set aside.
        classes: of the network.

    Raises:
        InputError: images that cannot be used.
    """
    own, own_val = (tuple(map(Path, about.get(name, ()))) for name in ("data", "val_data"))
    part = split or validation_split(about)
    try:
        if not data and own_val and part == "val":
            return open_source(own_val, split=None, classes=classes, watch=progress)
        part = None if part == "all" else part
        return open_source(data or own, split=part, classes=classes, watch=progress)
    except NoSplitError:
        aside = held_out_images(about) if split is None and not data else None
        if aside is None:
            raise
        if list(match(classes_of(aside), classes, title=aside.title)[0]) != list(range(len(classes.keys))):
            raise InputError(f"{aside.title} has other classes now than when the network was trained") from None
        return aside


def validation_split(about: Mapping[str, Any]) -> str:
    """Return the part of its images that a run validates on, from its description."""
    return about.get("values", {}).get("images.val_split") or "val"


def images_of(folder: ScoreFolder, name: str, data: Sequence[Path] = ()) -> Source:
    """Open the images that scores belong to: from the given paths, or else from those that the network's run records.

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
    raise InputError(f"the images that {folder.path} holds scores of are not found, or have changed: give --data")
