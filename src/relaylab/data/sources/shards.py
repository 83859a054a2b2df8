"""WebDataset shards: tar files of KEY.jpg and a label in KEY.cls or KEY.json, read in place like other tars.

Note [Shards]
1. As in WebDataset, the key of a member is its path up to the first dot of the file name, and members with the same key
   are adjacent. `KEY.cls` takes precedence over `KEY.json`, from which the first field in `FIELDS` is read.
2. A tar is a shard if its first members include an image and a label with the same key.
"""

import json
import os
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from relaylab.data.sources.archives import DAMAGE, Member, beginning, member_bytes, tar_members, unpacked
from relaylab.data.sources.class_names import numbered_names
from relaylab.data.sources.file_states import file_state
from relaylab.data.sources.listing import Listing, Place, Rows, Watch, few, is_image, printable
from relaylab.data.sources.valued import LARGEST_LABEL, LONGEST_NUMBER, Value, Values
from relaylab.errors import InputError
from relaylab.outside.reading import open_regular

FIELDS = (
    "label",
    "cls",
    "class",
    "class_id",
    "category",
    "category_id",
    "target",
    "class_name",
    "label_name",
    "labels",
)
LARGEST_LABEL_FILE = 1 << 20  # bytes
PEEKED, PEEKED_BYTES = 64, 1 << 24  # members and bytes that are read to distinguish shards from other tars
MEMBERS_AT_ONCE = 1000


def are_shards(tar: Path) -> bool:
    """Return whether a tar file is a WebDataset shard. See Note [Shards] 2."""
    images, labels = set[str](), set[str]()
    start = BytesIO(beginning(tar, PEEKED_BYTES))
    with suppress(*DAMAGE), tarfile.open(fileobj=start, mode="r:", errors="surrogateescape") as archive:
        for member in islice(archive, PEEKED):
            key, extension = _split(member.name)
            if is_image(member.name):
                images.add(key)
            elif extension == "cls":
                labels.add(key)
            elif extension == "json" and member.size <= LARGEST_LABEL_FILE:
                file = archive.extractfile(member)
                if file is not None and _field(file.read()) is not None:
                    labels.add(key)
    return bool(images & labels)


def list_shards(tars: Sequence[Path], title: str, named: Sequence[Path], watch: Watch, *, cache: Path) -> Listing:
    """List the images of WebDataset shards, in archive order. See Note [Shards].

    The names of numbered classes come from a classnames.txt or labels.txt in the shards' folder. Files in `named` give
    display names of synsets. Compressed tars are unpacked to `cache`.

    Raises:
        InputError: a tar is damaged, a label cannot be read, a key has several images, or there are no images.
    """
    rows, values, places = Rows(), Values(), list[Place]()
    for place, tar in enumerate(tars):
        rows.file_states.append(file_state(tar))
        plain = unpacked(tar, cache, watch)
        if plain != tar:
            rows.file_states.append(file_state(plain))
        places.append(Place(str(plain), str(tar)))
        _list_shard(plain, tar.name, place, rows, values, watch)
    return values.listing(rows, title, places, names=numbered_names(tars, rows.file_states), named=named)


def _list_shard(plain: Path, title: str, place: int, rows: Rows, values: Values, watch: Watch) -> None:
    with os.fdopen(open_regular(plain), "rb") as file, watch(f"listing {title}", plain.stat().st_size) as task:
        seen, current = 0, ""
        image: Member | None = None
        labels: dict[str, Value] = {}  # by extension
        lone_images, lone_labels = set[str](), set[str]()

        def finish() -> None:
            value = labels.get("cls", labels.get("json"))
            if image is not None:
                rows.add(os.fsencode(image.path), 0, place, (image.offset, image.size))
                values.add(value)
            if (image is None) != (value is None):
                (lone_images if value is None else lone_labels).add(current)

        for count, member in enumerate(tar_members(file, title, rows)):
            if member.folder:
                continue
            key, extension = _split(member.path)
            if key != current:
                finish()
                current, image, labels = key, None, {}
            if is_image(member.path):
                if image is not None:
                    names = f"{printable(image.path)} and {printable(member.path)}"
                    raise InputError(f"{title} has several images with one key: {names}; expected one image per key")
                image = member
            elif extension in ("cls", "json") and member.size <= LARGEST_LABEL_FILE:
                data, where = member_bytes(file, member), f"{title}: {printable(member.path)}"
                labels[extension] = _label(data, where) if extension == "cls" else _label_field(data, where)
            else:
                rows.ignore(member.path)
            if count % MEMBERS_AT_ONCE == 0:
                task.advance(member.offset - seen, f"{rows.found:,} images")
                seen = member.offset
        finish()
        apart = sorted(lone_images & lone_labels)
        if apart:
            raise InputError(
                f"{title}: the labels of {few(apart)} are not next to their images; rewrite the shard in order of keys"
            )
        task.advance(plain.stat().st_size - seen, f"{rows.found:,} images")


def _split(path: str) -> tuple[str, str]:
    """Return the key of a member and its extension, in lower case."""
    folder, slash, name = path.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower()


def _label(data: bytes, where: str) -> int | str:
    """Return the label in a .cls file: an integer if it is one, otherwise text."""
    text = data.decode("utf-8-sig", errors="backslashreplace").strip()
    if not text or len(text.splitlines()) > 1:
        raise InputError(f"{where} is {printable(text[:40])!r}; expected a class index or name")
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < 12 else text


class _LongNumber(int):
    """An integer in JSON with more digits than Python reads; the value is the number of digits."""


def _integer(text: str) -> int:
    return int(text) if len(text) <= LONGEST_NUMBER else _LongNumber(len(text.lstrip("-")))


def _field(data: bytes) -> Value:
    """Return the label in a JSON file, or None if it has no label."""
    try:
        fields = json.loads(data, parse_int=_integer)
    except (ValueError, RecursionError):
        return None
    value: Any = next((fields[name] for name in FIELDS if name in fields), None) if isinstance(fields, dict) else None
    items: Any = value if isinstance(value, list) else [value]
    if not all(type(item) in (int, _LongNumber) for item in items) and not all(type(item) is str for item in items):
        return None
    return tuple(items) if isinstance(value, list) else value


def _label_field(data: bytes, where: str) -> Value:
    """Return the label in a JSON file, or None if it has no label; raise InputError for a number that is too long."""
    value = _field(data)
    for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, _LongNumber):
            raise InputError(f"{where} has a label of {item:,} digits; expected 0 .. {LARGEST_LABEL}")
    return value
