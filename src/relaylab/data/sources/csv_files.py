"""CSV files with a header: an image column, and either one column of classes or one 0/1 column per class.

Note [CSV]
1. The first line is a header if it has no image name; otherwise the file is a list of `relaylab.data.sources.lists`.
   The delimiter is the one that splits the header into the most columns.
2. The image column is the one whose first values are most often files in the folder; if no column has any, the one with
   a header in `IMAGE_HEADERS`. Extensions may be omitted.
3. The class column has a header in `CLASS_HEADERS`. Its values are the keys of the classes, in numerical order if all
   are numbers, else in alphabetical order. A value holds several labels, separated by one of `DIVIDERS`, if the header
   is a plural, or if each of its items is also the only label of another image.
4. Without such a column, the columns of 0 and 1 are one class each, if there are at least two.
5. If any image has more or fewer than one label, the whole set has `targets`.
"""

import csv
import os
import re
from array import array
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
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
from relaylab.data.sources.targets import targets_from
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
SAMPLE = 100  # lines that are read to find the columns
LINES_AT_ONCE = 10_000


@dataclass(frozen=True)
class _Columns:
    """Indices of the columns that are read; each of the `flags` is a column of 0 and 1 for one class."""

    delimiter: str
    header: tuple[str, ...]
    image: int
    label: int | None
    flags: tuple[int, ...]

    @property
    def note(self) -> str:
        """A note for the user on the columns that are read."""
        used = {self.image, *self.flags, *([] if self.label is None else [self.label])}
        names = [f"{len(self.flags)} columns of 0 and 1"] if self.label is None else [self.header[self.label]]
        rest = [name for place, name in enumerate(self.header) if place not in used]
        ignored = f"; ignored: {', '.join(map(brief, rest))}" if rest else ""
        return f"images by {brief(self.header[self.image])}, classes by {brief(names[0])}{ignored}"


@dataclass
class _Files:
    """Looks up the images below a resolved folder by name, with or without extension."""

    root: Path
    inside: bytes = b""
    folders: dict[bytes, dict[bytes, list[bytes]]] = field(default_factory=dict[bytes, dict[bytes, list[bytes]]])

    def __post_init__(self) -> None:
        self.inside = os.fsencode(self.root).lstrip(b"/") + b"/"

    def find(self, text: str, where: str) -> bytes | None:
        """Return the name of a file relative to the root, or None if it does not exist.

        Raises:
            InputError: the name leads out of the root, or several files match it with different extensions.
        """
        name = tidy_name(os.fsencode(text.strip()), self.root, self.inside, where)
        folder, slash, base = name.rpartition(b"/")
        matches = self._names(folder).get(base, [])
        if len(matches) > 1:
            names = few(matches)
            raise InputError(f"{where}: {brief(name)} matches {names}; add the extensions to the names")
        return folder + slash + matches[0] if matches else None

    def _names(self, folder: bytes) -> dict[bytes, list[bytes]]:
        """Return the images of a folder by name, with and without extension."""
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
    """Return whether a file is a CSV file with a header. See Note [CSV] 1."""
    if file.suffix.lower() not in CSV:
        return False
    with closing(_lines(file)) as lines:
        first = next((line for line in lines if line.strip()), "")
    return bool(first) and not any(map(is_image, re.split(r"[\s,;\"']+", first)))


