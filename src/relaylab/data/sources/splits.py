"""Splits under other spellings, and files of splits: `Validation/`, `val_256/`, `train-00000-of-00004.parquet`.

Note [Splits]
1. The name of a folder is a split's if it is one of `WORDS`, in any case, with at most a number or one of `ADDITIONS`
   behind it. `train_station` remains a class.
2. Two folders of one split are an error; which of them is meant is not guessed.
3. The name of a shard has the word anywhere, between separators: `imagenet-train-0003.tar`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TypeVar

from relaylab.data.sources.listing import SPLITS, NoSplitError, SplitNeededError, few
from relaylab.errors import InputError

WORDS = {"train": "train training", "val": "val valid validation dev", "test": "test testing"}
ADDITIONS = "large small mini full standard challenge images imgs img data set split"
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words.split()}
T = TypeVar("T")
_WORD = "|".join(sorted(SPLIT_OF, key=len, reverse=True))
_FOLDER = re.compile(rf"({_WORD})(?:[-_ .]?(?:\d{{1,9}}(?:x\d{{1,9}})?|{ADDITIONS.replace(' ', '|')}))?", re.IGNORECASE)


def split_of(folder: str) -> str | None:
    """Return the split that a folder's name means, one of `SPLITS`; None for other folders. See Note [Splits]."""
    match = _FOLDER.fullmatch(folder)
    return SPLIT_OF[match[1].lower()] if match else None


def split_of_file(path: PurePath | str) -> str | None:
    """Return the split that the name of a file or, from the innermost one, of a folder around it means."""
    path = PurePath(path)
    words = (word for word in re.split(r"[-_. ]", path.name.lower()) if word in SPLIT_OF)
    inner_first = (split_of(folder) for folder in reversed(path.parts[:-1]))
    return next((SPLIT_OF[word] for word in words), None) or next(filter(None, inner_first), None)


def by_split(folders: Iterable[str]) -> dict[str, list[str]]:
    """Group folders by their splits, in the order of `SPLITS`; other folders are left out."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        if split := split_of(folder):
            found.setdefault(split, []).append(folder)
    return {split: sorted(found[split]) for split in SPLITS if split in found}


def only_one(folders: Sequence[str], split: str, title: object) -> str:
    """Return the only folder of a split; raises InputError for several. See Note [Splits] 2."""
    if len(folders) > 1:
        raise InputError(
            f"{title} has several folders that may be the split {split}: {few(folders)}; rename all but one, or give "
            "the training folder with --data and the other with --val-data"
        )
    return folders[0]


def note_on(folder: str, split: str) -> list[str]:
    """Return a note for the user on a folder that is not called like its split."""
    return [] if folder == split else [f"the split {split} is the folder {folder}"]


def chosen(splits: Mapping[str, T], split: str | None, title: object) -> T:
    """Return the entry of one split. `split` may be None if there is only one.

    Args:
        splits: entries by split; "" has the files whose names do not give a split.
        split: one of `SPLITS`, or None.
        title: of the data set, for messages.

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
