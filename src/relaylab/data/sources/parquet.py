"""Parquet files as Hugging Face's `datasets` writes them: a column of encoded images and a column of labels.

Note [Parquet]
1. The image column holds structs with `bytes` and `path`, or binary values. The label column is the one that the
   schema's metadata describes as ClassLabel, else one named in `LABELS`; it holds numbers, text or lists of either.
2. If the image column is not compressed, as recent versions of `datasets` write it, images are read in place.
   Otherwise it is compressed by Snappy in pages of a megabyte or more: an image cannot be read without its neighbours,
   and random access would decompress each page many times. The images are then copied once to a plain file in the
   cache, as compressed tars are, and read from there by offset.
3. pyarrow reads the columns from mapped memory, a batch of rows at a time. Nothing is unpickled, and no extension
   types are used.
"""

import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from relaylab.data.sources.cache import atomic_cache_write, cached_copy, remove_outdated
from relaylab.data.sources.class_names import numbered_names
from relaylab.data.sources.file_states import file_state
from relaylab.data.sources.listing import Listing, Place, Rows, Watch, few, printable
from relaylab.data.sources.valued import Value, Values
from relaylab.errors import InputError
from relaylab.outside.folders import is_our_own
from relaylab.outside.reading import open_regular
from relaylab.progress import Task

IMAGES = ("image", "img", "jpg", "jpeg", "png", "picture", "photo", "pixel_values")
LABELS = ("label", "labels", "fine_label", "class", "cls", "category", "target", "class_name", "label_name", "scene")
ROWS_AT_ONCE = 64
LARGEST_RATIO, ALWAYS_UNPACKED = 200, 64 << 20  # limit: this many times the packed size, but at least this many bytes
_OffsetOf = Callable[[bytes], int]


@dataclass(frozen=True)
class _Columns:
    """The image and label columns, the class names if the file has them, and the other columns."""

    image: str
    label: str | None
    names: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def note(self) -> str:
        ignored = f"; ignored: {few(list(self.others), 6)}" if self.others else ""
        labels = "no labels" if self.label is None else f"labels by {printable(self.label)}"
        return f"images by {printable(self.image)}, {labels}{ignored}"


def list_parquet(files: Sequence[Path], title: str, named: Sequence[Path], watch: Watch, *, cache: Path) -> Listing:
    """List the images of Parquet files, in file order. See Note [Parquet].

    Class names come from the schema, or from a classnames.txt or labels.txt in the files' folder. Files in `named` give
    display names of synsets. Images of compressed files are copied to `cache`.

    Raises:
        InputError: pyarrow is not installed; a file is damaged or has no image column; files differ in their columns;
            or the cache has no space.
    """
    pq = _pyarrow()
    rows, values, places = Rows(), Values(), list[Place]()
    columns: _Columns | None = None
    for place, path in enumerate(files):
        rows.file_states.append(file_state(path))
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                found = _columns(file)
                if columns is not None and found != columns:
                    raise InputError(f"its columns or classes differ from those of {files[0].name}: {found.note}")
                columns = found
                places.append(_list_file(file, path, place, found, rows, values, watch, cache))
        except InputError as error:
            raise InputError(f"{path.name}: {error}") from None
        except (ValueError, OSError, KeyError, NotImplementedError, MemoryError) as error:  # bases of pyarrow's errors
            reason = printable(str(error).partition("\n")[0])
            raise InputError(f"cannot read {path.name} as a Parquet file: {reason}") from None
    assert columns is not None, "there is at least one file"
    names = columns.names or numbered_names(files, rows.file_states)
    return replace(values.listing(rows, title, places, names=names, named=named), notes=(columns.note,))


def _pyarrow() -> Any:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("Parquet files need pyarrow: pip install 'relaybackprop[lab,parquet]'") from None
    return parquet


