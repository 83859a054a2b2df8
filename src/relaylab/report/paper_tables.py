"""The paper's tables, reproduced from scores, with the paper's results below.

Note [Tables]
1. A cell has the networks of one architecture and scheme, which differ in their seeds: their mean, and the standard
   deviation over seeds.
2. The improvement over standard BP is in brackets, as in the paper.
3. Inception-v3 has its own auxiliary classifier. Table 6 of the paper calls this "standard BP", and has no multi-loss.
4. The networks of a column may differ only in the scheme: different images, training lengths or learning rates are an
   error.
"""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relaylab.errors import InputError
from relaylab.evaluate.error_rates import difference, misses, per_class_errors
from relaylab.evaluate.protocols import Kind
from relaylab.evaluate.results import read_ensembles
from relaylab.evaluate.scores import ScoreFolder, check_alike
from relaylab.outside.reading import check_keys
from relaylab.recipes import RECIPES
from relaylab.recipes.schema import SCHEMES, Recipe
from relaylab.report.comparison import different_values
from relaylab.report.verdict import mean_text
from relaylab.tables import Table

TABLES = ("1", "3", "4", "5", "6", "sampling")
TOPS = {"top1": "top-1", "top5": "top-5"}
NAMES = {
    "model_a": "model A",
    "model_a_printed": "model A as printed",
    "model_b": "model B",
    "resnet50": "ResNet-50",
    "inception_v3": "Inception-v3",
    "small_vgg": "a small VGG",
    **{f"vgg{depth}": f"VGGNet-{depth}" for depth in (13, 16, 19, 22, 25)},
}
COLUMNS = {"3": ("model_a", "model_b"), "4": ("model_a", "model_b"), "6": ("resnet50", "inception_v3")}
DEPTHS = ("vgg19", "vgg22", "vgg25")
TEAMS = {"Ntu_rose": 19.33, "Trimps-Soushen": 17.98, "Qualcomm Research": 17.59, "SIAT_MMLAB": 17.36}
WM = {"WM (model A)": 17.35, "WM (model B)": 17.28, "WM (model ensemble)": 16.87}
SAMPLERS = {"shuffled": "plain sampling", "square-root": "square-root sampling", "class-aware": "class-aware sampling"}
VALUES = ("scheme", "network.architecture", "images.sampling")  # values that tables read
FREE = ("scheme", "plan", "evaluation")  # values that may differ within a column
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Entry:
    """An evaluated network.

    Attributes:
        name: name of the network.
        seed: seed of its training.
        values: values of its recipe.
        top1: 100 for each image if the most likely class is wrong, else 0.
        top5: 100 for each image if the true class is not among the five most likely ones, else 0.
        per_class: mean of the per-class top-1 errors.
        views: views of the evaluation.
    """

    name: str
    seed: int
    values: Mapping[str, Any]
    top1: Values
    top5: Values
    per_class: float
    views: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """The architecture of the network."""
        return self.values["network.architecture"]

    @property
    def scheme(self) -> str:
        """The training scheme."""
        return self.values["scheme"]


def paper_table(number: str, folders: Sequence[ScoreFolder]) -> Table:
    """Return one of `TABLES` from folders of scores of the same images.

    Raises:
        InputError: an unknown table, different images or classes, no network for the table, or networks in a column
            that differ in more than the scheme.
    """
    if number not in TABLES:
        raise InputError(f"unknown table {number!r}: expected one of {', '.join(TABLES)}")
    if not folders:
        raise InputError("no scores given: pass output folders of `relaylab eval`")
    check_alike(folders)
    if number == "5":
        return _ensembles(folders)
    kind: Kind = "dense" if number in ("1", "4", "6") else "single-crop"
    entries = _entries(folders, kind)
    title = f"{'Sampling' if number == 'sampling' else f'Table {number}'}. {_about(folders[0], kind)}"
    table = {"1": _depth, "sampling": _sampling}.get(number)
    return table(title, entries) if table else _schemes(number, title, entries)


def _entries(folders: Iterable[ScoreFolder], kind: Kind) -> list[Entry]:
    """Return all networks that have scores for a protocol."""
    entries: list[Entry] = []
    for folder in folders:
        for name in folder.names():
            about = folder.about(name)
            if not about.get("values") or kind not in folder.protocols(name):
                continue
            check_keys(about, ("seed",), f"the description of {name}")
            check_keys(about["values"], VALUES, f"the description of {name}")
            scores, labels = folder.protocol(name, kind), folder.images.labels
            per_class = float(np.nanmean(per_class_errors(scores, labels)))
            top1, top5 = misses(scores, labels, 1), misses(scores, labels, 5)
            views = folder.views_of(name, kind)
            entries.append(Entry(name, about["seed"], about["values"], top1, top5, per_class, views))
    return entries


