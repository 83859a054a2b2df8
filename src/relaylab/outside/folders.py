"""Untrusted folders: files are never written through a symbolic link, and folders of other users are not used."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from relaylab.errors import InputError
from relaylab.outside.showing import printable

DEEPEST = 4  # maximum depth of folders in a run folder


def open_for_writing(path: Path, mode: str, **options: Any) -> IO[Any]:
    """Open a file in an untrusted folder, in a mode of `open`. Symbolic links are rejected.

    Raises:
        OSError: the file is a symbolic link, or cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                reason = "it is a symbolic link, and files are not written through links"
                raise OSError(errno.ELOOP, reason, name) from None
            raise

    return open(path, mode, opener=opener, **options)


def refuse_links(folder: Path) -> None:
    """Check that a folder contains only regular files and folders. The folder itself may be a symbolic link.

    Raises:
        InputError: the folder contains a symbolic link, or an entry that is neither a file nor a folder.
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
                    raise InputError(f"{shown} is {what}: remove it, or replace it by a regular file or folder")


def is_our_own(path: Path) -> bool:
    """Return whether a path is a regular file owned by this user or by root."""
    try:
        state = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(state.st_mode) and state.st_uid in (os.geteuid(), 0)


def sweep(folder: Path, pattern: str, older_than_s: float, now_s: float) -> None:
    """Remove this user's files that match a pattern and are older than `older_than_s` seconds."""
    for path in _matching(folder, pattern):
        with suppress(OSError):
            if is_our_own(path) and now_s - path.stat().st_mtime > older_than_s:
                path.unlink()


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    with suppress(OSError):
        yield from folder.glob(pattern)