def _columns(file: Any) -> _Columns:
    """Find the image and label columns. See Note [Parquet] 1."""
    schema = file.schema_arrow
    features = _features(schema.metadata or {})
    kinds = {field.name: str(field.type) for field in schema}
    structs = [name for name, kind in kinds.items() if kind.startswith("struct<") and "bytes: " in kind]
    images = structs or [name for name, kind in kinds.items() if kind in ("binary", "large_binary")]
    image = next((name for name in IMAGES if name in images), images[0] if len(images) == 1 else None)
    columns = ", ".join(f"{printable(name)} ({kind})" for name, kind in list(kinds.items())[:8])
    if image is None:
        found = f"several image columns, {few(images)}" if images else "no column of encoded images"
        raise InputError(f"it has {found}; expected one, such as `image` with bytes and path. Columns: {columns}")
    described = [name for name in kinds if "names" in features.get(name, {})]
    candidates = [*(name for name in LABELS if name in kinds), *described]
    label = next((name for name in candidates if name in described), next(iter(candidates), None))
    names = features.get(label or "", {}).get("names") or ()
    others = tuple(name for name in kinds if name not in (image, label))
    return _Columns(image, label, tuple(map(str, names)), others)


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Return the features from Hugging Face's metadata in a schema; a list's feature is the feature of its items."""
    try:
        features: Any = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: one.get("feature", one) for name, one in features.items() if isinstance(one, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _list_file(
    file: Any, path: Path, place: int, columns: _Columns, rows: Rows, values: Values, watch: Watch, cache: Path
) -> Place:
    """Add the images of one file; copy them to the cache if they cannot be read in place and have no copy yet."""
    with watch(f"listing {path.name}", file.metadata.num_rows) as task:
        plain = path
        found = _found(file, columns, _in_place(path), task) if _is_uncompressed(file, columns) else None
        if found is None:
            plain = cached_copy(file_state(path), cache / "parquet", ".images")
            remove_outdated(plain)
            found = _found(file, columns, _copied(path, plain), task)
    assert found is not None, "every copied image has an offset"
    for row, (offset, size, name, value) in enumerate(found):
        rows.add(os.fsencode(f"{row}/{name.rpartition('/')[2]}" if name else f"{row}"), 0, place, (offset, size))
        values.add(value)
    if plain != path:
        rows.file_states.append(file_state(plain))
    return Place(str(plain), str(path))


def _found(
    file: Any, columns: _Columns, store: AbstractContextManager[_OffsetOf], task: Task
) -> list[tuple[int, int, str | None, Value]] | None:
    """Return offset, size, path and label of every image; None if an image has no offset in this store."""
    found = list[tuple[int, int, str | None, Value]]()
    with store as offset_of:
        for data, name, value in _rows(file, columns):
            offset = offset_of(data)
            if offset < 0:
                return None
            found.append((offset, len(data), name, value))
            if len(found) % ROWS_AT_ONCE == 0:
                task.advance(ROWS_AT_ONCE, f"{len(found):,} images")
    return found


def _is_uncompressed(file: Any, columns: _Columns) -> bool:
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    chunks = (group.column(column) for group in groups for column in range(group.num_columns))
    return all(
        chunk.compression == "UNCOMPRESSED" for chunk in chunks if chunk.path_in_schema.split(".")[0] == columns.image
    )


@contextmanager
def _in_place(path: Path) -> Iterator[_OffsetOf]:
    """Yield a function that returns the offset of the next image in the file itself, or -1.

    Without compression, values are stored in order, so each one is found where the last one ends or, after other
    columns, a little later. If one is not found, such as a repeated image in a dictionary, the file has to be copied.
    """
    end = 0
    with (
        os.fdopen(open_regular(path), "rb") as content,
        mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):

        def offset_of(data: bytes) -> int:
            nonlocal end
            start = mapped.find(data, end)
            end = start + len(data)
            return start

        yield offset_of


@contextmanager
def _copied(path: Path, plain: Path) -> Iterator[_OffsetOf]:
    """Yield a function that returns an image's offset in the plain copy, and writes the image if the copy is new.

    Raises:
        InputError: no space, far more bytes than the Parquet file has, or an existing copy of a different size.
    """
    state, end = path.stat(), 0
    most = max(ALWAYS_UNPACKED, LARGEST_RATIO * state.st_size)
    with ExitStack() as stack:
        target: IO[bytes] | None = None
        if not is_our_own(plain):
            temporary = stack.enter_context(atomic_cache_write(plain))
            free = shutil.disk_usage(temporary.parent).free
            if free < state.st_size:
                raise InputError(f"it needs {state.st_size:,} bytes in {plain.parent}, which has {free:,} free")
            target = stack.enter_context(temporary.open("wb"))

        def offset_of(data: bytes) -> int:
            nonlocal end
            if target is not None:
                target.write(data)
            end += len(data)
            if end > most:
                raise InputError(f"it unpacks to more than {LARGEST_RATIO} times its size, which images never do")
            return end - len(data)

        yield offset_of
    os.utime(plain, ns=(state.st_mtime_ns, state.st_mtime_ns))  # the time of its content
    if plain.stat().st_size != end:
        plain.unlink()
        raise InputError("its copy in the cache was damaged and has been removed; rerun the command")


def _rows(file: Any, columns: _Columns) -> Iterator[tuple[bytes, str | None, Value]]:
    """Yield image, path and label of every row; raise InputError for a row without an image."""
    wanted = [columns.image] if columns.label is None else [columns.image, columns.label]
    row = 0
    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted, use_threads=False):
        images = batch.column(columns.image).to_pylist()
        labels = [None] * len(images) if columns.label is None else batch.column(columns.label).to_pylist()
        for image, label in zip(images, labels, strict=True):
            fields = image if isinstance(image, dict) else {"bytes": image}
            if not fields.get("bytes"):
                path = f", only the path {printable(str(fields['path']))}" if fields.get("path") else ""
                raise InputError(f"row {row} has no image bytes{path}; embed the images in the file")
            yield fields["bytes"], fields.get("path"), _value(label, columns.label)
            row += 1


def _value(label: Any, column: str | None) -> Value:
    value = tuple(label) if isinstance(label, list) else label
    items = value if isinstance(value, tuple) else (value,)
    if all(type(item) is int for item in items) or all(type(item) is str for item in items):
        return value
    if value is None:
        return None
    shown = printable(repr(label)[:40])
    raise InputError(f"column {printable(str(column))} holds {shown}; expected class indices or names")
