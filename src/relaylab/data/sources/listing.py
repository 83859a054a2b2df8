"""The listing of a source, made in one pass over it: flat arrays without a Python object per image.

Note [Listing]
1. Names are bytes, concatenated in one array. Names that are not UTF-8 are preserved (`os.fsencode`).
2. Folder trees and tar files are sorted in the same order: class, folder, file. The same images have the same indices
   however they are stored, so a run on tar files equals a run on the tree.
3. A listing holds the size and modification time of everything that it was made from. An index is used only as long as
   these are unchanged.
"""

import os
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relaylab.data.sources.file_states import FileState
from relaylab.data.sources.source import UNLABELLED, Labels, Targets
from relaylab.errors import InputError
from relaylab.outside.showing import brief, printable
from relaylab.progress import Silent, Task

# The extensions of torchvision's ImageFolder, GIF, AVIF, and more extensions of JPEG.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
IMAGE_EXTENSIONS += (".avif", ".jfif", ".jpe")
SPLITS = ("train", "val", "test")
LARGEST_INT16 = 32_767
EXTENSIONS_TOLD_APART = FOLDERS_NAMED = 20
# Folders of network drives, operating systems, archives and package managers, never classes. In lower case.
SYSTEM_FOLDERS = frozenset(
    (
        "__macosx",
        "@eadir", "@tmp", "@sharebin", "@sharesnap", "#recycle", "#snapshot",  # Synology
        "@recycle", "@recently-snapshot", "@__thumb", "@transcode", "network recycle bin",  # QNAP
        "~snapshot", "_snapshot", "@snapshots",  # NetApp, Btrfs
        "$recycle.bin", "system volume information", "$windows.~bt", "$windows.~ws", "$winreagent", "$sysreset",
        "$getcurrent", "$extend",  # Windows
        "lost+found", "lost.dir",  # Linux, Android
        "network trash folder", "temporary items", "thevolumesettingsfolder",  # macOS on shared drives
        "__pycache__", "__pypackages__", "node_modules",
    )
)  # fmt: skip
RECOVERED = re.compile(r"found\.\d{3}", re.IGNORECASE)  # folders of Windows' chkdsk

Watch = Callable[[str, int], AbstractContextManager[Task]]
"""A progress display: `relaylab.progress.progress`, or `unwatched`."""


def unwatched(what: str, total: int) -> AbstractContextManager[Task]:  # noqa: ARG001
    """Display no progress."""
    return nullcontext(Silent())


class Place(NamedTuple):
    """A folder or archive that holds images: the path that is read, and the path that the user gave."""

    path: str
    shown: str


class SplitNeededError(InputError):
    """The data set has several `splits`, and no split was given."""

    def __init__(self, title: object, splits: Sequence[str]) -> None:
        self.splits = tuple(splits)
        plural = "s" * (len(splits) > 1)
        super().__init__(
            f"{title} has the split{plural} {', '.join(splits)}: choose one (--split, or split= in Python)"
        )


