"""The balance of classes: images of each class, and how often sampling draws each class in an epoch."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from relaylab.data.sampling import SAMPLERS
from relaylab.report.style import plot

NAMED_CLASSES = 40  # more names than these cannot be read
BAR_COLOUR, LINE_COLOURS = "#b9c0c7", ("#d55e00", "#0072b2")


def draws_per_epoch(counts: ArrayLike, sampling: str) -> NDArray[np.float64]:
    """Return how often each class is drawn, on average, in as many draws as there are images.

    Args:
        counts: (C,) images of each class.
        sampling: a key of `SAMPLERS`.
    """
    sizes = np.asarray(counts)
    turns = getattr(SAMPLERS[sampling], "turns", None)  # plain shuffling has none
    shares = sizes if turns is None else turns(sizes)
    return sizes.sum() * shares / shares.sum()


def balance_picture(
    counts: Mapping[str, ArrayLike],
    classes: Sequence[str],
    *,
    title: str,
    unit: str,
    size: tuple[float, float] = (7.4, 3.6),
) -> str:
    """A bar for each class and a line for each further count, the classes sorted by the bars.

    Args:
        counts: by what is counted, (C,) one number for each class; the first are the bars.
        classes: their names.
        title: of the picture.
        unit: on the vertical axis.
        size: width and height in inches.

    Returns:
        SVG.
    """
    columns = {name: np.asarray(values) for name, values in counts.items()}
    order = np.argsort(-next(iter(columns.values())), kind="stable")
    places = np.arange(len(classes))

    def draw(axes: Axes) -> None:
        for number, (name, values) in enumerate(columns.items()):
            if number == 0:
                width = 0.8 if len(classes) <= NAMED_CLASSES else 1.0
                axes.bar(places, values[order], width=width, color=BAR_COLOUR, label=name)
            else:
                axes.plot(places, values[order], color=LINE_COLOURS[number - 1], linewidth=2, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlim(-0.6, len(classes) - 0.4)
        axes.grid(visible=False, axis="x")
        axes.set_axisbelow(True)
        if len(classes) <= NAMED_CLASSES:
            names = [classes[int(label)][:24].replace("$", r"\$") for label in order]
            axes.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
        else:
            axes.set_xlabel(f"{len(classes)} classes, the largest first")

    legend = "below" if len(columns) > 1 else None  # the bars leave it no room inside
    return plot(draw, title.replace("$", r"\$"), unit, size=size, legend=legend)
