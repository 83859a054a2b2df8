"""Lists of images, `NAME LABEL` per line: the official ones of Places2 and Places365, and Caffe's for ImageNet.

Images keep the order of the list, since challenges expect results in it.
"""

import os
import posixpath
import re
from pathlib import Path

import numpy as np

from relaylab.data.sources.class_names import names_beside, read_categories, without_letter
from relaylab.data.sources.file_states import file_state
from relaylab.data.sources.listing import Listing, Place, Rows, Watch, few, is_image
from relaylab.data.sources.source import UNLABELLED
from relaylab.data.sources.trees import refuse_to_leave
from relaylab.data.sources.valued import unique_keys
from relaylab.errors import InputError
from relaylab.outside.reading import bounded_lines, open_regular
from relaylab.outside.showing import brief

LARGEST_LABEL = 999_999
LINES_AT_ONCE = 10_000


def list_file(file: Path, root: Path, categories: Path | None, named: list[Path], watch: Watch) -> Listing:
    """List the images in a file of lines `NAME LABEL` or `NAME,LABEL`, or `NAME` in a test set.

    Names are relative to the resolved folder `root`, with or without a leading slash. Class names come from
    `categories`, a file with a line `NAME LABEL` per class, or without it from the synset names in the files `named`.

    Raises:
        InputError: a line cannot be parsed, a label is out of range, a name leads out of the root or occurs twice, or
            files are missing.
    """
    rows = Rows()
    rows.file_states += [file_state(file), *([file_state(categories)] if categories else [])]
    classes = read_categories(categories) if categories else None
    keys = unique_keys(classes or ())
    folder_of = _read(file, root, rows, classes, watch)
    if not rows.found:
        raise InputError(f"no images in {file}: expected one line NAME LABEL per image")
    rows.refuse_repeats(file.name)
    check_files(file, root, rows, watch)
    labelled = set(folder_of) != {UNLABELLED}
    if classes is None:
        keys, classes = _names(folder_of, named, rows) if labelled else ((), ())
    places = [Place(str(root), str(root))]
    return rows.listed(file.name, classes, keys, places, numbered=labelled)


def _read(file: Path, root: Path, rows: Rows, classes: tuple[str, ...] | None, watch: Watch) -> dict[int, bytes | None]:
    """Add the image of every line to `rows`; return the folder of each label, None if its images are in several."""
    folder_of: dict[int, bytes | None] = {}
    inside = os.fsencode(root).lstrip(b"/") + b"/"
    largest = LARGEST_LABEL if classes is None else len(classes) - 1
    labelled: bool | None = None
    with os.fdopen(open_regular(file), "rb") as lines, watch("reading the list", file.stat().st_size) as task:
        unseen = 0
        for number, line in enumerate(bounded_lines(lines, file.name), 1):
            unseen += len(line)
            if number % LINES_AT_ONCE == 0:
                task.advance(unseen, f"{rows.found:,} images")
                unseen = 0
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
            if not text:
                continue
            name, label = _line(text, largest, f"{file.name}, line {number}")
            if labelled is None:
                labelled = label != UNLABELLED
            elif labelled != (label != UNLABELLED):
                raise InputError(
                    f"{file.name}, line {number}: some lines have a label and others do not; label all of them or none"
                )
            name = tidy_name(name, root, inside, f"{file.name}, line {number}")
            rows.add(name, label)
            folder = name.rpartition(b"/")[0]
            if folder_of.setdefault(label, folder) != folder:
                folder_of[label] = None
        task.advance(unseen, f"{rows.found:,} images")
    return folder_of


def tidy_name(name: bytes, root: Path, inside: bytes, where: str) -> bytes:
    """Return the normalised name of an image relative to the root.

    Args:
        name: relative to the root, with or without a leading slash, or an absolute path in it.
        root: resolved folder.
        inside: path of the root without its leading slash, with a trailing one.
        where: file and line, for messages.

    Raises:
        InputError: the name leads out of the root.
    """
    name = name.lstrip(b"/").removeprefix(inside)
    if b"./" in name or b"//" in name or b"\0" in name:
        if b".." in name.split(b"/") or b"\0" in name:
            raise InputError(f"{where}: {brief(name)} leads out of {root}")
        name = os.fsencode(posixpath.normpath(os.fsdecode(name)))
    return name


