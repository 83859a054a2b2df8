"""The page about runs: one HTML file that needs nothing but itself."""

from pathlib import Path

from relaylab.evaluate.scores import ScoreFolder
from relaylab.report.comparison import Comparison
from relaylab.report.curves import angle_picture, curve_picture
from relaylab.report.html import render_template, svg_uri
from relaylab.report.images import balance, is_embedded, sample_strips
from relaylab.report.paper_figures import gradient_figure, window_figure
from relaylab.report.paper_tables import NAMES
from relaylab.report.scored import scored
from relaylab.report.style import SCHEME_NAMES
from relaylab.report.summary import TITLES, failure_table, papers_table, recipe_table, run_table, summary, tops
from relaylab.report.verdict import chance_error, in_question, verdict
from relaylab.tables import Table, render


def render_page(comparison: Comparison, scores: ScoreFolder | None = None, *, images: bool = False) -> str:
    """Return the page as HTML text: no scripts, nothing from elsewhere.

    Args:
        comparison: the runs.
        scores: of their networks; None leaves out what needs them.
        images: show training images; those that the lab has itself are always shown.
    """
    by_scheme, first = comparison.by_scheme, comparison.runs[0]
    metrics = {scheme: [each.metrics for each in own] for scheme, own in by_scheme.items()}
    classes = len(first.classes)
    curves = {top: _curve(comparison, top) for top in tops(comparison)}
    more = [(f"Validation error, {TITLES[top]}", curve) for top, curve in curves.items() if top != "top1"]
    if all(any(line["kind"] == "train" for line in each.metrics) for each in comparison.runs):
        title = "Training loss, primary"
        more.append((title, svg_uri(curve_picture(metrics, "train", "loss.primary", title, "nats"))))
    more.append(("Validation loss", svg_uri(curve_picture(metrics, "val", "loss", "Validation loss", "nats"))))
    looks = {SCHEME_NAMES[scheme]: own[0].metrics for scheme, own in by_scheme.items()}
    looks = {name: lines for name, lines in looks.items() if any(line["kind"] == "gradients" for line in lines)}
    angles = angle_picture(metrics)
    failures, papers = failure_table(comparison), papers_table(comparison)
    return render_template(
        "relaylab.report",
        "page.html.j2",
        title=question(comparison),
        recipe=first.recipe,
        network=_network(comparison),
        images=" and ".join(Path(path).name for path in first.about["data"]),
        counts={part: sum(counts) for part, counts in first.counts.items()},
        classes=classes,
        verdict=verdict(comparison.errors("top1")),
        summary=_html(summary(comparison)),
        failures=failures and _html(failures),
        curve=curves["top1"],
        curves=more,
        papers=papers and _html(papers),
        windows=[
            (SCHEME_NAMES[scheme], svg_uri(window_figure(own[0].recipe, SCHEME_NAMES[scheme])))
            for scheme, own in by_scheme.items()
        ],
        gradients=[(name, svg_uri(gradient_figure(looks, name))) for name in looks],
        angles=angles and svg_uri(angles),
        samples=sample_strips(first) if images or is_embedded(first) else None,
        balance=balance(first),
        scored=None if scores is None else scored(by_scheme, scores),
        runs=_html(run_table(comparison)),
        commands=_commands(comparison),
        fields=_html(recipe_table(comparison)),
    )


def _curve(comparison: Comparison, top: str) -> str:
    metrics = {scheme: [each.metrics for each in own] for scheme, own in comparison.by_scheme.items()}
    guess = chance_error(len(comparison.runs[0].classes), int(top[3:]))
    title = f"Validation error, {TITLES[top]}"
    return svg_uri(curve_picture(metrics, "val", top, title, "per cent", guess=guess, size=(5.6, 3.3)))


def question(comparison: Comparison) -> str:
    """Return the question that a comparison answers: the page's title."""
    schemes, network = comparison.errors("top1"), _network(comparison)
    ours = in_question(schemes)
    if ours is None:
        return f"{network[0].upper()}{network[1:]} trained by {SCHEME_NAMES[next(iter(schemes))]}"
    *others, last = (SCHEME_NAMES[scheme] for scheme in schemes if scheme != ours)
    bases = f"{', '.join(others)} and {last}" if others else last
    return f"Does {SCHEME_NAMES[ours]} train {network} better than {bases}?"


def _commands(comparison: Comparison) -> dict[str, list[str]]:
    """Return the runs that each command line has started or resumed last."""
    found: dict[str, list[str]] = {}
    for run in comparison.runs:
        command = " ".join(map(str, run.starts[-1].get("command", [])))
        found.setdefault(command, []).append(run.folder.resolve().name)
    return found


def _network(comparison: Comparison) -> str:
    architecture = comparison.runs[0].recipe.network.architecture
    return NAMES.get(architecture, architecture)


def _html(table: Table) -> str:
    return render(table, "html")
