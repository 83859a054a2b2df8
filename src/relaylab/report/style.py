"""The look of all plots and the schemes' names and colours; plots as SVG text, layers' names as words."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relaylab.files import replacing
from relaylab.recipes.schema import SCHEMES

INK = "#1c1c1c"
# Okabe and Ito's colours, which colour-blind readers can tell apart. One colour means one thing in every picture.
SCHEME_COLOURS = {"standard": "#4d4d4d", "multi_loss": "#cc79a7", "relay": "#009e73", "isolated": "#0072b2"}
SCHEME_NAMES = {**SCHEMES, "multi_loss": "multi-loss"}  # short, for sentences and legends; tables have the paper's
SCHEME_DASHES = {"standard": "--", "multi_loss": "-.", "relay": "-", "isolated": ":"}

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "relaylab",
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


def plot(
    draw: Callable[[Axes], None],
    title: str,
    unit: str,
    *,
    size: tuple[float, float] = (5.3, 3.6),
    legend: Literal["inside", "below"] | None = "inside",
) -> str:
    """A plot as SVG text, the same text each time.

    Args:
        draw: puts the data onto the axes.
        title: above the plot.
        unit: on the vertical axis.
        size: width and height in inches.
        legend: where what was drawn with a label is named; None to leave it out.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
        axes.set_ylabel(unit)
        if legend == "inside":
            axes.legend(fontsize=10)
        elif legend == "below":
            columns = min(3, len(axes.get_legend_handles_labels()[1]))
            figure.legend(loc="outside lower center", ncols=columns, fontsize=10)
    return figure_text(figure)


def figure_text(figure: Figure) -> str:
    """A figure as SVG text, the same text each time."""
    file = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure in one piece, as SVG or PNG, the same bytes each time.

    Args:
        figure: of matplotlib.
        path: ends in .svg or .png.

    Raises:
        OSError: it cannot be written.
    """
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context(STYLE), replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=144, metadata=metadata)
        temporary.chmod(0o644)


def layer_name(name: str) -> str:
    """Name a layer in words: "segment4.conv2" becomes "segment 4, conv 2", "layer3.0.conv1" "layer3.0, conv1"."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = re.sub(r"^heads\.", "head ", parent)
    if re.fullmatch(r"segment\d+|classifier", parent):
        parent, leaf = (re.sub(r"(?<=[a-z])(?=\d+$)", " ", part) for part in (parent, leaf))
    return f"{parent}, {leaf}" if parent else leaf
