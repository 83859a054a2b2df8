"""Fingerprints of the files and folders that an index was made from: size and time of change, not content.

Adding, removing or renaming a file changes the time of its folder. What a file holds is read when its image is.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SETTLED_NS = 2_000_000_000  # two changes closer than this may leave the same time on some file systems


class Stamp(NamedTuple):
    """The state of a file or folder: size in bytes (-1 for a folder), time of its last change."""

    path: str
    size: int
    mtime_ns: int


def stamp(path: Path | str) -> Stamp:
    """Return the present state of a file or folder; raises OSError if there is none."""
    path = Path(path)
    state = path.stat()
    return Stamp(str(path), -1 if path.is_dir() else state.st_size, state.st_mtime_ns)


def unsettled(stamps: Sequence[Stamp]) -> bool:
    """Return whether something changed so recently that a further change might not show in its time."""
    now = time.time_ns()
    return any(abs(now - one.mtime_ns) < SETTLED_NS for one in stamps)


def stale(stamps: Sequence[Stamp]) -> bool:
    """Return whether anything has changed since."""
    try:
        return any(stamp(one.path) != one for one in stamps)
    except OSError:
        return True
