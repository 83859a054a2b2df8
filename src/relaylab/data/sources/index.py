"""The index of a source: a safetensors file that is written once and read in place by every process.

Note [Index]
1. Labels are memory-mapped: all processes share the same pages, and a fork copies nothing.
2. Names and places are not mapped but read one at a time with `pread`. Mapped pages that a worker has touched count as
   its memory, and after an epoch of random access that is all of them: 300 MB per worker for 8.1 million names.
3. `pread` has no file position, so forked processes can share descriptors. A pickled source consists of a path and the
   state of the file; unpickling opens the file again.
"""

import errno
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from relaylab.data.sources.cache import atomic_cache_write
from relaylab.data.sources.classes import Classes
from relaylab.data.sources.file_states import FileState, image_state, is_recent, stale, unsettled
from relaylab.data.sources.listing import Listing, Place, inflate, printable
from relaylab.data.sources.source import LARGEST_FILE, UNLABELLED, Labels, Targets
from relaylab.errors import InputError
from relaylab.outside.reading import open_regular, parse, read_bytes, typed

FORMAT = "relaylab image index 3"
CHECKED = ("labels", "targets", "bounds", "place", "spans")  # not the names, which can have hundreds of megabytes
LARGEST_HEADER = 100_000_000  # bytes; the limit of safetensors itself
TYPES = {"I16": np.int16, "I32": np.int32, "I64": np.int64, "U8": np.uint8, "U16": np.uint16, "U32": np.uint32}
CHUNK = 1 << 20
TYPES |= {"U64": np.uint64}


@dataclass(frozen=True)
class _About:
    """The metadata of an index, with types."""

    title: str
    classes: tuple[str, ...]
    folders: tuple[str, ...]
    numbered: bool
    remark: str
    places: tuple[Place, ...]
    ignored: dict[str, int]
    skipped: dict[str, int]
    images: str
    stamps: tuple[FileState, ...]  # `Listing.file_states`, under the key of indexes on disk
    settled: bool
    content: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Tensor:
    dtype: Literal["I16", "I32", "I64", "U8", "U16", "U32", "U64"]
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class UnusableIndexError(InputError):
    """The index is damaged, from a different version, or outdated because the data has changed."""


def write_index(path: Path, listing: Listing) -> None:
    """Write an index atomically; raise InputError if the cache cannot be written."""
    state, latest = "", 0
    if listing.spans is None:
        state, latest = image_state(
            len(listing.labels), lambda n: _path(listing.places[listing.place[n]], listing.name(n))
        )
    about = {
        "title": printable(listing.title),
        "classes": [printable(name) for name in listing.classes],
        "folders": listing.folders,
        "numbered": listing.numbered,
        "remark": printable(listing.remark),
        "places": listing.places,
        "ignored": listing.ignored,
        "skipped": {printable(name): count for name, count in listing.skipped.items()},
        "images": state,
        "stamps": listing.file_states,
        "settled": not unsettled(listing.file_states) and not is_recent(latest),
    }
    if listing.notes:
        about["notes"] = listing.notes
    optional = (name for name in ("spans", "inflated", "targets") if getattr(listing, name) is not None)
    fields = ("labels", "bounds", "names", "place", *optional)
    tensors: dict[str, NDArray[Any]] = {name: getattr(listing, name) for name in fields}
    content = sha256()
    for tensor in tensors.values():
        content.update(np.ascontiguousarray(tensor).data)
    about["content"] = content.hexdigest()  # the splits of one tar differ in nothing else
    text = json.dumps(about)
    total = zlib.crc32(text.encode())
    for name in CHECKED:
        if name in tensors:
            total = zlib.crc32(np.ascontiguousarray(tensors[name]).data.cast("B"), total)
    with atomic_cache_write(path) as file:
        save_file(tensors, file, metadata={"format": FORMAT, "about": text, "crc32": str(total)})


