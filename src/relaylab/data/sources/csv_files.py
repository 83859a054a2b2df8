"""CSV files with a header: a column with the images, and their classes in another column or in a column for each.

Note [CSV]
1. The first line is a header if nothing in it is the name of an image; otherwise the file is a list of
   `relaylab.data.sources.lists`. The delimiter is the one that divides the header into the most columns.
2. The column with the images is the one whose first values are most often files of the folder; without any, the one
   with a header in `IMAGE_HEADERS`. Extensions may be left out.
3. The column with the classes has a header in `CLASS_HEADERS`. Its values are the classes' keys, in the order of
   numbers if all are numbers, else of text. A value holds several labels, divided by one of `DIVIDERS`, if the header
   is a plural, or if all parts of it are classes that stand alone elsewhere in the column.
4. Without such a column, those with only 0 and 1 are a class each, if there are two or more.
5. An image with more or less than one label makes the whole set one with `targets`.
"""

import csv
import os
import re
from array import array
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from relaylab.data.sources.class_names import names_beside, read_categories
from relaylab.data.sources.file_states import file_state
from relaylab.data.sources.listing import Listing, Place, Rows, Watch, few, is_image
from relaylab.data.sources.lists import kinds_in, tidy_name
from relaylab.data.sources.source import UNLABELLED
from relaylab.data.sources.valued import in_order, unique_keys
from relaylab.errors import InputError
from relaylab.outside.reading import bounded_lines, open_regular
from relaylab.outside.showing import brief
from relaylab.progress import Task

CSV = (".csv", ".tsv")
DELIMITERS = (",", ";", "\t")
IMAGE_HEADERS = (
    "file", "filename", "file_name", "filepath", "file_path", "image", "image_file", "image_name", "image_path",
    "image_id", "img", "path", "name", "id",
)  # fmt: skip
PLURALS = ("labels", "classes", "categories", "targets", "tags")
CLASS_HEADERS = (
    "label", "class", "category", "target", "class_name", "label_name", "category_name", *PLURALS, "tag", "class_id",
    "label_id", "category_id", "y",
)  # fmt: skip
DIVIDERS = {"semicolons or bars": r"[;|]", "commas": r",", "spaces": r"\s"}
FLAGS = {"0": "0", "1": "1", "0.0": "0", "1.0": "1"}
WHOLE = re.compile(r"(\d+)(?:\.0+)?")
SAMPLE = 100  # lines by which columns are told apart
LINES_AT_ONCE = 10_000


@dataclass(frozen=True)
class _Columns:
    """The places of the columns that are read: of the images, and of the classes; `flags` are a class each."""

    delimiter: str
    header: tuple[str, ...]
    image: int
    label: int | None
    flags: tuple[int, ...]

    @property
    def note(self) -> str:
        """A sentence for the user, without its full stop."""
        used = {self.image, *self.flags, *([] if self.label is None else [self.label])}
        names = [f"{len(self.flags)} columns of 0 and 1"] if self.label is None else [self.header[self.label]]
        rest = [name for place, name in enumerate(self.header) if place not in used]
        ignored = f"; ignored: {', '.join(map(brief, rest))}" if rest else ""
        return f"images by {brief(self.header[self.image])}, classes by {brief(names[0])}{ignored}"


@dataclass
class _Files:
    """The images below a resolved folder, found by names with or without extension."""

    root: Path
    inside: bytes = b""
    folders: dict[bytes, dict[bytes, list[bytes]]] = field(default_factory=dict[bytes, dict[bytes, list[bytes]]])

    def __post_init__(self) -> None:
        self.inside = os.fsencode(self.root).lstrip(b"/") + b"/"

    def find(self, text: str, where: str) -> bytes | None:
        """Return the name of a file relative to the root; None if there is none.

        Raises:
            InputError: a name that leads out of the root, or that several files have with different extensions.
        """
        name = tidy_name(os.fsencode(text.strip()), self.root, self.inside, where)
        folder, slash, base = name.rpartition(b"/")
        found = self._names(folder).get(base, [])
        if len(found) > 1:
            names = few(found)
            raise InputError(f"{where}: {brief(name)} may be {names}; give names with their extensions")
        return folder + slash + found[0] if found else None

    def _names(self, folder: bytes) -> dict[bytes, list[bytes]]:
        """Return the images of a folder by their names with and without extension."""
        if folder not in self.folders:
            root = os.fsencode(self.root)
            kinds = kinds_in(root + b"/" + folder if folder else root, root)
            images = [name for name, kind in kinds.items() if kind == "file" and is_image(os.fsdecode(name))]
            names: dict[bytes, list[bytes]] = {}
            for name in images:
                names.setdefault(name.rpartition(b".")[0], []).append(name)
            self.folders[folder] = names | {name: [name] for name in images}
        return self.folders[folder]


