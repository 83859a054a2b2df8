"""`relaylab report`: one page about runs that needs nothing but itself."""

import itertools
import json
import statistics
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from relaylab.errors import InputError
from relaylab.evaluate.error_rates import confusion, per_class_errors
from relaylab.evaluate.images import images_of
from relaylab.evaluate.protocols import Kind
from relaylab.evaluate.scores import ScoreFolder
from relaylab.evaluate.trained import describe_run
from relaylab.recipes.schema import SCHEMES, Recipe
from relaylab.report import curves as page_pictures
from relaylab.report.paper_figures import gradient_figure, photo_figure, pick_photos, plain, window_figure
from relaylab.report.paper_tables import NAMES, mean_text, paper_table
from relaylab.report.style import SCHEME_COLOURS, figure_text
from relaylab.report.verdict import difference_text
from relaylab.tables import Table, render
from relaylab.train import runs
from relaylab.train.records import metrics_of

PAIRS = 8  # of classes that are taken for each other most often
RATE = "optimizer.lr"  # which may have been chosen for each scheme
PAPER_TABLES = ("1", "3", "4", "6", "sampling", "5")


@dataclass(frozen=True)
class Run:
    """A run that the page is about.

    Attributes:
        folder: of it.
        recipe: what it trains.
        about: what it says of itself.
        classes: their names.
        metrics: its lines.
        starts: where and with what it was started.
        last: the validation that the page reports: the last one that all runs have.
    """

    folder: Path
    recipe: Recipe
    about: Mapping[str, Any]
    classes: tuple[str, ...]
    metrics: Sequence[Mapping[str, Any]]
    starts: Sequence[Mapping[str, Any]]
    last: Mapping[str, Any]


