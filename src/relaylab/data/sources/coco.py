"""COCO's JSON files, as of iNaturalist: images, categories, and annotations that give each image its categories.

The classes have the order of the categories' numbers. An image with annotations of several categories has several
labels. Keys are the names of the categories' folders where the file has them (iNaturalist 2021), else the names.
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

HEAD = 1 << 16  # bytes by which such files are told from other JSON
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
    """Return whether a JSON file begins as COCO's do: an object with images, annotations, categories or info."""
    with os.fdopen(open_regular(file), "rb") as content:
        return bool(re.match(rb'\s*\{\s*"(images|annotations|categories|info|licenses|type)"\s*:', content.read(HEAD)))


def list_coco(file: Path, root: Path, watch: Watch) -> Listing:
    """List the images of a JSON file of COCO's kind, in its order.

    Names are relative to the resolved folder `root`, or to a folder in it that is called as the file or `images`.

    Raises:
        InputError: a file of another kind, an unknown category, images without annotations among others, a name that
            leads out of the root or occurs twice, or missing files.
    """
    content = _read(file)
    rows, values = Rows(), Values()
    rows.file_states.append(file_state(file))
    categories = sorted(content.categories, key=lambda one: one.id)
    number_of = {one.id: number for number, one in enumerate(categories)}
    labels: dict[int | str, set[int]] = {}
    for one in content.annotations:
        if one.category_id not in number_of:
            raise InputError(f"{file.name} has no category {one.category_id}, which an annotation names")
        labels.setdefault(one.image_id, set()).add(number_of[one.category_id])
    root = _folder(root, file, content.images)
    inside = os.fsencode(root).lstrip(b"/") + b"/"
    for image in content.images:
        rows.add(tidy_name(os.fsencode(image.file_name), root, inside, file.name), 0)
        values.add(_value(labels.get(image.id)))
    rows.refuse_repeats(file.name)
    check_files(file, root, rows, watch)
    folders = [one.image_dir_name for one in categories]
    keys = folders if all(folders) and len(set(folders)) == len(folders) else [one.name for one in categories]
    listing = values.listing(rows, file.name, [Place(str(root), str(root))], names=keys)
    names = dict(zip(listing.folders, (one.name for one in categories), strict=True))
    return replace(listing, classes=told_apart(list(names.values()), listing.folders))


def _read(file: Path) -> _Content:
    if file.stat().st_size > LARGEST:
        raise InputError(f"{file} has {file.stat().st_size:,} bytes; at most {LARGEST:,} are read")
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Content)
    except (msgspec.DecodeError, RecursionError) as error:
        reason = printable(str(error).replace("`", ""))
        raise InputError(f"{file} is not JSON with images, annotations and categories, as COCO's: {reason}") from None


def _value(numbers: set[int] | None) -> Value:
    """Return a number, or several; None for an image without annotations."""
    if not numbers:
        return None
    return tuple(sorted(numbers)) if len(numbers) > 1 else next(iter(numbers))


def _folder(root: Path, file: Path, images: Sequence[_Image]) -> Path:
    """Return the folder that names are relative to: the first of several that has the first image."""
    if not images:
        raise InputError(f"no images in {file}")
    stem = file.stem.removeprefix("instances_")
    folders = [root, *(root / name for name in (stem, "images", f"images/{stem}", "train_val_images"))]
    first = images[0].file_name.lstrip("/")
    return next((folder for folder in folders if (folder / first).is_file()), root)
