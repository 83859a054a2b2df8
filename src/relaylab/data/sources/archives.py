"""Tar and zip files, read in place: the offset of each image is listed once, and members are never extracted to disk.

Note [Archives]
1. A plain tar is read by random access. A compressed tar cannot be, so it is decompressed once, to a plain tar in the
   cache.
2. ILSVRC2012_img_train.tar is a tar of one tar per class. The inner tars are stored uncompressed and contiguously, so
   the images in them have an offset in the outer file like any other image.
3. Python's tarfile takes a damaged header for the end of the archive. The end is therefore checked: it must be zeros,
   and only zeros may follow.
4. Sizes in a tar are not trusted. tarfile reads the records of long names and extended headers into memory, so their
   size and their number in a row are limited, and so is the unpacked size of a compressed file. If an error follows,
   the unpacked file is removed.
"""

import bz2
import gzip
import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from relaylab.data.sources.cache import atomic_cache_write, cached_copy, remove_outdated
from relaylab.data.sources.class_names import named_classes, names_beside
from relaylab.data.sources.file_states import FileState, file_state
from relaylab.data.sources.listing import (
    SPLITS,
    Listing,
    NoSplitError,
    Place,
    Rows,
    SplitNeededError,
    Watch,
    inflate,
    is_image,
    is_system_folder,
)
from relaylab.data.sources.source import UNLABELLED
from relaylab.data.sources.splits import note_on, only_one, split_of
from relaylab.errors import InputError
from relaylab.outside.folders import is_our_own
from relaylab.outside.reading import open_regular
from relaylab.outside.showing import brief

CHUNK = 1 << 20
LABEL_FILES = (".cls", ".json")  # of shards, see `relaylab.data.sources.shards`
LARGEST_TEXT = 1 << 22  # bytes of classes.txt
MEMBERS_AT_ONCE = 1000
MAGIC = {b"\xfd7zXZ\x00": "xz", b"\x1f\x8b": "gz", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zst"}
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, IndexError, RecursionError, MemoryError)
LARGEST_RECORD = 1 << 20  # bytes of a long name or an extended header
LARGEST_PADDING = 256 << 20  # bytes of zeros after the end
MOST_RECORDS = 8  # maximum number of extended headers before one member
LARGEST_RATIO, ALWAYS_UNPACKED = 200, 64 << 20  # limit: this many times the packed size, but at least this many bytes
DRIVE = re.compile(r"(\./)*[A-Za-z]:/")  # start of an absolute path of Windows
RECORDS = (b"x", b"g", b"X", b"L", b"K")  # types of POSIX, Solaris and GNU


class Member(NamedTuple):
    """A file or folder in a tar or zip file. `inflated` is the size after decompression, 0 for a stored file."""

    path: str
    offset: int
    size: int
    folder: bool
    inflated: int = 0


Members = Callable[[IO[bytes], str, Rows], Iterator[Member]]
"""Iterates over the members of an archive: `tar_members`, `relaylab.data.sources.zips.zip_members`."""


