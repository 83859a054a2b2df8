"""The report's own pictures: learning curves, angles between losses, confusion, gains by class."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from relaylab.report.paper_figures import plain
from relaylab.report.style import SCHEME_COLOURS, SCHEME_DASHES, SCHEME_NAMES, STYLE, figure_text, plot

Lines = Sequence[Mapping[str, Any]]
IN_RANGE = 0.8  # of guessing: curves that reach it are shown together with its line
GAIN, LOSS = "#009e73", "#d55e00"


def curve_picture(
    runs: Mapping[str, Sequence[Lines]],
    kind: str,
    quantity: str,
    title: str,
    unit: str,
    *,
    guess: float | None = None,
    size: tuple[float, float] = (5.6, 3.6),
) -> str:
    """A quantity against iterations: the mean over seeds, and a band from the least to the greatest.

    Args:
        runs: for each scheme, the metrics of its runs.
        kind: of the lines.
        quantity: a name in them, dotted for groups.
        title: above the picture.
        unit: on the vertical axis.
        guess: the value that guessing gives, which has a line of its own unless all values are far below it.
        size: width and height in inches.
    """

    def draw(axes: Axes) -> None:
        for scheme, own in runs.items():
            rows = [{line["step"]: _at(line, quantity) for line in lines if line["kind"] == kind} for lines in own]
            steps = sorted(set.intersection(*(set(row) for row in rows)))
            values = [[row[step] for row in rows] for step in steps]
            colour = SCHEME_COLOURS[scheme]
            if len(rows) > 1:
                axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, lw=0)
            marker = "o" if len(steps) == 1 else None
            means = list(map(statistics.fmean, values))
            look: dict[str, Any] = {"color": colour, "linestyle": SCHEME_DASHES[scheme], "marker": marker}
            axes.plot(steps, means, linewidth=2, label=SCHEME_NAMES[scheme], **look)
        if guess is not None and axes.get_ylim()[1] >= IN_RANGE * guess:
            axes.axhline(guess, color="#555555", linewidth=1.2, linestyle=(0, (1, 2)), label="guessing")
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))

    return plot(draw, title, unit, size=size, legend="below")


def angle_picture(runs: Mapping[str, Sequence[Lines]]) -> str | None:
    """The cosines between losses' gradients where windows overlap, against iterations; None if there are none."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for scheme, own in runs.items():
        for line in (line for lines in own for line in lines if line["kind"] == "gradients"):
            for pairs in line.get("cosines", {}).values():
                for pair, cosine in pairs.items():
                    found.setdefault(scheme, {}).setdefault(pair, {}).setdefault(line["step"], []).append(cosine)
    if not found:
        return None

    def draw(axes: Axes) -> None:
        for scheme, pairs in found.items():
            for pair, by_step in pairs.items():
                steps = sorted(by_step)
                means = [statistics.fmean(by_step[step]) for step in steps]
                look: dict[str, Any] = {"color": SCHEME_COLOURS[scheme], "linestyle": SCHEME_DASHES[scheme]}
                axes.plot(steps, means, linewidth=2, label=f"{SCHEME_NAMES[scheme]}: {pair}", **look)
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_xlabel("iteration")

    return plot(draw, "Angle between the losses' gradients, shared layers", "cosine", size=(5.6, 3.4), legend="below")


def _at(line: Mapping[str, Any], name: str) -> float:
    value: Any = line
    for part in name.split("."):
        value = value[part]
    return float(value)


def confusion_picture(counts: NDArray[np.int64], classes: Sequence[str]) -> str:
    """Which class is taken for which: a row for each class, in per cent of its images.

    Args:
        counts: (classes, classes), rows are what it is, columns what it is taken for.
        classes: names.
    """
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    many = len(classes) > 40
    size = 8.0 if many else max(4.5, 0.3 * len(classes) + 2)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(size + 1, size), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="viridis", vmin=0, interpolation="nearest")
        figure.colorbar(image, ax=axes, label="per cent of the class's images", shrink=0.8)
        if not many:
            names = [plain(name) for name in classes]
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("taken for")
        axes.set_ylabel("is")
    return figure_text(figure)


def gain_picture(gains: NDArray[np.float64], classes: Sequence[str], most: int = 40) -> str:
    """By how many points the error of each class is lower; of many classes, those at both ends.

    Args:
        gains: (classes,), in points of top-1 error; positive is better.
        classes: names.
        most: of the classes that are shown.
    """
    order = [int(i) for i in np.argsort(gains) if not np.isnan(gains[i])]
    shown = order if len(order) <= most else [*order[: most // 2], *order[-most // 2 :]]
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(5.6, 0.24 * len(shown) + 1), layout="constrained")
        axes = figure.add_subplot()
        colours = [GAIN if gains[i] >= 0 else LOSS for i in shown]
        axes.barh(range(len(shown)), [gains[i] for i in shown], color=colours)
        axes.set_yticks(range(len(shown)), [plain(classes[i]) for i in shown], fontsize=9)
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.set_xlabel("points of top-1 error below standard BP")
        axes.margins(y=0.01)
    return figure_text(figure)
