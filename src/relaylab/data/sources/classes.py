"""Class identities, and matching the classes of a data set with those of another data set or of a network.

Note [Classes]
1. A class is identified by its key: the folder name, the synset, the category in a list or, if a list has no names, the
   label. Keys are unique. Names are for display.
2. Two sets are matched by the first of these that covers all classes with images: the keys of both; the keys of one and
   the names of the other; the names of both. Names count only if they are unique.
3. A list without names has only numbers. It matches another list by label, and class folders by number if all folder
   names are numbers.
4. A list without names matches folders with other names by rank: label 3 is the fourth folder, as in ImageNet's lists.
   Nothing can confirm that, so the user gets a warning.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from relaylab.data.sources.listing import Listing, few, label_type, told_apart
from relaylab.data.sources.source import UNLABELLED, Source, Targets, images_by_class
from relaylab.data.sources.targets import zero_targets
from relaylab.errors import InputError


@dataclass(frozen=True)
class Classes:
    """The classes of a data set or of a network, in the order of their labels.

    Attributes:
        keys: unique; see Note [Classes] 1.
        names: display names.
        numbered: whether the labels come from a list, so that they mean the same in other lists of its kind.

    Raises:
        InputError: a key occurs twice, or there are not as many names as keys.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    numbered: bool = False

    def __post_init__(self) -> None:
        if len(set(self.keys)) < len(self.keys):
            repeated = sorted(key for key, count in Counter(self.keys).items() if count > 1)
            raise InputError(f"classes: {few(repeated)} more than once; give class folders or other unique keys")
        if len(self.names) != len(self.keys):
            raise InputError(f"{len(self.names)} class names for {len(self.keys)} classes")

    @classmethod
    def of(cls, names: Sequence[str]) -> "Classes":
        """Return classes that have only names; "class 0", "class 1", ... count as numbers."""
        names = tuple(names)
        if names == tuple(f"class {label}" for label in range(len(names))):
            return cls(tuple(map(str, range(len(names)))), names, numbered=True)
        return cls(names, names)

    @classmethod
    def stored(cls, names: Sequence[str], keys: Sequence[str] | None, *, numbered: bool) -> "Classes":
        """Return the classes stored in a file. Files of earlier versions have no keys, and may repeat names."""
        if keys is None and len(set(names)) < len(names):
            keys = [f"{name} (output {label})" for label, name in enumerate(names)]
        if keys is None:
            known = cls.of(names)
            return replace(known, numbered=known.numbered or numbered)
        return cls(tuple(keys), tuple(names), numbered)

    @property
    def has_only_numbers(self) -> bool:
        """Whether these are the classes of a list without names."""
        return self.numbered and all(key == str(label) for label, key in enumerate(self.keys))

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """The number of each class: its label in a list, else its folder name; None if not all of them are numbers."""
        if self.numbered:
            return tuple(range(len(self.keys)))
        if not all(key.isdecimal() and len(key) < 10 for key in self.keys):
            return None
        numbers = tuple(map(int, self.keys))
        return numbers if len(set(numbers)) == len(numbers) else None


def classes_of(source: Source) -> Classes:
    """Return the classes of a data set; a source without `identity` has only their names."""
    found = getattr(source, "identity", None)
    return found if isinstance(found, Classes) else Classes.of(source.classes)


def match(
    own: Classes, wanted: Classes, *, title: str, used: Iterable[int] | None = None
) -> tuple[tuple[int, ...], str]:
    """Match the classes of a data set with given classes. See Note [Classes].

    Args:
        own: classes of the data set.
        wanted: classes to match, in the order of the resulting labels.
        title: display name of the data set, for messages.
        used: labels that have images; None for all. Other classes need no match.

    Returns:
        The index in `wanted` of each class, or UNLABELLED; and a remark for the user, which may be empty.

    Raises:
        InputError: a class has no match. The message lists the classes of both sides.
    """
    needed = range(len(own.keys)) if used is None else sorted(set(used))
    if own.has_only_numbers or wanted.has_only_numbers:
        return _match_numbers(own, wanted, needed, title)
    for theirs, ours in (
        (own.keys, wanted.keys),
        (own.keys, wanted.names),
        (own.names, wanted.keys),
        (own.names, wanted.names),
    ):
        found = _places(theirs, ours, needed)
        if found is not None:
            return found, ""
    if told_apart(wanted.names, own.keys) == own.names:  # a file without keys in which two classes have the same name
        return tuple(range(len(own.keys))), ""
    known = set(wanted.keys)
    raise _unknown(own, wanted, [label for label in needed if own.keys[label] not in known], title)


def _places(theirs: Sequence[str], ours: Sequence[str], needed: Iterable[int]) -> tuple[int, ...] | None:
    """Return the index in `ours` of each text in `theirs`; None if a needed text is missing or not unique."""
    counts = dict.fromkeys((*theirs, *ours), 0)
    for text in ours:
        counts[text] += 1
    places = {text: place for place, text in enumerate(ours) if counts[text] == 1}
    chosen = [theirs[label] for label in needed]
    if len(set(chosen)) < len(chosen) or not set(chosen) <= places.keys():
        return None
    return tuple(places.get(text, UNLABELLED) for text in theirs)


