"""Fingerprints of the files and folders that an index was made from: size and time of change, not content.

Adding, removing or renaming a file changes the time of its folder. Writing over a file changes its own only, so those
of images count too: of all of them in sets of up to `MOST_IMAGES`, and of as many, evenly spread, in larger ones.
"""

import os
import struct
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

MOST_IMAGES = 10_000  # 0.1 s on a local disk
SETTLED_NS = 2_000_000_000  # two changes closer than this may leave the same time on some file systems


class FileState(NamedTuple):
    """The state of a file or folder: size in bytes (-1 for a folder), time of its last change."""

    path: str
    size: int
    mtime_ns: int


def file_state(path: Path | str) -> FileState:
    """Return the present state of a file or folder; raises OSError if there is none."""
    path = Path(path)
    state = path.stat()
    return FileState(str(path), -1 if path.is_dir() else state.st_size, state.st_mtime_ns)


def image_state(count: int, path_of: Callable[[int], str]) -> tuple[str, int]:
    """Return a fingerprint of image files' sizes and times, and the latest time of change, in ns.

    Args:
        count: of images.
        path_of: returns the path of an image. A file that is absent has a state of its own.
    """
    content, latest = sha256(), 0
    for index in sample(count):
        try:
            state = os.stat(path_of(index))  # noqa: PTH116 (thousands of them)
        except OSError:
            content.update(b"absent")
            continue
        content.update(struct.pack("<qqq", state.st_size, state.st_mtime_ns, state.st_ctime_ns))
        latest = max(latest, state.st_mtime_ns)
    return content.hexdigest()[:32], latest


def sample(count: int) -> range:
    """Return the indices of the images that are looked at, evenly spread."""
    return range(0, count, max(1, -(-count // MOST_IMAGES)))


def unsettled(file_states: Sequence[FileState]) -> bool:
    """Return whether something changed so recently that a further change might not show in its time."""
    return any(is_recent(one.mtime_ns) for one in file_states)


def is_recent(time_ns: int) -> bool:
    """Return whether a time is so close to now that a further change might have the same one."""
    return abs(time.time_ns() - time_ns) < SETTLED_NS


def stale(file_states: Sequence[FileState]) -> bool:
    """Return whether anything has changed since."""
    try:
        return any(file_state(one.path) != one for one in file_states)
    except OSError:
        return True
