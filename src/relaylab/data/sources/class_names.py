"""Files with class names: MiniPlaces' classes.txt, ImageNet's synsets, Places' categories."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from relaylab.data.sources.file_states import FileState, file_state
from relaylab.data.sources.listing import few
from relaylab.errors import InputError
from relaylab.outside.reading import parse, read_bytes
from relaylab.outside.showing import brief

BESIDE = ("classes.txt", "LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
NUMBERED = ("classnames.txt", "class_names.txt", "labels.txt", "classes.txt")
NO_META = "is not the meta.mat of ImageNet's 2012 development kit"
LARGEST_MAT, MAT_SECONDS = 16 << 20, 60  # limits: bytes and seconds
LARGEST_TEXT = 64 << 20  # bytes
DIGITS = 6  # maximum number of digits of a class index


def files_beside(folders: Iterable[Path]) -> list[Path]:
    """Return the files in the folders that name classes, the most specific first."""
    return [folder / name for name in BESIDE for folder in folders if (folder / name).is_file()]


def numbered_names(files: Iterable[Path], file_states: list[FileState]) -> tuple[str, ...]:
    """Return the names of numbered classes, or () if no file in the folders of `files` has them.

    The first of `NUMBERED` that exists is read, one name per line, and added to `file_states`.
    """
    folders = dict.fromkeys(file.parent for file in files)
    path = next((folder / name for folder in folders for name in NUMBERED if (folder / name).is_file()), None)
    if path is None:
        return ()
    file_states.append(file_state(path))
    return tuple(line.strip() for line in _text(path).splitlines() if line.strip())


def names_beside(files: Iterable[Path], keys: Iterable[str], file_states: list[FileState]) -> dict[str, str]:
    """Return display names by class folder from the first file that names every folder, or an empty mapping.

    The files that are read are added to `file_states`.
    """
    wanted = set(keys)
    for file in files:
        file_states.append(file_state(file))
        names = named_classes(read_bytes(file, LARGEST_TEXT).decode(errors="replace"))
        if wanted and wanted <= names.keys():
            return names
    return {}


def named_classes(text: str) -> dict[str, str]:
    """Parse names by folder from lines such as `4 004_market /m/market/outdoor` and `n01440764 tench, Tinca tinca`."""
    names = dict[str, str]()
    for line in text.splitlines():
        first, *rest = line.strip().split(maxsplit=1)[:2] or [""]
        folder, *name = rest[0].split(maxsplit=1) if rest else [""]
        if first.isdecimal() and name:
            names[folder] = without_letter(name[0])
        elif re.fullmatch(r"n\d{8}", first) and rest:
            names[first] = rest[0]
    return names


def read_categories(file: Path) -> tuple[str, ...]:
    """Read the class names of a file with lines such as `/a/airfield 0`, in the order of their indices.

    Raises:
        InputError: a line cannot be parsed, an index occurs twice or is missing, or the file cannot be read.
    """
    names = dict[int, str]()
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        name, label = name_and_number(line)
        if not name:
            raise InputError(f"{file.name}, line {number}: {brief(line)!r}; expected NAME INDEX")
        if int(label) in names:
            raise InputError(f"{file.name}, line {number}: class {label} is given twice")
        names[int(label)] = without_letter(name)
    absent = [str(label) for label in range(min(max(names, default=0), len(names)) + 1) if label not in names]
    if absent:
        raise InputError(f"{file.name} leaves out class {few(absent)}; expected every index from 0")
    return tuple(names[label] for label in range(len(names)))


def name_and_number(line: str) -> tuple[str, str]:
    """Split a line NAME INDEX or NAME,INDEX with up to six digits; return two empty strings for any other line."""
    text = line.strip()
    name = text.rstrip("0123456789")
    label = text[len(name) :]
    bare = name.rstrip(" \t\f\v\r\n,")
    is_one = 1 <= len(label) <= DIGITS and bare and len(bare) < len(name)
    return (bare, label) if is_one else ("", "")


def without_letter(name: str) -> str:
    """Remove the leading letter of a class name of Places: /a/airfield becomes airfield."""
    return re.sub(r"^/?\w/", "", name.strip("/")) if "/" in name.strip("/") else name.strip("/")


def synset_numbers(meta: Path) -> tuple[dict[int, str], dict[str, str]]:
    """Read ImageNet's 2012 class numbers and names from the development kit's meta.mat.

    The numbers 1 to 1000 are not in the order of the sorted synsets, which is the usual order of the classes.

    Returns:
        The synset of each number, and the name of each synset.

    Raises:
        InputError: the file is not of a supported kind.
    """
    read_bytes(meta, LARGEST_MAT)  # checks that it is a regular file of bounded size
    command = [sys.executable, "-m", "relaylab.data.sources.synsets", str(meta)]
    try:  # in a separate process, since damaged files can crash scipy's C code
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        run = subprocess.run(command, capture_output=True, timeout=MAT_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise InputError(f"{meta} {NO_META}: it takes more than {MAT_SECONDS} seconds to read") from None
    if run.returncode:
        lines = run.stderr.decode(errors="replace").strip().splitlines() or [f"its reader exited with {run.returncode}"]
        raise InputError(f"{meta} {NO_META}: {brief(lines[-1])}")
    rows = parse(run.stdout, list[tuple[int, str, str]], str(meta))
    return {number: synset for number, synset, _ in rows}, {synset: words for _, synset, words in rows}


def read_truth(file: Path) -> Sequence[int]:
    """Read ImageNet's validation ground truth: one 2012 class number, from 1, per line.

    Raises:
        InputError: a line is not a number, or the file cannot be read.
    """
    lines = _text(file).split()
    for number, line in enumerate(lines, 1):
        if not (line.isascii() and line.isdecimal() and len(line) <= DIGITS):
            raise InputError(f"{file.name}, line {number}: {brief(line)!r}; expected a class number")
    return [int(line) for line in lines]


def _text(file: Path) -> str:
    try:
        return read_bytes(file, LARGEST_TEXT).decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
