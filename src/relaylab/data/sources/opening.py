"""Open data sets in any format. A data set is listed once, and opened from its index afterwards."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TypeVar, cast, overload

import numpy as np

from relaylab.data.sources.archives import list_archives, removing_refused, tar_members
from relaylab.data.sources.cache import cache_folder
from relaylab.data.sources.class_names import files_beside, read_truth, synset_numbers
from relaylab.data.sources.classes import Classes, relabelled
from relaylab.data.sources.coco import list_coco
from relaylab.data.sources.csv_files import CSV, has_header, list_csv
from relaylab.data.sources.file_states import file_state
from relaylab.data.sources.index import IndexedImages, UnusableIndexError, write_index
from relaylab.data.sources.layouts import PARQUET, SplitFiles, recognised
from relaylab.data.sources.listing import (
    SPLITS,
    Listing,
    NoSplitError,
    Watch,
    few,
    printable,
    told_apart,
    unwatched,
)
from relaylab.data.sources.lists import list_file
from relaylab.data.sources.parquet import list_parquet
from relaylab.data.sources.shards import are_shards, list_shards
from relaylab.data.sources.source import Source, check_source, is_source
from relaylab.data.sources.splits import chosen, split_of_file
from relaylab.data.sources.subset import Relabelled
from relaylab.data.sources.tabbed import is_tabbed, list_tabbed
from relaylab.data.sources.trees import list_trees
from relaylab.data.sources.zips import zip_members
from relaylab.errors import InputError
from relaylab.files import expanded
from relaylab.outside.folders import is_our_own

log = logging.getLogger("relaylab.data")

TARS = (".tar", ".tar.xz", ".tar.gz", ".tar.bz2", ".tar.zst", ".txz", ".tgz", ".tbz2", ".tzst")
ZIP = ".zip"
JSON = ".json"
LISTS = (".txt", *CSV, JSON)
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
Matched = TypeVar("Matched", IndexedImages, Relabelled)
ARCHIVES = (*TARS, ZIP, PARQUET)
VALIDATION_IMAGE = "ILSVRC2012_val_"


@dataclass(frozen=True, kw_only=True)
class _Request:
    """The arguments of `open_source` with resolved paths, sorted by kind. Equal requests have the same index."""

    folders: tuple[Path, ...] = ()
    archives: tuple[Path, ...] = ()  # tar files, zip files or Parquet files
    list: Path | None = None
    truth: Path | None = None
    meta: Path | None = None
    root: Path | None = None
    categories: Path | None = None
    named: tuple[Path, ...] = ()
    split: str | None = None
    classes: Classes | None = None

    def file(self, cache: Path) -> Path:
        text = json.dumps(asdict(self), default=str)
        return cache / "index" / f"{sha256(text.encode(errors='surrogateescape')).hexdigest()[:32]}.safetensors"


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@overload
def open_source(
    paths: Paths,
    *,
    split: str | None = None,
    classes: Sequence[str] | Classes | None = None,
    root: Path | None = None,
    categories: Path | None = None,
    cache: Path | None = None,
    watch: Watch = unwatched,
) -> IndexedImages: ...


@overload
def open_source(paths: Source, *, classes: Sequence[str] | Classes | None = None) -> Source: ...


def open_source(
    paths: Paths | Source,
    *,
    split: str | None = None,
    classes: Sequence[str] | Classes | None = None,
    root: Path | None = None,
    categories: Path | None = None,
    cache: Path | None = None,
    watch: Watch = unwatched,
) -> IndexedImages | Source:
    """Open a data set from its index or, if it has no current index, list it and write the index.

    Example::

        train = open_source("places2", split="train")
        val = open_source("places2", split="val", classes=train.identity)
        len(train), train.classes[train.labels[0]], train.read(0)[:2]

    Args:
        paths: one or more paths of the data set. Folder trees or tar files of CLASS/**/IMAGE, optionally inside
            {train,val,test}/. A list of `NAME LABEL` lines or a CSV file with a header, together with the image folder.
            ImageNet's validation images: their folder or tar together with ILSVRC2012_validation_ground_truth.txt and
            meta.mat, or with the folder of the development kit. docs/how-to/data.md describes all formats. Patterns
            such as `shard-{000..003}.tar` expand to several files. A `Source` is checked and returned, relabelled if
            `classes` is given.
        split: train, val or test, if the data has splits. A test split may have no classes.
        classes: classes that define the labels, in order: `identity` of the training set, or folders or names. The
            classes of the data set are matched with these by key; see Note [Classes].
        root: folder that the names of a list are relative to; by default the folder in `paths`, else the list's folder.
        categories: file with `NAME LABEL` per class of a list; by default a categories*.txt in the list's folder.
        cache: folder for indexes and unpacked tars; by default RELAYLAB_CACHE, else the user's cache folder.
        watch: progress display, such as `relaylab.progress.progress`.

    Returns:
        The images in a fixed order: by class, folder and file name, or in the order of a list or of shards.

    Raises:
        InputError: the paths do not exist or cannot be combined, or their content cannot be used.
    """
    wanted = classes if classes is None or isinstance(classes, Classes) else Classes.of(classes)
    if is_source(paths):
        check_source(paths)
        if (split, root, categories) != (None, None, None):
            raise InputError(f"{paths.title} is a Source: split, root and categories are for paths")
        return paths if wanted is None else _with_warning(Relabelled(paths, wanted))
    several = [paths] if isinstance(paths, (str, os.PathLike)) else cast("Sequence[str]", paths)
    request = _request(expanded(map(Path, several)), split, wanted, root, categories)
    folder = cache_folder(cache)
    file = request.file(folder)
    if is_our_own(file):
        try:
            return _with_warning(IndexedImages(file, fresh=True))
        except UnusableIndexError:
            pass  # rewritten below
    write_index(file, _list(request, folder, watch))
    return _with_warning(IndexedImages(file))


def _with_warning(source: Matched) -> Matched:
    """Log the remark on how the classes were matched and return the source."""
    if source.remark:
        log.warning("%s", source.remark)
    return source


def _request(
    paths: Sequence[Path],
    split: str | None,
    classes: Classes | None,
    root: Path | None,
    categories: Path | None,
) -> _Request:
    """Sort the paths by kind and check that they can be combined."""
    if split is not None and split not in SPLITS:
        raise InputError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    given = _kit([_resolved(path) for path in paths])
    for path in given:
        if given.count(path) > 1:
            raise InputError(f"{path} is given more than once")
        if path.is_dir() and any(path in other.parents for other in given if other.is_dir()):
            raise InputError(f"{path} contains another given folder: pass only one of them")
    folders = tuple(path for path in given if path.is_dir())
    files = [path for path in given if not path.is_dir()]
    archives = tuple(path for path in files if path.name.lower().endswith(ARCHIVES))
    truth = next((path for path in files if path.name == TRUTH), None)
    meta = next((path for path in files if path.name == META), None)
    lists = [path for path in files if path.suffix.lower() in LISTS and path != truth]
    strange = [path for path in files if path not in (*archives, *lists, truth, meta)]
    if not given or strange:
        problem = f"unsupported file type: {strange[0]};" if strange else "no paths given:"
        kinds = f"folders, tar files ({' '.join(TARS)}), zip or Parquet files, or a list of images ({', '.join(LISTS)})"
        raise InputError(f"{problem} expected {kinds}")
    request = _Request(
        folders=folders,
        archives=archives,
        truth=truth,
        meta=meta,
        split=split,
        classes=classes,
        named=tuple(dict.fromkeys(files_beside(_around((*folders, *files), split)))),
    )
    if lists:
        return _list_request(request, lists, root, categories)
    if root is not None or categories is not None:
        raise InputError("root and categories are only for a list of images (.txt), and none is given")
    if (truth is None) != (meta is None) or (truth and (len(folders) + len(archives) != 1 or split)):
        raise InputError(f"expected ImageNet's validation images (a folder or tar), {TRUTH} and {META}, and no split")
    if len({PARQUET if (kind := path.suffix.lower()) == PARQUET else kind == ZIP for path in archives}) > 1:
        raise InputError("tar, zip and Parquet files cannot be combined: give files of one kind")
    if folders and archives:
        raise InputError("folders cannot be combined with tar, zip or Parquet files: pass one kind")
    return request


def _list_request(request: _Request, lists: list[Path], root: Path | None, categories: Path | None) -> _Request:
    if len(lists) > 1 or request.archives or request.truth or len(request.folders) + (root is not None) > 1:
        raise InputError(f"{lists[0].name} is a list of images: pass it with at most one folder")
    if request.split is not None:
        message = f"{lists[0].name} is a list of images, which has no splits: omit the split {request.split}"
        raise NoSplitError(message, others=())
    beside = sorted(lists[0].parent.glob("categories*.txt"))
    if categories is None and len(beside) > 1:
        names = few([path.name for path in beside])
        raise InputError(f"{lists[0].name} has several categories files next to it, {names}: pass one as categories")
    categories = categories or next(iter(beside), None)
    folder = _resolved(root) if root is not None else next(iter(request.folders), lists[0].parent)
    if not folder.is_dir():
        raise InputError(f"root {folder} is not a folder")
    categories = None if categories is None else _resolved(categories)
    return replace(request, folders=(), list=lists[0], root=folder, categories=categories)


def _resolved(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InputError(f"no such file or folder: {printable(str(path))}") from None


def _kit(given: list[Path]) -> list[Path]:
    """Replace the folder of ImageNet's development kit by the two files that are needed."""
    return [
        file
        for path in given
        for file in ([path / "data" / TRUTH, path / "data" / META] if (path / "data" / META).is_file() else [path])
    ]


