"""Class balance: images per class, and draws per class in an epoch."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from relaylab.data.sampling import SAMPLERS
from relaylab.outside.showing import picture
from relaylab.report.style import BELOW_AXIS, plot

NAMED_CLASSES = 40  # more class names would be illegible
BAR_COLOUR, LINE_COLOURS = "#b9c0c7", ("#d55e00", "#0072b2")


def draws_per_epoch(counts: ArrayLike, sampling: str) -> NDArray[np.float64]:
    """Return the expected draws per class (classes,) in an epoch, from the class sizes (classes,)."""
    sizes = np.asarray(counts)
    turns = getattr(SAMPLERS[sampling], "turns", None)  # plain shuffling has none
    shares = sizes if turns is None else turns(sizes)
    return sizes.sum() * shares / shares.sum()


def balance_plot(
    counts: Mapping[str, ArrayLike],
    classes: Sequence[str],
    *,
    title: str,
    unit: str,
    size: tuple[float, float] = (7.4, 3.6),
) -> str:
    """Plot counts per class as SVG: bars for the first series, lines for further ones, sorted by the bars.

    Args:
        counts: (classes,) by legend label.
        classes: names of the classes.
        title: title of the plot.
        unit: label of the vertical axis.
        size: width and height in inches.
    """
    (bars, sizes), *lines = ((name, np.asarray(values)) for name, values in counts.items())
    order = np.argsort(-sizes, kind="stable")
    positions = np.arange(len(classes))
    is_named = len(classes) <= NAMED_CLASSES

    def draw(axes: Axes) -> None:
        axes.bar(positions, sizes[order], width=0.8 if is_named else 1.0, color=BAR_COLOUR, label=bars)
        for colour, (name, values) in zip(LINE_COLOURS, lines, strict=False):
            axes.plot(positions, values[order], color=colour, linewidth=2, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.6, len(classes) - 0.4)
        axes.grid(visible=False, axis="x")
        axes.set_axisbelow(True)
        if is_named:
            names = [picture(classes[int(label)][:24]) for label in order]
            axes.set_xticks(positions, names, **BELOW_AXIS)
        else:
            axes.set_xlabel(f"{len(classes)} classes, largest first")

    return plot(draw, title, unit, size=size, legend=bool(lines))
