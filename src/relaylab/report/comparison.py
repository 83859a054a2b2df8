"""Comparisons: read runs that differ only in scheme, seed and each scheme's own values, including failed runs."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relaylab.errors import InputError
from relaylab.evaluate.trained import describe_run
from relaylab.recipes.schema import SCHEME_NAMES, SCHEMES, Recipe
from relaylab.train import requests, run_folder
from relaylab.train.failures import FILE, Failure, read_failure
from relaylab.train.metrics import (
    MEASURES,
    TOP,
    Measure,
    chance_error,
    guessed_precision_error,
    informative_tops,
    measures_of,
)
from relaylab.train.records import metrics_of
from relaylab.train.tuning import Tuning, read_tuning

SCHEME_VALUES = ("plan", "optimizer.lr")  # values that may differ between schemes, in addition to tuned values
Member = tuple[str, int]
"""Scheme and seed."""


@dataclass(frozen=True)
class Run:
    """A run with a result.

    Attributes:
        folder: the run folder.
        recipe: recipe of the run.
        about: description, from `relaylab.evaluate.trained.describe_run`.
        classes: names of the classes.
        counts: number of images per class, by split; empty for runs of earlier versions.
        sizes: number of images by split; empty for runs of earlier versions.
        metrics: all lines of metrics.
        starts: the environment of each start.
        last: the reported validation: the last one that all runs have.
        tuning: the trials that determined its values; None if it was not tuned.
    """

    folder: Path
    recipe: Recipe
    about: Mapping[str, Any]
    classes: tuple[str, ...]
    counts: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    metrics: Sequence[Mapping[str, Any]]
    starts: Sequence[Mapping[str, Any]]
    last: Mapping[str, Any]
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs that differ only in scheme, seed and each scheme's own values.

    Attributes:
        runs: runs with a result, sorted by scheme and seed.
        failures: failed runs by scheme and seed.
        tuning: the trials that determined the values of each scheme; None without --tune.
    """

    runs: Sequence[Run]
    failures: Mapping[Member, Failure] = field(default_factory=dict[Member, Failure])
    tuning: Tuning | None = None

    @property
    def measures(self) -> list[Measure]:
        """The errors that all runs have; without the top-5 error, which is zero, for up to five classes."""
        hidden = TOP.keys() - informative_tops(len(self.runs[0].classes))
        measures = [measure for measure in measures_of(self.runs[0].last) if measure.base not in hidden]
        return [measure for measure in measures if all(measure.name in run.last for run in self.runs)]

    @property
    def measure(self) -> Measure:
        """The decisive error. See Note [Measures] in `relaylab.train.metrics`."""
        return self.measures[0]

    def guess(self, measure: Measure | None = None) -> float:
        """Return the chance level of an error in per cent; by default of the decisive error."""
        first, measure = self.runs[0], measure or self.measure
        if measure.base in TOP:
            return chance_error(len(first.classes), TOP[measure.base])
        return guessed_precision_error(first.counts["val"], first.sizes["val"])

    @property
    def by_scheme(self) -> dict[str, list[Run]]:
        """The runs with a result, by scheme."""
        groups = {scheme: [run for run in self.runs if run.recipe.scheme == scheme] for scheme in SCHEMES}
        return {scheme: runs for scheme, runs in groups.items() if runs}

    @property
    def metrics(self) -> dict[str, list[Sequence[Mapping[str, Any]]]]:
        """The metrics of the runs of each scheme."""
        return {scheme: [run.metrics for run in runs] for scheme, runs in self.by_scheme.items()}

    @property
    def failure_texts(self) -> list[str]:
        """A description of each failed run."""
        failures = self.failures.items()
        return [f"{SCHEMES[scheme]}, seed {seed}: {failure.text}" for (scheme, seed), failure in failures]

    def errors(self, measure: Measure | None = None) -> dict[str, dict[int, float | None]]:
        """Return an error, by default the decisive one, by scheme and seed; None for failed runs."""
        measure = measure or (self.measure if self.runs else MEASURES[0])
        errors: dict[str, dict[int, float | None]] = {scheme: {} for scheme in SCHEMES}
        for run in self.runs:
            errors[run.recipe.scheme][run.about["seed"]] = run.last[measure.name]
        for scheme, seed in self.failures:
            errors[scheme].setdefault(seed, None)
        return {scheme: by_seed for scheme, by_seed in errors.items() if by_seed}


def open_runs(paths: Sequence[Path], *, may_fail: bool = False) -> Comparison:
    """Open the runs in folders of runs or comparisons.

    Args:
        paths: the folders.
        may_fail: accept that all runs have failed.

    Raises:
        InputError: no runs, runs without a validation, only failed runs, or runs with different classes, images or
            recipes.

    Example:
        >>> comparison = open_runs([Path("runs/compare/digits")])
        >>> comparison.errors()["relay"]
        {0: 3.89, 1: 4.44, 2: 3.33}
    """
    folders: list[Path] = []
    for path in paths:
        inside = {file.parent for name in (run_folder.CONFIG, FILE) for file in path.glob(f"*/{name}")}
        folders += [path] if _is_run(path) or not inside else sorted(inside)
    if not folders and not may_fail:
        raise InputError("no runs given: pass folders of runs or comparisons")
    opened = [_open(folder) for folder in folders if not _has_failed(folder)]
    failed: dict[Member, Failure] = {}
    for folder in filter(_has_failed, folders):
        member, failure = _open_failure(folder, opened[0] if opened else None)
        if member in failed or member in {(run.recipe.scheme, run.about["seed"]) for run in opened}:
            raise InputError(f"{folder}: more than one run has this scheme and seed")
        failed[member] = failure
    if not opened and not may_fail:
        reasons = "; ".join(Comparison([], failed).failure_texts)
        raise InputError(f"there is nothing to report, since all runs have failed: {reasons}")
    for one, other in itertools.combinations(opened, 2):
        _check_comparable(one, other)
    validated = [{line["step"]: line for line in run.metrics if line["kind"] == "val"} for run in opened]
    steps = set.intersection(*map(set, validated)) if validated else {0}
    if not steps:
        raise InputError("no iteration was validated in all runs: resume them with `relaylab train --resume RUN`")
    opened = [replace(run, last=lines[max(steps)]) for run, lines in zip(opened, validated, strict=True)]
    order = {scheme: index for index, scheme in enumerate(SCHEMES)}
    opened.sort(key=lambda run: (order[run.recipe.scheme], run.about["seed"]))
    members = sorted(failed, key=lambda member: (order[member[0]], member[1]))
    return Comparison(opened, {member: failed[member] for member in members}, _tuning_of(opened, failed))