class IndexedImages:
    """A `Source` of the images in an index, as `open_source` returns it. See Note [Index].

    Args:
        path: path of the index.
        fresh: reject an index of data that have changed since it was made.

    Raises:
        UnusableIndexError: the index is damaged, from a different version, or outdated.

    Attributes:
        title: display name, without folders.
        classes: display names, in the order of the labels.
        folders: keys of the classes in the same order: folders, categories or labels of a list.
        identity: keys and names of the classes, to pass as `open_source(classes=...)`.
        remark: note for the user on how the classes were matched; may be empty.
        labels: (n,) class indices, memory-mapped and read-only; UNLABELLED in a test set.
        targets: (n, classes), 1 for each label of an image, memory-mapped, if images are multi-label; else
            None.
        notes: notes for the user on how the images were found.
        places: folders or archives that hold the images.
        fingerprint: hash that changes with the images, labels or classes.
        ignored: number of files that are not images, by extension.
        skipped: number of folders that were skipped, by name.
    """

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self._path = path
        self._descriptors: dict[str, int] = {}
        try:
            self._open(fresh)
        except OSError as error:
            self.close()
            raise UnusableIndexError(f"cannot read the index {path}: {error.strerror}") from None
        except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, struct.error) as error:
            self.close()
            if isinstance(error, UnusableIndexError):
                raise
            raise UnusableIndexError(f"the index {path} is damaged: {error}; delete it") from None

    def _open(self, fresh: bool) -> None:
        descriptor = self._descriptor(str(self._path))
        self._index_state = _state(descriptor)
        self._tensors, text, crc = _header(descriptor, str(self._path))
        about = parse(text, _About, str(self._path))
        self._file_states = {one.path: one for one in about.stamps}
        self.places = about.places
        changed = f"the index {self._path} is outdated: the data has changed"
        if fresh:
            self._check_sum(text, crc)
            if not about.settled or stale(about.stamps):
                raise UnusableIndexError(changed)
        self.title: str = about.title
        self.classes: Sequence[str] = about.classes
        self.folders: Sequence[str] = about.folders
        self.identity = Classes(about.folders, about.classes, about.numbered)
        self.remark: str = about.remark
        self.ignored: Mapping[str, int] = about.ignored
        self.skipped: Mapping[str, int] = about.skipped
        self.fingerprint = sha256(text.encode()).hexdigest()[:32]
        self.notes: Sequence[str] = about.notes
        self.labels: Labels = self._mapped("labels")
        self.targets: Targets | None = self._mapped("targets") if "targets" in self._tensors else None
        self._check()
        if fresh and self._are_changed(about.images):
            raise UnusableIndexError(changed)

    def _check_sum(self, text: str, crc: str) -> None:
        total = zlib.crc32(text.encode())  # takes 0.1 s for 8 million images
        for name in CHECKED:
            if name in self._tensors:
                dtype, shape, offset = self._tensors[name]
                left = dtype.itemsize * math.prod(shape)
                while left:
                    data = _pread(self._descriptor(str(self._path)), min(left, CHUNK), offset, self._path)
                    total = zlib.crc32(data, total)
                    left, offset = left - len(data), offset + len(data)
        if str(total) != crc:
            raise ValueError("its checksum does not match")

    def _check(self) -> None:
        """Check ranges and shapes, which costs little: names are not read."""
        count = len(self.labels)
        if not count or self.labels.min() < UNLABELLED or self.labels.max() >= max(1, len(self.classes)):
            raise ValueError("labels out of range")
        spans = {"spans": (count, 2)} if "spans" in self._tensors else {}
        targets = {"targets": (count, len(self.classes))} if "targets" in self._tensors else {}
        inflated = {"inflated": (count,)} if "inflated" in self._tensors else {}
        for name, shape in {"bounds": (count + 1,), "place": (count,), **spans, **inflated, **targets}.items():
            if self._tensors[name][1] != shape:
                raise ValueError(f"{name} of shape {self._tensors[name][1]}")
        if int(self._rows("bounds", count)[0]) != self._tensors["names"][1][0]:
            raise ValueError("names cut short")

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "state": self._index_state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])
        if self._index_state != state["state"]:  # an index may now refer to a different image
            raise UnusableIndexError(f"the index {self._path} was rewritten while in use; rerun the command")

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close all files. They are reopened when needed."""
        for path in list(self.__dict__.get("_descriptors", ())):
            os.close(self._descriptors.pop(path))

    def size(self, index: int) -> int:
        """Return the size of an encoded image in bytes, without reading it; raises OSError if it does not exist."""
        if "spans" in self._tensors:
            return self._inflated(index) or int(self._rows("spans", index)[0][1])
        return os.stat(self._image_path(index)).st_size  # noqa: PTH116 (thousands of them)

    def _are_changed(self, state: str) -> bool:
        """Return whether image files have been overwritten."""
        if "spans" in self._tensors:
            return False
        places, names = self._mapped("place"), self._mapped("names")
        bounds = self._mapped("bounds")

        def path_of(index: int) -> str:
            return _path(self.places[places[index]], names[bounds[index] : bounds[index + 1]].tobytes())

        return image_state(len(places), path_of)[0] != state

    def _mapped(self, tensor: str) -> Any:
        """Memory-map a tensor of the file."""
        dtype, shape, offset = self._tensors[tensor]
        with open(self._descriptor(str(self._path)), "rb", closefd=False) as file:
            return np.memmap(file, dtype, "r", offset, shape).view(np.ndarray)

    def _image_path(self, index: int) -> str:
        return _path(self.places[int(self._rows("place", index)[0])], self.relative_name(index))

    def relative_name(self, index: int) -> bytes:
        """Return the name of an image relative to its place, as in lists; raises IndexError if it does not exist."""
        start, stop = self._rows("bounds", index, 2).tolist()
        return _pread(self._descriptor(str(self._path)), stop - start, self._tensors["names"][2] + start, self._path)

    def name(self, index: int) -> str:
        """Return the path of an image for messages and lists, with unprintable characters escaped."""
        place = self.places[int(self._rows("place", index)[0])]
        return printable(os.fsencode(place.shown) + b"/" + self.relative_name(index))

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image.

        Raises:
            IndexError: the index is out of range.
            OSError: the image cannot be read, or its archive has changed since it was indexed.
        """
        place = self.places[int(self._rows("place", index)[0])]
        if "spans" not in self._tensors:
            return read_bytes(_path(place, self.relative_name(index)), LARGEST_FILE)
        offset, size = self._rows("spans", index)[0].tolist()
        if size > LARGEST_FILE:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; the limit is {LARGEST_FILE:,}", place.path)
        descriptor = self._descriptor(place.path)
        data = _pread(descriptor, size, offset, place.path)
        self._check_unchanged(descriptor, place.path)  # after the read, so that a change during it is detected
        inflated = self._inflated(index)
        return inflate(data, inflated, place.shown) if inflated else data

    def _inflated(self, index: int) -> int:
        return int(self._rows("inflated", index)[0]) if "inflated" in self._tensors else 0

    def _rows(self, tensor: str, index: int, count: int = 1) -> NDArray[Any]:
        """Read `count` rows of a tensor from the file."""
        dtype, shape, offset = self._tensors[tensor]
        if not 0 <= index <= shape[0] - count:
            raise IndexError(f"image {index}: expected 0 .. {len(self) - 1}")
        row = dtype.itemsize * math.prod(shape[1:])
        data = _pread(self._descriptor(str(self._path)), count * row, offset + int(index) * row, self._path)
        return np.frombuffer(data, dtype).reshape(count, *shape[1:])

    def _check_unchanged(self, descriptor: int, path: str) -> None:
        known = self.__dict__.get("_file_states", {}).get(path)
        if known is not None and _state(descriptor)[:2] != (known.size, known.mtime_ns):
            raise OSError(5, "the file has changed since it was indexed", path)

    def _descriptor(self, path: str) -> int:
        """Return the descriptor of a file, which is opened on first use."""
        existing = self._descriptors.get(path)
        if existing is not None:
            return existing
        opened = open_regular(path)
        try:
            self._check_unchanged(opened, path)
        except OSError:
            os.close(opened)
            raise
        kept = self._descriptors.setdefault(path, opened)  # another thread may have opened it since the check
        if kept != opened:
            os.close(opened)
        return kept