def list_archives(
    archives: Sequence[Path],
    members: Members,
    title: str,
    split: str | None,
    named: Iterable[Path],
    watch: Watch,
    *,
    cache: Path,
    flat: bool,
) -> Listing:
    """List the images of archives with members CLASS/**/IMAGE or {train,val,test}/CLASS/**/IMAGE.

    Files in `named` give the display names of classes. With `flat`, all images are listed, without classes. Compressed
    tars are unpacked to `cache`.

    Raises:
        InputError: a file is not an archive or is damaged, a member is rejected, a name occurs twice, or there are no
            images.
    """
    rows, shown = Rows(), dict[str, str]()
    keys: dict[str, set[str]] = {}  # class folders by split; "" if the archive has no splits
    spellings: dict[str, set[str]] = {}  # folder names by split
    has_loose = False  # images outside class folders
    places: list[Place] = []
    for place, tar in enumerate(archives):
        rows.file_states.append(file_state(tar))
        plain = unpacked(tar, cache, watch)
        if plain != tar:
            rows.file_states.append(file_state(plain))
        places.append(Place(str(plain), str(tar)))
        with plain.open("rb") as file, watch(f"listing {tar.name}", plain.stat().st_size) as task:
            seen = 0
            for count, member in enumerate(members(file, tar.name, rows)):
                if count % MEMBERS_AT_ONCE == 0:
                    task.advance(member.offset - seen, f"{rows.found:,} images")
                    seen = member.offset
                member_split, key, spelling = _where(member)
                spellings.setdefault(member_split, set()).add(spelling)
                if (member_split, key) == ("", "test") and split == "test":
                    member_split, key = "test", None  # test/1.jpg: not a class called test
                if flat and not member.folder:
                    member_split, key = "", None
                if key is not None:
                    keys.setdefault(member_split, set()).add(key)
                if member.folder:
                    continue
                if member.path.rpartition("/")[2] == "classes.txt" and member.path.count("/") <= 1:
                    shown |= named_classes(member_bytes(file, member).decode(errors="replace"))
                elif not is_image(member.path):
                    rows.ignore(member.path)
                elif member_split != (split or "") and not (split == "test" and key is None):
                    if member_split not in SPLITS:  # images of the other splits are not counted as ignored
                        rows.ignore(member.path)
                elif key is None and split != "test" and not flat:
                    rows.ignore(member.path)
                    has_loose = True
                else:
                    label = UNLABELLED if key is None else rows.key(key)
                    rows.add(os.fsencode(member.path), label, place, (member.offset, member.size), member.inflated)
            task.advance(plain.stat().st_size - seen, f"{rows.found:,} images")
    _check(rows, title, split, keys, has_loose)
    if split in spellings:
        rows.notes += note_on(only_one(sorted(spellings[split]), split, title), split)
    chosen = keys.get("", set()) if split is None else keys.get(split, set())
    if split is not None and chosen:
        chosen = chosen.union(keys.get("train", ()), keys.get("val", ()))
    shown = names_beside(named, chosen, rows.file_states) | {key: name for key, name in shown.items() if key in chosen}
    listing = rows.listing(title, chosen, shown, places)
    if listing.classes and (listing.labels == UNLABELLED).any():
        raise InputError(f"{title} has images with and without class folders in {split}: expected only one kind")
    return listing


