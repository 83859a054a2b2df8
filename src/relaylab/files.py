"""Files that are whole or not there at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file under another name while it is written: whoever stops half-way leaves the old file, or none.

    Args:
        path: in an existing folder.

    Yields:
        Where to write; that file takes the path's place when all went well.

    Raises:
        OSError: it cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    try:
        yield Path(name)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece.

    Args:
        path: in an existing folder.
        text: written as UTF-8; what names of files hold that is not Unicode is written with a backslash.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.chmod(0o644)  # a temporary file is its owner's alone