def open_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in folders, or in folders of comparisons.

    Raises:
        InputError: no runs, empty ones, or ones that cannot stand in one table: of other classes, images or recipes.
    """
    folders: list[Path] = []
    for path in paths:
        inside = sorted(file.parent for file in path.glob(f"*/{runs.CONFIG}"))
        folders += [path] if (path / runs.CONFIG).exists() or not inside else inside
    if not folders:
        raise InputError("no runs given: name folders of runs, or of comparisons")
    found = [_open(folder) for folder in folders]
    for one, other in itertools.combinations(found, 2):
        _check_alike(one, other)
    validated = [{line["step"]: line for line in each.metrics if line["kind"] == "val"} for each in found]
    steps = set.intersection(*map(set, validated))
    if not steps:
        raise InputError("the runs have no validation at the same iteration: let all of them go on")
    found = [replace(each, last=own[max(steps)]) for each, own in zip(found, validated, strict=True)]
    return sorted(found, key=lambda each: (list(SCHEMES).index(each.recipe.scheme), each.about["seed"]))


def _open(folder: Path) -> Run:
    if not (folder / runs.CONFIG).is_file():
        raise InputError(f"{folder} holds no run: expected {runs.CONFIG}, as `relaylab train` writes it")
    recipe, about, metrics = runs.recipe_of(folder), describe_run(folder), metrics_of(folder)
    if not any(line["kind"] == "val" for line in metrics):
        raise InputError(f"{folder} has not been validated yet: go on with it, relaylab train --resume {folder}")
    try:
        classes = tuple(json.loads((folder / runs.CONFIG).read_text(encoding="utf-8"))["classes"])
        starts = json.loads((folder / runs.ENVIRONMENT).read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: {runs.CONFIG} or {runs.ENVIRONMENT} cannot be read: {error}") from None
    return Run(folder, recipe, about, classes, metrics, starts, {})


def _check_alike(one: Run, other: Run) -> None:
    def refuse(what: str) -> None:
        raise InputError(f"{one.folder} and {other.folder} have {what}: they cannot stand in one table")

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


def render_page(found: Sequence[Run], scores: ScoreFolder | None) -> str:
    """The page as HTML text: no scripts, nothing from elsewhere.

    Args:
        found: the runs, alike but for scheme, seed and the schemes' learning rates.
        scores: of their networks; None leaves out what needs them.
    """
    by_scheme = {s: [each for each in found if each.recipe.scheme == s] for s in SCHEMES}
    by_scheme = {scheme: own for scheme, own in by_scheme.items() if own}
    metrics = {scheme: [each.metrics for each in own] for scheme, own in by_scheme.items()}
    template = resources.files("relaylab.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    curves = [
        ("val", "top1", "Validation error, top-1", "per cent"),
        ("val", "top5", "Validation error, top-5", "per cent"),
        ("train", "loss.primary", "Training loss, primary", "nats"),
        ("val", "loss", "Validation loss", "nats"),
    ]
    has_train = all(any(line["kind"] == "train" for line in each.metrics) for each in found)
    first = {SCHEMES[scheme]: own[0] for scheme, own in by_scheme.items()}
    looks = {name: each.metrics for name, each in first.items() if _has_gradients(each)}
    network = NAMES[found[0].recipe.network.architecture]
    angles = page_pictures.angle_picture(metrics)
    return environment.from_string(template).render(
        recipe=found[0].recipe,
        title=f"{_capital(network)}: {' against '.join(SCHEMES[s] for s in by_scheme)}",
        network=network,
        methods=SCHEMES,
        by_scheme=by_scheme,
        colours=SCHEME_COLOURS,
        classes=found[0].classes,
        verdict=verdict(by_scheme),
        summary=render(summary(by_scheme), "html"),
        tables=[] if scores is None else _paper_tables(scores),
        curves=[
            (what, _svg(page_pictures.curve_picture(metrics, kind, name, what, unit)))
            for kind, name, what, unit in curves
            if kind == "val" or has_train
        ],
        windows=[
            (SCHEMES[scheme], _svg(figure_text(window_figure(own[0].recipe, SCHEMES[scheme]))))
            for scheme, own in by_scheme.items()
        ],
        gradients=_svg(figure_text(gradient_figure(looks))) if looks else None,
        angles=None if angles is None else _svg(angles),
        scored=None if scores is None else _scored(by_scheme, scores),
        scores_title=None if scores is None else scores.images.title,
        origins=[_origin(each) for each in found],
        fields=_fields(by_scheme),
    )


def _fields(by_scheme: Mapping[str, Sequence[Run]]) -> list[tuple[str, str, str]]:
    """The recipe, value by value, with where each comes from."""
    recipes = [own[0].recipe for own in by_scheme.values()]
    rates = dict.fromkeys(f"{recipe.optimizer.lr:g}" for recipe in recipes)
    return [
        (name, " / ".join(rates) if name == RATE else _text(value), source)
        for name, value, source in recipes[0].fields()
    ]


def summary(by_scheme: Mapping[str, Sequence[Run]]) -> Table:
    """Errors as the runs themselves measured them."""
    base = by_scheme.get("standard", [])
    rows: list[tuple[str, ...]] = []
    for scheme, own in by_scheme.items():
        cells = [SCHEMES[scheme], ", ".join(str(each.about["seed"]) for each in own)]
        cells += [mean_text([each.last[top] for each in own]) for top in ("top1", "top5")]
        for top in ("top1", "top5"):
            pairs = _pairs(own, base, top)
            cells.append(difference_text(pairs) if pairs and scheme != "standard" else "")
        rows.append(tuple(cells))
    header = ("method", "seeds", "top-1 error", "top-5 error", "top-1 minus standard BP", "top-5 minus standard BP")
    first = next(iter(by_scheme.values()))[0]
    step, iterations = first.last["step"], first.recipe.optimizer.iterations
    when = "at the end of training" if step == iterations else f"at iteration {step:,} of {iterations:,}, unfinished"
    notes = (
        f"Per cent; single crop, {when}. After ±, the standard deviation over seeds. Differences are "
        "paired by seed; in brackets, their 95 % confidence interval over seeds (t).",
    )
    rates = {scheme: own[0].recipe.optimizer.lr for scheme, own in by_scheme.items()}
    if len(set(rates.values())) > 1:
        told = ", ".join(f"{SCHEMES[scheme]} {rate:g}" for scheme, rate in rates.items())
        notes = (*notes, f"Each method has a learning rate of its own: {told}.")
    return Table("Errors on the validation images", header, tuple(rows), notes)


def verdict(by_scheme: Mapping[str, Sequence[Run]]) -> list[str]:
    """What the errors say, in sentences that do not say more."""
    base = by_scheme.get("standard", [])
    sentences: list[str] = []
    for scheme, own in by_scheme.items():
        pairs = _pairs(own, base, "top1")
        if scheme == "standard" or not pairs:
            continue
        mean, same = statistics.fmean(pairs), len({value > 0 for value in pairs}) == 1
        word = "lower" if mean < 0 else "higher"
        text = f"{SCHEMES[scheme]}: top-1 error {abs(mean):.2f} points {word} than standard BP"
        if len(pairs) == 1:
            text += ", with one seed; another seed may turn that round."
        elif same:
            text += f", {word} with each of {len(pairs)} seeds."
        else:
            text += f" on average; with {len(pairs)} seeds, not with each of them."
        sentences.append(text)
    return sentences or ["Nothing to compare with: the runs have no standard BP of the same seeds."]


def _pairs(own: Sequence[Run], base: Sequence[Run], top: str) -> list[float]:
    other = {each.about["seed"]: each.last[top] for each in base}
    return [each.last[top] - other[each.about["seed"]] for each in own if each.about["seed"] in other]


def _paper_tables(scores: ScoreFolder) -> list[str]:
    """Those of the paper's tables into which networks of the scores belong."""
    tables: list[str] = []
    for number in PAPER_TABLES:
        try:
            tables.append(render(paper_table(number, [scores]), "html"))
        except InputError:
            continue
    return tables


