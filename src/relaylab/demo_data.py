"""Images into memory: scikit-learn's digits, a folder tree, or tar files that are read and never unpacked."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from relaylab.config import DemoConfig
from relaylab.errors import InputError
from relaylab.progress import progress

SPLITS: tuple[str, str] = ("train", "val")
DIGITS_TRAIN = 1000  # of 1,797; the rest is the validation part


@dataclass(frozen=True)
class Part:
    """Labelled images.

    Attributes:
        images: uint8 (n, c, side, side), a little larger than the crop that the network sees.
        labels: int64 (n,).
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageSet:
    """A data set in memory.

    Attributes:
        name: for the report.
        classes: names, in the order of the labels.
        train: training part.
        val: validation part.
    """

    name: str
    classes: tuple[str, ...]
    train: Part
    val: Part


@dataclass(frozen=True)
class Entry:
    """One image file: where it is, and what its place says."""

    source: Path
    file: str
    split: str
    folder: str


def load(config: DemoConfig) -> ImageSet:
    """Read the data that the options name.

    Args:
        config: resolved options.

    Raises:
        InputError: a path, folder or image that cannot be used.
    """
    return _load_files(config) if config.data else _load_digits(config)


def stored_side(size: int) -> int:
    """Side of the images that crops of `size` are cut from: the paper's 256 for 224, to a multiple of 4.

    The multiple of 4 lets the centre crop sit in the centre, and keeps 64-pixel crops of 72-pixel images from resizing
    them to 73.
    """
    return max(size, 4 * round(size * 256 / 224 / 4))


def sample(data: ImageSet, config: DemoConfig) -> bytes | None:
    """A PNG with twelve of the digits of each class, or None: other people's images stay out of reports."""
    if config.data:
        return None
    rows = torch.stack([data.train.images[data.train.labels == label][:12] for label in range(len(data.classes))])
    tiles = 255 - rows[:, :, 0].permute(1, 3, 0, 2)
    file = io.BytesIO()
    sheet = Image.fromarray(tiles.flatten(2).flatten(0, 1).numpy().T)
    sheet.resize((sheet.width * 4, sheet.height * 4), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def _load_digits(config: DemoConfig) -> ImageSet:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = cast("tuple[np.ndarray, np.ndarray]", load_digits(return_X_y=True))
    images = torch.from_numpy(np.round(pixels * 255 / 16).astype(np.uint8)).reshape(-1, 1, 8, 8)
    images = functional.pad(images, (1, 1, 1, 1))  # crops of 8 out of 10 shift by one pixel
    target = torch.from_numpy(labels.astype(np.int64))
    # The split does not depend on --seed: seeds then differ in training only.
    train, val = train_test_split(np.arange(len(labels)), train_size=DIGITS_TRAIN, stratify=labels, random_state=0)
    count = _class_count(config, 10)
    parts = [_select(images, target, torch.from_numpy(rows), count) for rows in (train, val)]
    parts = [_limit(part, limit) for part, limit in zip(parts, _limits(config), strict=True)]
    return ImageSet("scikit-learn's handwritten digits", tuple(str(digit) for digit in range(count)), *parts)


def _class_count(config: DemoConfig, there_are: int) -> int:
    if config.classes is not None and config.classes > there_are:
        raise InputError(f"--classes {config.classes}: there are only {there_are}")
    return config.classes or there_are


def _limits(config: DemoConfig) -> tuple[int | None, int | None]:
    return config.train_per_class, config.val_per_class


def _select(images: Tensor, labels: Tensor, rows: Tensor, classes: int) -> Part:
    rows = rows[labels[rows] < classes]
    return Part(images[rows], labels[rows])


def _limit(part: Part, per_class: int | None) -> Part:
    if per_class is None:
        return part
    rows = torch.cat([(part.labels == label).nonzero().flatten()[:per_class] for label in part.labels.unique()])
    return Part(part.images[rows], part.labels[rows])


def _load_files(config: DemoConfig) -> ImageSet:
    entries: list[Entry] = []
    names: dict[str, str] = {}
    for path in _each_once(config.data):
        found, names_here = _list_tree(path) if path.is_dir() else _list_tar(path)
        if not found:
            raise InputError(f"no images in {path}: expected train/CLASS/IMAGE and val/CLASS/IMAGE")
        entries += found
        names |= names_here
    folders = _check_classes(entries, config)
    folders = folders[: _class_count(config, len(folders))]
    wanted = _wanted(entries, folders, dict(zip(SPLITS, _limits(config), strict=True)))
    side = stored_side(cast(int, config.size))
    label_of = {folder: label for label, folder in enumerate(folders)}
    counts = {split: sum(entry.split == split for entry in wanted) for split in SPLITS}
    parts = {
        split: Part(torch.empty(count, 3, side, side, dtype=torch.uint8), torch.empty(count, dtype=torch.int64))
        for split, count in counts.items()
    }
    rows: dict[str, int] = dict.fromkeys(SPLITS, 0)
    with progress("reading images", len(wanted)) as task:
        for entry, data in _read(wanted):
            part, row = parts[entry.split], rows[entry.split]
            part.images[row] = _decode(data, entry, side)
            part.labels[row] = label_of[entry.folder]
            rows[entry.split] = row + 1
            task.advance()
    if rows != counts:  # rows that were not filled would be whatever lay in memory
        raise InputError(f"{' '.join(map(str, config.data))} changed while it was read")
    title = " + ".join(path.name for path in config.data)
    return ImageSet(title, tuple(names.get(folder, folder) for folder in folders), parts["train"], parts["val"])


def _each_once(paths: Sequence[Path]) -> Sequence[Path]:
    resolved = [path.resolve() for path in paths]
    for path, real in zip(paths, resolved, strict=True):
        if resolved.count(real) > 1:
            raise InputError(f"{path} is given more than once with --data")
    return paths


def _list_tree(root: Path) -> tuple[list[Entry], dict[str, str]]:
    """ImageFolder's reading of a tree: a class is a folder, an image a file anywhere below it."""
    entries: list[Entry] = []
    for split in SPLITS:
        for folder in sorted(path for path in root.glob(f"{split}/*") if path.is_dir()):
            files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_image(path.name))
            entries += [Entry(root, str(path), split, folder.name) for path in files]
    if not entries and any(_is_image(path.name) for path in root.glob("*/*")):
        raise InputError(f"{root} has class folders but no train/ and val/: sort them into train/CLASS and val/CLASS")
    return entries, {}


