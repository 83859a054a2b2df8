"""States of the files and folders that an index was made from: size and modification time, not content.

Adding, removing or renaming a file changes the time of its folder. Overwriting a file changes only the file's own
time, so the times of images are checked as well: of all images in sets of up to `MOST_IMAGES`, and of at most that
many, evenly spread, in larger sets.
"""

import os
import struct
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

MOST_IMAGES = 10_000  # 0.1 s on a local disk
SETTLED_NS = 2_000_000_000  # on some file systems, two changes closer than this can have the same time


class FileState(NamedTuple):
    """The state of a file or folder: its size in bytes (-1 for a folder) and its modification time."""

    path: str
    size: int
    mtime_ns: int


def file_state(path: Path | str) -> FileState:
    """Return the current state of a file or folder; raises OSError if it does not exist."""
    path = Path(path)
    state = path.stat()
    return FileState(str(path), -1 if path.is_dir() else state.st_size, state.st_mtime_ns)


def image_state(count: int, path_of: Callable[[int], str]) -> tuple[str, int]:
    """Return a hash of the sizes and times of image files, and the latest modification time in nanoseconds.

    Args:
        count: number of images.
        path_of: returns the path of an image by index. A missing file changes the hash too.
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
    """Return the indices of the images that are checked, evenly spread."""
    return range(0, count, max(1, -(-count // MOST_IMAGES)))


def unsettled(file_states: Sequence[FileState]) -> bool:
    """Return whether a file changed so recently that another change could leave the same time."""
    return any(is_recent(one.mtime_ns) for one in file_states)


def is_recent(time_ns: int) -> bool:
    """Return whether a time is so close to now that another change could have the same time."""
    return abs(time.time_ns() - time_ns) < SETTLED_NS


def stale(file_states: Sequence[FileState]) -> bool:
    """Return whether any of the files or folders has changed or disappeared."""
    try:
        return any(file_state(one.path) != one for one in file_states)
    except OSError:
        return True
