"""Plots of the report: learning curves, cosines between losses, confusion matrices, gains per class."""

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
IN_RANGE = 0.8  # fraction of the chance level above which curves are plotted together with it
NAMED_CLASSES = 40  # more class names would be illegible
GAIN, LOSS = "#009e73", "#d55e00"


def curve_plot(
    runs: Mapping[str, Sequence[Lines]],
    kind: str,
    quantity: str,
    title: str,
    unit: str,
    *,
    guess: float | None = None,
    size: tuple[float, float] = (5.6, 3.6),
) -> str:
    """Plot a metric against iterations: the mean over seeds, with a band from the minimum to the maximum.

    Args:
        runs: metrics of the runs of each scheme.
        kind: kind of the lines of metrics: "train" or "val".
        quantity: name of the metric, dotted for groups.
        title: title of the plot.
        unit: label of the vertical axis.
        guess: chance level, drawn as a line unless all values are far below it.
        size: width and height in inches.

    Returns:
        SVG text.
    """

    def draw(axes: Axes) -> None:
        for scheme, scheme_runs in runs.items():
            rows = [
                {line["step"]: _at(line, quantity) for line in lines if line["kind"] == kind} for lines in scheme_runs
            ]
            steps = sorted(set.intersection(*map(set, rows)))
            values = [[row[step] for row in rows] for step in steps]
            ends = list(map(min, values)), list(map(max, values))
            if len(rows) > 1:
                axes.fill_between(steps, *ends, color=SCHEME_COLOURS[scheme], alpha=0.15, lw=0)
            _line(axes, scheme, dict(zip(steps, values, strict=True)), SCHEME_NAMES[scheme])
        if guess is not None and axes.get_ylim()[1] >= IN_RANGE * guess:
            axes.axhline(guess, color="#555555", linewidth=1.2, linestyle=(0, (1, 2)), label="chance level")
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))

    return plot(draw, title, unit, size=size, legend=True)


def cosine_plot(runs: Mapping[str, Sequence[Lines]]) -> str | None:
    """Plot the cosines between the losses' gradients in overlaps against iterations; None if there are none."""
    cosines: dict[str, dict[str, dict[int, list[float]]]] = {}
    for scheme, scheme_runs in runs.items():
        for line in (line for lines in scheme_runs for line in lines if line["kind"] == "gradients"):
            for pairs in line.get("cosines", {}).values():
                for pair, cosine in pairs.items():
                    cosines.setdefault(scheme, {}).setdefault(pair, {}).setdefault(line["step"], []).append(cosine)
    if not cosines:
        return None

    def draw(axes: Axes) -> None:
        for scheme, pairs in cosines.items():
            for pair, by_step in pairs.items():
                _line(axes, scheme, by_step, f"{SCHEME_NAMES[scheme]}: {pair}")
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_xlabel("iteration")

    return plot(draw, "Cosine between the gradients of two losses", "cosine", size=(5.6, 3.4), legend=True)


def _line(axes: Axes, scheme: str, by_step: Mapping[int, Sequence[float]], label: str) -> None:
    """Plot the mean of the values at each step."""
    steps = sorted(by_step)
    means = [statistics.fmean(by_step[step]) for step in steps]
    style: dict[str, Any] = {"color": SCHEME_COLOURS[scheme], "linestyle": SCHEME_DASHES[scheme], "linewidth": 2}
    axes.plot(steps, means, marker="o" if len(steps) == 1 else None, label=label, **style)


def _at(line: Mapping[str, Any], name: str) -> float:
    value: Any = line
    for part in name.split("."):
        value = value[part]
    return float(value)


def confusion_plot(counts: NDArray[np.int64], classes: Sequence[str]) -> str:
    """Plot a confusion matrix, with true classes as rows, in per cent of the images of each class."""
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    many = len(classes) > NAMED_CLASSES
    size = 8.0 if many else max(4.5, 0.3 * len(classes) + 2)

    def draw(axes: Axes) -> None:
        image = axes.imshow(shares, cmap="viridis", vmin=0, interpolation="nearest")
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.colorbar(image, ax=axes, label="% of the images of the class", shrink=0.8)
        if not many:
            names = [picture(plain(name)) for name in classes]
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
            axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("predicted class")

    return plot(draw, unit="true class", size=(size + 1, size), grid=False)


def gain_plot(gains: NDArray[np.float64], classes: Sequence[str], most: int = NAMED_CLASSES) -> str:
    """Plot the reduction of the top-1 error per class, in points; of many classes, the extremes."""
    order = [int(i) for i in np.argsort(gains) if not np.isnan(gains[i])]
    shown = order if len(order) <= most else [*order[: most // 2], *order[-most // 2 :]]

    def draw(axes: Axes) -> None:
        colours = [GAIN if gains[i] >= 0 else LOSS for i in shown]
        axes.barh(range(len(shown)), [gains[i] for i in shown], color=colours)
        axes.set_yticks(range(len(shown)), [picture(plain(classes[i])) for i in shown], fontsize=9)
        axes.axvline(0, color="#444444", linewidth=0.8)
        axes.set_xlabel("reduction of the top-1 error vs standard BP, points")
        axes.margins(y=0.01)

    return plot(draw, size=(5.6, 0.24 * len(shown) + 1), grid=False)