def _match_numbers(own: Classes, wanted: Classes, needed: Sequence[int], title: str) -> tuple[tuple[int, ...], str]:
    """Match classes where one side has only numbers. See Note [Classes] 3 and 4."""
    theirs, ours, remark = own.numbers, wanted.numbers, ""
    if theirs is None:
        raise _unknown(own, wanted, needed, title)
    if ours is None and not any(key.isdecimal() for key in wanted.keys):
        ours = tuple(range(len(wanted.keys)))
        remark = (
            f"{title} has no class names: label 0 is taken to be {few(wanted.keys[:1])}, and so on in the order of the "
            "names; to confirm this, add a categories.txt with a line NAME LABEL per class to the list's folder"
        )
    places = {number: place for place, number in enumerate(ours or ())}
    strange = [label for label in needed if theirs[label] not in places]
    if strange or ours is None:
        raise _unknown(own, wanted, strange or needed, title)
    return tuple(places.get(number, UNLABELLED) for number in theirs), remark


def _unknown(own: Classes, wanted: Classes, labels: Sequence[int], title: str) -> InputError:
    """Return the error for classes without a match."""
    labels = labels or range(len(own.keys))
    strange, expected = [own.keys[label] for label in labels], list(wanted.keys)
    what = "labels" if own.has_only_numbers else "classes"
    return InputError(
        f"{title} has unexpected {what}: {few(strange)}; expected the {len(expected):,} classes "
        f"{few(expected)}{_advice(own, wanted, strange)}"
    )


def _advice(own: Classes, wanted: Classes, strange: Sequence[str]) -> str:
    """Return advice on classes without a match, to append to the error; it may be empty."""
    alike = look_alikes(strange, wanted.keys)
    if alike:
        return f"; {alike[0]}"
    # Repeated names are followed by their keys; see `told_apart`.
    plain = Counter(name.removesuffix(f" ({key})") for key, name in _pairs(wanted))
    ambiguous = [name for name in strange if plain[name] > 1]
    if ambiguous:
        return f"; several classes are called {few(ambiguous)}: name the folders by key"
    if wanted.keys == wanted.names and not own.has_only_numbers:
        names = "(classes.txt, synset_words.txt) next to the folders"
        return f"; if these are the same classes under other names, add the file with the names {names}"
    return ""


def relabelled(listing: Listing, wanted: Classes) -> Listing:
    """Relabel images by a given class order, such as the order of the training set.

    Raises:
        InputError: a class with images that is not among them.
    """
    own = Classes(listing.folders, listing.classes, listing.numbered)
    count = len(own.keys)
    used = np.flatnonzero(images_by_class(listing.labels if listing.targets is None else listing.targets, count))
    places, remark = match(own, wanted, title=listing.title, used=used.tolist())
    shown = {} if own.has_only_numbers else dict(zip(places, own.names, strict=True))
    names = (name if name != key else shown.get(place, name) for place, (key, name) in enumerate(_pairs(wanted)))
    return replace(
        listing,
        labels=np.array([*places, UNLABELLED])[listing.labels].astype(label_type(len(wanted.keys))),
        targets=None if listing.targets is None else moved(listing.targets, places, len(wanted.keys), listing.title),
        classes=tuple(names),
        folders=wanted.keys,
        numbered=wanted.numbered,
        remark=remark,
    )


def moved(targets: Targets, places: Sequence[int], count: int, title: str) -> Targets:
    """Move the columns of targets to their places among `count` classes; those without a place have no 1."""
    result = zero_targets(len(targets), count, title)
    kept = [label for label, place in enumerate(places) if place != UNLABELLED]
    result[:, [places[label] for label in kept]] = targets[:, kept]
    return result


def _pairs(classes: Classes) -> Iterable[tuple[str, str]]:
    return zip(classes.keys, classes.names, strict=True)


def look_alikes(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return a sentence for each name that differs from one of others in spelling only."""
    by_form: dict[str, str] = {}
    for other in others:
        by_form.setdefault(_plainest(other), other)
    pairs = [(name, by_form[_plainest(name)]) for name in names if _plainest(name) in by_form]
    return [
        f"{name!a} and {other!a} differ only in {_difference(name, other)}" for name, other in pairs if name != other
    ]


def _squeezed(name: str) -> str:
    """Remove formatting characters, and white space that is repeated, at the ends or of other widths."""
    return " ".join("".join(c for c in name if unicodedata.category(c) != "Cf").split())


def _composed(name: str) -> str:
    return unicodedata.normalize("NFKC", name)


SPELLINGS: dict[str, Callable[[str], str]] = {
    "white space": _squeezed,
    "Unicode form (NFC and NFD)": _composed,
    "case": str.casefold,
}


def _plainest(name: str) -> str:
    return _composed(_composed(_squeezed(name)).casefold())


def _difference(one: str, other: str) -> str:
    single = (what for what, change in SPELLINGS.items() if change(one) == change(other))
    return next(single, "case, Unicode form and white space")
