"""Draw networks with their heads and windows, like the paper's Figure 2."""

from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from relaylab.outside.showing import picture
from relaylab.report.stages import Loss, Stage
from relaylab.report.style import INK, STYLE

# Okabe and Ito's colour-blind safe palette: strong for a loss, light for the layers that it trains.
PRIMARY = "#0072b2", "#cfe5f3"
AUXILIARY = ("#d55e00", "#fbdcc5"), ("#009e73", "#c5e8dc"), ("#b0558f", "#f0d9e6"), ("#8a6d00", "#f3e6b8")
QUIET = "#6b6b6b"

# Lengths are in points, so that text fits whatever the number of stages.
NARROW, WIDE, HEIGHT, GAP = 150, 252, 44, 26  # of a stage; GAP is the arrow between two stages
BAR, HEAD = 22, (128, 40)  # distance between bars, and size of a head
MARGIN, GROUND = 10, 52  # GROUND is the bottom of the lowest stage
LETTER = 5.7  # width of a letter in a stage's description at full size


def draw_network(
    stages: Sequence[Stage], losses: Sequence[Loss], title: str = "", *, room_for_heads: bool = False
) -> Figure:
    """Draw the forward pass in black, from the image up, and each loss with a bar along the layers that it trains.

    Args:
        stages: stages from lowest to highest.
        losses: the primary loss, then the auxiliary losses from the lowest head to the highest.
        title: title of the figure.
        room_for_heads: reserve the width of a head even without heads, for figures side by side.
    """
    colours = {loss.name: (PRIMARY, *AUXILIARY)[min(index, len(AUXILIARY))] for index, loss in enumerate(losses)}
    primary, *auxiliary = losses
    left = MARGIN + 50
    right = left + min(max(NARROW, 12 + LETTER * max(len(_words(stage)) for stage in stages)), WIDE)
    heads = right + BAR * (max(len(auxiliary), 1) + 1) + 4
    width = heads + HEAD[0] + MARGIN if auxiliary or room_for_heads else right + 50
    roof = GROUND + (HEIGHT + GAP) * len(stages)
    height = roof + 34 + (26 if title else 0)
    with rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(0, height)
        axes.set_axis_off()
        middle = (left + right) / 2
        if title:
            axes.text(MARGIN, height - 10, picture(title), fontsize=12, fontweight="bold", va="top", color=INK)
        axes.text(middle, 8, "image", ha="center", va="bottom", fontsize=10, color=INK)
        for index, stage in enumerate(stages):
            _stage(axes, stage, left, right - left, _floor(index), [colours[loss] for loss in stage.losses])
        _arrow(axes, (middle, roof - GAP), (middle, roof + 4), INK, 1.4)
        _box(axes, (middle - 60, roof + 4), (120, 26), ["primary loss"], colours[primary.name][0])
        _window(axes, primary, (middle - 60, roof + 17), left - BAR, colours[primary.name][0])
        # From the highest down, so that the arrow to a lower head is drawn over the bar of a higher one.
        for index, loss in reversed(list(enumerate(auxiliary))):
            colour = colours[loss.name][0]
            level = _floor(loss.top) + HEIGHT + GAP / 2
            _arrow(axes, (middle, level), (heads, level), INK, 1.4)
            words = [f"head of {loss.name}", f"weight {loss.weight:g}"]
            _box(axes, (heads, level - HEAD[1] + 12), HEAD, words, colour)
            bar = right + BAR * (len(auxiliary) - index)
            _window(axes, loss, (heads, level - HEAD[1] + 20), bar, colour)
    return figure


def _floor(index: int) -> float:
    return GROUND + (HEIGHT + GAP) * index


def _words(stage: Stage) -> str:
    return ", ".join(stage.layers) or stage.name


def _stage(
    axes: Axes, stage: Stage, left: float, width: float, floor: float, colours: Sequence[tuple[str, str]]
) -> None:
    stripe = width / max(len(colours), 1)
    for index, (_, tint) in enumerate(colours):  # a stripe in the colour of each loss that trains the stage
        axes.add_patch(Rectangle((left + stripe * index, floor), stripe, HEIGHT, facecolor=tint, linewidth=0))
    axes.add_patch(Rectangle((left, floor), width, HEIGHT, facecolor="none", edgecolor=INK, linewidth=1))
    middle, words = left + width / 2, _words(stage)
    axes.text(
        middle, floor + 28, picture(stage.name), ha="center", va="center", fontsize=10.5, fontweight="bold", color=INK
    )
    size = 9.5 * min(1, (width - 12) / (LETTER * len(words)))
    axes.text(middle, floor + 13, picture(words), ha="center", va="center", fontsize=size, color=INK)
    _arrow(axes, (middle, floor - GAP), (middle, floor), INK, 1.4)
    if stage.input_size is not None:
        side = stage.input_size
        axes.text(middle - 8, floor - GAP / 2, f"{side} x {side}", ha="right", va="center", fontsize=8, color=QUIET)


def _window(axes: Axes, loss: Loss, start: tuple[float, float], bar: float, colour: str) -> None:
    """Draw the bar of a loss, from its box down to the end of its window."""
    end = _floor(loss.low) - 2
    axes.plot([start[0], bar, bar], [start[1], start[1], end + 8], color=colour, linewidth=4, solid_joinstyle="miter")
    _arrow(axes, (bar, end + 14), (bar, end), colour, 4)
    axes.text(bar, end - 3, f"N={loss.depth}", ha="center", va="top", fontsize=9, fontweight="bold", color=colour)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> None:
    style = f"-|>,head_length={3 + width},head_width={1.5 + 0.8 * width}"
    options: dict[str, Any] = {"arrowstyle": style, "color": colour, "linewidth": width, "joinstyle": "miter"}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **options))


def _box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], lines: Sequence[str], colour: str) -> None:
    shape = "round,pad=0,rounding_size=5"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=shape, facecolor="white", edgecolor=colour, zorder=3))
    middle = corner[0] + size[0] / 2, corner[1] + size[1] / 2
    axes.text(
        *middle,
        "\n".join(map(picture, lines)),
        ha="center",
        va="center",
        fontsize=10,
        color=colour,
        linespacing=1.3,
        zorder=4,
    )
