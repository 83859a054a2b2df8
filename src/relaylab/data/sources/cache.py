"""The cache of indexes and unpacked archives: its folder, atomic writes, and the names of cached copies."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from relaylab.data.sources.file_states import FileState
from relaylab.errors import InputError
from relaylab.files import PART, atomic_write
from relaylab.outside.folders import sweep

ABANDONED_S = 24 * 3600  # older temporary files were left behind by a process that was killed
VARIABLE = "RELAYLAB_CACHE"


def cache_folder(cache: Path | None = None) -> Path:
    """Return the given folder; by default RELAYLAB_CACHE, or `relaylab` in the user's cache folder (XDG)."""
    named = cache or os.environ.get(VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "relaylab"


@contextmanager
def atomic_cache_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file that is renamed to `path`, a file in the cache; missing folders are created.

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
            f"cannot write to the cache {path.parent}: {error.strerror or error}; set {VARIABLE} to a different folder"
        ) from None


def cached_copy(source: FileState, folder: Path, suffix: str) -> Path:
    """Return the path of a file's plain copy in a cache folder: `PATH_HASH-STATE_HASH` and the suffix.

    The name depends on the file's path, size and modification time, so a changed file gets a new copy.
    """
    path, state = (sha256(os.fsencode(text)).hexdigest()[:16] for text in (source.path, str(source[1:])))
    return folder / f"{path}-{state}{suffix}"


def remove_outdated(copy: Path) -> None:
    """Remove the copies of earlier states of the same file."""
    for other in copy.parent.glob(f"{copy.name.partition('-')[0]}-*{copy.suffix}"):
        if other != copy:
            other.unlink(missing_ok=True)