def _around(paths: Sequence[Path], split: str | None) -> list[Path]:
    """Return the folders that may contain files with class names."""
    folders = [path for path in paths if path.is_dir()]
    inside = [folder / split for folder in folders if split]
    return [*inside, *folders, *(path.parent for path in paths)]


def _list(request: _Request, cache: Path, watch: Watch) -> Listing:
    title = " + ".join(printable(path.name) for path in request.folders or request.archives)
    try:
        listing = _list_files(request, title, cache, watch)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or title}: {error.strerror or error}") from None
    if request.truth is not None and request.meta is not None:
        listing = _with_truth(listing, request.truth, request.meta)
    return listing if request.classes is None else relabelled(listing, request.classes)


def _list_files(request: _Request, title: str, cache: Path, watch: Watch) -> Listing:
    """List a data set in any format."""
    flat = request.truth is not None
    if request.list is not None and request.root is not None:
        return _list_named(request.list, request.root, request.categories, request, watch)
    if request.archives:
        return _list_archives(request.archives, title, request, cache, watch)
    layout = recognised(request.folders[0]) if len(request.folders) == 1 and not flat else {}
    if not layout:
        return list_trees(request.folders, title, request.split, request.named, watch, flat=flat)
    entry = chosen(layout, request.split, request.folders[0])
    entry = entry if isinstance(entry, SplitFiles) else entry()
    if entry.files and entry.folder is not None:
        listing = _list_named(entry.files[0], entry.folder, entry.categories, request, watch)
    elif entry.folder is not None:
        listing = list_trees([entry.folder], title, None, request.named, watch, flat=entry.flat)
    else:
        listing = _list_shards(entry.files, title, request, cache, watch)
    folders = dict.fromkeys((request.folders[0], *(file.parent for file in entry.files)))
    return replace(listing, file_states=(*listing.file_states, *map(file_state, folders)))


