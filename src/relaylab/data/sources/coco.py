"""JSON files in COCO's format, as used by iNaturalist: images, categories, and annotations that connect the two.

The classes are in the order of the category ids. An image with annotations of several categories has several labels.
The keys of classes are the folders of the categories if the file gives them (iNaturalist 2021), else the names.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from relaylab.data.sources.file_states import file_state
from relaylab.data.sources.listing import Listing, Place, Rows, Watch, printable, told_apart
from relaylab.data.sources.lists import check_files, tidy_name
from relaylab.data.sources.valued import Value, Values
from relaylab.errors import InputError
from relaylab.outside.reading import open_regular

HEAD = 1 << 16  # bytes that are read to recognise the format
LARGEST = 4 << 30


class _Image(msgspec.Struct):
    id: int | str
    file_name: str


class _Category(msgspec.Struct):
    id: int
    name: str
    image_dir_name: str = ""


class _Annotation(msgspec.Struct):
    image_id: int | str
    category_id: int


class _Content(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation] = []
    categories: list[_Category] = []


def is_coco(file: Path) -> bool:
    """Return whether a JSON file begins like COCO's: an object with images, annotations, categories or info."""
    with os.fdopen(open_regular(file), "rb") as content:
        return bool(re.match(rb'\s*\{\s*"(images|annotations|categories|info|licenses|type)"\s*:', content.read(HEAD)))


def list_coco(file: Path, root: Path, watch: Watch) -> Listing:
    """List the images of a JSON file in COCO's format, in its order.

    Names are relative to the resolved folder `root`, or to a folder in it named like the file or `images`.

    Raises:
        InputError: the file is in a different format, a category is unknown, only some images have annotations, a name
            leads out of the root or occurs twice, or files are missing.
    """
    content = _read(file)
    rows, values = Rows(), Values()
    rows.file_states.append(file_state(file))
    categories = sorted(content.categories, key=lambda category: category.id)
    label_of = {category.id: label for label, category in enumerate(categories)}
    labels: dict[int | str, set[int]] = {}  # by image id
    for annotation in content.annotations:
        if annotation.category_id not in label_of:
            raise InputError(f"{file.name} has an annotation with the unknown category {annotation.category_id}")
        labels.setdefault(annotation.image_id, set()).add(label_of[annotation.category_id])
    root = _folder(root, file, content.images)
    inside = os.fsencode(root).lstrip(b"/") + b"/"
    for image in content.images:
        rows.add(tidy_name(os.fsencode(image.file_name), root, inside, file.name), 0)
        values.add(_value(labels.get(image.id)))
    rows.refuse_repeats(file.name)
    check_files(file, root, rows, watch)
    folders = [category.image_dir_name for category in categories]
    keys = folders if all(folders) and len(set(folders)) == len(folders) else [entry.name for entry in categories]
    listing = values.listing(rows, file.name, [Place(str(root), str(root))], names=keys)
    names = dict(zip(listing.folders, (category.name for category in categories), strict=True))
    return replace(listing, classes=told_apart(list(names.values()), listing.folders))


def _read(file: Path) -> _Content:
    if file.stat().st_size > LARGEST:
        raise InputError(f"{file} has {file.stat().st_size:,} bytes; the limit is {LARGEST:,}")
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Content)
    except (msgspec.DecodeError, RecursionError) as error:
        reason = printable(str(error).replace("`", ""))
        raise InputError(f"{file} is not in COCO's format (images, annotations, categories): {reason}") from None


def _value(labels: set[int] | None) -> Value:
    """Return an image's label, or its labels as a tuple; None for an image without annotations."""
    if not labels:
        return None
    return tuple(sorted(labels)) if len(labels) > 1 else next(iter(labels))


def _folder(root: Path, file: Path, images: Sequence[_Image]) -> Path:
    """Return the folder that names are relative to: the first candidate that has the first image."""
    if not images:
        raise InputError(f"no images in {file}")
    stem = file.stem.removeprefix("instances_")
    folders = [root, *(root / name for name in (stem, "images", f"images/{stem}", "train_val_images"))]
    first = images[0].file_name.lstrip("/")
    return next((folder for folder in folders if (folder / first).is_file()), root)
