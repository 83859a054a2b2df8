"""The figures of docs/evidence/first-check.md: learning rates, the errors of each arm, and learning curves."""

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.findings import Finding, Size, read_findings, scheme_of
from experiments.studies import CURVES, METHODS, PLOTTED, RATES, STUDIES, Study
from relaylab.report.style import SCHEME_COLOURS, SCHEME_DASHES, STYLE


def figures(size: Size) -> dict[str, Figure]:
    """Return the figures of an image size, by the last part of their file names."""
    findings = read_findings(size)
    with rc_context(STYLE):
        return {
            "rates": rates_figure(findings),
            "errors": errors_figure([STUDIES[name] for name in PLOTTED[size]], findings),
            "curves": curves_figure([STUDIES[name] for name in CURVES[size]], findings),
        }


def rates_figure(findings: Sequence[Finding]) -> Figure:
    """Plot the top-1 error on held-out images against the learning rate, one line per scheme."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for label, scheme in METHODS.items():
        errors = {run.rate: run.top1 for run in findings if run.arm.startswith(f"selection/{scheme}-")}
        axes.plot(RATES, [errors[rate] for rate in RATES], marker="o", linewidth=2, label=label, **_look(scheme))
    axes.set_xscale("log")
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("top-1 error, per cent")
    axes.set_title("On images set aside, after a quarter of the iterations")
    axes.legend(fontsize=9)
    return figure


def errors_figure(studies: Sequence[Study], findings: Sequence[Finding]) -> Figure:
    """Plot the top-1 errors of each arm, one panel per study: a point per seed, and a bar at the mean.

    Collapsed runs are counted next to the panel.
    """
    heights = [len(study.arms) + 1.5 for study in studies]
    figure = Figure(figsize=(8, 0.36 * sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(studies), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, study in zip(panels, studies, strict=True):
        _errors_panel(axes, study, findings)
    panels[-1].set_xlabel("top-1 error on the validation images, per cent; to the left is better")
    return figure


def _errors_panel(axes: Axes, study: Study, findings: Sequence[Finding]) -> None:
    for row, (label, arm) in enumerate(study.arms.items()):
        runs = study.runs(label, findings)
        learnt = [run.top1 for run in runs if not run.collapsed]
        lost = len(runs) - len(learnt)
        note = "not run" if not runs else f"{lost} of {len(runs)} collapsed" if lost else ""
        axes.text(1.01, row, note, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        if learnt:
            colour = SCHEME_COLOURS[scheme_of(arm)]
            axes.plot(learnt, [row] * len(learnt), "o", color=colour, markersize=5, alpha=0.7)
            axes.plot(statistics.fmean(learnt), row, "|", color=colour, markersize=18, markeredgewidth=2.5)
    axes.set_yticks(range(len(study.arms)), list(study.arms))
    axes.set_ylim(len(study.arms) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.set_title(study.title, x=-0.3)


def curves_figure(studies: Sequence[Study], findings: Sequence[Finding]) -> Figure:
    """Plot the top-1 error against iterations, one panel per study: the mean over seeds, and faint lines per seed.

    Collapsed runs are excluded, and counted in the legend.
    """
    figure = Figure(figsize=(5.2 * len(studies), 3.8), layout="constrained")
    for axes, study in zip(figure.subplots(1, len(studies), squeeze=False, sharey=True)[0], studies, strict=True):
        for label, arm in study.arms.items():
            runs = study.runs(label, findings)
            curves = [run.curve for run in runs if not run.collapsed]
            look = _look(scheme_of(arm))
            for curve in curves:
                axes.plot(list(curve), list(curve.values()), color=look["color"], linewidth=0.8, alpha=0.3)
            steps = list(curves[0])
            means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
            counted = f"{label} ({len(curves)} of {len(runs)} seeds)" if len(curves) < len(runs) else label
            axes.plot(steps, means, linewidth=2.2, label=counted, **look)
        axes.set_title(study.title)
        axes.set_xlabel("iteration")
        axes.legend(fontsize=9)
    figure.axes[0].set_ylabel("top-1 error, per cent")
    return figure


def _look(scheme: str) -> dict[str, Any]:
    return {"color": SCHEME_COLOURS[scheme], "linestyle": SCHEME_DASHES[scheme]}