def _list_named(file: Path, root: Path, categories: Path | None, request: _Request, watch: Watch) -> Listing:
    """List the images in a list file in any format."""
    if file.suffix.lower() == JSON:
        return list_coco(file, root, watch)
    if has_header(file):
        known = (*request.classes.keys, *request.classes.names) if request.classes else ()
        return list_csv(file, root, categories, request.named, known, watch)
    if is_tabbed(file):
        return list_tabbed(file, root, request.named, watch)
    return list_file(file, root, categories, list(request.named), watch)


def _list_archives(archives: Sequence[Path], title: str, request: _Request, cache: Path, watch: Watch) -> Listing:
    """List tar, zip or Parquet files."""
    kind = archives[0].suffix.lower()
    if kind == PARQUET or (request.truth is None and kind != ZIP and are_shards(archives[0])):
        by_split: dict[str, list[Path]] = {}
        for path in archives:
            by_split.setdefault(split_of_file(path.name) or "", []).append(path)
        return _list_shards(chosen(by_split, request.split, title), title, request, cache, watch)
    members = zip_members if kind == ZIP else tar_members
    flat = request.truth is not None
    with removing_refused(archives, cache):
        return list_archives(archives, members, title, request.split, request.named, watch, cache=cache, flat=flat)


def _list_shards(files: Sequence[Path], title: str, request: _Request, cache: Path, watch: Watch) -> Listing:
    """List Parquet files or WebDataset shards."""
    lister = list_parquet if files[0].suffix.lower() == PARQUET else list_shards
    with removing_refused(files, cache):
        return lister(files, title, request.named, watch, cache=cache)


def _with_truth(listing: Listing, truth: Path, meta: Path) -> Listing:
    """Label ImageNet's validation images: image k has the class on line k."""
    file_states = (*listing.file_states, file_state(truth), file_state(meta))
    synset, shown = synset_numbers(meta)
    lines = read_truth(truth)
    folders = tuple(sorted(shown))
    rank = {name: label for label, name in enumerate(folders)}
    labels = np.full(len(listing.labels), -1, np.int16)
    for index in range(len(labels)):
        stem = os.fsdecode(listing.name(index)).rpartition("/")[2].rpartition(".")[0]
        image = stem.removeprefix(VALIDATION_IMAGE)
        if image == stem or not image.isdecimal() or len(image) > 12 or not 1 <= int(image) <= len(lines):
            raise InputError(
                f"image {printable(stem)}: expected {VALIDATION_IMAGE}1 .. {len(lines)}, as in {truth.name}"
            )
        if lines[int(image) - 1] not in synset:
            raise InputError(f"{truth.name}, line {int(image)}: {meta.name} has no class {lines[int(image) - 1]}")
        labels[index] = rank[synset[lines[int(image) - 1]]]
    if len(labels) != len(lines):
        raise InputError(f"{listing.title} has {len(labels):,} images, but {truth.name} has {len(lines):,} lines")
    classes = told_apart([shown[name] for name in folders], folders)
    return replace(listing, labels=labels, classes=classes, folders=folders, file_states=file_states)
