"""WebDataset shards: tar files of KEY.jpg with KEY.cls, or with a label in KEY.json, read in place as other tars are.

Note [Shards]
1. As in WebDataset, the key of a member is its path up to the first dot of the file's name, and members of one key
   lie side by side. `KEY.cls` counts before `KEY.json`; of the latter, the first of `FIELDS` that is there.
2. A tar is a shard if one of its first members is an image with such a label beside it, or of the same key as one.
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
from relaylab.data.sources.listing import Listing, Place, Rows, Watch, is_image, printable
from relaylab.data.sources.valued import Value, Values
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
PEEKED, PEEKED_BYTES = 64, 1 << 24  # members, and bytes of a tar, by which shards are told from other tars
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
    """List the images of WebDataset shards, in their order; see Note [Shards].

    Names of numbered classes are those of a classnames.txt or labels.txt beside the shards; files in `named` have
    display names of synsets. Compressed tars are unpacked to `cache`.

    Raises:
        InputError: a tar that is damaged, a label that cannot be read, a key with several images, or no images.
    """
    rows, values, places = Rows(), Values(), list[Place]()
    for number, tar in enumerate(tars):
        rows.file_states.append(file_state(tar))
        plain = unpacked(tar, cache, watch)
        if plain != tar:
            rows.file_states.append(file_state(plain))
        places.append(Place(str(plain), str(tar)))
        _list_shard(plain, tar.name, number, rows, values, watch)
    return values.listing(rows, title, places, names=numbered_names(tars, rows.file_states), named=named)


def _list_shard(plain: Path, title: str, number: int, rows: Rows, values: Values, watch: Watch) -> None:
    with os.fdopen(open_regular(plain), "rb") as file, watch(f"listing {title}", plain.stat().st_size) as task:
        seen, current = 0, ""
        image: Member | None = None
        found: dict[str, Value] = {}

        def finish() -> None:
            if image is not None:
                rows.add(os.fsencode(image.path), 0, number, (image.offset, image.size))
                values.add(found.get("cls", found.get("json")))

        for count, member in enumerate(tar_members(file, title, rows)):
            if member.folder:
                continue
            key, extension = _split(member.path)
            if key != current:
                finish()
                current, image, found = key, None, {}
            if is_image(member.path):
                if image is not None:
                    names = f"{printable(image.path)} and {printable(member.path)}"
                    raise InputError(f"{title} has several images with one key: {names}; expected one for each")
                image = member
            elif extension in ("cls", "json") and member.size <= LARGEST_LABEL_FILE:
                data, where = member_bytes(file, member), f"{title}: {printable(member.path)}"
                found[extension] = _number(data, where) if extension == "cls" else _field(data)
            else:
                rows.ignore(member.path)
            if count % MEMBERS_AT_ONCE == 0:
                task.advance(member.offset - seen, f"{rows.found:,} images")
                seen = member.offset
        finish()
        task.advance(plain.stat().st_size - seen, f"{rows.found:,} images")


def _split(path: str) -> tuple[str, str]:
    """Return the key of a member and its extension, in lower case."""
    folder, slash, name = path.removeprefix("./").rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower()


def _number(data: bytes, where: str) -> int | str:
    """Return the label in a .cls file: a number, or else text."""
    text = data.decode("utf-8", errors="replace").strip()
    if not text or len(text.splitlines()) > 1:
        raise InputError(f"{where} is {printable(text[:40])!r}; expected a class number or name")
    return int(text) if text.lstrip("-").isdecimal() and len(text) < 12 else text


def _field(data: bytes) -> Value:
    """Return the label in a JSON file; None if it has none."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    value: Any = next((fields[name] for name in FIELDS if name in fields), None) if isinstance(fields, dict) else None
    parts: Any = value if isinstance(value, list) else [value]
    if not all(type(part) is int for part in parts) and not all(type(part) is str for part in parts):
        return None
    return tuple(parts) if isinstance(value, list) else value
