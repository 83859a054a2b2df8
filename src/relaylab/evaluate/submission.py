"""Submission files of challenges: five labels for each test image, in the official order.

Note [Formats]
1. ILSVRC's classification task: a line for each test image, in the order of their names; labels from 1 to 1000, as the
   development kits of 2012 to 2015 say it (that of localisation has boxes between the labels).
2. The development kits of Places365's challenge and of MiniPlaces: the image's name as it is listed, then exactly five
   labels, from 0. The format of 2015's 401 classes, the paper's, refers to a kit that we have not seen; it is assumed
   to be the same.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from torch import Tensor

from relaylab.errors import InputError

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
        lines = path.read_text(encoding="utf-8").splitlines()
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


def submission_lines(names: Sequence[str], scores: Tensor, expected: Sequence[str], form: Form) -> list[str]:
    """Format the scores of named images, (images, classes), as a submission for the expected images in their order.

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
    best: list[list[int]] = (scores.topk(LABELS, dim=1).indices + form.first_label).tolist()
    lines: list[str] = []
    for name, short in zip(expected, wanted, strict=True):
        labels = " ".join(map(str, best[rows[short]]))
        lines.append(f"{name} {labels}" if form.with_names else labels)
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
