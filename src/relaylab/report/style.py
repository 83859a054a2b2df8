"""Style of all plots: colours of the schemes, SVG output, and display names of layers."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from relaylab.files import atomic_write
from relaylab.outside.showing import picture

INK = "#1c1c1c"
# Okabe and Ito's colour-blind safe palette. Each scheme has the same colour in all plots.
SCHEME_COLOURS = {"standard": "#4d4d4d", "multi_loss": "#cc79a7", "relay": "#009e73", "isolated": "#0072b2"}
SCHEME_DASHES = {"standard": "--", "multi_loss": "-.", "relay": "-", "isolated": ":"}

BELOW_AXIS: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}  # long names
OTHER_SCRIPTS = (  # fonts, used if installed
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Devanagari", "Noto Sans Thai",
    "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Bengali", "Noto Sans Tamil",
)  # fmt: skip


def _fonts_of_other_scripts() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return [name for name in OTHER_SCRIPTS if name in installed]


STYLE: dict[Any, Any] = {
    "svg.hashsalt": "relaylab",
    "font.size": 11,
    "font.family": ["DejaVu Sans", *_fonts_of_other_scripts()],
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
    title: str = "",
    unit: str = "",
    *,
    size: tuple[float, float],
    legend: bool = False,
    grid: bool = True,
) -> str:
    """Return a plot as SVG text, deterministically.

    Args:
        draw: draws the data on the axes.
        title: title of the plot.
        unit: label of the vertical axis.
        size: width and height in inches.
        legend: show a legend below the plot.
        grid: show grid lines.
    """
    with rc_context({**STYLE, "axes.grid": grid}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(picture(title))
        axes.set_ylabel(picture(unit))
        if legend:
            columns = min(3, len(axes.get_legend_handles_labels()[1]))
            figure.legend(loc="outside lower center", ncols=columns, fontsize=10)
    return figure_text(figure)


def figure_text(figure: Figure) -> str:
    """Return a figure as SVG text, deterministically."""
    file = io.StringIO()
    with rc_context(STYLE), _without_warnings():
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure atomically and deterministically, as SVG or PNG according to the suffix."""
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context(STYLE), _without_warnings(), atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=144, metadata=metadata)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress the warnings for characters that no font has, which are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def layer_name(name: str) -> str:
    """Return the display name of a layer, such as "segment 4, conv 2" for "segment4.conv2"."""
    parent, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = re.sub(r"^heads\.", "head ", parent)
    if re.fullmatch(r"segment\d+|classifier", parent):
        parent, leaf = (re.sub(r"(?<=[a-z])(?=\d+$)", " ", part) for part in (parent, leaf))
    return f"{parent}, {leaf}" if parent else leaf
