"""Folder trees: ROOT/CLASS/**/IMAGE or ROOT/{train,val,test}/CLASS/**/IMAGE, read as torchvision's ImageFolder does."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from relaylab.data.sources.class_names import names_beside
from relaylab.data.sources.file_states import file_state
from relaylab.data.sources.hints import no_images
from relaylab.data.sources.listing import (
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
from relaylab.data.sources.splits import by_split, note_on, only_one
from relaylab.errors import InputError


def list_trees(
    roots: Sequence[Path], title: str, split: str | None, named: Iterable[Path], watch: Watch, *, flat: bool = False
) -> Listing:
    """List the images of resolved folder trees. The classes are the class folders of all trees, in train and val.

    Files in `named` give the display names of classes. With `flat`, images are directly in the folders, without
    classes.

    Raises:
        InputError: a tree has no images or an unsupported structure, cannot be read, or has a link that leads out of
            it.
    """
    rows, keys = Rows(), set[str]()
    walks: list[tuple[int, Path, Path, str | None]] = []
    for place, root in enumerate(roots):
        base, classes, siblings = _shape(root, split, rows, flat)
        keys.update(classes, siblings)
        walks += [(place, root, base, name) for name in classes or [None]]
    with watch("listing folders", len(walks)) as task:
        for place, root, base, name in walks:
            prefix = "" if base == root else f"{base.name}/"
            start = base if name is None else base / name
            label = UNLABELLED if name is None else rows.key(name)
            for folder, files in _walk(str(start), str(root), rows, deep=name is not None):
                inside = folder[len(str(base)) + 1 :]
                inside = f"{prefix}{inside}/" if inside else prefix
                for file in files:
                    rows.add(os.fsencode(inside + file), label, place)
            task.advance(note=f"{rows.found:,} images")
    if not rows.found:
        raise InputError(no_images(title, roots))
    shown = names_beside(named, keys, rows.file_states)
    return rows.listing(title, keys, shown, [Place(str(root), str(root)) for root in roots])


def _shape(root: Path, split: str | None, rows: Rows, flat: bool) -> tuple[Path, list[str], set[str]]:
    """Return the folder that holds the class folders, the classes, and the classes of the other splits."""
    tops, images = _scan(str(root), str(root), rows, count=False)
    if flat:
        return root, [], set()
    splits = by_split(tops)
    if split is None:
        below = [name for names in splits.values() for name in names if _has_folders(root / name, root, rows)]
        if below:
            raise SplitNeededError(root, list(splits))
        if images and not tops:
            raise InputError(f"{root} has images but no class folders: expected CLASS/IMAGE, or --split test")
        rows.ignore(*images)  # next to class folders, so without a class
        return root, tops, set()
    if split not in splits:
        if split == "test" and images and not tops:
            return root, [], set()
        found = f"only {', '.join(splits)}" if splits else "nor any other split"
        message = f"{root} has no {split} folder, {found}: expected {split}/CLASS/IMAGE"
        raise NoSplitError(message, others=list(splits))
    base = root / only_one(splits[split], split, root)
    rows.notes += note_on(base.name, split)
    classes, images = _scan(str(base), str(root), rows, count=False)
    if images and not classes and split != "test":
        raise InputError(f"{base} has images but no class folders: expected {base.name}/CLASS/IMAGE")
    rows.ignore(*(images if classes else ()))
    others = [name for other in ("train", "val") if other != split and classes for name in splits.get(other, ())]
    # Labels agree between splits, even if a class has images in only one of them.
    siblings = {name for other in others for name in _scan(str(root / other), str(root), rows, count=False)[0]}
    return base, classes, siblings


def _has_folders(folder: Path, root: Path, rows: Rows) -> bool:
    return bool(_scan(str(folder), str(root), rows, count=False)[0])


def _walk(start: str, root: str, rows: Rows, *, deep: bool) -> list[tuple[str, list[str]]]:
    """Return `start` and the folders below it with the names of their images, all sorted."""
    visited: list[tuple[str, list[str]]] = []
    waiting: list[tuple[str, tuple[str, ...]]] = [(start, (os.path.realpath(start),))]
    while waiting:
        folder, trail = waiting.pop()
        folders, images = _scan(folder, root, rows)
        visited.append((folder, images))
        for name in folders if deep else ():
            path = f"{folder}/{name}"
            if Path(path).is_symlink():
                real = os.path.realpath(path)
                if any(f"{parent}/".startswith(f"{real}/") for parent in (*trail, os.path.realpath(folder))):
                    raise InputError(f"the link {printable(path)} leads back to a folder that contains it; remove it")
                waiting.append((path, (*trail, real)))
            else:
                waiting.append((path, trail))
    return sorted(visited)


def _scan(folder: str, root: str, rows: Rows, *, count: bool = True) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the images in a folder, sorted; other files are counted."""
    folders: list[str] = []
    images: list[str] = []
    try:
        state = file_state(folder)  # before the scan: a change during the scan then makes the index outdated
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                image = is_image(name)
                if entry.is_symlink() and (image or entry.is_dir()):
                    refuse_to_leave(entry.path, root)
                if entry.is_dir():
                    if is_system_folder(name):
                        rows.skip(entry.path)
                    else:
                        folders.append(name)
                elif image and entry.is_file():
                    images.append(name)
                elif count:
                    rows.ignore(name)
    except OSError as error:
        raise InputError(f"cannot read the folder {printable(folder)}: {error.strerror}") from None
    rows.file_states.append(state)
    folders.sort()
    images.sort()
    return folders, images


def refuse_to_leave(link: str, root: str) -> None:
    """Raise InputError if a symbolic link is broken or leads out of the resolved folder `root`."""
    real = os.path.realpath(link)
    if not f"{real}/".startswith(f"{root.rstrip('/')}/"):
        raise InputError(f"the link {printable(link)} leads out of {root}: replace it by its target, or remove it")
    if not Path(real).exists():
        raise InputError(f"the link {printable(link)} is broken: its target does not exist; remove it")