def has_header(file: Path) -> bool:
    """Return whether a file is one of CSV with a header. See Note [CSV] 1."""
    if file.suffix.lower() not in CSV:
        return False
    with closing(_lines(file)) as lines:
        first = next((line for line in lines if line.strip()), "")
    return bool(first) and not any(map(is_image, re.split(r"[\s,;\"']+", first)))


def list_csv(
    file: Path, root: Path, categories: Path | None, named: Sequence[Path], wanted: Collection[str], watch: Watch
) -> Listing:
    """List the images that a CSV file with a header names, in its order. See Note [CSV].

    Args:
        file: of the list.
        root: resolved folder that names are relative to.
        categories: file with a line `NAME LABEL` for each class, of which the values are names or labels.
        named: files with display names.
        wanted: classes of another set, which the values may name, too.
        watch: display of progress.

    Raises:
        InputError: columns that cannot be told apart, a damaged line, empty labels, or missing files.
    """
    rows, files = Rows(), _Files(root)
    rows.file_states += [file_state(file), *([file_state(categories)] if categories else [])]
    columns = _columns(file, files)
    with watch("reading the list", file.stat().st_size) as task:
        values, value_of = _read(file, columns, files, rows, task)
    rows.refuse_repeats(file.name)
    known = unique_keys(read_categories(categories)) if categories else None
    own, divider = _labels(columns, list(values), {*wanted, *(known or ())})
    by_column = tuple(columns.header[place] for place in columns.flags)
    keys = known or by_column or in_order({label for one in own for label in one})
    places = _places(keys, own, columns, is_known=known is not None, title=file.name)
    classes = _display_names(keys, named, rows)
    has_several = any(len(one) != 1 for one in places)
    labels = np.array([UNLABELLED if has_several else one[0] for one in places])[value_of]
    listing = rows.listed(file.name, classes, keys, [Place(str(root), str(root))], labels)
    notes = (columns.note, *([f"several labels for an image, divided by {divider}"] if has_several and divider else []))
    if not has_several:
        return replace(listing, notes=notes)
    targets = np.zeros((len(places), len(keys)), np.uint8)
    for row, one in enumerate(places):
        targets[row, one] = 1
    return replace(listing, notes=notes, targets=targets[value_of])


