"""Comparisons: runs that differ in scheme, seed and rate only, opened from their folders, and those that failed."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relaylab.errors import InputError
from relaylab.evaluate.trained import describe_run
from relaylab.recipes.schema import SCHEMES, Recipe
from relaylab.report.style import SCHEME_NAMES
from relaylab.train import runs
from relaylab.train.failures import FILE, Failure, read_failure
from relaylab.train.records import metrics_of

RATE = "optimizer.lr"  # which may have been chosen for each scheme
Member = tuple[str, int]
"""A scheme and a seed."""


@dataclass(frozen=True)
class Run:
    """A run that the page is about.

    Attributes:
        folder: of it.
        recipe: what it trains.
        about: options and values as its folder records them.
        classes: their names.
        counts: images of each class, by part; empty for runs of earlier versions.
        metrics: its lines.
        starts: where and with what it was started.
        last: the validation that the page reports: the last one that all runs have.
    """

    folder: Path
    recipe: Recipe
    about: Mapping[str, Any]
    classes: tuple[str, ...]
    counts: Mapping[str, Sequence[int]]
    metrics: Sequence[Mapping[str, Any]]
    starts: Sequence[Mapping[str, Any]]
    last: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Runs that are alike except for scheme, seed and the schemes' learning rates.

    Attributes:
        runs: those with a result, sorted by scheme and seed.
        failures: the others, in the same order.
    """

    runs: Sequence[Run]
    failures: Mapping[Member, Failure] = field(default_factory=dict[Member, Failure])

    @property
    def by_scheme(self) -> dict[str, list[Run]]:
        """The runs with a result of each scheme that has any."""
        found = {scheme: [run for run in self.runs if run.recipe.scheme == scheme] for scheme in SCHEMES}
        return {scheme: own for scheme, own in found.items() if own}

    def errors(self, top: str) -> dict[str, dict[int, float | None]]:
        """Return an error by scheme and seed; None for failed runs."""
        found: dict[str, dict[int, float | None]] = {scheme: {} for scheme in SCHEMES}
        for run in self.runs:
            found[run.recipe.scheme][run.about["seed"]] = run.last[top]
        for scheme, seed in self.failures:
            found[scheme].setdefault(seed, None)
        return {scheme: own for scheme, own in found.items() if own}


def open_runs(paths: Sequence[Path], *, may_fail: bool = False) -> Comparison:
    """Open folders of runs, or of comparisons, which hold runs.

    Args:
        paths: the folders.
        may_fail: whether all of them may have failed.

    Raises:
        InputError: no runs, empty ones, only failed ones, or runs of different classes, images or recipes.
    """
    folders: list[Path] = []
    for path in paths:
        inside = {file.parent for name in (runs.CONFIG, FILE) for file in path.glob(f"*/{name}")}
        folders += [path] if _is_run(path) or not inside else sorted(inside)
    if not folders and not may_fail:
        raise InputError("no runs are given: name folders of runs, or of comparisons")
    failed = dict(_open_failure(folder) for folder in folders if _has_failed(folder))
    found = [_open(folder) for folder in folders if not _has_failed(folder)]
    if not found and not may_fail:
        reasons = "; ".join(
            f"{SCHEMES[scheme]}, seed {seed}: {failure.text}" for (scheme, seed), failure in failed.items()
        )
        raise InputError(f"all runs have failed, so there is nothing to report: {reasons}")
    for one, other in itertools.combinations(found, 2):
        _check_alike(one, other)
    validated = [{line["step"]: line for line in each.metrics if line["kind"] == "val"} for each in found]
    steps = set.intersection(*map(set, validated)) if validated else {0}
    if not steps:
        raise InputError("the runs have no validation at the same iteration: resume them, relaylab train --resume RUN")
    found = [replace(each, last=own[max(steps)]) for each, own in zip(found, validated, strict=True)]
    order = list(SCHEMES)
    return Comparison(
        sorted(found, key=lambda each: (order.index(each.recipe.scheme), each.about["seed"])),
        dict(sorted(failed.items(), key=lambda each: (order.index(each[0][0]), each[0][1]))),
    )


def _is_run(path: Path) -> bool:
    return (path / runs.CONFIG).exists() or (path / FILE).exists()


def _has_failed(folder: Path) -> bool:
    return (folder / FILE).is_file() and not (folder / runs.MODEL).exists()


def _open_failure(folder: Path) -> tuple[Member, Failure]:
    failure = read_failure(folder)
    if failure is None:
        raise InputError(f"{folder / FILE} cannot be read: it is damaged; remove it, and train the run again")
    if (folder / runs.CONFIG).is_file():
        about = describe_run(folder)
        return (about["values"]["scheme"], about["seed"]), failure
    name = re.fullmatch(r"(.+)-s(\d+)", folder.resolve().name)  # it failed before it began; named by `compare`
    scheme = "" if name is None else name[1].replace("-", "_")
    if name is None or scheme not in SCHEMES:
        raise InputError(f"{folder} holds {FILE} but no {runs.CONFIG}: scheme and seed are not known")
    return (scheme, int(name[2])), failure


def _open(folder: Path) -> Run:
    if not (folder / runs.CONFIG).is_file():
        raise InputError(f"{folder} holds no run: expected {runs.CONFIG}, as `relaylab train` writes it")
    recipe, about, metrics = runs.recipe_of(folder), describe_run(folder), metrics_of(folder)
    if not any(line["kind"] == "val" for line in metrics):
        raise InputError(f"{folder} has not been validated yet: resume it, relaylab train --resume {folder}")
    try:
        config = json.loads((folder / runs.CONFIG).read_text(encoding="utf-8"))
        classes, counts = tuple(config["classes"]), config.get("counts", {})
        starts = json.loads((folder / runs.ENVIRONMENT).read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: {runs.CONFIG} or {runs.ENVIRONMENT} cannot be read: {error}") from None
    return Run(folder, recipe, about, classes, counts, metrics, starts, {})


def _check_alike(one: Run, other: Run) -> None:
    def refuse(what: str) -> None:
        raise InputError(f"{one.folder} and {other.folder} have {what}: they cannot be compared in one table")

    if one.classes != other.classes:
        refuse(f"different classes ({len(one.classes)} and {len(other.classes)})")
    if (one.about["data"], one.about["val_data"]) != (other.about["data"], other.about["val_data"]):
        refuse("different images")
    values = one.about["values"], other.about["values"]
    apart = ("scheme", "plan", "evaluation", *([RATE] if one.recipe.scheme != other.recipe.scheme else []))
    names = [name for name in {**values[0], **values[1]} if not name.startswith(apart)]
    different = [name for name in names if values[0].get(name) != values[1].get(name)]
    if different:
        refuse(f"different recipes ({different[0]})")
    if one.recipe.scheme == other.recipe.scheme and one.about["seed"] == other.about["seed"]:
        refuse("the same scheme and seed")


def joined(texts: Mapping[str, str]) -> str:
    """Format a text for each scheme: once if all are the same, else with the schemes' names."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    schemes = {text: [SCHEME_NAMES[s] for s, other in texts.items() if other == text] for text in texts.values()}
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in schemes.items())