def _line(text: bytes, largest: int, where: str) -> tuple[bytes, int]:
    """Parse a line into name and label. The label is the last word, since names may have spaces."""
    if is_image(os.fsdecode(text)):
        return text, UNLABELLED
    label = re.split(rb"[ \t,]", text)[-1]
    name = text[: len(text) - len(label)].rstrip(b" \t").removesuffix(b",").rstrip(b" \t")
    if not name or not label or not is_image(os.fsdecode(name)):
        raise InputError(f"{where}: {brief(text)!r}; expected NAME LABEL, an image and its class index")
    if not label.removeprefix(b"-").isdigit():
        raise InputError(f"{where}: label {brief(label)!r}; expected an integer")
    value = int(label) if len(label) < 12 else LARGEST_LABEL + 1
    if not 0 <= value <= largest:
        raise InputError(f"{where}: label {brief(label)}; expected 0 .. {largest}")
    return name, value


def check_files(file: Path, root: Path, rows: Rows, watch: Watch) -> None:
    """Check that all files exist, by scanning each folder once: millions of single checks take far longer."""
    folders: dict[bytes, int] = {}
    folder = np.fromiter(
        (folders.setdefault(rows.name(i).rpartition(b"/")[0], len(folders)) for i in range(rows.found)), np.int32
    )
    order = np.argsort(folder, kind="stable")
    missing: list[tuple[int, str]] = []
    with watch("looking for the files", len(folders)) as task:
        for name, members in zip(folders, np.split(order, np.cumsum(np.bincount(folder))[:-1]), strict=True):
            indices = members.tolist()
            kinds = kinds_in(os.fsencode(root) + b"/" + name, os.fsencode(root))
            for index in indices:
                kind = kinds.get(rows.name(index).rpartition(b"/")[2], "")
                if kind != "file":
                    missing.append((index, " (is a folder)" if kind == "folder" else ""))
            task.advance()
    if missing:
        missing.sort()
        names = [brief(rows.name(index)) + what for index, what in missing[:3]] + [""] * (len(missing) - 3)
        raise InputError(
            f"{len(missing):,} of the {rows.found:,} images of {file.name} are not in {root}: {few(names)}; give the "
            "folder that the names are relative to"
        )


def kinds_in(folder: bytes, root: bytes) -> dict[bytes, str]:
    """Return the kind of each entry of a folder: `file`, `folder` or `other`. A missing folder has no entries.

    Raises:
        InputError: the folder cannot be read, or a link leads out of the root.
    """
    kinds: dict[bytes, str] = {}
    try:
        if os.path.realpath(folder) != folder:  # a link, or a folder below one
            refuse_to_leave(os.fsdecode(folder), os.fsdecode(root))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink() and is_image(os.fsdecode(entry.name)):
                    refuse_to_leave(os.fsdecode(entry.path), os.fsdecode(root))
                kinds[entry.name] = "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"cannot read the folder {brief(folder)}: {error.strerror}") from None
    return kinds


def _names(
    folder_of: dict[int, bytes | None], named: list[Path], rows: Rows
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys and names of the classes of a list without categories.

    The key of a class is its folder. If folders do not identify the classes, and for labels without images, it is the
    label.
    """
    folders = {label: os.fsdecode(folder) for label, folder in folder_of.items() if folder}
    labels = range(max(folder_of) + 1)
    if not len(folders) == len(folder_of) == len(set(folders.values())):
        folders = {}
    keys = {label: without_letter(folder) for label, folder in folders.items()}
    shown = names_beside(named, keys.values(), rows.file_states) if keys else {}
    names = {label: shown.get(key, key) for label, key in keys.items()}
    unique = unique_keys([keys.get(label, str(label)) for label in labels])
    return unique, tuple(names.get(label, f"class {label}") for label in labels)
