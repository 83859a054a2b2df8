"""Tar files, read in place: each image's offset is listed once, and nothing is ever unpacked by name.

Note [Archives]
1. A plain tar is read by random access. A compressed one cannot be: it is decompressed once, to a plain tar in the
   cache.
2. ILSVRC2012_img_train.tar is a tar of one tar per class. Those lie in it uncompressed and in one piece, so images
   inside them have a place in the outer file like any other.
3. Python's tarfile takes a damaged header in the middle for the end. The end is therefore checked: it must be zeros,
   and nothing but zeros may follow.
"""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

from relaylab.data.sources.cache import written
from relaylab.data.sources.class_names import named_classes, names_beside
from relaylab.data.sources.listing import (
    SPLITS,
    Listing,
    NoSplitError,
    Place,
    Rows,
    SplitNeededError,
    Watch,
    is_image,
    is_system_folder,
    printable,
)
from relaylab.data.sources.source import UNLABELLED
from relaylab.data.sources.stamps import stamp
from relaylab.errors import InputError

CHUNK = 1 << 20
LARGEST_TEXT = 1 << 22  # of classes.txt, bytes
MEMBERS_AT_ONCE = 1000
MAGIC = {b"\xfd7zXZ\x00": "xz", b"\x1f\x8b": "gz", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zst"}
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, IndexError, RecursionError)


class Member(NamedTuple):
    """A file or folder in a tar file: its normalised path, offset and size."""

    path: str
    offset: int
    size: int
    folder: bool


def list_tars(
    tars: Sequence[Path], title: str, split: str | None, named: Iterable[Path], watch: Watch, *, cache: Path, flat: bool
) -> Listing:
    """List the images of tar files with members CLASS/**/IMAGE or {train,val,test}/CLASS/**/IMAGE.

    Files in `named` give classes names; `flat` takes all images, without classes. Decompressed tars go to `cache`.

    Raises:
        InputError: a file that is not a tar or is damaged, a member that is refused, a name twice, or no images.
    """
    rows, shown = Rows(), dict[str, str]()
    keys: dict[str, set[str]] = {}  # class folders by split; "" where there are no splits
    outside = False  # images outside class folders
    places: list[Place] = []
    for number, tar in enumerate(tars):
        rows.stamps.append(stamp(tar))
        plain = unpacked(tar, cache, watch)
        if plain != tar:
            rows.stamps.append(stamp(plain))
        places.append(Place(str(plain), str(tar)))
        with plain.open("rb") as file, watch(f"listing {tar.name}", plain.stat().st_size) as task:
            seen = 0
            for count, member in enumerate(members(file, tar.name, rows)):
                if count % MEMBERS_AT_ONCE == 0:
                    task.advance(member.offset - seen, f"{rows.found:,} images")
                    seen = member.offset
                part, key = _where(member)
                if (part, key) == ("", "test") and split == "test":
                    part, key = "test", None  # test/1.jpg: not a class called test
                if flat and not member.folder:
                    part, key = "", None
                if key is not None:
                    keys.setdefault(part, set()).add(key)
                if member.folder:
                    continue
                if member.path.rpartition("/")[2] == "classes.txt" and member.path.count("/") <= 1:
                    shown |= named_classes(_text(file, member))
                elif not is_image(member.path):
                    rows.ignore(member.path)
                elif part != (split or "") and not (split == "test" and key is None):
                    if part not in SPLITS:  # images of the other splits are not counted as ignored
                        rows.ignore(member.path)
                elif key is None and split != "test" and not flat:
                    rows.ignore(member.path)
                    outside = True
                else:
                    label = UNLABELLED if key is None else rows.key(key)
                    rows.add(os.fsencode(member.path), label, number, (member.offset, member.size))
            task.advance(plain.stat().st_size - seen, f"{rows.found:,} images")
    _check(rows, title, split, keys, outside)
    chosen = keys.get("", set()) if split is None else keys.get(split, set())
    if split is not None and chosen:
        chosen = chosen.union(keys.get("train", ()), keys.get("val", ()))
    shown = names_beside(named, chosen, rows.stamps) | {key: name for key, name in shown.items() if key in chosen}
    listing = rows.listing(title, chosen, shown, places)
    if listing.classes and (listing.labels == UNLABELLED).any():
        raise InputError(f"{title} has images with and without class folders in {split}: expected one kind only")
    return listing


