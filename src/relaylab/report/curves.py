"""Plots of the report: learning curves, angles between losses, confusion, gains by class."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from relaylab.outside.showing import picture
from relaylab.recipes.schema import SCHEME_NAMES
from relaylab.report.paper_figures import plain
from relaylab.report.style import SCHEME_COLOURS, SCHEME_DASHES, plot

Lines = Sequence[Mapping[str, Any]]
IN_RANGE = 0.8  # of guessing: curves that reach it are shown together with its line
NAMED_CLASSES = 40  # more names than these cannot be read
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
    """Plot a quantity against iterations: the mean over seeds, and a band from the least to the greatest.

    Args:
        runs: for each scheme, the metrics of its runs.
        kind: of the lines.
        quantity: a name in them, dotted for groups.
        title: above the picture.
        unit: on the vertical axis.
        guess: the value of guessing, which has a line of its own unless all values are far below it.
        size: width and height in inches.
    """

    def draw(axes: Axes) -> None:
        for scheme, own in runs.items():
            rows = [{line["step"]: _at(line, quantity) for line in lines if line["kind"] == kind} for lines in own]
            steps = sorted(set.intersection(*map(set, rows)))
            values = [[row[step] for row in rows] for step in steps]
            ends = list(map(min, values)), list(map(max, values))
            if len(rows) > 1:
                axes.fill_between(steps, *ends, color=SCHEME_COLOURS[scheme], alpha=0.15, lw=0)
            _line(axes, scheme, dict(zip(steps, values, strict=True)), SCHEME_NAMES[scheme])
        if guess is not None and axes.get_ylim()[1] >= IN_RANGE * guess:
            axes.axhline(guess, color="#555555", linewidth=1.2, linestyle=(0, (1, 2)), label="guessing")
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))

    return plot(draw, title, unit, size=size, legend=True)


def angle_picture(runs: Mapping[str, Sequence[Lines]]) -> str | None:
    """Plot the cosines between losses' gradients where windows overlap, against iterations; None if there are none."""
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
                _line(axes, scheme, by_step, f"{SCHEME_NAMES[scheme]}: {pair}")
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_xlabel("iteration")

    return plot(draw, "Cosine between the losses' gradients, shared layers", "cosine", size=(5.6, 3.4), legend=True)


def _line(axes: Axes, scheme: str, by_step: Mapping[int, Sequence[float]], label: str) -> None:
    """Draw the means of the values at each step."""
    steps = sorted(by_step)
    means = [statistics.fmean(by_step[step]) for step in steps]
    look: dict[str, Any] = {"color": SCHEME_COLOURS[scheme], "linestyle": SCHEME_DASHES[scheme], "linewidth": 2}
    axes.plot(steps, means, marker="o" if len(steps) == 1 else None, label=label, **look)


def _at(line: Mapping[str, Any], name: str) -> float:
    value: Any = line
    for part in name.split("."):
        value = value[part]
    return float(value)


def confusion_picture(counts: NDArray[np.int64], classes: Sequence[str]) -> str:
    """Plot a confusion matrix, rows are the true classes, in per cent of each class's images."""
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    many = len(classes) > NAMED_CLASSES
    size = 8.0 if many else max(4.5, 0.3 * len(classes) + 2)

    def draw(axes: Axes) -> None:
        image = axes.imshow(shares, cmap="viridis", vmin=0, interpolation="nearest")
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.colorbar(image, ax=axes, label="per cent of the class's images", shrink=0.8)
        if not many:
            names = [picture(plain(name)) for name in classes]
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("predicted class")

    return plot(draw, unit="true class", size=(size + 1, size), grid=False)


def gain_picture(gains: NDArray[np.float64], classes: Sequence[str], most: int = NAMED_CLASSES) -> str:
    """Plot by how many points of top-1 error each class is better; of many classes, those at both ends."""
    order = [int(i) for i in np.argsort(gains) if not np.isnan(gains[i])]
    shown = order if len(order) <= most else [*order[: most // 2], *order[-most // 2 :]]

    def draw(axes: Axes) -> None:
        colours = [GAIN if gains[i] >= 0 else LOSS for i in shown]
        axes.barh(range(len(shown)), [gains[i] for i in shown], color=colours)
        axes.set_yticks(range(len(shown)), [picture(plain(classes[i])) for i in shown], fontsize=9)
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.set_xlabel("points of top-1 error below standard BP")
        axes.margins(y=0.01)

    return plot(draw, size=(5.6, 0.24 * len(shown) + 1), grid=False)
