"""How many images each class has, as a picture."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from relaylab.report.style import plot

NAMED_CLASSES = 40  # more names than these cannot be read
BAR_COLOUR, LINE_COLOURS = "#b9c0c7", ("#d55e00", "#0072b2")


def balance_picture(counts: Mapping[str, ArrayLike], classes: Sequence[str], *, title: str, unit: str) -> str:
    """A bar for each class and a line for each further count, the classes sorted by the bars.

    Args:
        counts: by what is counted, (C,) one number for each class; the first are the bars.
        classes: their names.
        title: of the picture.
        unit: on the vertical axis.

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
    return plot(draw, title.replace("$", r"\$"), unit, size=(7.4, 3.6), legend=legend)
