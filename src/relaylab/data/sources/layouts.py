"""Data sets as their authors distribute them, recognised by the files in their folder, and folders of shards.

Note [Layouts]
1. A layout is a function of a folder that returns its splits, or nothing where the folder is of another kind. `LAYOUTS`
   has them all; the first that recognises the folder counts.
2. Where two files or folders may be meant, the error names both and the commands to choose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from relaylab.data.sources.coco import is_coco
from relaylab.data.sources.listing import few, is_image, is_system_folder
from relaylab.data.sources.shards import are_shards
from relaylab.data.sources.splits import split_of, split_of_file
from relaylab.errors import InputError

PARQUET = ".parquet"
TINY = "val_annotations.txt"
PLACES_LISTS = {
    "train": ("places365_train_standard.txt", "places365_train_challenge.txt"),
    "val": ("places365_val.txt",),
    "test": ("places365_test.txt",),
}
PLACES_CATEGORIES = "categories_places365.txt"
PLACES_FOLDERS = {
    "train": ("data_large_standard", "data_256_standard", "data_large", "data_256", "data_large_challenge"),
    "val": ("val_large", "val_256"),
    "test": ("test_large", "test_256"),
}
ANNOTATIONS = ("", "annotations")  # folders of COCO's files
MOST_FOLDERS, DEEPEST = 20, 3  # that are searched for shards


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """A split of a layout: a list and the folder that it is about, a tree, or shards.

    Attributes:
        files: a list, or Parquet files, or tar files; none for a tree.
        folder: of the tree, or that the list is about.
        categories: file with the names of the list's classes.
        flat: whether the tree has no classes.
    """

    files: tuple[Path, ...] = ()
    folder: Path | None = None
    categories: Path | None = None
    flat: bool = False


Splits = Mapping[str, SplitFiles | Callable[[], SplitFiles]]
Layout = Callable[[Path], Splits]


def places365(folder: Path) -> Splits:
    """Recognise Places365: lists beside data_large_standard/, val_large/ and the like."""
    lists = {split: _there(folder, names) for split, names in PLACES_LISTS.items()}
    categories = folder / PLACES_CATEGORIES

    def files_of(split: str) -> SplitFiles:
        path = _only(lists[split], folder, split)
        roots = _there(folder, PLACES_FOLDERS[split])
        if not roots:
            raise InputError(
                f"{folder} has {path.name}, and none of the folders {', '.join(PLACES_FOLDERS[split])}; "
                "give the list and the folder that it is about"
            )
        root = _only(roots, folder, split)
        return SplitFiles(files=(path,), folder=root, categories=categories if categories.is_file() else None)

    return {split: lambda split=split: files_of(split) for split, found in lists.items() if found}


def tiny_imagenet(folder: Path) -> Splits:
    """Recognise Tiny ImageNet, whose validation images lie in one folder beside their list."""
    if not (folder / "val" / TINY).is_file():
        return {}
    splits: dict[str, SplitFiles | Callable[[], SplitFiles]] = {}
    if (folder / "train").is_dir():
        splits["train"] = SplitFiles(folder=folder / "train")
    splits["val"] = SplitFiles(files=(folder / "val" / TINY,), folder=folder / "val" / "images")
    if (folder / "test" / "images").is_dir():
        splits["test"] = SplitFiles(folder=folder / "test" / "images", flat=True)
    return splits


def annotated(folder: Path) -> Splits:
    """Recognise COCO's JSON files for splits, as of iNaturalist: train2017.json, train_mini.json and the like."""
    found: dict[str, list[Path]] = {}
    for file in (file for place in ANNOTATIONS for file in sorted((folder / place).glob("*.json"))):
        split = split_of(file.stem.removeprefix("instances_"))
        if split and is_coco(file):
            found.setdefault(split, []).append(file)

    def files_of(split: str) -> SplitFiles:
        files = found[split]
        present = [file for file in files if (folder / file.stem.removeprefix("instances_")).is_dir()]
        return SplitFiles(files=(_only(present or files, folder, split),), folder=folder)

    return {split: lambda split=split: files_of(split) for split in found}


def packed(folder: Path) -> Splits:
    """Recognise a folder of Parquet files or of WebDataset shards, with splits in the names of files or folders.

    The split "" has the files whose names say nothing.
    """
    files = _packed_files(folder, 0) or []
    parquet = [file for file in files if file.suffix.lower() == PARQUET]
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    chosen = parquet or (tars if tars and are_shards(tars[0]) else [])
    groups: dict[str, list[Path]] = {}
    for file in chosen:
        groups.setdefault(split_of_file(file.relative_to(folder)) or "", []).append(file)
    sets = {_set(file.relative_to(folder)) for file in chosen}
    if len(sets) > 1:
        raise InputError(f"{folder} has several data sets: {few(sorted(sets))}; give the folder of one")
    return {split: SplitFiles(files=tuple(group)) for split, group in groups.items()}


LAYOUTS: Sequence[Layout] = (places365, tiny_imagenet, annotated, packed)


def recognised(folder: Path) -> Splits:
    """Return the splits of a folder that has one of the layouts; nothing for others."""
    return next((splits for layout in LAYOUTS if (splits := layout(folder))), {})


def _there(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]


def _only(paths: Sequence[Path], folder: Path, split: str) -> Path:
    if len(paths) > 1:
        raise InputError(
            f"{folder} has several files or folders for the split {split}: {few([path.name for path in paths])}; give "
            "a list and its folder with --data, and those for validation with --val-data"
        )
    return paths[0]


def _packed_files(folder: Path, depth: int) -> list[Path] | None:
    """Return the tar and Parquet files in and below a folder; None as soon as there is an image."""
    entries = sorted(path for path in folder.iterdir() if not is_system_folder(path.name))
    if any(is_image(path.name) for path in entries):
        return None
    files = [path for path in entries if path.suffix.lower() in (PARQUET, ".tar") and path.is_file()]
    folders = [path for path in entries if path.is_dir() and not path.is_symlink()]
    if depth == DEEPEST or len(folders) > MOST_FOLDERS:
        return files
    for inner in folders:
        below = _packed_files(inner, depth + 1)
        if below is None:
            return None
        files += below
    return files


def _set(path: Path) -> str:
    """Return the folders around a file except those of splits, by which Hugging Face tells configurations apart."""
    return "/".join(name for name in path.parts[:-1] if not split_of(name))
