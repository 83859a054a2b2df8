"""Where indexes and unpacked archives are kept between runs, and how a file gets there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from relaylab.errors import InputError
from relaylab.files import replacing

VARIABLE = "RELAYLAB_CACHE"


def cache_folder(cache: Path | None = None) -> Path:
    """The folder given, else the one that the environment names, else the user's own for such things."""
    if cache is not None:
        return cache
    named = os.environ.get(VARIABLE)
    return Path(named) if named else user_cache_path("relaylab")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file under another name while it is written, which takes its place when all went well.

    Args:
        path: of the finished file; folders above it are made.

    Yields:
        Where to write.

    Raises:
        InputError: the folder or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise InputError(
            f"cannot write to the cache {path.parent}: {error.strerror or error}; name another folder with {VARIABLE}"
        ) from None