def _scored(by_scheme: Mapping[str, Sequence[Run]], scores: ScoreFolder) -> dict[str, Any]:
    """What needs the scores of single images: photos, confusion, gains by class."""
    kind: Kind = "single-crop"
    there = {name: scores.about(name) for name in scores.names() if kind in scores.protocols(name)}
    own: dict[str, list[str]] = {}
    for scheme, members in by_scheme.items():
        seeds = {each.about["seed"] for each in members}
        own[scheme] = [
            name
            for name, about in there.items()
            if about.get("values", {}).get("scheme") == scheme and about.get("seed") in seeds
        ]
    own = {scheme: names for scheme, names in own.items() if names}
    if not own:
        raise InputError(f"{scores.path} holds no single-crop scores of these runs: relaylab eval RUN...")
    classes, labels = scores.images.classes, scores.images.labels
    shown = "relay" if "relay" in own else list(own)[-1]
    network = own[shown][0]
    log_probabilities = scores.protocol(network, kind)
    counts = sum((confusion(scores.protocol(name, kind), labels) for name in own[shown]), start=np.zeros(1, np.int64))
    missing, photos = "", dict[str, str]()
    try:
        source = images_of(scores, network)
    except InputError as error:  # a page without photos is better than none
        missing = str(error)
    else:
        photos = {
            what: _png(photo_figure(found, ""))
            for what, right in (("rightly", True), ("wrongly", False))
            if (found := pick_photos(source, classes, log_probabilities, right=right))
        }
    gains = None
    if "standard" in own and shown != "standard":
        errors = {
            scheme: np.mean([per_class_errors(scores.protocol(name, kind), labels) for name in own[scheme]], axis=0)
            for scheme in ("standard", shown)
        }
        gains = _svg(page_pictures.gain_picture(errors["standard"] - errors[shown], classes))
    return {
        "method": SCHEMES[shown],
        "network": network,
        "networks": len(own[shown]),
        "photos": photos,
        "missing": missing,
        "confusion": _svg(page_pictures.confusion_picture(counts, classes)),
        "pairs": _worst_pairs(counts, classes),
        "gains": gains,
    }


def _worst_pairs(counts: np.ndarray[Any, np.dtype[np.int64]], classes: Sequence[str]) -> list[tuple[str, str, str]]:
    wrong = counts - np.diag(np.diag(counts))
    shares = 100 * wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = np.argsort(shares, axis=None)[::-1][:PAIRS]
    places = [np.unravel_index(int(place), shares.shape) for place in order]
    return [(plain(classes[int(i)]), plain(classes[int(j)]), f"{shares[i, j]:.0f}") for i, j in places]


def _origin(each: Run) -> dict[str, str]:
    start = each.starts[-1]
    versions: Mapping[str, str] = start.get("versions", {})
    return {
        "name": each.folder.resolve().name,
        "command": " ".join(map(str, start.get("command", []))),
        "started": str(each.starts[0].get("started_at", "")),
        "where": f"{start.get('device')}, processes: {start.get('processes')}, threads: {start.get('threads')}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "step": str(each.last["step"]),
    }


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _has_gradients(each: Run) -> bool:
    return any(line["kind"] == "gradients" for line in each.metrics)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _svg(text: str) -> str:
    return f"data:image/svg+xml;base64,{b64encode(text.encode()).decode()}"


def _png(figure: Figure) -> str:
    file = BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