def list_csv(
    file: Path, root: Path, categories: Path | None, named: Sequence[Path], wanted: Collection[str], watch: Watch
) -> Listing:
    """List the images in a CSV file with a header, in its order. See Note [CSV].

    Args:
        file: the CSV file.
        root: resolved folder that names are relative to.
        categories: file with a line `NAME LABEL` for each class; the values are then names or labels from it.
        named: files with display names.
        wanted: classes of a different data set, which the values may also refer to.
        watch: progress display.

    Raises:
        InputError: the columns cannot be determined, a line is damaged, labels are empty, or files are missing.
    """
    rows, files = Rows(), _Files(root)
    rows.file_states += [file_state(file), *([file_state(categories)] if categories else [])]
    columns = _columns(file, files)
    with watch("reading the list", file.stat().st_size) as task:
        values, value_of = _read(file, columns, files, rows, task)
    rows.refuse_repeats(file.name)
    known = unique_keys(read_categories(categories)) if categories else None
    texts, divider = _labels(columns, list(values), {*wanted, *(known or ())})
    by_column = tuple(columns.header[place] for place in columns.flags)
    keys = known or by_column or in_order({label for labels in texts for label in labels})
    indices = _indices(keys, texts, columns, is_known=known is not None, title=file.name)
    classes = _display_names(keys, named, rows)
    has_several = any(len(labels) != 1 for labels in indices)
    labels = np.array([UNLABELLED if has_several else labels[0] for labels in indices])[value_of]
    listing = rows.listed(file.name, classes, keys, [Place(str(root), str(root))], labels)
    notes = (columns.note, *([f"several labels per image, separated by {divider}"] if has_several and divider else []))
    if not has_several:
        return replace(listing, notes=notes)
    return replace(listing, notes=notes, targets=targets_from(indices, value_of, len(keys), file.name))


