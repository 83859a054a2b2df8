"""Submission files for challenges: five labels for each test image, in the official order.

Note [Formats]
1. ILSVRC classification: one line per test image, sorted by name; labels from 1 to 1000, according to the development
   kits of 2012 to 2015 (localisation has boxes between the labels). The kits number the synsets in their own order,
   which is not the sorted order.
2. Places365 challenge and MiniPlaces, according to their development kits: the name of the image as listed, then
   exactly five labels, from 0. The kit of the 2015 challenge with 401 classes, which the paper uses, was not available;
   its format is assumed to be the same.
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
    """The format of a line: the label of the first class, and whether the line starts with the image name."""

    first_label: int
    with_names: bool


FORMATS = {"ilsvrc": Form(first_label=1, with_names=False), "places2": Form(first_label=0, with_names=True)}


def read_test_list(path: Path) -> list[str]:
    """Read the test images in the official order, one per line; text after the name is ignored.

    Raises:
        InputError: the file cannot be read, is empty, or lists an image twice.
    """
    try:
        lines = read_bytes(path, LARGEST).decode().splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        name = next(iter(line.split()), None)
        if name is not None and names.setdefault(name, number) != number:
            raise InputError(f"{path}, line {number}: {name} is already on line {names[name]}")
    if not names:
        raise InputError(f"{path} is empty: expected one test image per line")
    return list(names)


def official_labels(classes: Classes, form: Form, kit: Mapping[str, int] | None = None) -> list[int]:
    """Return the challenge's label of each class: from the development kit, or by the rank of the class numbers.

    Args:
        classes: classes of the scores.
        form: the format.
        kit: label of each class by key; see `read_kit`.

    Raises:
        InputError: classes missing from the kit, or synsets without a kit.
    """
    if kit is not None:
        strange = [key for key in classes.keys if key not in kit]
        if strange:
            raise InputError(f"the development kit lacks the classes {few(strange)}; it contains {few(sorted(kit))}")
        return [kit[key] for key in classes.keys]
    if form.first_label == 1 and all(re.fullmatch(r"n\d{8}", key) for key in classes.keys):
        raise InputError(
            "--format ilsvrc requires the development kit's meta.mat or map_clsloc.txt, which define the labels of "
            "the synsets: give it with --kit"
        )
    numbers = classes.numbers or range(len(classes.keys))
    rank = {number: index for index, number in enumerate(sorted(numbers))}
    return [form.first_label + rank[number] for number in numbers]


def read_kit(path: Path) -> dict[str, int]:
    """Read the label of each synset from a development kit's meta.mat, or map_clsloc.txt with SYNSET NUMBER lines.

    Raises:
        InputError: the file has a different format.
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
        raise InputError(f"{path}: expected meta.mat, or SYNSET NUMBER lines as in map_clsloc.txt")
    return {line[0]: int(line[1]) for line in lines}


def submission_lines(
    names: Sequence[str],
    scores: Tensor,
    expected: Sequence[str],
    form: Form,
    labels: Sequence[int] | None = None,
) -> list[str]:
    """Format class scores as the lines of a submission.

    Args:
        names: names of the images.
        scores: (images, classes).
        expected: names of the test images, in the official order.
        form: the format.
        labels: label of each class, see `official_labels`; None to number the classes in order.

    Raises:
        InputError: missing, extra or repeated images; NaN scores, or fewer than five classes.
    """
    if scores.shape[1] < LABELS:
        raise InputError(f"a submission needs five labels per image, but there are only {scores.shape[1]} classes")
    bad = scores.isnan().any(dim=1).nonzero().flatten()
    if len(bad):
        raise InputError(f"the scores of {len(bad)} images are NaN, first of {names[int(bad[0])]}")
    rows, wanted = {name: row for row, name in enumerate(names)}, list(expected)
    if not any(name in rows for name in wanted):  # the list has different folders, or none
        rows, wanted = _by_name(names), [PurePosixPath(name).name for name in expected]
    repeated = [name for name, count in Counter(wanted).items() if count > 1]
    missing, extra = [name for name in wanted if name not in rows], [*(rows.keys() - set(wanted))]
    problems = [
        f"{len(images)} images {problem}: {', '.join(sorted(images)[:NAMED])}{' ...' if len(images) > NAMED else ''}"
        for problem, images in [
            ("of the list have no scores", missing),
            ("have scores and are not in the list", extra),
            ("of the list have the same name in several folders", repeated),
        ]
        if images
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
        InputError: a wrong number of lines, a wrong image, or missing, repeated or out-of-range labels.
    """
    if len(lines) != len(expected):
        raise InputError(f"{len(lines)} lines for {len(expected)} test images")
    allowed = range(form.first_label, form.first_label + num_classes)
    for number, (line, name) in enumerate(zip(lines, expected, strict=True), 1):
        parts = line.split()
        labels = parts[1:] if form.with_names else parts
        if form.with_names and parts[:1] != [name]:
            raise InputError(f"line {number} starts with {parts[0] if parts else 'nothing'}: expected {name}")
        if len(labels) != LABELS or len({*labels}) != LABELS:
            raise InputError(f"line {number}: {' '.join(labels)!r}: expected five different labels")
        if not all(label.isdecimal() and len(label) < 10 and int(label) in allowed for label in labels):
            raise InputError(f"line {number}: {' '.join(labels)!r}: expected labels from {allowed[0]} to {allowed[-1]}")


def _by_name(names: Sequence[str]) -> dict[str, int]:
    """Return the row of each image by name, without folders."""
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        short = PurePosixPath(name).name
        if short in rows:
            raise InputError(f"two images have the name {short}: {names[rows[short]]} and {name}")
        rows[short] = row
    return rows
