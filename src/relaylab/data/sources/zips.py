"""Zip files, read in place: members that are stored as they are, and deflated ones, which are inflated when read.

Note [Zips]
What a zip file claims is not believed: members may not overlap, none may lie outside of the file, and sizes after
decompression are limited, as images hardly shrink. The data of a member begins behind a header of its own, whose
length the directory at the end does not say.
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

HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and further fields
SIGNATURE = b"PK\x03\x04"
LARGEST_RATIO, ALWAYS_INFLATED = 200, 64 << 20  # inflated bytes to each deflated one; and as many whatever the ratio
DAMAGE = (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, OverflowError, struct.error)


def zip_members(file: IO[bytes], title: str, rows: Rows) -> Iterator[Member]:
    """Iterate over the files and folders of a zip file, in the order of their data.

    Raises:
        InputError: it is damaged, or has a member that is refused. See Note [Zips].
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda one: one.header_offset)
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
    """Raise InputError for a member that cannot be read in place."""
    where = f"{title}: {printable(path)}"
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise InputError(f"{where} is a link; make the zip file anew with whole files")
    if entry.flag_bits & 1:
        raise InputError(f"{where} is encrypted; unpack the zip file, and give the folder")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{where} is neither stored nor deflated; unpack the zip file")
    if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
        raise InputError(f"{title} is damaged at {printable(path)}: it is stored, and has two sizes")
    if entry.file_size > max(ALWAYS_INFLATED, LARGEST_RATIO * entry.compress_size):
        raise InputError(
            f"{where} would have {entry.file_size:,} bytes, more than {LARGEST_RATIO} times its size, as no image has; "
            "if that is right, unpack the zip file"
        )
