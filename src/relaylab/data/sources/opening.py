"""Open any kind of data set: listed once, and read from its index from then on."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from relaylab.data.sources.archives import list_tars
from relaylab.data.sources.cache import cache_folder
from relaylab.data.sources.class_names import files_beside, read_truth, synset_numbers
from relaylab.data.sources.classes import Classes, relabelled
from relaylab.data.sources.csv_files import CSV, has_header, list_csv
from relaylab.data.sources.index import IndexedImages, UnusableIndexError, write_index
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
from relaylab.data.sources.stamps import stamp
from relaylab.data.sources.trees import list_trees
from relaylab.errors import InputError

log = logging.getLogger("relaylab.data")

TARS = (".tar", ".tar.xz", ".tar.gz", ".tar.bz2", ".tar.zst", ".txz", ".tgz", ".tbz2", ".tzst")
LISTS = (".txt", *CSV)
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
VALIDATION_IMAGE = "ILSVRC2012_val_"


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A request for a data set, with all paths resolved; equal requests have the same index."""

    folders: tuple[Path, ...] = ()
    tars: tuple[Path, ...] = ()
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


def open_source(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    split: str | None = None,
    classes: Sequence[str] | Classes | None = None,
    root: Path | None = None,
    categories: Path | None = None,
    cache: Path | None = None,
    watch: Watch = unwatched,
) -> IndexedImages:
    """Open a data set: from its index if there is one that still fits, else by listing it once.

    Args:
        paths: of the data set. One or more folder trees or tar files, CLASS/**/IMAGE or with {train,val,test}/
            above. Or a list file, `NAME LABEL` per line or a CSV file with a header, with the folder that it is about.
            Or, for ImageNet's validation images, their folder or tar, ILSVRC2012_validation_ground_truth.txt and
            meta.mat, the latter two also as the folder of the development kit.
        split: train, val or test where the tree or tar has them. A test split may be without classes.
        classes: classes in the order that labels shall have, such as `identity` of the training set; or their folders
            or names. Images are labelled by these, matched by key: see Note [Classes].
        root: folder that a list is about; by default the folder among `paths`, else the list's own.
        categories: file with `NAME LABEL` for each class of a list; by default a categories*.txt beside it.
        cache: folder for indexes and decompressed tars; by default the environment's RELAYLAB_CACHE, else the user's.
        watch: display of progress.

    Raises:
        InputError: anything wrong with the paths or with what they hold.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    request = _request(paths, split, classes, root, categories)
    folder = cache_folder(cache)
    file = request.file(folder)
    if file.exists():
        try:
            return _told(IndexedImages(file, fresh=True))
        except UnusableIndexError:
            pass  # it is made anew
    write_index(file, _list(request, folder, watch))
    return _told(IndexedImages(file))


def _told(source: IndexedImages) -> IndexedImages:
    if source.remark:
        log.warning("%s", source.remark)
    return source


def _request(
    paths: Sequence[Path],
    split: str | None,
    classes: Sequence[str] | Classes | None,
    root: Path | None,
    categories: Path | None,
) -> _Request:
    """Sort the paths by kind and check that they go together."""
    if split is not None and split not in SPLITS:
        raise InputError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    given = _kit([_resolved(path) for path in paths])
    for path in given:
        if given.count(path) > 1:
            raise InputError(f"{path} is given more than once")
        if path.is_dir() and any(path in other.parents for other in given if other.is_dir()):
            raise InputError(f"{path} holds another folder that is given too: give one of them")
    folders = tuple(path for path in given if path.is_dir())
    files = [path for path in given if not path.is_dir()]
    tars = tuple(path for path in files if path.name.lower().endswith(TARS))
    truth = next((path for path in files if path.name == TRUTH), None)
    meta = next((path for path in files if path.name == META), None)
    lists = [path for path in files if path.suffix.lower() in LISTS and path != truth]
    strange = [path for path in files if path not in (*tars, *lists, truth, meta)]
    if not given or strange:
        came = f"{strange[0]}" if strange else "nothing"
        kinds = f"folders, tar files ({' '.join(TARS)}) or a list of images ({', '.join(LISTS)})"
        raise InputError(f"{came}: expected {kinds}")
    request = _Request(
        folders=folders,
        tars=tars,
        truth=truth,
        meta=meta,
        split=split,
        classes=classes if classes is None or isinstance(classes, Classes) else Classes.of(classes),
        named=tuple(dict.fromkeys(files_beside(_around((*folders, *files), split)))),
    )
    if lists:
        return _list_request(request, lists, root, categories)
    if root is not None or categories is not None:
        raise InputError("root and categories go with a list of images (.txt): none is given")
    if (truth is None) != (meta is None) or (truth and (len(folders) + len(tars) != 1 or split)):
        raise InputError(f"expected ImageNet's validation images (a folder or tar), {TRUTH} and {META}, and no split")
    if folders and tars:
        raise InputError("folders and tar files together: expected one kind")
    return request


def _list_request(request: _Request, lists: list[Path], root: Path | None, categories: Path | None) -> _Request:
    if len(lists) > 1 or request.tars or request.truth or len(request.folders) + (root is not None) > 1:
        raise InputError(f"{lists[0].name} is a list of images: expected it and the one folder that it is about")
    if request.split is not None:
        message = f"{lists[0].name} is a list of images, which has no parts train and val"
        raise NoSplitError(message, others=())
    beside = sorted(lists[0].parent.glob("categories*.txt"))
    if categories is None and len(beside) > 1:
        raise InputError(f"{few([path.name for path in beside])} beside {lists[0].name}: say which are its categories")
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
    """Replace ImageNet's development kit by its two files that are needed."""
    return [
        file
        for path in given
        for file in ([path / "data" / TRUTH, path / "data" / META] if (path / "data" / META).is_file() else [path])
    ]