def _path(place: Place, name: bytes) -> str:
    return f"{place.path}/{os.fsdecode(name)}"


def _state(descriptor: int) -> tuple[int, int, int]:
    state = os.fstat(descriptor)
    return state.st_size, state.st_mtime_ns, state.st_ino


def _header(descriptor: int, where: str) -> tuple[dict[str, tuple[np.dtype, tuple[int, ...], int]], str, str]:
    """Read dtype, shape and offset of each tensor, the metadata and its checksum. safetensors gives no offsets."""
    size = os.fstat(descriptor).st_size
    (length,) = struct.unpack("<Q", os.pread(descriptor, 8, 0))
    if length > min(size, LARGEST_HEADER):
        raise ValueError("cut short")
    header = parse(_pread(descriptor, length, 8, "the index"), dict[str, dict[str, Any]], where)
    metadata = typed(header.pop("__metadata__"), dict[str, str], where)
    if metadata["format"] != FORMAT:
        raise ValueError(f"format {metadata['format']!r}, expected {FORMAT!r}")
    tensors = {}
    for name, values in header.items():
        tensor = typed(values, _Tensor, where)
        dtype, shape = np.dtype(TYPES[tensor.dtype]), tensor.shape
        start, stop = (8 + length + offset for offset in tensor.data_offsets)
        if (
            min(shape, default=0) < 0
            or not 8 + length <= start <= stop <= size
            or stop - start != dtype.itemsize * math.prod(shape)
        ):
            raise ValueError(f"{name} cut short")
        tensors[name] = dtype, shape, start
    return tensors, metadata["about"], metadata["crc32"]


def _pread(descriptor: int, size: int, offset: int, path: Path | str) -> bytes:
    """Read exactly `size` bytes, in several calls if needed; raise OSError if the file is too short."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise OSError(5, "the file is shorter than it was", str(path))
        data += more
    return data