def _lines(file: Path, task: Task | None = None) -> Generator[str]:
    """Iterate over the lines of a file, without a byte order mark."""
    with os.fdopen(open_regular(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        unseen = 0
        for number, line in enumerate(bounded_lines(lines, file.name), 1):
            unseen += len(line)
            if task is not None and number % LINES_AT_ONCE == 0:
                task.advance(unseen, f"{number:,} lines")
                unseen = 0
            yield line


def _records(file: Path, delimiter: str, columns: int, task: Task | None = None) -> Generator[tuple[int, list[str]]]:
    """Iterate over the fields of each line behind the header that is not empty, with its number.

    Raises:
        InputError: a line that cannot be parsed, or of another number of fields.
    """
    with closing(_lines(file, task)) as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                if not any(fields):
                    continue
                if len(fields) != columns:
                    found = f"{len(fields)} field{'s' * (len(fields) != 1)}"
                    raise InputError(f"{file.name}, line {reader.line_num}: {found}; the header has {columns}")
                yield reader.line_num, fields
        except csv.Error as error:
            raise InputError(f"{file.name}, line {reader.line_num}: {error}") from None


def _header(file: Path) -> tuple[str, list[str]]:
    """Return the delimiter and the names of the columns. See Note [CSV] 1."""
    with closing(_lines(file)) as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        split = {each: next(csv.reader([first], delimiter=each, strict=True)) for each in DELIMITERS}
    except csv.Error as error:
        raise InputError(f"{file.name}, line 1: {error}") from None
    delimiter = max(DELIMITERS, key=lambda each: len(split[each]))
    return delimiter, [name.strip() for name in split[delimiter]]


def _columns(file: Path, files: _Files) -> _Columns:
    """Tell the columns apart. See Note [CSV] 2 to 4.

    Raises:
        InputError: no column with images or with classes, or a file without lines behind the header.
    """
    delimiter, header = _header(file)
    records = _records(file, delimiter, len(header))
    with closing(records):
        next(records)  # the header
        sample = list(islice(records, SAMPLE))
    named = f"its columns are {', '.join(map(brief, header))}"
    if not sample:
        raise InputError(f"no images in {file}: there are no lines behind the header; {named}")
    kinds = [re.sub(r"[\s-]+", "_", name.lower()) for name in header]
    found = [sum(bool(row[i]) and _is_there(files, row[i]) for _, row in sample) for i in range(len(header))]
    by_header = _by_header(kinds, IMAGE_HEADERS)
    best = [place for place, count in enumerate(found) if count == max(found) > 0]
    image = next((place for place in by_header if place in best), next(iter(best or by_header), None))
    if image is None:
        raise InputError(
            f"{file.name} has no column with images of {files.root}: {named}; expected one such as file or image, "
            "with names below this folder"
        )
    label = next((place for place in _by_header(kinds, CLASS_HEADERS) if place != image), None)
    flags = [i for i in range(len(header)) if i != image and all(row[i].strip() in FLAGS for _, row in sample)]
    if label is None and len(flags) < 2:
        raise InputError(
            f"{file.name} has no column with classes: {named}; expected one named label, class, category or target, "
            "or a column of 0 and 1 for each class"
        )
    repeated = sorted({header[i] for i in flags if header.count(header[i]) > 1}) if label is None else []
    if repeated:
        raise InputError(f"{file.name} has the columns {few(repeated)} more than once")
    return _Columns(delimiter, tuple(header), image, label, () if label is not None else tuple(flags))


def _by_header(kinds: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the places of columns with a known header, in the order of `known`."""
    return [place for name in known for place, kind in enumerate(kinds) if kind == name]


def _is_there(files: _Files, text: str) -> bool:
    try:
        return files.find(text, "") is not None
    except InputError:  # of a column that may not be the one with the images
        return False


def _read(
    file: Path, columns: _Columns, files: _Files, rows: Rows, task: Task
) -> tuple[dict[tuple[str, ...], int], NDArray[np.int32]]:
    """Add every line's image to `rows`; return the different values of the classes' columns, and each line's value.

    Raises:
        InputError: images that are not there, empty labels, or a flag that is neither 0 nor 1.
    """
    values: dict[tuple[str, ...], int] = {}
    value_of = array("i")
    missing, empty = list[str](), list[int]()
    records = _records(file, columns.delimiter, len(columns.header), task)
    next(records)  # the header
    for number, fields in records:
        where = f"{file.name}, line {number}"
        name = files.find(fields[columns.image], where)
        if name is None:
            missing.append(fields[columns.image])
            continue
        if columns.label is None:
            value = tuple(_flag(fields[place], columns.header[place], where) for place in columns.flags)
        else:
            value = (fields[columns.label].strip(),)
            if not value[0]:
                empty.append(number)
        rows.add(name, UNLABELLED)
        value_of.append(values.setdefault(value, len(values)))
    if missing:
        raise InputError(
            f"{len(missing):,} of the {rows.found + len(missing):,} images of {file.name} are not in {files.root}: "
            f"{few(missing)}; name the folder that the list is about"
        )
    if empty:
        raise InputError(
            f"{file.name}: {len(empty):,} of {rows.found:,} images have no label, such as that in line {empty[0]}; "
            "remove these lines, or put the images without a label into a list of their own"
        )
    return values, np.frombuffer(value_of, np.int32)


def _flag(text: str, name: str, where: str) -> str:
    flag = FLAGS.get(text.strip())
    if flag is None:
        raise InputError(f"{where}, column {brief(name)}: {brief(text)!r}; expected 0 or 1, as above it")
    return flag


def _labels(
    columns: _Columns, values: Sequence[tuple[str, ...]], known: Collection[str]
) -> tuple[list[tuple[str, ...]], str]:
    """Return the labels of each value, and what divides them. See Note [CSV] 3."""
    if columns.label is None:
        names = [columns.header[place] for place in columns.flags]
        return [tuple(name for name, flag in zip(names, value, strict=True) if flag == "1") for value in values], ""
    texts = [value[0] for value in values]
    if all(WHOLE.fullmatch(text) for text in texts):  # 3.0 is how some programs write 3
        texts = [WHOLE.sub(r"\1", text) for text in texts]
    is_plural = columns.header[columns.label].lower() in PLURALS
    for title, divider in DIVIDERS.items():
        parts = [tuple(part.strip() for part in re.split(divider, text) if part.strip()) for text in texts]
        alone = {text for text in texts if not re.search(divider, text)} | set(known)
        several = [own for own in parts if len(own) > 1]
        if several and (is_plural or alone.issuperset(part for own in several for part in own)):
            return parts, title
    return [(text,) for text in texts], ""


def _places(
    keys: Sequence[str], labels: Sequence[tuple[str, ...]], columns: _Columns, *, is_known: bool, title: str
) -> list[list[int]]:
    """Return the class indices of each value; with `is_known` keys, labels may also be their indices.

    Raises:
        InputError: a label that is not among the keys, or a value without any.
    """
    place_of = {str(place): place for place in range(len(keys))} if is_known else {}
    place_of |= {key: place for place, key in enumerate(keys)}
    strange = sorted({label for own in labels for label in own if label not in place_of})
    if strange:
        raise InputError(f"{title} has classes that its categories lack: {few(strange)}; expected {few(list(keys))}")
    if columns.label is not None and not all(labels):
        raise InputError(f"{title} has labels that consist of divider characters only")
    return [sorted({place_of[label] for label in own}) for own in labels]


def _display_names(keys: tuple[str, ...], named: Sequence[Path], rows: Rows) -> tuple[str, ...]:
    shown: Mapping[str, str] = names_beside(named, keys, rows.file_states)
    return tuple(shown.get(key, key) for key in keys)
