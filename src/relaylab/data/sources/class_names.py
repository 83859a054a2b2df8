"""Files with the names of classes: MiniPlaces' classes.txt, ImageNet's synsets, Places' categories."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from relaylab.data.sources.listing import few, printable
from relaylab.data.sources.stamps import Stamp, stamp
from relaylab.errors import InputError

BESIDE = ("classes.txt", "LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
NUMBERED = ("classnames.txt", "class_names.txt", "labels.txt", "classes.txt")


def files_beside(folders: Iterable[Path]) -> list[Path]:
    """Return the files in some folders that give classes names, the more particular first."""
    return [folder / name for name in BESIDE for folder in folders if (folder / name).is_file()]


def numbered_names(files: Iterable[Path], stamps: list[Stamp]) -> tuple[str, ...]:
    """Return the names of numbered classes from the first file beside some files that has one on each line, or ().

    The file that was read is added to `stamps`.
    """
    folders = dict.fromkeys(file.parent for file in files)
    found = next((folder / name for folder in folders for name in NUMBERED if (folder / name).is_file()), None)
    if found is None:
        return ()
    stamps.append(stamp(found))
    return tuple(line.strip() for line in _text(found).splitlines() if line.strip())


def names_beside(files: Iterable[Path], keys: Iterable[str], stamps: list[Stamp]) -> dict[str, str]:
    """Return display names by class folder from the first file that names every folder.

    The files that were read are added to `stamps`.
    """
    wanted = set(keys)
    for file in files:
        stamps.append(stamp(file))
        names = named_classes(file.read_text(encoding="utf-8", errors="replace"))
        if wanted and wanted <= names.keys():
            return names
    return {}


def named_classes(text: str) -> dict[str, str]:
    """Parse names by folder from lines such as `4 004_market /m/market/outdoor` and `n01440764 tench, Tinca tinca`."""
    names = dict[str, str]()
    for line in text.splitlines():
        if match := re.fullmatch(r"\s*\d+\s+(\S+)\s+(\S.*?)\s*", line):
            names[match[1]] = without_letter(match[2])
        elif match := re.fullmatch(r"\s*(n\d{8})\s+(\S.*?)\s*", line):
            names[match[1]] = match[2]
    return names


def read_categories(file: Path) -> tuple[str, ...]:
    """Read the classes of a file with a line `/a/airfield 0` for each, in the order of their numbers.

    Raises:
        InputError: a line of another form, a number twice or left out, or a file that cannot be read.
    """
    names = dict[int, str]()
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(\S.*?)[\s,]+(\d{1,6})\s*", line)
        if match is None:
            raise InputError(f"{file.name}, line {number}: {printable(line)!r}; expected NAME NUMBER")
        if int(match[2]) in names:
            raise InputError(f"{file.name}, line {number}: class {match[2]} for the second time")
        names[int(match[2])] = without_letter(match[1])
    absent = [str(number) for number in range(max(names, default=0) + 1) if number not in names]
    if absent:
        raise InputError(f"{file.name} leaves out class {few(absent)}; expected all numbers from 0")
    return tuple(names[number] for number in range(len(names)))


def without_letter(name: str) -> str:
    """Remove the letter that Places sorts classes by: /a/airfield gives airfield."""
    return re.sub(r"^/?\w/", "", name.strip("/")) if "/" in name.strip("/") else name.strip("/")


def synset_numbers(meta: Path) -> tuple[dict[int, str], dict[str, str]]:
    """Read the synset of each of ImageNet's numbers of 2012 and the name of each synset from the kit's meta.mat.

    The numbers 1 to 1000 are not in the order of the sorted synsets, by which the field numbers the classes.

    Raises:
        InputError: another kind of file.
    """
    from scipy.io import loadmat  # takes a while to import

    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        leaves = [one for one in synsets.flat if int(one["num_children"]) == 0]
        numbers = {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in leaves}
        names = {str(one["WNID"]): str(one["words"]) for one in leaves}
    except Exception as error:  # loadmat raises whatever the damage leads to
        raise InputError(f"{meta} is not the meta.mat of ImageNet's development kit of 2012: {error}") from None
    return numbers, names


def read_truth(file: Path) -> Sequence[int]:
    """Read ImageNet's validation ground truth: a class number of 2012, from 1, on each line.

    Raises:
        InputError: a line that is not a number, or a file that cannot be read.
    """
    lines = _text(file).split()
    for number, line in enumerate(lines, 1):
        if not line.isdecimal():
            raise InputError(f"{file.name}, line {number}: {printable(line)!r}; expected a class number")
    return [int(line) for line in lines]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
