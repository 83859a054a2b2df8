"""The evidence's pictures: errors of each arm, errors along training, gradients by layer, angles between losses."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.studies import ARMS, METHODS, RATES, SELECTION, STUDIES, Study
from experiments.tables import Finding
from relaylab.report.style import INK, SCHEME_COLOURS, SCHEME_DASHES, STYLE

Lines = Sequence[Mapping[str, Any]]


def errors_figure(names: Sequence[str], found: Sequence[Finding]) -> Figure:
    """Top-1 errors of all arms of some studies, a panel each: a point for each seed, a bar at their mean.

    Collapsed runs are counted beside the panel.

    Args:
        names: of studies.
        found: of all runs.
    """
    shown = [STUDIES[name] for name in names]
    heights = [len(study.arms) + 1.5 for study in shown]
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 0.36 * sum(heights) + 0.4), layout="constrained")
        panels = figure.subplots(len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, study in zip(panels, shown, strict=True):
            _errors(axes, study, found)
        panels[-1].set_xlabel("top-1 error on the validation images, per cent; to the left is better")
    return figure


def _errors(axes: Axes, study: Study, found: Sequence[Finding]) -> None:
    for place, name in enumerate(study.arms.values()):
        own = [each for each in found if each.arm == name and study.counts(name, each.seed)]
        good = [each.top1 for each in own if not each.collapsed]
        lost = len(own) - len(good)
        told = "not run" if not own else f"{lost} of {len(own)} collapsed" if lost else ""
        axes.text(1.01, place, told, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        if good:
            colour = SCHEME_COLOURS[ARMS[name].scheme]
            axes.plot(good, [place] * len(good), "o", color=colour, markersize=5, alpha=0.7)
            axes.plot(statistics.fmean(good), place, "|", color=colour, markersize=18, markeredgewidth=2.5)
    axes.set_yticks(range(len(study.arms)), list(study.arms))
    axes.set_ylim(len(study.arms) - 0.5, -0.5)
    axes.margins(x=0.1)
    axes.set_title(study.title, x=-0.3)


def rates_figure(found: Sequence[Finding]) -> Figure:
    """Top-1 errors on images set aside, against the learning rate, a line for each scheme."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        for word, scheme in METHODS.items():
            arms = {f"{SELECTION}/{scheme}-{rate:g}": rate for rate in RATES}
            own = {arms[each.arm]: each.top1 for each in found if each.arm in arms}
            look: dict[str, Any] = {"color": SCHEME_COLOURS[scheme], "linestyle": SCHEME_DASHES[scheme]}
            axes.plot(sorted(own), [own[rate] for rate in sorted(own)], marker="o", linewidth=2, label=word, **look)
        axes.set_xscale("log")
        axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        axes.minorticks_off()
        axes.set_xlabel("learning rate")
        axes.set_ylabel("top-1 error, per cent")
        axes.set_title("On images set aside, after a quarter of the iterations")
        axes.legend(fontsize=9)
    return figure


def curves_figure(names: Sequence[str], found: Sequence[Finding]) -> Figure:
    """Top-1 error against iterations, a panel for each study: the mean over seeds, and each seed faint behind it.

    Runs that collapsed are left out, and the legend says so.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(names), 3.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
            for word, arm in STUDIES[name].arms.items():
                seeds = [each for each in found if each.arm == arm]
                own = [each.curve for each in seeds if not each.collapsed]
                if not own:
                    continue
                told = f"{word} ({len(own)} of {len(seeds)} seeds)" if len(own) < len(seeds) else word
                scheme, weight = ARMS[arm].scheme, 1.2 if ARMS[arm].changes else 2.2
                look: dict[str, Any] = {"color": SCHEME_COLOURS[scheme], "linestyle": SCHEME_DASHES[scheme]}
                for curve in own if len(own) > 1 else []:
                    axes.plot(list(curve), list(curve.values()), color=look["color"], linewidth=0.8, alpha=0.3)
                means = [statistics.fmean(curve[step] for curve in own) for step in own[0]]
                axes.plot(list(own[0]), means, linewidth=weight, label=told, **look)
            axes.set_title(STUDIES[name].title)
            axes.set_xlabel("iteration")
            axes.legend(fontsize=9)
        figure.axes[0].set_ylabel("top-1 error, per cent")
    return figure


def angles_figure(runs: Mapping[str, Sequence[Lines]], arms: Mapping[str, str]) -> Figure:
    """Cosine of the angle between two losses' gradients on the layers that they share, against iterations.

    Args:
        runs: by title, the metrics of its seeds.
        arms: by title, which arm they are of.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for title, own in runs.items():
            arm = ARMS[arms[title]]
            by_step: dict[int, list[float]] = {}
            for line in (line for lines in own for line in lines if line["kind"] == "gradients"):
                for pairs in line.get("cosines", {}).values():
                    by_step.setdefault(line["step"], []).extend(pairs.values())
            steps = sorted(step for step in by_step if len(by_step[step]) == max(map(len, by_step.values())))
            means = [statistics.fmean(by_step[step]) for step in steps]
            dash = ":" if arm.changes else SCHEME_DASHES[arm.scheme]
            axes.plot(steps, means, linewidth=2, label=title, color=SCHEME_COLOURS[arm.scheme], linestyle=dash)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_ylabel("cosine, primary and auxiliary gradient")
        axes.set_xlabel("iteration")
        axes.legend(fontsize=10)
    return figure