def _as_table_6(entry: Entry) -> Entry:
    """Relabel Inception-v3 with its own classifier. See Note [Tables] 3."""
    is_own = (entry.architecture, entry.scheme) == ("inception_v3", "multi_loss")
    return replace(entry, values={**entry.values, "scheme": "standard"}) if is_own else entry


def _check_column(column: Sequence[Entry], free: Sequence[str] = FREE) -> None:
    """Raise an InputError if two networks cannot share a column. See Note [Tables] 4."""
    for one, two in itertools.combinations(column, 2):
        if (one.seed, one.values) == (two.seed, two.values):
            raise InputError(f"{one.name} and {two.name} have the same recipe and seed: remove one of them")
    for other in column[1:]:
        first = column[0]
        if first.views != other.views:
            tests = [", ".join(each.views) for each in (first, other)]
            raise InputError(
                f"{first.name} was evaluated by {tests[0]}, {other.name} by {tests[1]}: evaluate both alike"
            )
        different = different_values(first.values, other.values, free)
        if different:
            name, *more = different
            values = f"{name} is {first.values.get(name)!r} and {other.values.get(name)!r}"
            values += f", and {len(more)} more" if more else ""
            raise InputError(f"{first.name} and {other.name} cannot be compared in one column: {values}")


def _schemes(number: str, title: str, entries: Sequence[Entry]) -> Table:
    if number == "6":
        entries = list(map(_as_table_6, entries))
    columns = {a: [entry for entry in entries if entry.architecture == a] for a in COLUMNS[number]}
    columns = {architecture: column for architecture, column in columns.items() if column}
    if not columns:
        kind = "single-crop" if number == "3" else "dense"
        raise InputError(f"no network for table {number}: expected {kind} scores of {_names(COLUMNS[number])}")
    notes: list[str] = []
    for column in columns.values():
        _check_column(column)
    rows: list[tuple[str, ...]] = []
    for scheme, method in SCHEMES.items():
        if not any(entry.scheme == scheme for column in columns.values() for entry in column):
            continue
        cells = [method]
        for architecture, column in columns.items():
            ours, base = ([e for e in column if e.scheme == name] for name in (scheme, "standard"))
            cells += [_cell(ours, base, top) for top in TOPS]
            if scheme != "standard" and ours and base:
                notes.append(_difference(f"{method} minus standard BP, {NAMES[architecture]}", ours, base))
        rows.append(tuple(cells))
    rows += reported_rows(number, list(columns))
    header = ("method", *(f"{NAMES[a]}, {top} error" for a in columns for top in TOPS.values()))
    return Table(title, header, tuple(rows), tuple(notes))


def _depth(title: str, entries: Sequence[Entry]) -> Table:
    column = [e for e in entries if e.architecture in DEPTHS and e.scheme == "standard"]
    if not column:
        raise InputError(f"no network for table 1: expected dense scores of {_names(DEPTHS)}, trained by standard BP")
    _check_column(column, (*FREE, "network.architecture"))
    rows: list[tuple[str, ...]] = []
    for architecture in DEPTHS:
        ours = [entry for entry in column if entry.architecture == architecture]
        if ours:
            rows.append((NAMES[architecture], *(_cell(ours, [], top) for top in TOPS)))
    for recipe in _recipes("table1-"):
        if recipe.images.data_set == "Places2 challenge":
            rows.append((f"{NAMES[recipe.network.architecture]} (the paper)", *_reported(recipe, None)))
    return Table(title, ("network", "top-1 error", "top-5 error"), tuple(rows))


def _sampling(title: str, entries: Sequence[Entry]) -> Table:
    kinds = {kind: [entry for entry in entries if entry.values["images.sampling"] == kind] for kind in SAMPLERS}
    kinds = {kind: column for kind, column in kinds.items() if column}
    if len(kinds) < 2:
        raise InputError("the sampling table needs two kinds of sampling, such as class-aware and shuffled")
    _check_column([entry for column in kinds.values() for entry in column], ("plan", "evaluation", "images.sampling"))
    rows: list[tuple[str, ...]] = []
    for kind, column in kinds.items():
        per_class = mean_text([entry.per_class for entry in column])
        rows.append((SAMPLERS[kind], *(_cell(column, [], top) for top in TOPS), per_class))
    base, ours = kinds.get("shuffled"), kinds.get("class-aware")
    notes = [_difference("Class-aware minus plain sampling", ours, base)] if ours and base else []
    notes.append("The paper: class-aware sampling gains about 0.6 points of accuracy on Places2's validation images.")
    return Table(title, ("sampling", "top-1 error", "top-5 error", "mean per-class error"), tuple(rows), tuple(notes))


