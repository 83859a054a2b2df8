"""Folders that others may have written: nothing is opened for writing through a link, nor taken from another user."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from relaylab.errors import InputError
from relaylab.outside.showing import printable

DEEPEST = 4  # folders below a run's


def open_for_writing(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open a file of a folder that others may have written, in the modes of `open`; a link is refused.

    Raises:
        OSError: it is a link, or it cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "it is a symbolic link, which is not written through", name) from None
            raise

    return open(path, mode, opener=opener, **options)


def refuse_links(folder: Path) -> None:
    """Check that a folder holds no symbolic links, and nothing but files and folders; it may be one itself.

    Raises:
        InputError: one that does, by its name.
    """
    waiting = [(folder, 0)]
    while waiting:
        inside, depth = waiting.pop()
        with os.scandir(inside) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting += [(Path(entry.path), depth + 1)] if depth < DEEPEST else []
                elif not entry.is_file(follow_symlinks=False):
                    what = "a symbolic link" if entry.is_symlink() else "neither a file nor a folder"
                    shown = printable(entry.path)
                    raise InputError(f"{shown} is {what}, which may lead elsewhere: remove it, or copy what it names")


def is_our_own(path: Path) -> bool:
    """Return whether a file is a regular one that this user, or the system's administrator, owns."""
    try:
        state = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(state.st_mode) and state.st_uid in (os.geteuid(), 0)


def sweep(folder: Path, pattern: str, older_than_s: float, now_s: float) -> None:
    """Remove the files of this user that match a pattern and have not been written to for a while."""
    for path in _matching(folder, pattern):
        with suppress(OSError):
            if is_our_own(path) and now_s - path.stat().st_mtime > older_than_s:
                path.unlink()


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    with suppress(OSError):
        yield from folder.glob(pattern)
