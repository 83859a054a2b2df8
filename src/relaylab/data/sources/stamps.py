"""Whether what an index was made from is still the same: by size and time, without looking into it.

Adding, removing or renaming a file changes the time of its folder. What a file holds is read when its image is.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SETTLED_NS = 2_000_000_000  # two changes closer than this may leave the same time on some file systems


class Stamp(NamedTuple):
    """What a file or folder was like when it was read: size in bytes (-1 for a folder), time of its last change."""

    path: str
    size: int
    mtime_ns: int


def stamp(path: Path | str) -> Stamp:
    """The present state of a file or folder.

    Raises:
        OSError: there is none.
    """
    path = Path(path)
    state = path.stat()
    return Stamp(str(path), -1 if path.is_dir() else state.st_size, state.st_mtime_ns)


def unsettled(stamps: Sequence[Stamp]) -> bool:
    """Whether something changed so lately that a further change might not show in its time."""
    now = time.time_ns()
    return any(abs(now - one.mtime_ns) < SETTLED_NS for one in stamps)


def stale(stamps: Sequence[Stamp]) -> bool:
    """Whether anything has changed since."""
    try:
        return any(stamp(one.path) != one for one in stamps)
    except OSError:
        return True