def _list_tar(path: Path) -> tuple[list[Entry], dict[str, str]]:
    entries: list[Entry] = []
    names: dict[str, str] = {}
    for archive, member in _members(path):
        split, folder, *rest = (*PurePosixPath(member.name).parts, "", "")
        if PurePosixPath(member.name) == PurePosixPath("classes.txt"):
            names = _class_names(_bytes(archive, member).decode(errors="replace"))
        elif split in SPLITS and any(rest) and _is_image(member.name):
            entries.append(Entry(path, member.name, split, folder))
    for file, count in Counter(entry.file for entry in entries).most_common(1):
        if count > 1:
            raise InputError(f"{path} has {file} more than once; make the tar file anew")
    return entries, names


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Regular files only: links and devices in a tar are nothing to look at."""
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isfile():
                    yield archive, member
    except FileNotFoundError:
        raise InputError(f"no such file or folder: {path}") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"cannot read {path} as a tar file: {error}") from None


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "regular files have content"
    return file.read()


def _class_names(text: str) -> dict[str, str]:
    """By folder, the last part of the original name: `0 000_abbey /a/abbey` gives abbey."""
    lines = [line.split(maxsplit=2) for line in text.splitlines()]
    return {line[1]: line[2].rpartition("/")[2] for line in lines if len(line) == 3}


def _is_image(name: str) -> bool:
    return has_file_allowed_extension(name, IMG_EXTENSIONS)


def _check_classes(entries: Iterable[Entry], config: DemoConfig) -> list[str]:
    folders = {split: {entry.folder for entry in entries if entry.split == split} for split in SPLITS}
    where = " ".join(map(str, config.data))
    for split in SPLITS:
        if not folders[split]:
            raise InputError(f"no {split} part in {where}: expected {split}/CLASS/IMAGE")
    for split, other in (SPLITS, SPLITS[::-1]):
        alone = sorted(folders[split] - folders[other])
        if alone:
            more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
            raise InputError(f"classes with {split} images but no {other} images: {', '.join(alone[:3])}{more}")
    if len(folders["train"]) < 2:
        raise InputError(f"one class only ({', '.join(folders['train'])}) in {where}: expected at least 2")
    return sorted(folders["train"])


def _wanted(entries: Iterable[Entry], folders: Sequence[str], limits: Mapping[str, int | None]) -> list[Entry]:
    """The first so many entries of each class and split."""
    taken = {(split, folder): 0 for split in SPLITS for folder in folders}
    wanted: list[Entry] = []
    for entry in entries:
        key, limit = (entry.split, entry.folder), limits[entry.split]
        if key in taken and (limit is None or taken[key] < limit):
            taken[key] += 1
            wanted.append(entry)
    return wanted


def _read(wanted: Sequence[Entry]) -> Iterator[tuple[Entry, bytes]]:
    """Each wanted file's bytes. A tar is read once more from start to end: xz cannot jump."""
    for source in dict.fromkeys(entry.source for entry in wanted):
        entries = {entry.file: entry for entry in wanted if entry.source == source}
        if source.is_dir():
            for entry in entries.values():
                try:
                    content = Path(entry.file).read_bytes()
                except OSError as error:
                    raise InputError(f"cannot read {entry.file}: {error.strerror}") from None
                yield entry, content
            continue
        for archive, member in _members(source):
            entry = entries.pop(member.name, None)
            if entry is not None:
                yield entry, _bytes(archive, member)


def _decode(data: bytes, entry: Entry, side: int) -> Tensor:
    """An RGB image, its shorter side resized to `side`, cropped to a square in the centre: uint8 (3, side, side)."""
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        where = entry.file if entry.source.is_dir() else f"{entry.file} in {entry.source}"
        raise InputError(f"unreadable image {where}: {error}".replace("\n", " ")) from None
    width, height = image.size
    scale = side / min(width, height)
    if scale != 1:
        width, height = max(side, round(width * scale)), max(side, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, upper = (width - side) // 2, (height - side) // 2
    square = image.crop((left, upper, left + side, upper + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
