"""Tuning: search for each scheme's best values, such as its learning rate, on a grid that is extended as needed.

Note [Tuning]
1. All schemes start from the same grid. Each point is trained with one seed, on the training images without the
   held-out ones, and evaluated by its error on the held-out images.
2. The best point is *enclosed* once its neighbours along each numeric axis have been trained. Beyond the end of an
   axis, the neighbour is a new value that continues the ratio of the last two: the grid is extended until the best
   point is enclosed.
3. A run that diverges ranks below all others, so that the grid is not extended where training diverges. Ties in the
   error are broken by the loss, then by the order of the grid.
4. At most `MOST_ADDED` values are added at each end of an axis.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

from relaylab.errors import InputError, nearest
from relaylab.files import write_text
from relaylab.outside.reading import DamagedFileError, read_json
from relaylab.recipes.changes import located, recipe_problems, with_changes
from relaylab.recipes.schema import SCHEMES, DecayConfig, PlateauConfig, Recipe, value_text
from relaylab.train.metrics import is_at_chance

FILE, FOLDER = "tuning.json", "tuning"  # in the folder of a comparison
SEED = 1000  # shared by all trials; unlikely to be a seed of the comparison
MOST_ADDED = 6
PLAN = "plan."  # prefix of values that standard BP does not use
SAME = ("scheme", "network.num_classes", "images.", "evaluation.", "optimizer.iterations")  # cannot be tuned

SAFE = " :+"  # characters allowed in folder names, in addition to letters, digits and "_.-~"

Point = tuple[str, ...]
"""A value for each axis, as text."""


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of the grid: a parameter to tune, and its values.

    Attributes:
        key: key given by the user, such as "plan.auxiliary.*.weight".
        names: names of the recipe's values that match the key.
        values: values to try, as text; numbers in increasing order.
        kind: "number", "whole" for integers, or "choice" for unordered values, which have no neighbours.
    """

    key: str
    names: tuple[str, ...]
    values: tuple[str, ...]
    kind: str

    @property
    def title(self) -> str:
        """The last part of the key, such as "lr"."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Trial:
    """A trained point of the grid.

    Attributes:
        point: the value on each axis.
        error: error on the held-out images at the end of training, in per cent; None if training diverged.
        loss: loss on the held-out images; None if training diverged.
    """

    point: Point
    error: float | None = None
    loss: float | None = None

    @property
    def order(self) -> tuple[float, float]:
        """Sort key: smaller is better."""
        return tuple(math.inf if value is None else value for value in (self.error, self.loss))  # pyright: ignore


@dataclass(frozen=True, slots=True)
class Choice:
    """The trials of one scheme, and its best point.

    Attributes:
        axes: the axes of the grid.
        trials: all trained points.
        point: the best point.
        enclosed: whether the neighbours of the best point have been trained. See Note [Tuning] 2.
    """

    axes: tuple[Axis, ...]
    trials: tuple[Trial, ...]
    point: Point
    enclosed: bool

    @property
    def values(self) -> dict[str, str]:
        """The chosen values by key."""
        return {axis.key: text for axis, text in zip(self.axes, self.point, strict=True)}

    @property
    def changes(self) -> list[str]:
        """The chosen values as overrides of the recipe, NAME=VALUE each."""
        return changes_of(self.axes, self.point)

    def chance_text(self, guess: float) -> str:
        """Return a warning if no trial has learnt anything, else an empty text; `guess` is the chance level."""
        errors = [trial.error for trial in self.trials if trial.error is not None]
        if not errors or not all(is_at_chance(error, guess) for error in errors):
            return ""
        which = "all trials" if len(errors) == len(self.trials) else "all trials that did not diverge are"
        return (
            f"{which} at chance level; chosen by {'error' if errors.count(min(errors)) == 1 < len(errors) else 'loss'}"
        )


def axes_of(texts: Sequence[str], recipe: Recipe) -> tuple[tuple[Axis, ...], list[str]]:
    """Parse the values of --tune and return the axes of the grid and error messages.

    Args:
        texts: KEY=VALUE,VALUE,... each; a key may contain the wildcard *.
        recipe: recipe to tune.
    """
    axes: list[Axis] = []
    problems: list[str] = []
    for text in texts:
        key, _, rest = text.partition("=")
        key, values = key.strip(), [value.strip() for value in rest.split(",") if value.strip()]
        possible = recipe.names()
        names = [name for name in possible if fnmatchcase(name, key)] if "*" in key else [key]
        if not key or not values or len(set(values)) < len(values):
            problems.append(f"--tune {text}: expected KEY=VALUE,VALUE,... with different values")
        elif any(key == axis.key for axis in axes):
            problems.append(f"--tune {key} is given twice")
        elif any(name.startswith(SAME) for name in names):
            problems.append(
                f"--tune {key}: schemes, images, classes and iterations cannot be tuned; "
                "use --schemes to choose schemes"
            )
        elif not names:
            problems.append(f"--tune {key}: unknown value of the recipe{nearest(key, possible)}")
        else:
            axis, invalid = _axis(key, names, values, recipe)
            problems += invalid
            axes += [] if invalid else [axis]
    return tuple(axes), problems


def _axis(key: str, names: Sequence[str], texts: Sequence[str], recipe: Recipe) -> tuple[Axis, list[str]]:
    problems: list[str] = []
    values: list[object] = []
    texts = [located(key, text) for text in texts]
    of_text: dict[tuple[object, ...], str] = {}
    for text in texts:
        changed, invalid = with_changes(recipe, [f"{name}={text}" for name in names])
        problems += (problem.replace("--set", "--tune") for problem in invalid or recipe_problems(changed))
        parsed = tuple(value for name, value, _ in changed.fields() if name in names)
        same = of_text.setdefault(parsed, text)
        problems += [f"--tune {key}: {same} and {text} are the same value"] if parsed and same != text else []
        values += parsed
    kind = _kind_of(values)
    ordered = texts if problems or kind == "choice" else sorted(texts, key=float)
    return Axis(key, tuple(names), tuple(ordered), kind), list(dict.fromkeys(problems))


def _kind_of(values: Iterable[object]) -> str:
    kinds = {type(value) for value in values}
    return "whole" if kinds == {int} else "number" if kinds and kinds <= {int, float} else "choice"


def of_scheme(axes: Iterable[Axis], scheme: str) -> tuple[Axis, ...]:
    """Return the axes that a scheme depends on: standard BP has no auxiliary losses."""
    return tuple(axis for axis in axes if scheme != "standard" or not all(name.startswith(PLAN) for name in axis.names))


def changes_of(axes: Sequence[Axis], point: Point) -> list[str]:
    """Return a point as overrides of the recipe, NAME=VALUE each."""
    return [f"{name}={text}" for axis, text in zip(axes, point, strict=True) for name in axis.names]


def name_of(axes: Sequence[Axis], point: Point) -> str:
    """Return the folder name of a point, such as "lr=0.01,weight=0.3"."""
    titles = [axis.title for axis in axes]
    keys = titles if len(set(titles)) == len(titles) else [axis.key.replace("*", "all") for axis in axes]
    named = (f"{key}={quote(text, safe=SAFE)}" for key, text in zip(keys, point, strict=True))
    return ",".join(named) or "recipe"


def is_allowed(recipe: Recipe, changes: Sequence[str]) -> bool:
    """Return whether a recipe is valid with these overrides."""
    changed, problems = with_changes(recipe, changes)
    return not problems and not recipe_problems(changed)


def next_points(axes: Sequence[Axis], trials: Sequence[Trial], allowed: Callable[[Point], bool]) -> list[Point]:
    """Return the points to train next: first the grid, then neighbours of the best point until it is enclosed.

    Args:
        axes: axes of one scheme.
        trials: the trained points.
        allowed: whether a point beyond the grid can be trained.
    """
    tried = {trial.point for trial in trials}
    missing = [point for point in itertools.product(*(axis.values for axis in axes)) if point not in tried]
    if missing:
        return missing
    return [point for point in _neighbours(axes, trials) if point and point not in tried and allowed(point)]


def choice_of(axes: Sequence[Axis], trials: Sequence[Trial]) -> Choice:
    """Return the best point of all trials. See Note [Tuning] 3."""
    tried = {trial.point for trial in trials}
    enclosed = all(point in tried for point in _neighbours(axes, trials))
    ordered = _ordered(axes, trials)
    return Choice(tuple(axes), tuple(ordered), min(ordered, key=lambda trial: trial.order).point, enclosed)


def _ordered(axes: Sequence[Axis], trials: Sequence[Trial]) -> list[Trial]:
    ladders = _ladders(axes, trials)
    return sorted(
        trials, key=lambda trial: [ladder.index(text) for ladder, text in zip(ladders, trial.point, strict=True)]
    )


def _ladders(axes: Sequence[Axis], trials: Sequence[Trial]) -> list[list[str]]:
    """Return all values of each axis in order, those of the grid and added ones."""
    ladders: list[list[str]] = []
    for index, axis in enumerate(axes):
        values = {*axis.values, *(trial.point[index] for trial in trials)}
        ladders.append(list(axis.values) if axis.kind == "choice" else sorted(values, key=float))
    return ladders


def _neighbours(axes: Sequence[Axis], trials: Sequence[Trial]) -> list[Point | None]:
    """Return both neighbours of the best point along each numeric axis; None for a missing neighbour.

    Axes with a single value are skipped.
    """
    best = min(_ordered(axes, trials), key=lambda trial: trial.order).point
    neighbours: list[Point | None] = []
    for index, (axis, ladder) in enumerate(zip(axes, _ladders(axes, trials), strict=True)):
        if axis.kind == "choice" or len(axis.values) == 1:
            continue
        position = ladder.index(best[index])
        for neighbour in (position - 1, position + 1):
            text = ladder[neighbour] if 0 <= neighbour < len(ladder) else _beyond(axis, ladder, neighbour < 0)
            neighbours.append(None if text is None else (*best[:index], text, *best[index + 1 :]))
    return neighbours


def _beyond(axis: Axis, ladder: Sequence[str], is_below: bool) -> str | None:
    """Return the next value beyond an end of an axis; None if it is not positive or the limit is reached."""
    last, inner = map(float, ladder[:2] if is_below else ladder[:-3:-1])
    end = ladder.index(axis.values[0 if is_below else -1])
    added = end if is_below else len(ladder) - 1 - end
    if added >= MOST_ADDED or (is_below and min(last, inner) <= 0):
        return None
    value = last * last / inner if min(last, inner) > 0 else 2 * last - inner
    text = str(round(value)) if axis.kind == "whole" else f"{float(f'{value:.2g}'):g}"
    return None if float(text) in map(float, ladder) else text


@dataclass(frozen=True, slots=True)
class Tuning:
    """The tuning of a comparison, as its folder records it.

    Attributes:
        seed: seed shared by all trials.
        images: images of each class held out: a fraction, or a number.
        share: length of a trial, as a fraction of the recipe's iterations.
        choices: the choice for each scheme.
    """

    seed: int
    images: float
    share: float
    choices: Mapping[str, Choice]

    @property
    def names(self) -> set[str]:
        """The names of the recipe's values that are tuned."""
        return {name for choice in self.choices.values() for axis in choice.axes for name in axis.names}

    def is_of(self, recipe: Recipe) -> bool:
        """Return whether a recipe has the values chosen for its scheme."""
        choice = self.choices.get(recipe.scheme)
        if choice is None:
            return False
        chosen, problems = with_changes(recipe, choice.changes)
        actual, expected = ({name: value for name, value, _ in r.fields()} for r in (recipe, chosen))
        names = [name for axis in choice.axes for name in axis.names]
        return not problems and all(actual.get(name) == expected.get(name) for name in names)


