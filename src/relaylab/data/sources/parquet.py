"""Parquet files of images, as Hugging Face's `datasets` writes them: a column of encoded images, one of labels.

Note [Parquet]
1. The images are in the column of structs with `bytes` and `path`, or of binary values. The labels are in the column
   that the schema's metadata describes as ClassLabel, else in one of `LABELS`: numbers, text or lists of either.
2. Where the column of images is not compressed, as recent versions of `datasets` write it, images are read in place.
   Otherwise it is compressed by Snappy in pages of a megabyte or more, so an image cannot be read without its
   neighbours, and random access would decompress each page many times. The images are then copied once to a plain
   file in the cache, as compressed tars are, and read from there by offset.
3. pyarrow reads the columns from mapped memory, a batch of rows at a time. Nothing is unpickled, and no extension type
   is used.
"""

import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from relaylab.data.sources.cache import atomic_cache_write
from relaylab.data.sources.class_names import numbered_names
from relaylab.data.sources.file_states import file_state
from relaylab.data.sources.listing import Listing, Place, Rows, Watch, few, printable
from relaylab.data.sources.valued import Value, Values
from relaylab.errors import InputError
from relaylab.outside.reading import open_regular
from relaylab.progress import Task

IMAGES = ("image", "img", "jpg", "jpeg", "png", "picture", "photo", "pixel_values")
LABELS = ("label", "labels", "fine_label", "class", "cls", "category", "target", "class_name", "label_name", "scene")
ROWS_AT_ONCE = 64
LARGEST_RATIO, ALWAYS_UNPACKED = 200, 64 << 20  # unpacked bytes to each packed one; and as many whatever the ratio
_OffsetOf = Callable[[bytes], int]


@dataclass(frozen=True)
class _Columns:
    """The columns that are read, and the names of the classes, if the file has them."""

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
    """List the images of Parquet files, in their order. See Note [Parquet].

    Names of numbered classes are the schema's, or those of a classnames.txt or labels.txt beside the files; files in
    `named` have display names of synsets. Images of compressed files are copied to `cache`.

    Raises:
        InputError: pyarrow is not installed; a file that is damaged or has no column of images; files with different
            columns; or no space in the cache.
    """
    pq = _pyarrow()
    rows, values, places = Rows(), Values(), list[Place]()
    columns: _Columns | None = None
    for number, path in enumerate(files):
        rows.file_states.append(file_state(path))
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                own = _columns(file)
                if columns is not None and own != columns:
                    raise InputError(f"it has other columns or classes than {files[0].name}: {own.note}")
                columns = own
                places.append(_list_file(file, path, number, own, rows, values, watch, cache))
        except InputError as error:
            raise InputError(f"{path.name}: {error}") from None
        except (ValueError, OSError, KeyError, NotImplementedError, MemoryError) as error:  # pyarrow's are of these
            reason = printable(str(error).partition("\n")[0])
            raise InputError(f"cannot read {path.name} as a Parquet file: {reason}") from None
    assert columns is not None, "there is a file"
    names = columns.names or numbered_names(files, rows.file_states)
    return replace(values.listing(rows, title, places, names=names, named=named), notes=(columns.note,))


def _pyarrow() -> Any:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("Parquet files need pyarrow: pip install 'relaybackprop[lab,parquet]'") from None
    return parquet


