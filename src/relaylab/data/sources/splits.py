"""Recognise splits by the names of folders and files: `Validation/`, `val_256/`, `train-00000-of-00004.parquet`.

Note [Splits]
1. A folder is a split's if its name is one of `WORDS`, in any case, optionally followed by a number or by one of
   `ADDITIONS`. `train_station` is a class.
2. Two folders for one split raise an error: the program does not choose between them.
3. In the name of a shard the word may be anywhere between separators: `imagenet-train-0003.tar`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypeVar, overload

from relaylab.data.sources.listing import SPLITS, NoSplitError, SplitNeededError, few
from relaylab.errors import InputError

WORDS = {"train": "train training", "val": "val valid validation dev", "test": "test testing"}
ADDITIONS = "large small mini full standard challenge images imgs img data set split"
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words.split()}
T = TypeVar("T")
_WORD = "|".join(sorted(SPLIT_OF, key=len, reverse=True))
_FOLDER = re.compile(rf"({_WORD})(?:[-_ .]?(?:\d{{1,9}}(?:x\d{{1,9}})?|{ADDITIONS.replace(' ', '|')}))?", re.IGNORECASE)


def split_of(folder: str) -> str | None:
    """Return the split that a folder's name stands for, one of `SPLITS`, or None. See Note [Splits]."""
    match = _FOLDER.fullmatch(folder)
    return SPLIT_OF[match[1].lower()] if match else None


def split_of_file(path: PurePath | str) -> str | None:
    """Return the split in a file's name, else in the name of its innermost parent folder that has one, else None."""
    path = PurePath(path)
    words = (word for word in re.split(r"[-_. ]", path.name.lower()) if word in SPLIT_OF)
    inner_first = (split_of(folder) for folder in reversed(path.parts[:-1]))
    return next((SPLIT_OF[word] for word in words), None) or next(filter(None, inner_first), None)


def by_split(folders: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of folders by split, in the order of `SPLITS`. Other folders are left out."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        if split := split_of(folder):
            found.setdefault(split, []).append(folder)
    return {split: sorted(found[split]) for split in SPLITS if split in found}


@overload
def only_one(candidates: Sequence[str], split: str, title: object) -> str: ...
@overload
def only_one(candidates: Sequence[Path], split: str, title: object) -> Path: ...
def only_one(candidates: Sequence[str] | Sequence[Path], split: str, title: object) -> str | Path:
    """Return the only file or folder of a split; raise InputError if there are several. See Note [Splits] 2."""
    if len(candidates) > 1:
        names = [PurePath(candidate).name for candidate in candidates]
        raise InputError(
            f"{title} has several files or folders for the split {split}: {few(names)}; keep one of them, or give the "
            "right ones with --data (training) and --val-data (validation), a list together with its folder"
        )
    return candidates[0]


def note_on(folder: str, split: str) -> list[str]:
    """Return a note for the user if a folder's name differs from the name of its split, else no notes."""
    return [] if folder == split else [f"the split {split} is the folder {folder}"]


def chosen(splits: Mapping[str, T], split: str | None, title: object) -> T:
    """Return the entry of one split. `split` may be None if there is only one.

    Args:
        splits: entries by split; "" has the files whose names do not give a split.
        split: one of `SPLITS`, or None.
        title: title of the data set, for messages.

    Raises:
        SplitNeededError: there are several splits and `split` is None.
        NoSplitError: there is no such split.
    """
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    named = [name for name in SPLITS if name in splits]
    if split is None:
        raise SplitNeededError(title, named)
    if split not in splits:
        found = f"only {', '.join(named)}" if named else "nor any other split"
        raise NoSplitError(f"{title} has no images of the split {split}, {found}", others=named)
    return splits[split]
