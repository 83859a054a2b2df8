"""Zip files, read in place: stored members as they are, deflated members by inflating them on each read.

Note [Zips]
Sizes and offsets in a zip file are not trusted: members must not overlap or extend beyond the file, and sizes after
decompression are limited, since images hardly compress. A member's data begins after its local header, whose length is
not in the central directory.
"""

import os
import stat
import struct
import zipfile
from collections.abc import Iterator
from typing import IO

from relaylab.data.sources.archives import Member, inside_path, system_folder
from relaylab.data.sources.listing import Rows, is_image, printable
from relaylab.errors import InputError

HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and the extra field
SIGNATURE = b"PK\x03\x04"
LARGEST_RATIO, ALWAYS_INFLATED = 200, 64 << 20  # limit: this many times the deflated size, but at least this many bytes
DAMAGE = (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, OverflowError, struct.error)


def zip_members(file: IO[bytes], title: str, rows: Rows) -> Iterator[Member]:
    """Iterate over the files and folders of a zip file, in the order of their data.

    Raises:
        InputError: the file is damaged, or has a member that is rejected. See Note [Zips].
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        size = os.fstat(file.fileno()).st_size
    except DAMAGE as error:
        raise InputError(f"cannot read {title} as a zip file: {error}") from None
    end = 0
    for entry in entries:
        path = inside_path(entry.filename.replace("\\", "/"), title)
        start = _start(file, entry, title)
        if entry.header_offset < end or start + entry.compress_size > size:
            raise InputError(f"{title} is damaged or cut short at {printable(path)}")
        end = start + entry.compress_size
        skipped = system_folder(path if entry.is_dir() else path.rpartition("/")[0])
        if skipped:
            rows.skip(skipped)
            rows.ignore(*([] if entry.is_dir() else [path]))
        elif entry.is_dir():
            yield Member(path, 0, 0, True)
        elif is_image(path) or path.endswith(".txt"):
            _check(entry, path, title)
            inflated = entry.file_size if entry.compress_type == zipfile.ZIP_DEFLATED else 0
            yield Member(path, start, entry.compress_size if entry.file_size else 0, False, inflated)
        else:
            rows.ignore(path)


def _start(file: IO[bytes], entry: zipfile.ZipInfo, title: str) -> int:
    """Return the offset of a member's data."""
    header = os.pread(file.fileno(), HEADER.size, entry.header_offset)
    if len(header) < HEADER.size or not header.startswith(SIGNATURE):
        raise InputError(f"{title} is damaged or cut short at {printable(entry.filename)}")
    _, name, extra = HEADER.unpack(header)
    return entry.header_offset + HEADER.size + name + extra


def _check(entry: zipfile.ZipInfo, path: str, title: str) -> None:
    """Raise InputError if a member cannot be read in place."""
    where = f"{title}: {printable(path)}"
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise InputError(f"{where} is a link; recreate the zip file with regular files")
    if entry.flag_bits & 1:
        raise InputError(f"{where} is encrypted; unpack the zip file and pass the folder")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{where} is neither stored nor deflated; unpack the zip file and pass the folder")
    if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
        raise InputError(f"{title} is damaged at {printable(path)}: a stored member with two different sizes")
    if entry.file_size > max(ALWAYS_INFLATED, LARGEST_RATIO * entry.compress_size):
        raise InputError(
            f"{where} inflates to {entry.file_size:,} bytes, more than {LARGEST_RATIO} times its size, which images "
            "never do; if that is right, unpack the zip file and pass the folder"
        )