def tar_members(file: IO[bytes], title: str, rows: Rows, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Iterate over the files and folders of a plain tar, and of plain tars in it, in archive order.

    The tar occupies the bytes from `start` to `stop` of the file; None is the end of the file. Files that are not
    images are counted in `rows`.

    Raises:
        InputError: the tar is damaged, or has a member that is rejected.
    """
    nested = stop is not None
    stop = os.fstat(file.fileno()).st_size if stop is None else stop
    end = start
    try:
        file.seek(start)
        opened: Any = _Tar(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape", tarinfo=_Record)
        with opened as archive:  # Any: `members` and `offset` are not in the type stubs
            while (entry := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep every entry in memory
                # Checked for every entry: a size that overruns the file, or an offset that does not advance.
                if entry.size < 0 or entry.offset_data + entry.size > stop or archive.offset <= end:
                    raise InputError(f"{title} is damaged or cut short at {brief(entry.name)}")
                end = archive.offset
                path = inside_path(entry.name, title)
                skipped = system_folder(path if entry.isdir() else path.rpartition("/")[0])
                if skipped:
                    rows.skip(skipped)
                    rows.ignore(*([] if entry.isdir() else [path]))
                elif entry.isdir():
                    yield Member(path, 0, 0, True)
                elif not _is_file(entry, path, title):
                    rows.ignore(path)
                elif path.endswith(".tar"):
                    if nested:
                        raise InputError(f"{title}: {brief(path)} is nested too deeply; expected at most a tar of tars")
                    inner_stop = entry.offset_data + entry.size
                    inner = tar_members(file, f"{title}/{path}", rows, entry.offset_data, inner_stop)
                    yield from (member._replace(path=f"{path[:-4]}/{member.path}") for member in inner)
                else:
                    yield Member(path, entry.offset_data, entry.size, False)
            end = archive.offset
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"cannot read {title} as a tar file: {error}") from None
    _check_end(file, title, end, stop, nested)


class _Record(tarfile.TarInfo):
    """A tar header with limits on the records of long names and extended headers. See Note [Archives] 4."""

    depth = 0

    def _proc_member(self, archive: Any) -> tarfile.TarInfo:
        if self.type in RECORDS:
            if not 0 <= self.size <= LARGEST_RECORD:
                raise ValueError(f"a name or header of {self.size:,} bytes; the limit is {LARGEST_RECORD:,}")
            archive.records += 1
            if archive.records > MOST_RECORDS:
                raise ValueError(f"more than {MOST_RECORDS} names and headers in a row")
            member: tarfile.TarInfo = super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue]
            return member
        archive.records = 0
        return super()._proc_member(archive)  # pyright: ignore[reportAttributeAccessIssue]


class _Tar(tarfile.TarFile):
    """A tar file with `_Record` headers."""

    records = 0


def unpacked(tar: Path, cache: Path, watch: Watch) -> Path:
    """Return a plain tar with the same content: the tar itself, or for a compressed tar its copy in the cache.

    Raises:
        InputError: this Python lacks the compression, the file is damaged, there is no space, or the cache cannot be
            written.
    """
    with os.fdopen(open_regular(tar), "rb") as file:
        start = file.read(6)
    kind = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
    if kind is None:
        return tar
    source = file_state(tar)
    plain = _cached_tar(source, cache)
    if is_our_own(plain):
        return plain
    with (
        atomic_cache_write(plain) as file,
        tar.open("rb") as packed,
        watch(f"unpacking {tar.name}", source.size) as task,
    ):
        free = shutil.disk_usage(file.parent).free
        if free < source.size:  # the unpacked tar is at least this large
            raise InputError(
                f"{tar.name} needs more than {source.size:,} bytes in {file.parent}, which has {free:,} free"
            )
        with file.open("wb") as target:
            seen = size = 0
            for content in _decompressed(packed, kind, tar.name):
                size += len(content)
                if size > max(ALWAYS_UNPACKED, LARGEST_RATIO * packed.tell()):
                    raise InputError(
                        f"{tar.name} unpacks to more than {LARGEST_RATIO} times its size, which images never do; if "
                        "that is right, unpack it to .tar yourself"
                    )
                target.write(content)
                task.advance(packed.tell() - seen)
                seen = packed.tell()
        os.utime(file, ns=(source.mtime_ns, source.mtime_ns))  # the time of its content
    remove_outdated(plain)
    return plain


def _cached_tar(source: FileState, cache: Path) -> Path:
    return cached_copy(source, cache / "tars", ".tar")


@contextmanager
def removing_refused(tars: Iterable[Path], cache: Path) -> Iterator[None]:
    """Remove the unpacked copies of tars if the block raises InputError, unless only the choice of the split failed."""
    try:
        yield
    except (SplitNeededError, NoSplitError):
        raise
    except InputError:
        for tar in tars:
            with suppress(OSError):
                _cached_tar(file_state(tar), cache).unlink(missing_ok=True)
        raise


def beginning(tar: Path, size: int) -> bytes:
    """Return about the first `size` bytes of a tar, uncompressed; fewer if it is damaged."""
    with os.fdopen(open_regular(tar), "rb") as file:
        start = file.read(6)
        kind = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
        file.seek(0)
        if kind is None:
            return file.read(size)
        chunks: list[bytes] = []
        with suppress(InputError):  # listing the tar raises it
            chunks.extend(islice(_decompressed(file, kind, tar.name), max(1, size // CHUNK)))
        return b"".join(chunks)


def _check(rows: Rows, title: str, split: str | None, keys: dict[str, set[str]], has_loose: bool) -> None:
    splits = [name for name in SPLITS if name in keys]
    if split is None and splits:
        raise SplitNeededError(title, splits)
    if not rows.found and split is not None:
        found = f"only {', '.join(splits)}" if splits else "nor any other split"
        raise NoSplitError(f"{title} has no images in {split}/CLASS/IMAGE, {found}", others=splits)
    if not rows.found:
        what = "images but no class folders" if has_loose else "no images"
        labels = [extension for extension in LABEL_FILES if has_loose and rows.ignored[extension]]
        what += f", and no label in its first {' or '.join(labels)} files" if labels else ""
        raise InputError(f"{title} has {what}: expected CLASS/IMAGE or {{train,val}}/CLASS/IMAGE")
    rows.refuse_repeats(title)


def _decompressed(packed: IO[bytes], kind: str, title: str) -> Iterator[bytes]:
    opened: Any
    try:
        if kind == "zst":
            try:
                from compression import zstd  # pyright: ignore[reportMissingImports]
            except ImportError:
                raise InputError(
                    f"{title} is compressed with zstd, which needs Python 3.14: unpack it to .tar"
                ) from None
            opened = zstd.open(packed)
        else:
            opened = {"xz": lzma.open, "gz": gzip.open, "bz2": bz2.open}[kind](packed)
        with opened:
            while content := opened.read(CHUNK):
                yield content
    except InputError:
        raise
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"{title} is damaged or cut short: {error}") from None


def inside_path(name: str, title: str) -> str:
    """Return the normalised path of a member; raise InputError for a path that leads out of the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or DRIVE.match(name) or ".." in parts or "\0" in name:
        raise InputError(f"{title} has a member whose path leads out of it, {brief(name)}: refused")
    return "/".join(parts)


def _is_file(member: tarfile.TarInfo, path: str, title: str) -> bool:
    """Return whether a member is a regular file; raise InputError for an image that is not."""
    is_file = member.isreg() and not member.issparse()
    if not is_file and is_image(path):
        kind = "a link" if member.issym() or member.islnk() else "sparse" if member.issparse() else "not a regular file"
        raise InputError(f"{title}: {brief(path)} is {kind}; recreate the tar with regular files")
    return is_file


def system_folder(folder: str) -> str:
    """Return the path of the outermost system folder that is or contains a folder; empty if there is none."""
    parts = folder.split("/")
    return next(("/".join(parts[: place + 1]) for place, part in enumerate(parts) if is_system_folder(part)), "")


def _where(member: Member) -> tuple[str, str | None, str]:
    """Return split, class folder and split folder from a member's path, ignoring a folder around the splits."""
    parts = member.path.split("/")
    folders = parts if member.folder else parts[:-1]
    if len(folders) >= 2 and not split_of(folders[0]) and split_of(folders[1]):
        folders = folders[1:]
    split = split_of(folders[0]) if folders and (len(folders) > 1 or member.folder) else None
    if split:
        return split, folders[1] if len(folders) > 1 else None, folders[0]
    # train/1.jpg: a class called train, or a split without classes
    return ("", folders[0], "") if folders else ("", None, "")


def member_bytes(file: IO[bytes], member: Member, most: int = LARGEST_TEXT) -> bytes:
    """Return the content of a member; if it is larger than `most`, the first bytes, or b"" if it is compressed."""
    content = os.pread(file.fileno(), min(member.size, most), member.offset)
    if member.inflated:
        return inflate(content, member.inflated, member.path) if member.inflated <= most else b""
    return content


def _check_end(file: IO[bytes], title: str, end: int, stop: int, nested: bool) -> None:
    """Check the end of a tar. See Note [Archives] 3."""
    if end >= stop and not nested:
        raise InputError(f"{title} is truncated: it has no end-of-archive marker")
    if stop - end > LARGEST_PADDING:
        raise InputError(f"{title} has {stop - end:,} bytes after its end at byte {end:,}: it is not a complete tar")
    file.seek(end)
    while end < stop:
        content = file.read(min(CHUNK, stop - end))
        if content.strip(b"\0"):
            raise InputError(
                f"{title} is damaged at byte {end:,}, or consists of several concatenated tars: split it and pass them "
                "separately"
            )
        if not content:
            break
        end += len(content)