def _around(paths: Sequence[Path], split: str | None) -> list[Path]:
    """Return the folders that may contain files with names of classes."""
    folders = [path for path in paths if path.is_dir()]
    inside = [folder / split for folder in folders if split]
    return [*inside, *folders, *(path.parent for path in paths)]


def _list(request: _Request, cache: Path, watch: Watch) -> Listing:
    flat = request.truth is not None
    title = " + ".join(printable(path.name) for path in request.folders or request.tars)
    try:
        if request.list is not None:
            assert request.root is not None, "a list has a root"
            if has_header(request.list):
                known = (*request.classes.keys, *request.classes.names) if request.classes else ()
                listing = list_csv(request.list, request.root, request.categories, request.named, known, watch)
            else:
                listing = list_file(request.list, request.root, request.categories, list(request.named), watch)
        elif request.tars:
            listing = list_tars(request.tars, title, request.split, request.named, watch, cache=cache, flat=flat)
        else:
            listing = list_trees(request.folders, title, request.split, request.named, watch, flat=flat)
    except OSError as error:
        raise InputError(f"cannot read {error.filename or title}: {error.strerror or error}") from None
    if request.truth is not None and request.meta is not None:
        listing = _with_truth(listing, request.truth, request.meta)
    return listing if request.classes is None else relabelled(listing, request.classes)


def _with_truth(listing: Listing, truth: Path, meta: Path) -> Listing:
    """Label ImageNet's validation images: image k has the class on line k."""
    stamps = (*listing.stamps, stamp(truth), stamp(meta))
    synset, shown = synset_numbers(meta)
    lines = read_truth(truth)
    folders = tuple(sorted(shown))
    rank = {name: label for label, name in enumerate(folders)}
    labels = np.full(len(listing.labels), -1, np.int16)
    for number in range(len(labels)):
        stem = os.fsdecode(listing.name(number)).rpartition("/")[2].rpartition(".")[0]
        image = stem.removeprefix(VALIDATION_IMAGE)
        if image == stem or not image.isdecimal() or not 1 <= int(image) <= len(lines):
            raise InputError(f"{printable(stem)}: expected {VALIDATION_IMAGE}1 .. {len(lines)}, as {truth.name} has")
        if lines[int(image) - 1] not in synset:
            raise InputError(f"{truth.name}, line {int(image)}: {meta.name} has no class {lines[int(image) - 1]}")
        labels[number] = rank[synset[lines[int(image) - 1]]]
    if len(labels) != len(lines):
        raise InputError(f"{listing.title} has {len(labels):,} images, {truth.name} {len(lines):,} lines")
    classes = told_apart([shown[name] for name in folders], folders)
    return replace(listing, labels=labels, classes=classes, folders=folders, stamps=stamps)
