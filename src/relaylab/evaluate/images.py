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
    """Open images, with labels in the order of the networks' classes.

    Args:
        data: their paths; empty for those of the first run.
        split: train, val, test or all.
        networks: to evaluate.
        models: their model files, by name.

    Raises:
        InputError: networks with different classes, or images that cannot be used.
    """
    first = models[networks[0].name]
    for name, model in models.items():
        if model.classes != first.classes:
            raise InputError(
                f"{networks[0].name} and {name} have different classes ({len(first.classes)} and "
                f"{len(model.classes)}): they cannot be compared in one table"
            )
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
    """Open one split of the given images, or else of a run's.

    Args:
        data: given by the user; may be empty.
        of_run: the training and validation images of a run; the latter are empty if the former include them.
        split: train, val, test or all.
        classes: of the network, in the order of its output.

    Raises:
        InputError: images that cannot be used.
    """
    own, own_val = of_run
    part = None if split == "all" else split
    if not data and own_val and split == "val":
        data, part = own_val, None
    return open_source(data or own, split=part, classes=class_order(classes), watch=progress)


def images_of(folder: ScoreFolder, name: str, data: Sequence[Path] = ()) -> Source:
    """Open the images that scores belong to.

    Args:
        folder: of scores.
        name: of a network whose run records its images.
        data: paths to try first.

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