def _columns(file: Any) -> _Columns:
    """Tell the columns apart. See Note [Parquet] 1."""
    schema = file.schema_arrow
    features = _features(schema.metadata or {})
    kinds = {field.name: str(field.type) for field in schema}
    structs = [name for name, kind in kinds.items() if kind.startswith("struct<") and "bytes: " in kind]
    images = structs or [name for name, kind in kinds.items() if kind in ("binary", "large_binary")]
    image = next((name for name in IMAGES if name in images), images[0] if len(images) == 1 else None)
    columns = ", ".join(f"{printable(name)} ({kind})" for name, kind in list(kinds.items())[:8])
    if image is None:
        found = f"several columns of images, {few(images)}" if images else "no column of encoded images"
        raise InputError(f"it has {found}; expected one, such as image, of bytes and path. Columns: {columns}")
    described = [name for name in kinds if "names" in features.get(name, {})]
    candidates = [*(name for name in LABELS if name in kinds), *described]
    label = next((name for name in candidates if name in described), next(iter(candidates), None))
    names = features.get(label or "", {}).get("names") or ()
    others = tuple(name for name in kinds if name not in (image, label))
    return _Columns(image, label, tuple(map(str, names)), others)


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """Return the features that Hugging Face keeps in a schema, those in lists without the list."""
    try:
        features: Any = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {name: one.get("feature", one) for name, one in features.items() if isinstance(one, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _list_file(
    file: Any, path: Path, number: int, columns: _Columns, rows: Rows, values: Values, watch: Watch, cache: Path
) -> Place:
    """Add the images of one file, and copy them to the cache if they are not there and cannot be read in place."""
    with watch(f"listing {path.name}", file.metadata.num_rows) as task:
        plain = path
        found = _found(file, columns, _in_place(path), task) if _is_uncompressed(file, columns) else None
        if found is None:
            plain = _copy_of(path, cache)
            found = _found(file, columns, _copied(path, plain), task)
    assert found is not None, "copies have an offset"
    for row, (offset, size, name, value) in enumerate(found):
        rows.add(os.fsencode(f"{row}/{name.rpartition('/')[2]}" if name else f"{row}"), 0, number, (offset, size))
        values.add(value)
    if plain != path:
        rows.file_states.append(file_state(plain))
    return Place(str(plain), str(path))


def _found(
    file: Any, columns: _Columns, store: AbstractContextManager[_OffsetOf], task: Task
) -> list[tuple[int, int, str | None, Value]] | None:
    """Return offset, size, path and label of all images; None if one has no offset in this store."""
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
    parts = (group.column(place) for group in groups for place in range(group.num_columns))
    return all(
        part.compression == "UNCOMPRESSED" for part in parts if part.path_in_schema.split(".")[0] == columns.image
    )


@contextmanager
def _in_place(path: Path) -> Iterator[_OffsetOf]:
    """Yield a function that returns the offset of the next image in the file itself, or -1.

    Without compression, values are stored one after the other, so each is found where the last one ends or, behind
    other columns, a little later. One that is not, as a repeated image in a dictionary, makes the file one to copy.
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
    """Yield a function that returns an image's offset in a file of images alone, to which it is written if that is new.

    Raises:
        InputError: no space, far more bytes than the file has, or another size than that of the file that is there.
    """
    state, end = path.stat(), 0
    most = max(ALWAYS_UNPACKED, LARGEST_RATIO * state.st_size)
    with ExitStack() as stack:
        target: IO[bytes] | None = None
        if not plain.exists():
            temporary = stack.enter_context(atomic_cache_write(plain))
            free = shutil.disk_usage(temporary.parent).free
            if free < state.st_size:
                raise InputError(f"it needs {state.st_size:,} bytes in {plain.parent}: {free:,} are free")
            target = stack.enter_context(temporary.open("wb"))

        def offset_of(data: bytes) -> int:
            nonlocal end
            if target is not None:
                target.write(data)
            end += len(data)
            if end > most:
                raise InputError(f"it unpacks to more than {LARGEST_RATIO} times its size, as no images do")
            return end - len(data)

        yield offset_of
    os.utime(plain, ns=(state.st_mtime_ns, state.st_mtime_ns))  # as old as its content
    if plain.stat().st_size != end:
        plain.unlink()
        raise InputError("its copy in the cache was damaged, and is removed: start again")


def _rows(file: Any, columns: _Columns) -> Iterator[tuple[bytes, str | None, Value]]:
    """Iterate over image, path and label of all rows; raises InputError for a row without an image."""
    wanted = [columns.image] if columns.label is None else [columns.image, columns.label]
    row = 0
    for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted, use_threads=False):
        images = batch.column(columns.image).to_pylist()
        labels = [None] * len(images) if columns.label is None else batch.column(columns.label).to_pylist()
        for image, label in zip(images, labels, strict=True):
            fields = image if isinstance(image, dict) else {"bytes": image}
            if not fields.get("bytes"):
                path = f", only the path {printable(str(fields['path']))}" if fields.get("path") else ""
                raise InputError(f"row {row} has no bytes{path}; write the images into the file")
            yield fields["bytes"], fields.get("path"), _value(label, columns.label)
            row += 1


def _value(label: Any, column: str | None) -> Value:
    value = tuple(label) if isinstance(label, list) else label
    parts = value if isinstance(value, tuple) else (value,)
    if all(type(part) is int for part in parts) or all(type(part) is str for part in parts):
        return value
    if value is None:
        return None
    raise InputError(f"column {printable(str(column))}: {printable(repr(label)[:40])}; expected class numbers or names")


def _copy_of(path: Path, cache: Path) -> Path:
    """Return the place in the cache for the images of a file in its present state, and remove older ones."""
    state = file_state(path)
    same, now = (sha256(os.fsencode(text)).hexdigest()[:16] for text in (state.path, str(state[1:])))
    plain = cache / "parquet" / f"{same}-{now}.images"
    for older in plain.parent.glob(f"{same}-*.images"):
        if older != plain:
            older.unlink(missing_ok=True)
    return plain
