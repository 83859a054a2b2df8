"""The report of runs: one self-contained HTML page."""

import shlex
from pathlib import Path

from relaylab.errors import InputError
from relaylab.evaluate.scores import ScoreFolder
from relaylab.recipes.schema import SCHEME_NAMES, Recipe
from relaylab.report.comparison import Comparison
from relaylab.report.curves import cosine_plot, curve_plot
from relaylab.report.html import render_template, svg_uri
from relaylab.report.images import balance, is_embedded, sample_strips
from relaylab.report.paper_figures import gradient_figure, window_figure
from relaylab.report.paper_tables import NAMES
from relaylab.report.scored import scored
from relaylab.report.summary import (
    code_of,
    curve_title,
    failure_table,
    papers_table,
    recipe_table,
    run_table,
    summary,
    verdict_of,
)
from relaylab.report.tuned import tuning_plots, tuning_table
from relaylab.report.verdict import compared_scheme
from relaylab.tables import Table, render
from relaylab.train.metrics import TOP, Measure

DIGITS = "scikit-learn's handwritten digits"


def render_page(comparison: Comparison, scores: ScoreFolder | None = None, *, images: bool = False) -> str:
    """Return the report as HTML, without scripts and external resources.

    Args:
        comparison: the runs, at least one of them with a result.
        scores: scores of their networks; None to omit the sections that need them.
        images: include training images; the packaged digits are always included.
    """
    by_scheme, first, metrics = comparison.by_scheme, comparison.runs[0], comparison.metrics
    classes = len(first.classes)
    curve, *more = (_error_curve(comparison, measure) for measure in comparison.measures)
    if all(any(line["kind"] == "train" for line in run.metrics) for run in comparison.runs):
        title = "Training loss, primary"
        more.append((title, svg_uri(curve_plot(metrics, "train", "loss.primary", title, "nats"))))
    more.append(("Validation loss", svg_uri(curve_plot(metrics, "val", "loss", "Validation loss", "nats"))))
    probes = {SCHEME_NAMES[scheme]: scheme_runs[0].metrics for scheme, scheme_runs in by_scheme.items()}
    probes = {name: lines for name, lines in probes.items() if any(line["kind"] == "gradients" for line in lines)}
    windows = {SCHEME_NAMES[scheme]: scheme_runs[0].recipe for scheme, scheme_runs in by_scheme.items()}
    cosines = cosine_plot(metrics)
    failures, papers = failure_table(comparison), papers_table(comparison)
    return render_template(
        "relaylab.report",
        "page.html.j2",
        title=question(comparison),
        recipe=first.recipe,
        network=_network(comparison),
        images=DIGITS if is_embedded(first) else " and ".join(Path(path).name for path in first.about["data"]),
        counts=first.sizes,
        measure=comparison.measure,
        is_share=comparison.measure.name in TOP,
        classes=classes,
        verdict=verdict_of(comparison),
        tuning=_tuning(comparison),
        code=code_of(comparison),
        summary=_html(summary(comparison)),
        failures=failures and _html(failures),
        curve=curve[1],
        curves=more,
        papers=papers and _html(papers),
        windows=[(name, picture) for name, recipe in windows.items() for picture in _drawn(recipe, name)],
        gradients=[(name, svg_uri(gradient_figure(probes, name))) for name in probes],
        cosines=cosines and svg_uri(cosines),
        samples=sample_strips(first) if images or is_embedded(first) else None,
        balance=balance(first),
        scored=None if scores is None else scored(by_scheme, scores),
        runs=_html(run_table(comparison)),
        commands=_commands(comparison),
        fields=_html(recipe_table(comparison)),
    )


def _drawn(recipe: Recipe, title: str) -> list[str]:
    """Return the drawing of the windows as a data URI; empty for a custom network that cannot be drawn."""
    try:
        return [svg_uri(window_figure(recipe, title))]
    except InputError:
        if not recipe.network.is_named:
            raise
        return []


def _tuning(comparison: Comparison) -> tuple[dict[str, str], str] | None:
    """Return the plots of the tuning as data URIs by tuned value, and the table of its trials."""
    if comparison.tuning is None:
        return None
    pictures = {key: svg_uri(picture) for key, picture in tuning_plots(comparison.tuning, comparison.measure).items()}
    return pictures, _html(tuning_table(comparison.tuning, comparison.guess(), comparison.measure))


def _error_curve(comparison: Comparison, measure: Measure) -> tuple[str, str]:
    """Return the title of an error curve, and its plot as a data URI."""
    title, guess = curve_title(measure), comparison.guess(measure)
    picture = curve_plot(comparison.metrics, "val", measure.name, title, "per cent", guess=guess, size=(5.6, 3.3))
    return title, svg_uri(picture)


def question(comparison: Comparison) -> str:
    """Return the title of the report: the question that the comparison answers."""
    schemes, network = comparison.errors(), _network(comparison)
    ours = compared_scheme(schemes)
    if ours is None:
        return f"{network[0].upper()}{network[1:]} trained by {SCHEME_NAMES[next(iter(schemes))]}"
    *others, last = (SCHEME_NAMES[scheme] for scheme in schemes if scheme != ours)
    bases = f"{', '.join(others)} and {last}" if others else last
    return f"Does {SCHEME_NAMES[ours]} train {network} better than {bases}?"


def _commands(comparison: Comparison) -> dict[str, list[str]]:
    """Return the runs by the command line that last started or resumed them."""
    commands: dict[str, list[str]] = {}
    for run in comparison.runs:
        command = shlex.join(map(str, run.starts[-1].get("command", [])))
        commands.setdefault(command, []).append(run.folder.resolve().name)
    return commands


def _network(comparison: Comparison) -> str:
    architecture = comparison.runs[0].recipe.network.architecture
    return NAMES.get(architecture, architecture.rpartition("/")[2])  # for a Python file, its name without folders


def _html(table: Table) -> str:
    return render(table, "html")