class NoSplitError(InputError):
    """The data set does not have the given split; `others` are the splits that it has."""

    def __init__(self, message: str, *, others: Sequence[str]) -> None:
        self.others = others
        super().__init__(message)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All images of a source.

    Attributes:
        title: display name, without folders.
        classes: display names, in the order of the labels.
        folders: keys of the classes in the same order: folders, categories or labels; see Note [Classes].
        places: folders or archives that hold the images.
        labels: (n,) class indices or UNLABELLED.
        names: (bytes,) uint8, the names relative to their places, concatenated.
        bounds: (n + 1,) start of each name, and the end of the last one.
        place: (n,) uint16, index of each image's place.
        spans: (n, 2) int64, offset and size in the archive; None for folders.
        inflated: (n,) int64, size of each image after decompression by zlib, 0 for stored images; None if all are
            stored.
        ignored: number of ignored files, by extension.
        skipped: number of ignored folders, by name; see `is_system_folder`.
        file_states: states of everything that was read.
        numbered: whether the labels come from a list.
        remark: note for the user on how the classes were matched; may be empty.
        targets: (n, classes) uint8, 1 for each label of an image, if images are multi-label; `labels`
            are then UNLABELLED. Otherwise None.
        notes: notes for the user on how the images were found.
    """

    title: str
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    places: tuple[Place, ...]
    labels: Labels
    names: NDArray[np.uint8]
    bounds: NDArray[np.uint32] | NDArray[np.uint64]
    place: NDArray[np.uint16]
    spans: NDArray[np.int64] | None
    ignored: Mapping[str, int]
    file_states: tuple[FileState, ...]
    numbered: bool = False
    remark: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict[str, int])
    targets: Targets | None = None
    notes: tuple[str, ...] = ()
    inflated: NDArray[np.int64] | None = None

    def name(self, index: int) -> bytes:
        """Return the name of an image relative to its place."""
        return self.names[int(self.bounds[index]) : int(self.bounds[index + 1])].tobytes()


class Rows:
    """A listing under construction, to which images are added one by one."""

    def __init__(self) -> None:
        self.found = 0
        self.keys: dict[str, int] = {}  # index of each class folder, in the order of discovery
        self.ignored: Counter[str] = Counter()
        self.skipped: set[str] = set()  # paths of folders
        self.file_states: list[FileState] = []
        self.notes: list[str] = []  # notes for the user
        self._names = bytearray()
        self._bounds = array("Q", [0])
        self._labels = array("i")
        self._place = array("H")
        self._spans = array("q")
        self._inflated = array("q")
        self._hashes = array("q")

    def key(self, folder: str) -> int:
        """Return the index of a class folder, which is added if it is new."""
        return self.keys.setdefault(folder, len(self.keys))

    def add(
        self, name: bytes, label: int, place: int = 0, span: tuple[int, int] | None = None, inflated: int = 0
    ) -> None:
        """Add an image: its name relative to its place and, in an archive, `span`, its offset and size."""
        self.found += 1
        self._names += name
        self._bounds.append(len(self._names))
        self._labels.append(label)
        self._place.append(place)
        self._hashes.append(hash(name))
        if span is not None:
            self._spans.extend(span)
            self._inflated.append(inflated)

    def ignore(self, *names: str) -> None:
        """Count files that are not images."""
        for name in names:
            extension = os.path.splitext(name)[1].lower() or "no extension"  # noqa: PTH122 (a name of many)
            if extension not in self.ignored and len(self.ignored) >= EXTENSIONS_TOLD_APART:
                extension = "others"
            self.ignored[extension] += 1

    def skip(self, folder: str) -> None:
        """Record a folder that is neither a class nor searched."""
        self.skipped.add(folder)

    def refuse_repeats(self, title: str) -> None:
        """Raise InputError if two images have the same name."""
        hashes = np.frombuffer(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            if self.name(first) == self.name(second):
                raise InputError(f"{title} has {printable(self.name(first))} more than once")

    def name(self, index: int) -> bytes:
        """Return the name of an image that was added."""
        return bytes(self._names[self._bounds[index] : self._bounds[index + 1]])

    def listing(self, title: str, keys: Collection[str], shown: Mapping[str, str], places: Sequence[Place]) -> Listing:
        """Return the sorted listing; labels are the ranks of the classes' keys. See Note [Listing] 2.

        Args:
            title: display name.
            keys: keys of all classes, including classes without images.
            shown: display names by key.
            places: folders or archives that hold the images.

        Raises:
            InputError: the folders are letters, not classes.
        """
        folders = tuple(sorted(keys))
        self._refuse_letters(folders, title)
        rank = {key: label for label, key in enumerate(folders)}
        ranks = np.array([rank.get(key, UNLABELLED) for key in self.keys] + [UNLABELLED])
        labels = ranks[np.frombuffer(self._labels, np.int32)]  # UNLABELLED is the last of the ranks
        return _sorted(self.listed(title, tuple(shown.get(key, key) for key in folders), folders, places, labels))

    def listed(
        self,
        title: str,
        classes: tuple[str, ...],
        folders: tuple[str, ...],
        places: Sequence[Place],
        labels: NDArray[np.integer] | None = None,
        *,
        numbered: bool = False,
    ) -> Listing:
        """Return the listing in the order in which images were added; `labels` replace the added ones."""
        bound_type: Any = np.uint32 if len(self._names) < 2**32 else np.uint64
        labels = np.frombuffer(self._labels, np.int32) if labels is None else labels
        return Listing(
            title=title,
            classes=told_apart(classes, folders),
            folders=folders,
            places=tuple(places),
            labels=labels.astype(label_type(len(classes))),
            names=np.frombuffer(self._names, np.uint8),
            bounds=np.frombuffer(self._bounds, np.uint64).astype(bound_type),
            place=np.frombuffer(self._place, np.uint16),
            spans=np.frombuffer(self._spans, np.int64).reshape(-1, 2) if self._spans else None,
            inflated=np.frombuffer(self._inflated, np.int64) if any(self._inflated) else None,
            ignored=dict(self.ignored),
            file_states=tuple(self.file_states),
            numbered=numbered,
            skipped=dict(Counter(path.rpartition("/")[2] for path in self.skipped).most_common(FOLDERS_NAMED)),
            notes=tuple(self.notes),
        )

    def _refuse_letters(self, folders: Sequence[str], title: str) -> None:
        """Raise InputError for a tree such as Places' a/abbey, b/bakery, whose letters would be taken for classes."""
        if self.found and folders and all(len(folder) == 1 and folder.isalpha() for folder in folders):
            some = range(0, self.found, max(1, self.found // 100))
            if all(len(self.name(index).split(b"/")[-2]) > 1 for index in some):
                raise InputError(
                    f"{title} groups its class folders by first letter ({folders[0]}/CLASS/IMAGE), as Places does: "
                    "pass its list file as well"
                )


def _sorted(listing: Listing) -> Listing:
    """Sort by class, folder and file name. Only the names of one class at a time become Python objects."""
    by_class = np.argsort(listing.labels, kind="stable")
    edges = np.flatnonzero(np.diff(listing.labels[by_class])) + 1
    blob = bytearray()
    order = np.empty(len(by_class), np.int64)
    position = 0
    for members in np.split(by_class, edges):
        named = [(*listing.name(index).rpartition(b"/")[::2], index) for index in members.tolist()]
        named.sort()
        order[position : position + len(named)] = [index for _, _, index in named]
        position += len(named)
        blob += b"".join(folder + b"/" + file if folder else file for folder, file, _ in named)
    lengths = np.diff(listing.bounds)[order]
    return replace(
        listing,
        labels=listing.labels[order],
        names=np.frombuffer(blob, np.uint8),
        bounds=np.concatenate([[0], np.cumsum(lengths, dtype=np.uint64)]).astype(listing.bounds.dtype),
        place=listing.place[order],
        spans=None if listing.spans is None else listing.spans[order],
        inflated=None if listing.inflated is None else listing.inflated[order],
    )


def told_apart(names: Sequence[str], keys: Sequence[str]) -> tuple[str, ...]:
    """Return display names, with the key of the class appended to each name that is not unique."""
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} ({key})" for name, key in zip(names, keys, strict=False))


def label_type(num_classes: int) -> Any:
    """Return the smallest integer type for the labels of `num_classes` classes."""
    return np.int16 if num_classes <= LARGEST_INT16 else np.int32


def few(names: Sequence[str | bytes], most: int = 3) -> str:
    """Join the first `most` names and append the number of the remaining ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(brief(name) for name in names[:most]) + more


def inflate(data: bytes, size: int, title: str) -> bytes:
    """Decompress a member of a zip file, which must have `size` bytes; raise OSError if it is damaged."""
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise OSError(5, f"damaged in the zip file: {error}", title) from None
    if len(inflated) != size:
        raise OSError(5, "damaged in the zip file: its size does not match", title)
    return inflated


def is_system_folder(name: str) -> bool:
    """Return whether a name belongs to a hidden or system folder, which is neither a class nor searched."""
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS or bool(RECOVERED.fullmatch(name))


def is_image(name: str) -> bool:
    """Return whether a name belongs to an image file; `._` files, which macOS leaves in archives, are not."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.rpartition("/")[2].startswith("._")