def _lines(file: Path, task: Task | None = None) -> Generator[str]:
    """Iterate over the lines of a file, without a byte order mark."""
    with os.fdopen(open_regular(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        if os.pread(lines.fileno(), 2, 0) in (BOM_UTF16_LE, BOM_UTF16_BE):
            raise InputError(f"{file.name} is not UTF-8 text, but probably UTF-16; save it as UTF-8")
        unseen = 0
        for number, line in enumerate(bounded_lines(lines, file.name), 1):
            unseen += len(line)
            if task is not None and number % LINES_AT_ONCE == 0:
                task.advance(unseen, f"{number:,} lines")
                unseen = 0
            yield line


def _records(file: Path, delimiter: str, columns: int, task: Task | None = None) -> Generator[tuple[int, list[str]]]:
    """Yield the line number and the fields of each line that is not empty, the header included.

    Raises:
        InputError: a line cannot be parsed, or does not have as many fields as the header.
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
    split, problem = dict[str, list[str]](), ""
    for mark in DELIMITERS:
        try:
            split[mark] = next(csv.reader([first], delimiter=mark, strict=True))
        except csv.Error as error:  # as for ";" in a header of quoted names separated by commas
            problem = problem or str(error)
    if not split:
        raise InputError(f"{file.name}, line 1: {problem}")
    delimiter = max(split, key=lambda mark: len(split[mark]))
    return delimiter, [name.strip() for name in split[delimiter]]


def _columns(file: Path, files: _Files) -> _Columns:
    """Find the image and class columns. See Note [CSV] 2 to 4.

    Raises:
        InputError: there is no image column, no class column, or no line after the header.
    """
    delimiter, header = _header(file)
    records = _records(file, delimiter, len(header))
    with closing(records):
        next(records)  # the header
        sample = list(islice(records, SAMPLE))
    named = f"its columns are {', '.join(map(brief, header))}"
    if not sample:
        raise InputError(f"no images in {file}: there are no lines after the header; {named}")
    kinds = [re.sub(r"[\s-]+", "_", name.lower()) for name in header]
    exists = {text: bool(text) and _exists(files, text) for text in {text for _, row in sample for text in row}}
    found = [sum(exists[row[i]] for _, row in sample) for i in range(len(header))]
    by_header = _by_header(kinds, IMAGE_HEADERS)
    most = max(found)
    best = [place for place, count in enumerate(found) if count == most > 0]
    image = next((place for place in by_header if place in best), next(iter(best or by_header), None))
    if image is None:
        raise InputError(
            f"{file.name} has no column with images of {files.root}: {named}; expected a column such as file or image, "
            "with names relative to this folder"
        )
    label = next((place for place in _by_header(kinds, CLASS_HEADERS) if place != image), None)
    flags = [i for i in range(len(header)) if i != image and all(row[i].strip() in FLAGS for _, row in sample)]
    if label is None and len(flags) < 2:
        raise InputError(
            f"{file.name} has no column with classes: {named}; expected a column named label, class, category or "
            "target, or a column of 0 and 1 for each class"
        )
    counts = Counter(header)
    repeated = sorted({header[i] for i in flags if counts[header[i]] > 1}) if label is None else []
    if repeated:
        raise InputError(f"{file.name} has the columns {few(repeated)} more than once")
    return _Columns(delimiter, tuple(header), image, label, () if label is not None else tuple(flags))


def _by_header(kinds: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the indices of the columns with a known header, in the order of `known`."""
    return [place for name in known for place, kind in enumerate(kinds) if kind == name]


def _exists(files: _Files, text: str) -> bool:
    try:
        return files.find(text, "") is not None
    except InputError:  # this may not be the image column
        return False


def _read(
    file: Path, columns: _Columns, files: _Files, rows: Rows, task: Task
) -> tuple[dict[tuple[str, ...], int], NDArray[np.int32]]:
    """Add the image of every line to `rows`.

    Returns:
        The index of each distinct value of the class columns, and the index of each line's value.

    Raises:
        InputError: images are missing, labels are empty, or a flag is neither 0 nor 1.
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
            f"{few(missing)}; pass the folder that the names are relative to"
        )
    if empty:
        raise InputError(
            f"{file.name}: {len(empty):,} of {rows.found:,} images have no label, such as the one in line {empty[0]}; "
            "remove these lines, or move them to a separate list"
        )
    return values, np.frombuffer(value_of, np.int32)


def _flag(text: str, name: str, where: str) -> str:
    flag = FLAGS.get(text.strip())
    if flag is None:
        raise InputError(f"{where}, column {brief(name)}: {brief(text)!r}; expected 0 or 1, as in the lines above")
    return flag


def _labels(
    columns: _Columns, values: Sequence[tuple[str, ...]], known: Collection[str]
) -> tuple[list[tuple[str, ...]], str]:
    """Return the labels of each value, and the name of the divider between them. See Note [CSV] 3."""
    if columns.label is None:
        names = [columns.header[place] for place in columns.flags]
        return [tuple(name for name, flag in zip(names, value, strict=True) if flag == "1") for value in values], ""
    texts = [value[0] for value in values]
    if all(WHOLE.fullmatch(text) for text in texts):  # some programs write 3 as 3.0
        texts = [WHOLE.sub(r"\1", text) for text in texts]
    is_plural = columns.header[columns.label].lower() in PLURALS
    for title, divider in DIVIDERS.items():
        split = [tuple(item.strip() for item in re.split(divider, text) if item.strip()) for text in texts]
        alone = {text for text in texts if not re.search(divider, text)} | set(known)
        several = [labels for labels in split if len(labels) > 1]
        if several and (is_plural or alone.issuperset(label for labels in several for label in labels)):
            return split, title
    return [(text,) for text in texts], ""


def _indices(
    keys: Sequence[str], texts: Sequence[tuple[str, ...]], columns: _Columns, *, is_known: bool, title: str
) -> list[list[int]]:
    """Return the class indices of each value; with `is_known`, labels may also be indices of the keys.

    Raises:
        InputError: a label is not among the keys, or a value has no label.
    """
    index_of = {str(index): index for index in range(len(keys))} if is_known else {}
    index_of |= {key: index for index, key in enumerate(keys)}
    strange = sorted({label for labels in texts for label in labels if label not in index_of})
    if strange:
        raise InputError(
            f"{title} has classes that are not in its categories file: {few(strange)}; expected {few(list(keys))}"
        )
    if columns.label is not None and not all(texts):
        raise InputError(f"{title} has labels that consist of divider characters only")
    return [sorted({index_of[label] for label in labels}) for labels in texts]


def _display_names(keys: tuple[str, ...], named: Sequence[Path], rows: Rows) -> tuple[str, ...]:
    shown: Mapping[str, str] = names_beside(named, keys, rows.file_states)
    return tuple(shown.get(key, key) for key in keys)
