"""Submission files of challenges: five labels for each test image, in the official order.

Note [Formats]
1. ILSVRC's classification task: a line for each test image, in the order of their names; labels from 1 to 1000, as the
   development kits of 2012 to 2015 say it (that of localisation has boxes between the labels). A kit numbers the
   synsets in an order of its own, which is not that of the sorted synsets.
2. The development kits of Places365's challenge and of MiniPlaces: the image's name as it is listed, then exactly five
   labels, from 0. The format of 2015's 401 classes, the paper's, refers to a kit that we have not seen; it is assumed
   to be the same.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from relaylab.data.sources.class_names import synset_numbers
from relaylab.data.sources.classes import Classes
from relaylab.data.sources.listing import few
from relaylab.errors import InputError
from relaylab.outside.reading import LARGEST, read_bytes

LABELS, NAMED = 5, 5


@dataclass(frozen=True)
class Form:
    """The format of a line: the index of the first class, and whether the image's name comes first."""

    first_label: int
    with_names: bool


FORMATS = {"ilsvrc": Form(first_label=1, with_names=False), "places2": Form(first_label=0, with_names=True)}


def read_test_list(path: Path) -> list[str]:
    """Read the test images in the official order, one on each line; text after the name is ignored.

    Raises:
        InputError: it cannot be read, is empty, or names an image twice.
    """
    try:
        lines = read_bytes(path, LARGEST).decode().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = next(iter(line.split()), None)
        if name is not None and names.setdefault(name, number) != number:
            raise InputError(f"{path}, line {number}: {name} was on line {names[name]} already")
    if not names:
        raise InputError(f"{path} is empty: expected the name of a test image on each line")
    return list(names)


def official_labels(classes: Classes, form: Form, kit: Mapping[str, int] | None = None) -> list[int]:
    """Return the challenge's label of each class: by the kit's numbers, or in the order of numbers that classes have.

    Args:
        classes: of the scores.
        form: the format.
        kit: the number of each class by key; see `read_kit`.

    Raises:
        InputError: classes that the kit does not have, or synsets without a kit.
    """
    if kit is not None:
        strange = [key for key in classes.keys if key not in kit]
        if strange:
            raise InputError(f"the kit has no classes {few(strange)}; it has {few(sorted(kit))}")
        return [kit[key] for key in classes.keys]
    if form.first_label == 1 and all(re.fullmatch(r"n\d{8}", key) for key in classes.keys):
        raise InputError(
            "--format ilsvrc: the challenge numbers synsets in an order of its own: give the development kit's "
            "meta.mat or map_clsloc.txt with --kit"
        )
    numbers = classes.numbers or range(len(classes.keys))
    rank = {number: place for place, number in enumerate(sorted(numbers))}
    return [form.first_label + rank[number] for number in numbers]


def read_kit(path: Path) -> dict[str, int]:
    """Read the number of each synset from a development kit's meta.mat, or map_clsloc.txt with SYNSET NUMBER lines.

    Raises:
        InputError: another kind of file.
    """
    if path.suffix == ".mat":
        return {synset: number for number, synset in synset_numbers(path)[0].items()}
    try:
        text = read_bytes(path, LARGEST).decode(errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or not all(
        len(line) > 1 and line[1].isascii() and line[1].isdecimal() and len(line[1]) < 10 for line in lines
    ):
        raise InputError(f"{path}: expected a line SYNSET NUMBER for each class, as map_clsloc.txt has, or meta.mat")
    return {line[0]: int(line[1]) for line in lines}


def submission_lines(
    names: Sequence[str],
    scores: Tensor,
    expected: Sequence[str],
    form: Form,
    labels: Sequence[int] | None = None,
) -> list[str]:
    """Format the scores of named images, (images, classes), as a submission for the expected images in their order.

    `labels` are those of the classes; see `official_labels`. None numbers the classes in their order.

    Raises:
        InputError: missing, extra or repeated images; scores that are not numbers or of fewer than five classes.
    """
    if scores.shape[1] < LABELS:
        raise InputError(f"scores of {scores.shape[1]} classes: a submission needs five labels for each image")
    bad = scores.isnan().any(dim=1).nonzero().flatten()
    if len(bad):
        raise InputError(f"the scores of {len(bad)} images are not numbers, the first of {names[int(bad[0])]}")
    rows, wanted = {name: row for row, name in enumerate(names)}, list(expected)
    if not any(name in rows for name in wanted):  # the list has other folders, or none
        rows, wanted = _by_name(names), [PurePosixPath(name).name for name in expected]
    repeated = [name for name, count in Counter(wanted).items() if count > 1]
    missing, extra = [name for name in wanted if name not in rows], [*(rows.keys() - set(wanted))]
    problems = [
        f"{len(found)} images {what}: {', '.join(sorted(found)[:NAMED])}{' ...' if len(found) > NAMED else ''}"
        for what, found in [
            ("of the list have no scores", missing),
            ("have scores and are not in the list", extra),
            ("of the list have the same name in several folders", repeated),
        ]
        if found
    ]
    if problems:
        raise InputError("; ".join(problems))
    chosen = range(form.first_label, form.first_label + scores.shape[1]) if labels is None else labels
    best: list[list[int]] = torch.tensor(list(chosen))[scores.topk(LABELS, dim=1).indices].tolist()
    lines: list[str] = []
    for name, short in zip(expected, wanted, strict=True):
        text = " ".join(map(str, best[rows[short]]))
        lines.append(f"{name} {text}" if form.with_names else text)
    return lines


def check_submission(lines: Sequence[str], expected: Sequence[str], num_classes: int, form: Form) -> None:
    """Check a submission as the challenge's server would.

    Raises:
        InputError: a wrong number of lines, a wrong image, or labels that are too few, repeated or out of range.
    """
    if len(lines) != len(expected):
        raise InputError(f"{len(lines)} lines for {len(expected)} test images")
    allowed = range(form.first_label, form.first_label + num_classes)
    for number, (line, name) in enumerate(zip(lines, expected, strict=True), 1):
        parts = line.split()
        labels = parts[1:] if form.with_names else parts
        if form.with_names and parts[:1] != [name]:
            raise InputError(f"line {number} is about {parts[0] if parts else 'nothing'}: expected {name}")
        if len(labels) != LABELS or len({*labels}) != LABELS:
            raise InputError(f"line {number}: {' '.join(labels)!r}: expected five different labels")
        if not all(label.isdecimal() and int(label) in allowed for label in labels):
            raise InputError(f"line {number}: {' '.join(labels)!r}: expected labels from {allowed[0]} to {allowed[-1]}")


def _by_name(names: Sequence[str]) -> dict[str, int]:
    """The rows by image name, without folders."""
    rows: dict[str, int] = {}
    for number, name in enumerate(names):
        short = PurePosixPath(name).name
        if short in rows:
            raise InputError(f"two images are called {short}: {names[rows[short]]} and {name}")
        rows[short] = number
    return rows