def _tuning_of(opened: Sequence[Run], failed: Collection[Member]) -> Tuning | None:
    """Return the tuning that all tuned runs share, restricted to their schemes; None if it differs."""
    tunings = [run.tuning for run in opened if run.tuning is not None]
    if not tunings or any(tuning != tunings[0] for tuning in tunings):
        return None
    untuned = {run.recipe.scheme for run in opened if run.tuning is None}
    schemes = {run.recipe.scheme for run in opened} | {scheme for scheme, _ in failed}
    choices = {name: choice for name, choice in tunings[0].choices.items() if name in schemes - untuned}
    return replace(tunings[0], choices=choices)


def _is_run(path: Path) -> bool:
    return (path / run_folder.CONFIG).exists() or (path / FILE).exists()


def _has_failed(folder: Path) -> bool:
    return (folder / FILE).is_file() and not (folder / run_folder.MODEL).exists()


def _open_failure(folder: Path, first: Run | None) -> tuple[Member, Failure]:
    failure = read_failure(folder)
    if failure is None:
        raise InputError(f"{folder / FILE} is damaged: remove it and train the run again")
    if (folder / run_folder.CONFIG).is_file():
        about = describe_run(folder)
        tuning = read_tuning(folder.parent)
        problem = None if first is None else _difference(about, first.about, tuning.names if tuning else ())
        if first is not None and problem is not None:
            raise InputError(f"{folder}, which failed, and {first.folder} have {problem}")
        return (about["values"]["scheme"], about["seed"]), failure
    member = run_folder.parse_member_name(folder)  # it failed before it started
    if member is None:
        raise InputError(f"{folder} contains {FILE} but no {run_folder.CONFIG}: scheme and seed are unknown")
    return member, failure


def _open(folder: Path) -> Run:
    recipe, about, metrics = requests.recipe_of(folder), describe_run(folder), metrics_of(folder)
    if not any(line["kind"] == "val" for line in metrics):
        raise InputError(f"{folder} has no validation yet; to resume it: relaylab train --resume {folder}")
    stored, tuning = run_folder.read_run(folder), read_tuning(folder.parent)
    tuning = tuning if tuning and tuning.is_of(recipe) else None  # the tuning may belong to other runs in the folder
    sizes = stored.images or {split: sum(counts) for split, counts in stored.counts.items()}
    starts = run_folder.read_starts(folder) or [{}]
    return Run(folder, recipe, about, stored.classes, stored.counts, sizes, metrics, starts, {}, tuning)


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], tuned: Collection[str]) -> str | None:
    """Return why two runs cannot be compared, from their descriptions; None if they can.

    Values in `tuned` may differ between schemes.
    """
    if (one["data"], one["val_data"]) != (other["data"], other["val_data"]):
        return "different images"
    is_same_scheme = one["values"]["scheme"] == other["values"]["scheme"]
    free = ("scheme", "evaluation", *([] if is_same_scheme else [*SCHEME_VALUES, *tuned]))
    different = different_values(one["values"], other["values"], free)
    return f"different recipes ({different[0]})" if different else None


def _check_comparable(one: Run, other: Run) -> None:
    tuned = {name for run in (one, other) if run.tuning for name in run.tuning.names}
    problem = _difference(one.about, other.about, tuned)
    if one.classes != other.classes:
        problem = f"different classes ({len(one.classes)} and {len(other.classes)})"
    if problem is None and (one.recipe.scheme, one.about["seed"]) == (other.recipe.scheme, other.about["seed"]):
        problem = "the same scheme and seed"
    if problem is None:
        return
    raise InputError(f"{one.folder} and {other.folder} have {problem}: they cannot be compared in one table")


def different_values(one: Mapping[str, Any], other: Mapping[str, Any], free: Sequence[str]) -> list[str]:
    """Return the names of the values that differ between two recipes, except names that start with one of `free`."""
    names = [name for name in {**one, **other} if not name.startswith(tuple(free))]
    return [name for name in names if one.get(name) != other.get(name)]


def joined(texts: Mapping[str, str]) -> str:
    """Join a text per scheme: once if all are equal, otherwise with the names of the schemes."""
    names = {text: [SCHEME_NAMES[s] for s, other in texts.items() if other == text] for text in texts.values()}
    return (
        next(iter(names))
        if len(names) == 1
        else "; ".join(f"{', '.join(schemes)}: {t}" for t, schemes in names.items())
    )
