"""Atomic file writes, new folders for results with their time stamps, and the cores of this machine."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from relaylab.errors import InputError

PART = ".part"  # suffix of files that are being written
NAME = 100  # characters of a file's name in that of its temporary file
ROOT = Path("runs")  # default folder of everything that commands write


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file and rename it into place, so that an interrupted write leaves the old file intact."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:NAME]}.", suffix=PART)
    os.fchmod(descriptor, 0o666 & ~_umask())  # such a file is readable by its owner only
    os.close(descriptor)
    try:
        yield Path(name)
        Path(name).replace(path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if type(error).__name__ == "SafetensorError":  # which hides the system's error and the file
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number) if found else str(error), str(path)) from None
        raise


def _umask() -> int:
    """Return the process's umask, which cannot be read without setting it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8; bytes of file names that are not Unicode get a backslash."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def timestamp() -> str:
    """Return the present time for the name of a folder, such as 20261128T224500Z."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


@contextmanager
def new_folder(given: Path | None, default: Path, *, may_hold: bool = False) -> Iterator[Path]:
    """Yield a new or empty folder for results, and remove a new one in the end if nothing was written to it.

    Args:
        given: by the user.
        default: otherwise.
        may_hold: allow a folder that holds earlier results.

    Raises:
        InputError: it is not empty, or cannot be written to.
    """
    folder = given or default
    is_new = not folder.exists()
    try:
        if not may_hold and folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; give a new folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # before minutes of work, not after them
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        yield folder
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
