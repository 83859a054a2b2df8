"""Atomic file writes, time-stamped result folders, path patterns, and the number of usable cores."""

import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from glob import glob, has_magic
from itertools import islice
from pathlib import Path

from relaylab.errors import InputError

MOST_SHARDS = 100_000
PART = ".part"  # suffix of files that are being written
NAME = 100  # characters of a file's name in the name of its temporary file
ROOT = Path("runs")  # default folder for all output of commands


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file and rename it into place, so that an interrupted write leaves the old file intact."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:NAME]}.", suffix=PART)
    os.fchmod(descriptor, 0o666 & ~_umask())  # mkstemp makes the file readable by its owner only
    os.close(descriptor)
    try:
        yield Path(name)
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if type(error).__name__ == "SafetensorError":  # it hides the system's error and the file name
            match = re.search(r"os error (\d+)", str(error))
            number = int(match[1]) if match else errno.EIO
            raise OSError(number, os.strerror(number) if match else str(error), str(path)) from None
        raise


def _umask() -> int:
    """Return the process's umask, which cannot be read without setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Undecodable bytes of file names are written as backslash escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def timestamp() -> str:
    """Return the current UTC time for the name of a folder, such as 20261128T224500Z."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


@contextmanager
def new_folder(given: Path | None, default: Path, *, may_hold: bool = False) -> Iterator[Path]:
    """Yield a new or empty folder for results. A new folder is removed afterwards if nothing was written to it.

    Args:
        given: folder given by the user, or None.
        default: folder to use if none is given; without `may_hold`, NAME-2, NAME-3, ... if it exists.
        may_hold: allow a folder with earlier results.

    Raises:
        InputError: the folder is not empty, or cannot be written to.
    """
    folder = given or default
    is_new = not folder.exists()
    try:
        if given is None and not may_hold:
            folder, is_new = create_folder(default), True
        elif not may_hold and folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; choose a new folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # fail before minutes of work, not after them
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        yield folder
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def create_folder(folder: Path) -> Path:
    """Create a folder, or NAME-2, NAME-3, ... if it exists: several commands may start in the same second.

    Raises:
        OSError: the folder cannot be created.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path, attempt = folder, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            attempt += 1
            path = folder.with_name(f"{folder.name}-{attempt}")


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def expanded(paths: Iterable[Path]) -> list[Path]:
    """Expand patterns such as `shard-{000..003}.tar` and `*.tar` to paths.

    An existing path, and a pattern without a match, are returned unchanged.

    Raises:
        InputError: a pattern has too many numbers or paths.
    """
    result: list[Path] = []
    for path in paths:
        if path.exists():
            result.append(path)
            continue
        texts = list(islice(_braces(str(path)), MOST_SHARDS + 1))
        if len(texts) > MOST_SHARDS:
            raise InputError(f"{path} stands for more than {MOST_SHARDS:,} paths: pass a folder, or fewer shards")
        for text in texts:
            matches = sorted(glob(text)) if has_magic(text) else []  # noqa: PTH207 (a pattern that may be absolute)
            result += map(Path, matches or [text])
    return result


def _braces(text: str) -> Iterator[str]:
    """Expand `{000..123}` and `{a,b}` as a shell does."""
    match = re.search(r"\{(?:(\d{1,9})\.\.(\d{1,9})|([^{}]*,[^{}]*))\}", text)
    if match is None:
        yield text
        return
    first, last, words = match.groups()
    if words is None and not 0 <= int(last) - int(first) < MOST_SHARDS:
        raise InputError(f"{match[0]} in {text}: expected 1 to {MOST_SHARDS:,} numbers, such as {{000..123}}")
    numbers = () if words is not None else range(int(first), int(last) + 1)
    width = len(first) if first and first.startswith("0") else 0
    for word in words.split(",") if words is not None else (f"{number:0{width}}" for number in numbers):
        yield from _braces(text[: match.start()] + word + text[match.end() :])
