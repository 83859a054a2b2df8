"""The cache of indexes and unpacked archives, and atomic writes to it."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from relaylab.errors import InputError
from relaylab.files import PART, atomic_write
from relaylab.outside.folders import sweep

ABANDONED_S = 24 * 3600  # a file that is being written for so long has been left by a process that was killed
VARIABLE = "RELAYLAB_CACHE"


def cache_folder(cache: Path | None = None) -> Path:
    """Return the given folder, else that of RELAYLAB_CACHE, else relaylab's in the user's cache, as torch has one."""
    named = cache or os.environ.get(VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "relaylab"


@contextmanager
def atomic_cache_write(path: Path) -> Iterator[Path]:
    """Write a file of the cache atomically: yields the temporary file; folders above `path` are made.

    Raises:
        InputError: the folder or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, f".*{PART}", ABANDONED_S, time.time())
        with atomic_write(path) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {path.parent}: {error.strerror or error}; name another folder with {VARIABLE}"
        ) from None
