"""Run a tuning: train trials of all schemes in rounds until each scheme's best point is enclosed."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from relaylab.errors import InputError, LabError
from relaylab.recipes.changes import with_changes
from relaylab.recipes.schema import SCHEME_NAMES, Recipe
from relaylab.train import requests, run_folder
from relaylab.train.failures import read_failure
from relaylab.train.many import is_missing
from relaylab.train.metrics import chance_level, deciding
from relaylab.train.options import TrainOptions
from relaylab.train.records import metrics_of
from relaylab.train.tuning import (
    FOLDER,
    SEED,
    Axis,
    Choice,
    Point,
    Trial,
    Tuning,
    changes_of,
    choice_of,
    is_allowed,
    name_of,
    next_points,
    of_scheme,
    read_tuning,
    shortened,
    write_tuning,
)

TrainMany = Callable[[Mapping[str, TrainOptions], int], bool]
"""Trains runs, given their options by name and their iterations; returns False if a signal stopped them."""


@dataclass(frozen=True)
class Search:
    """The specification of a tuning.

    Attributes:
        folder: folder of the comparison.
        recipe: the recipe with the user's overrides.
        base: options of a run of the comparison; trials replace its seed, scheme and folder.
        axes: axes of the grid.
        images: images of each class to hold out: a fraction, or a number.
        share: length of a trial, as a fraction of the recipe's iterations.
    """

    folder: Path
    recipe: Recipe
    base: TrainOptions
    axes: tuple[Axis, ...]
    images: float
    share: float

    def path(self, scheme: str, point: Point) -> Path:
        """Return the folder of a trial."""
        return self.folder / FOLDER / scheme.replace("_", "-") / name_of(of_scheme(self.axes, scheme), point)

    def trial_options(self, scheme: str, point: Point) -> TrainOptions:
        """Return the options of a trial."""
        point_changes = changes_of(of_scheme(self.axes, scheme), point)
        values = {"scheme": scheme, "images.set_aside": f"{self.images:g}"}
        values |= shortened(with_changes(self.recipe, point_changes)[0], self.share)
        more = [f"{name}={value}" for name, value in values.items()]
        more += [text for text in point_changes if text.partition("=")[0] not in values]
        replaced = {text.partition("=")[0] for text in more}
        kept = [text for text in self.base.changes if text.partition("=")[0].strip() not in replaced]
        return replace(
            self.base,
            changes=(*kept, *more),
            seed=SEED,
            out=self.path(scheme, point),
            resume="auto",
            keep=1,
            diagnose_every=0,
        )

    def allows(self, scheme: str, point: Point) -> bool:
        """Return whether a point beyond the grid can be trained."""
        return is_allowed(self.recipe, changes_of(of_scheme(self.axes, scheme), point))


def tune(search: Search, schemes: Sequence[str], train: TrainMany) -> Tuning | None:
    """Train the missing trials and return the chosen values of each scheme; None after SIGINT or SIGTERM.

    A scheme without alternatives is not tuned.

    Raises:
        InputError: a trial could not start, or an existing one has different images, options or values.
        LabError: a trial failed for a reason other than divergence.
    """
    trials = {scheme: list[Trial]() for scheme in schemes}
    while due := [(scheme, point) for scheme in schemes for point in _due(search, scheme, trials[scheme])]:
        due_options = {pair: search.trial_options(*pair) for pair in due}
        # Also resolve finished trials: those with different images, options or values must not be reused.
        recipes = [requests.resolve(options).recipe for options in due_options.values()]
        missing = {_title(search, *pair): due_options[pair] for pair in due if is_missing(search.path(*pair))}
        if missing and not train(missing, recipes[0].optimizer.iterations):
            return None
        for scheme, point in due:
            trials[scheme].append(_trial(search, scheme, point))
    choices = {scheme: _choice(search, scheme, trials[scheme]) for scheme in schemes}
    tuning = Tuning(SEED, search.images, search.share, _earlier(search) | choices)
    write_tuning(search.folder, tuning)
    return tuning


def _earlier(search: Search) -> dict[str, Choice]:
    """Return the choices of earlier commands whose trials have the same length and images."""
    with suppress(InputError):  # a damaged file will be overwritten
        earlier = read_tuning(search.folder)
        if earlier is not None and (earlier.seed, earlier.images, earlier.share) == (SEED, search.images, search.share):
            return dict(earlier.choices)
    return {}


def _due(search: Search, scheme: str, trials: Sequence[Trial]) -> list[Point]:
    """Return the points to train next, or none without alternatives. Points beyond the grid are printed."""
    axes = of_scheme(search.axes, scheme)
    if not any(len(axis.values) > 1 for axis in axes):
        return []
    points = next_points(axes, trials, partial(search.allows, scheme))
    new = [name_of(axes, point) for point in points if is_missing(search.path(scheme, point))]
    if trials and new:
        best = name_of(axes, choice_of(axes, trials).point)
        print(f"{SCHEME_NAMES[scheme]}: best so far is {best}; next: {' and '.join(new)}", file=sys.stderr)
    return points


def _choice(search: Search, scheme: str, trials: Sequence[Trial]) -> Choice:
    axes = of_scheme(search.axes, scheme)
    if not trials:  # no alternatives: the only value of each axis
        return Choice(axes, (), tuple(axis.values[0] for axis in axes), True)
    choice = choice_of(axes, trials)
    if text := choice.chance_text(_guess(search.path(scheme, choice.point))):
        print(f"{SCHEME_NAMES[scheme]}: {text}; train longer or extend the grid", file=sys.stderr)
    if not choice.enclosed:
        print(
            f"{SCHEME_NAMES[scheme]}: the best point is at the edge of the tried values: {choice.values}; to search "
            "further, add values beyond the edge to --tune and choose a new --out",
            file=sys.stderr,
        )
    return choice


def _guess(folder: Path) -> float:
    """Return the chance level of the error that decides a trial, in per cent; 100 if the trial diverged."""
    if not (folder / run_folder.MODEL).is_file():
        return 100.0
    stored, line = run_folder.read_run(folder), _last(folder)
    counts = stored.counts["val"]
    return chance_level(deciding(line), counts, stored.images.get("val", sum(counts)))


def _last(folder: Path) -> Mapping[str, Any]:
    """Return the metrics of the last validation of a run."""
    return [line for line in metrics_of(folder) if line["kind"] == "val"][-1]


def _trial(search: Search, scheme: str, point: Point) -> Trial:
    """Return the result of a trial.

    Raises:
        LabError: it has neither finished nor diverged.
    """
    folder = search.path(scheme, point)
    if is_missing(folder):
        failure = read_failure(folder)
        reason = failure.text if failure else "it wrote no result; the disk may be full"
        raise LabError(f"tuning, {_title(search, scheme, point)}: {reason}. Run the same command again to resume it.")
    if not (folder / run_folder.MODEL).is_file():
        return Trial(point)
    last = _last(folder)
    return Trial(point, last[deciding(last).name], last["loss"])


def _title(search: Search, scheme: str, point: Point) -> str:
    return f"{SCHEME_NAMES[scheme]} {name_of(of_scheme(search.axes, scheme), point)}"