def members(file: IO[bytes], title: str, rows: Rows, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Iterate over the files and folders of a plain tar, and of plain tars in it, in their order.

    The tar lies between the bytes `start` and `stop` of the file, None for its end. Files that are not images are
    counted in `rows`.

    Raises:
        InputError: it is damaged, or has a member that is refused.
    """
    nested = stop is not None
    stop = os.fstat(file.fileno()).st_size if stop is None else stop
    end = start
    try:
        file.seek(start)
        opened: Any = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
        with opened as archive:  # Any: its list of members and its offset are not in the type stubs
            while (one := archive.next()) is not None:
                archive.members.clear()  # else all of them stay in memory
                if one.size < 0 or one.offset_data + one.size > stop or archive.offset <= end:
                    raise InputError(f"{title} is damaged or cut short at {printable(one.name)}")
                end = archive.offset
                path = _path(one, title)
                skipped = _system_folder(path if one.isdir() else path.rpartition("/")[0])
                if skipped:
                    rows.skip(skipped)
                    rows.ignore(*([] if one.isdir() else [path]))
                elif one.isdir():
                    yield Member(path, 0, 0, True)
                elif not _plain(one, path, title):
                    rows.ignore(path)
                elif path.endswith(".tar"):
                    if nested:
                        raise InputError(f"{title}: {printable(path)} is a tar in a tar in a tar; expected one level")
                    inner = members(file, f"{title}/{path}", rows, one.offset_data, one.offset_data + one.size)
                    yield from (each._replace(path=f"{path[:-4]}/{each.path}") for each in inner)
                else:
                    yield Member(path, one.offset_data, one.size, False)
            end = archive.offset
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"cannot read {title} as a tar file: {error}") from None
    _check_end(file, title, end, stop, nested)


def unpacked(tar: Path, cache: Path, watch: Watch) -> Path:
    """Return a plain tar with the same content: the tar itself, or if it is compressed one in the cache.

    Raises:
        InputError: a compression that this Python lacks, a damaged file, no space, or a cache that cannot be written.
    """
    with tar.open("rb") as file:
        start = file.read(6)
    kind = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
    if kind is None:
        return tar
    source = stamp(tar)
    same, state = (sha256(os.fsencode(text)).hexdigest()[:16] for text in (source.path, str(source[1:])))
    plain = cache / "tars" / f"{same}-{state}.tar"
    if plain.exists():
        return plain
    with written(plain) as file, tar.open("rb") as packed, watch(f"unpacking {tar.name}", source.size) as task:
        free = shutil.disk_usage(file.parent).free
        if free < source.size:  # the least it can need
            raise InputError(f"{tar.name} needs more than {source.size:,} bytes in {file.parent}: {free:,} are free")
        with file.open("wb") as target:
            seen = 0
            for content in _decompressed(packed, kind, tar.name):
                target.write(content)
                task.advance(packed.tell() - seen)
                seen = packed.tell()
        os.utime(file, ns=(source.mtime_ns, source.mtime_ns))  # as old as its content
    for older in plain.parent.glob(f"{same}-*.tar"):
        if older != plain:
            older.unlink(missing_ok=True)  # of the same tar before it was changed
    return plain


def _check(rows: Rows, title: str, split: str | None, keys: dict[str, set[str]], outside: bool) -> None:
    splits = [name for name in SPLITS if name in keys]
    if split is None and splits:
        raise SplitNeededError(title, splits)
    if not rows.found and split is not None:
        found = f"only {', '.join(splits)}" if splits else "nor any other split"
        raise NoSplitError(f"{title} has no images in {split}/CLASS/IMAGE, {found}", others=splits)
    if not rows.found:
        what = "images but no class folders" if outside else "no images"
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


def _path(member: tarfile.TarInfo, title: str) -> str:
    """Return the normalised path of a member; refuse one outside the tar."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        raise InputError(f"{title} has a member that leads out of it, {printable(member.name)}: refused")
    return "/".join(parts)


def _plain(member: tarfile.TarInfo, path: str, title: str) -> bool:
    """Return whether a member is a regular file; an image that is not is refused."""
    whole = member.isreg() and not member.issparse()
    if not whole and is_image(path):
        kind = "a link" if member.issym() or member.islnk() else "sparse" if member.issparse() else "no regular file"
        raise InputError(f"{title}: {printable(path)} is {kind}; make the tar anew with whole files")
    return whole


def _system_folder(folder: str) -> str:
    """Return the path of the first system folder on the way to a folder; empty if there is none."""
    parts = folder.split("/")
    return next(("/".join(parts[: place + 1]) for place, part in enumerate(parts) if is_system_folder(part)), "")


def _where(member: Member) -> tuple[str, str | None]:
    """Return split and class folder of a member's path; a folder around the splits is skipped."""
    parts = member.path.split("/")
    folders = parts if member.folder else parts[:-1]
    if len(folders) >= 2 and folders[0] not in SPLITS and folders[1] in SPLITS:
        folders = folders[1:]
    if folders and folders[0] in SPLITS and (len(folders) > 1 or member.folder):
        return folders[0], folders[1] if len(folders) > 1 else None
    # train/1.jpg: a class called train, or a split without classes
    return ("", folders[0]) if folders else ("", None)


def _text(file: IO[bytes], member: Member) -> str:
    content = os.pread(file.fileno(), min(member.size, LARGEST_TEXT), member.offset)
    return content.decode(errors="replace")


def _check_end(file: IO[bytes], title: str, end: int, stop: int, nested: bool) -> None:
    """See Note [Archives] 3."""
    if end >= stop and not nested:
        raise InputError(f"{title} is cut short: it has no end mark")
    file.seek(end)
    while end < stop:
        content = file.read(min(CHUNK, stop - end))
        if content.strip(b"\0"):
            raise InputError(f"{title} is damaged at byte {end:,}, or several tars in a row: give them one by one")
        if not content:
            break
        end += len(content)
