"""Listings of formats that store each image's label as a value: an integer, a name, or several of them.

Note [Values]
1. Integers are labels. The keys of the classes are their names if these are known, otherwise the integers.
2. Text is the key of a class. Classes are in the order of the given names if these include all keys, else in numerical
   or alphabetical order.
3. If any image has several labels, or an empty list of labels, the whole set has `targets`.
4. None and -1 mean that an image has no label. Either all images have a label, or none has (a test set).
"""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from relaylab.data.sources.class_names import names_beside
from relaylab.data.sources.listing import Listing, Place, Rows, few
from relaylab.data.sources.source import UNLABELLED
from relaylab.data.sources.targets import targets_from
from relaylab.errors import InputError

LARGEST_LABEL = 999_999
LONGEST_NUMBER = 30  # digits; Python rejects integers of thousands of digits
Value = int | str | tuple[int, ...] | tuple[str, ...] | None


class Values:
    """The label of each image, in the order in which the images are added to `Rows`."""

    def __init__(self) -> None:
        self._different: dict[Value, int] = {}
        self._of = array("i")

    def add(self, value: Value) -> None:
        """Add the label of the next image."""
        self._of.append(self._different.setdefault(None if value == UNLABELLED else value, len(self._different)))

    def listing(
        self, rows: Rows, title: str, places: Sequence[Place], *, names: Sequence[str] = (), named: Iterable[Path] = ()
    ) -> Listing:
        """Return the listing of the images in `rows`. See Note [Values].

        Args:
            rows: the images, in the same order as the values.
            title: display name.
            places: folders or files that hold the images.
            names: class names in the order of the labels; empty if they are not known.
            named: files with display names by key, such as those of synsets.

        Raises:
            InputError: no images, only some images have a label, or a label is out of range.
        """
        values, value_of = list(self._different), np.frombuffer(self._of, np.int32)
        if not rows.found:
            raise InputError(f"no images in {title}")
        if None in self._different:
            return self._unlabelled(rows, title, places, names)
        several = any(isinstance(value, tuple) for value in values)
        labels = [value if isinstance(value, tuple) else (value,) for value in values]
        are_numbers = all(isinstance(label, int) for value in labels for label in value)
        keys = _number_keys(labels, names, title) if are_numbers else _text_keys(labels, names)
        index_of = {key: index for index, key in enumerate(keys)}
        indices = [[label if isinstance(label, int) else index_of[f"{label}"] for label in value] for value in labels]
        shown = names_beside(named, keys, rows.file_states)
        default = (name or f"class {key}" for name, key in zip(names or [""] * len(keys), keys, strict=True))
        classes = tuple(shown.get(key, name) for key, name in zip(keys, default if are_numbers else keys, strict=True))
        is_single = not several or all(len(value) == 1 for value in indices)
        single = np.array([value[0] if is_single else UNLABELLED for value in indices])[value_of]
        listing = rows.listed(title, classes, keys, places, single, numbered=are_numbers)
        if is_single:
            return listing
        return replace(listing, targets=targets_from(indices, value_of, len(keys), title))

    def _unlabelled(self, rows: Rows, title: str, places: Sequence[Place], names: Sequence[str]) -> Listing:
        without = np.flatnonzero(np.frombuffer(self._of, np.int32) == self._different[None]).tolist()
        if len(without) < rows.found:
            raise InputError(
                f"{title}: {len(without):,} of {rows.found:,} images have no label, such as "
                f"{few([rows.name(index).decode(errors='backslashreplace') for index in without[:1]])}"
            )
        labels = np.full(rows.found, UNLABELLED)
        return rows.listed(title, tuple(names), unique_keys(names), places, labels, numbered=bool(names))


def _number_keys(labels: Sequence[tuple[object, ...]], names: Sequence[str], title: str) -> tuple[str, ...]:
    used = {label for value in labels for label in value if isinstance(label, int)}
    most = len(names) - 1 if names else LARGEST_LABEL
    if min(used, default=0) < 0 or max(used, default=0) > most:
        wrong = next(label for label in sorted(used) if not 0 <= label <= most)
        raise InputError(f"{title} has the label {wrong}; expected 0 .. {most}")
    return unique_keys(names) if names else tuple(map(str, range(max(used, default=0) + 1)))


def _text_keys(labels: Sequence[tuple[object, ...]], names: Sequence[str]) -> tuple[str, ...]:
    keys = {f"{label}" for value in labels for label in value}
    return tuple(names) if keys <= set(names) and len(set(names)) == len(names) else in_order(keys)


def in_order(keys: Collection[str]) -> tuple[str, ...]:
    """Sort keys numerically if all are numbers of a common length, otherwise alphabetically."""
    are_numbers = all(key.isdecimal() and len(key) <= LONGEST_NUMBER for key in keys)
    return tuple(sorted(keys, key=int) if are_numbers else sorted(keys))


def unique_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of numbered classes: the name of each class, or its label if its name is not unique.

    If a name equals the label of another class, the keys are the labels of all classes.
    """
    counts = Counter(names)
    keys = tuple(name if counts[name] == 1 else str(label) for label, name in enumerate(names))
    return keys if len(set(keys)) == len(keys) else tuple(map(str, range(len(names))))
