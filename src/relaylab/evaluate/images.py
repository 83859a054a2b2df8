"""The images for evaluation: those that the user names, or else those of the networks' runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from relaylab.data.sources.opening import open_source
from relaylab.data.sources.source import Source
from relaylab.errors import InputError
from relaylab.evaluate.scores import ScoreFolder, describe_images
from relaylab.evaluate.trained import Trained
from relaylab.models.file import ModelFile
from relaylab.progress import progress


def open_images(
    data: Sequence[Path], split: str, networks: Sequence[Trained], models: Mapping[str, ModelFile]
) -> Source:
    """Open one split, or "all", of the given images, or else of the first run's, labelled in the order of its classes.

    Raises:
        InputError: networks with different classes, or images that cannot be used.
    """
    first = models[networks[0].name]
    for name, model in models.items():
        if model.classes != first.classes:
            counts = f"{len(first.classes)} and {len(model.classes)}"
            what = f"{networks[0].name} and {name} have different classes ({counts})"
            raise InputError(f"{what}: they cannot be compared in one table")
    if not data and not networks[0].data[0]:
        raise InputError("--data is required: a model file does not record its images")
    source = open_split(data, networks[0].data, split, first.classes)
    if len(source.classes) != len(first.classes):
        raise InputError(
            f"{source.title} has {len(source.classes)} classes, and {networks[0].name} {len(first.classes)}"
        )
    return source


def open_split(
    data: Sequence[Path], of_run: tuple[Sequence[Path], Sequence[Path]], split: str, classes: Sequence[str]
) -> Source:
    """Open one split, or "all", of the given images, or else of a run's, labelled in the order of a network's classes.

    A run has paths of training and of validation images; the latter are empty if the former include them.

    Raises:
        InputError: images that cannot be used.
    """
    own, own_val = of_run
    part = None if split == "all" else split
    if not data and own_val and split == "val":
        data, part = own_val, None
    return open_source(data or own, split=part, classes=class_order(classes), watch=progress)


def images_of(folder: ScoreFolder, name: str, data: Sequence[Path] = ()) -> Source:
    """Open the images that scores belong to: from the given paths, or else from those that the network's run records.

    Raises:
        InputError: the images have moved or changed.
    """
    about = folder.about(name)
    options = [(data or tuple(map(Path, about.get("data", ()))), "val")]
    options += [(paths, None) for paths in (data, tuple(map(Path, about.get("val_data", ())))) if paths]
    for paths, split in options:
        try:
            source = open_source(paths, split=split, classes=class_order(folder.images.classes), watch=progress)
        except InputError:
            continue
        if describe_images(source).fingerprint == folder.images.fingerprint:
            return source
    raise InputError(f"the images that {folder.path} holds scores of are not found, or have changed: give --data")


def class_order(classes: Sequence[str]) -> Sequence[str] | None:
    """Return the order of the labels; None, the data set's own, where a network's class names are only numbers."""
    return None if all(name.isdecimal() for name in classes) else classes
