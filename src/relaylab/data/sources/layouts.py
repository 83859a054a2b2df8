"""Recognise data sets in their authors' layout by the files in their folder, and folders of shards.

Note [Layouts]
1. A layout is a function that takes a folder and returns its splits, or an empty mapping if it does not recognise the
   folder. The first layout in `LAYOUTS` that recognises the folder is used.
2. If a split has several candidate files or folders, the error lists them and the options to choose one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from relaylab.data.sources.coco import is_coco
from relaylab.data.sources.listing import few, is_image, is_system_folder
from relaylab.data.sources.shards import are_shards
from relaylab.data.sources.splits import only_one, split_of, split_of_file
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
ANNOTATIONS = ("", "annotations")  # folders that hold COCO's files
MOST_FOLDERS, DEEPEST = 20, 3  # that are searched for shards


@dataclass(frozen=True, kw_only=True)
class SplitFiles:
    """The files of one split: a list with its folder, a tree, or shards.

    Attributes:
        files: the list, Parquet files or tar files; empty for a tree.
        folder: the tree's root, or the folder that the list's names are relative to.
        categories: file with the class names of the list.
        flat: whether the images of the tree are not in class folders.
    """

    files: tuple[Path, ...] = ()
    folder: Path | None = None
    categories: Path | None = None
    flat: bool = False


Splits = Mapping[str, SplitFiles | Callable[[], SplitFiles]]
Layout = Callable[[Path], Splits]


def places365(folder: Path) -> Splits:
    """Recognise Places365: lists next to data_large_standard/, val_large/ and similar folders."""
    lists = {split: _existing(folder, names) for split, names in PLACES_LISTS.items()}
    categories = folder / PLACES_CATEGORIES

    def files_of(split: str) -> SplitFiles:
        path = only_one(lists[split], split, folder)
        roots = _existing(folder, PLACES_FOLDERS[split])
        if not roots:
            raise InputError(
                f"{folder} has {path.name} but none of the folders {', '.join(PLACES_FOLDERS[split])}; "
                "pass the list and its image folder"
            )
        root = only_one(roots, split, folder)
        return SplitFiles(files=(path,), folder=root, categories=categories if categories.is_file() else None)

    return {split: lambda split=split: files_of(split) for split, existing in lists.items() if existing}


def tiny_imagenet(folder: Path) -> Splits:
    """Recognise Tiny ImageNet, whose validation images are in one folder with a list."""
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
    """Recognise one COCO JSON file per split, as in iNaturalist: train2017.json, train_mini.json and so on."""
    annotations: dict[str, list[Path]] = {}
    for file in (file for place in ANNOTATIONS for file in sorted((folder / place).glob("*.json"))):
        split = split_of(file.stem.removeprefix("instances_"))
        if split and is_coco(file):
            annotations.setdefault(split, []).append(file)

    def files_of(split: str) -> SplitFiles:
        files = annotations[split]
        present = [file for file in files if (folder / file.stem.removeprefix("instances_")).is_dir()]
        return SplitFiles(files=(only_one(present or files, split, folder),), folder=folder)

    return {split: lambda split=split: files_of(split) for split in annotations}


def packed(folder: Path) -> Splits:
    """Recognise a folder of Parquet files or WebDataset shards whose file or folder names give the split.

    Files without a split in their name are under "".
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
        raise InputError(f"{folder} contains several data sets: {few(sorted(sets))}; pass the folder of one of them")
    return {split: SplitFiles(files=tuple(group)) for split, group in groups.items()}


LAYOUTS: Sequence[Layout] = (places365, tiny_imagenet, annotated, packed)


def recognised(folder: Path) -> Splits:
    """Return the splits of a folder in one of the `LAYOUTS`; an empty mapping for any other folder."""
    return next((splits for layout in LAYOUTS if (splits := layout(folder))), {})


def _existing(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]


def _packed_files(folder: Path, depth: int) -> list[Path] | None:
    """Return the tar and Parquet files in and below a folder, or None if it also holds images."""
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
    """Return a file's parent folders without those of splits: Hugging Face's name for a configuration."""
    return "/".join(name for name in path.parts[:-1] if not split_of(name))