def _ensembles(folders: Sequence[ScoreFolder]) -> Table:
    rows: list[tuple[str, ...]] = []
    for folder in folders:
        for entry in read_ensembles(folder):
            what = f"{', '.join(entry.members)} by {entry.how}, {entry.protocol}, {entry.images:,} images"
            rows.append((what, *(f"{getattr(entry.errors, top).value:.2f}" for top in TOPS)))
        for kind in ("single-crop", "dense"):
            rows += [(f"{e.name}, {kind}", *(_cell([e], [], top) for top in TOPS)) for e in _entries([folder], kind)]
    if not any("by" in row[0] for row in rows):
        raise InputError("no ensemble for table 5: evaluate one with `relaylab eval RUN... --ensemble product`")
    rows += [(f"{team} (the paper, test images)", "", f"{error:.2f}") for team, error in {**TEAMS, **WM}.items()]
    title = f"Table 5. {_about(folders[0], None)}"
    return Table(title, ("entry", "top-1 error", "top-5 error"), tuple(rows))


def _cell(ours: Sequence[Entry], base: Sequence[Entry], top: str) -> str:
    if not ours:
        return ""
    text = mean_text([float(getattr(entry, top).mean()) for entry in ours])
    if not base or ours == base:
        return text
    means = [statistics.fmean(getattr(entry, top).mean() for entry in group) for group in (base, ours)]
    return f"{text} ({means[0] - means[1]:+.2f})"


def _difference(title: str, ours: Sequence[Entry], base: Sequence[Entry]) -> str:
    """Return a note on a difference, with intervals over images; the cells have the spread over seeds."""
    texts: list[str] = []
    for top, name in TOPS.items():
        misses_of = ([getattr(entry, top) for entry in group] for group in (ours, base))
        texts.append(f"{name} {difference(*misses_of).text(signed=True)}")
    seeds = len({entry.seed for entry in ours})
    return f"{title}: {', '.join(texts)} (95 % intervals over images; {seeds} seed{'s' if seeds > 1 else ''})."


def _reported(recipe: Recipe | None, base: Recipe | None) -> list[str]:
    cells: list[str] = []
    for top in TOPS:
        value = getattr(recipe.reported, top) if recipe and recipe.reported else None
        other = getattr(base.reported, top) if base and base.reported else None
        gain = f" ({other - value:+.2f})" if value is not None and other is not None and recipe is not base else ""
        cells.append("" if value is None else f"{value:.2f}{gain}")
    return cells


def reported(number: str, architectures: Sequence[str]) -> dict[str, list[str]]:
    """Return the paper's cells of Table 3, 4 or 6 by scheme: top-1 and top-5 error of each network."""
    rows: dict[str, list[str]] = {scheme: [] for scheme in SCHEMES}
    for architecture in architectures:
        recipes = {r.scheme: r for r in _recipes(f"table{number}-") if r.network.architecture == architecture}
        if number == "6" and "standard" not in recipes:
            recipes = {"standard": recipes.pop("multi_loss"), **recipes}  # Note [Tables] 3
        for scheme, cells in rows.items():
            cells += _reported(recipes.get(scheme), recipes.get("standard"))
    return {scheme: cells for scheme, cells in rows.items() if any(cells)}


def reported_rows(number: str, architectures: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the paper's rows of Table 3, 4 or 6."""
    return [(f"{SCHEMES[scheme]} (the paper)", *cells) for scheme, cells in reported(number, architectures).items()]


def _recipes(prefix: str) -> list[Recipe]:
    return [recipe for name, recipe in RECIPES.items() if name.startswith(prefix)]


def _names(architectures: Iterable[str]) -> str:
    return ", ".join(NAMES[architecture] for architecture in architectures)


def _about(folder: ScoreFolder, kind: Kind | None) -> str:
    prefix = {"single-crop": "Single-crop e", "dense": "Dense multi-scale e", None: "E"}[kind]
    images = folder.images
    title = f"{prefix}rror rates (%) on {len(images):,} images of {images.title}, {len(images.classes)} classes"
    return f"{title}; in brackets, the improvement over standard BP; after ±, the standard deviation over seeds"