def write_tuning(folder: Path, tuning: Tuning) -> None:
    """Write the tuning of the comparison in a folder."""
    write_text(folder / FILE, json.dumps(asdict(tuning), indent=1) + "\n")


def read_tuning(folder: Path) -> Tuning | None:
    """Read the tuning of the comparison in a folder; None if it has none.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        tuning = read_json(path, Tuning)
        for scheme, choice in tuning.choices.items():
            _check_choice(scheme, choice, str(path))
    except DamagedFileError as error:
        raise InputError(f"{error}; rerun `relaylab compare` to write it again") from None
    return tuning


def _check_choice(scheme: str, choice: Choice, where: str) -> None:
    """Raise a DamagedFileError if points do not match their axes, or a value on a numeric axis is not a number."""
    points = [choice.point, *(trial.point for trial in choice.trials)]
    fits = scheme in SCHEMES and all(len(point) == len(choice.axes) for point in points)
    for index, axis in enumerate(choice.axes if fits else ()):
        texts = [*axis.values, *(point[index] for point in points)]
        fits = fits and bool(axis.values) and (axis.kind == "choice" or all(map(_is_number, texts)))
    if not fits:
        raise DamagedFileError(f"{where} is damaged or was not written by relaylab: choices.{scheme}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def shortened(recipe: Recipe, share: float) -> dict[str, str]:
    """Return the overrides, by name, that shorten a recipe to a fraction of its iterations.

    The schedule is shortened in proportion; with a plateau schedule, evaluations become more frequent, so
    its patience in evaluations is unchanged.
    """
    if share == 1:
        return {}
    optimizer, schedule = recipe.optimizer, recipe.optimizer.schedule
    values = {"optimizer.iterations": max(1, round(optimizer.iterations * share))}
    values["optimizer.warmup"] = round(optimizer.warmup * share)
    if isinstance(schedule, DecayConfig):
        values["optimizer.schedule.every"] = max(1, round(schedule.every * share))
    if isinstance(schedule, PlateauConfig):
        values["optimizer.evaluate_every"] = max(1, round(optimizer.evaluate_every * share))
    return {name: value_text(value) for name, value in values.items()}
