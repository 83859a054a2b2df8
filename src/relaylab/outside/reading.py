"""Typed reading of this program's own files: JSON decoded into dataclasses, and regular files of bounded size.

Note [Reading]
1. Files may be damaged, or written by others. Any problem raises a `DamagedFileError` that states the file, the place
   in it and the reason. Every value that is returned has the type that the dataclass declares.
2. JSON is read by the standard: no NaN or Infinity, no repeated names in an object, no numbers beyond 64 bits or
   doubles. Unknown entries are ignored, since a later version may have written them.
3. A FIFO, device or folder in place of a file is rejected before anything is read from it.
"""

import errno
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, AnyStr, TypeVar

import msgspec

from relaylab.errors import InputError
from relaylab.outside.showing import printable

LARGEST = 256 << 20  # bytes of a JSON file
LONGEST_LINE = 1 << 20  # characters
LONGEST = 20  # digits of an integer
SHOWN = 300  # characters of a reason

T = TypeVar("T")


class DamagedFileError(InputError):
    """The file is damaged, or its content does not match its name."""


def read_json(path: Path, kind: type[T], *, most: int = LARGEST) -> T:
    """Read a JSON file into a dataclass or a value of a different type.

    Raises:
        DamagedFileError: the file cannot be read, or its content is not of this type. See Note [Reading].
    """
    try:
        data = read_bytes(path, most)
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror or error}") from None
    return parse(data, kind, str(path))


def parse(data: bytes | str, kind: type[T], where: str) -> T:
    """Decode JSON text into a type.

    Args:
        data: JSON text, UTF-8 if it is bytes.
        kind: a dataclass, or a type such as dict[str, int].
        where: the file, for error messages.

    Raises:
        DamagedFileError: the text is not valid, or not of this type. See Note [Reading].
    """
    return typed(_plain(data, where), kind, where)


def typed(value: Any, kind: type[T], where: str) -> T:
    """Convert plain values, as from JSON, to a type; see `parse`."""
    try:
        return msgspec.convert(value, kind, dec_hook=_other)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        text, _, place = str(error).replace("`", "").rpartition(" - at ")
        place = place if text else ""
        reason = f"{place.removeprefix('$').removeprefix('.')}: {text}" if place else str(error).replace("`", "")
        raise _damaged(where, reason) from None


def read_bytes(path: Path | str, most: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: the file cannot be read, is not a regular file, or has more than `most` bytes.
    """
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; the limit is {most:,}", str(path))
        return file.read()


def open_regular(path: Path | str) -> int:
    """Open a regular file for reading and return its descriptor; raise OSError if there is none at the path."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO would block
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise OSError(errno.EINVAL, f"it is {what}, not a regular file", str(path))
    return descriptor


def bounded_lines(file: IO[AnyStr], name: str) -> Iterator[AnyStr]:
    """Yield the lines of an open file; raise DamagedFileError for a line of `LONGEST_LINE` characters or more."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise DamagedFileError(f"{name} is not a text file: line {number} has {LONGEST_LINE:,} characters or more")
        yield line


def check_keys(values: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Raise DamagedFileError if a mapping lacks one of the names."""
    lacking = [name for name in names if name not in values]
    if lacking:
        raise _damaged(where, f"it lacks {', '.join(lacking)}")


def _plain(data: bytes | str, where: str) -> Any:
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_number, parse_int=_whole
        )
    except RecursionError:
        raise _damaged(where, "nested too deeply") from None
    except ValueError as error:  # including UnicodeDecodeError
        raise _damaged(where, str(error) if data else "it is empty") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return values


def _constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:LONGEST]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > LONGEST:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _other(kind: type[Any], value: Any) -> Any:
    """Convert a value to a type that msgspec does not support."""
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")


def _damaged(where: str, reason: str) -> DamagedFileError:
    reason = printable(re.sub(r"\s+", " ", reason[:SHOWN]))
    return DamagedFileError(f"{where} is damaged, or was not written by relaylab: {reason}")
