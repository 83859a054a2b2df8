"""The report's pictures as SVG text: the network with its windows, learning curves, gradient magnitudes."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from relaylab.pictures import INK, plot

# Okabe and Ito's colours, which colour-blind readers can tell apart. One colour means one thing in every picture.
SCHEME_COLOURS = {"standard": "#4d4d4d", "multi_loss": "#cc79a7", "relay": "#009e73"}
SCHEME_DASHES = {"standard": "--", "multi_loss": "-.", "relay": "-"}
LOSS_COLOURS = {"primary": "#0072b2", "aux": "#d55e00"}
LOSS_TINTS = {"primary": "#cfe5f3", "aux": "#fbdcc5"}
COLUMN, ROW, GAP = 152, 46, 24  # a box's width and height, and the arrow between two boxes


def learning_curves(figures: Mapping[str, Any], quantity: str, title: str, unit: str) -> str:
    """Mean over seeds against epochs, a line per scheme, with each seed's own curve faint behind it.

    Args:
        figures: as `relaylab.demo_report.collect` returns them.
        quantity: a key of a run's epochs.
        title: above the picture.
        unit: on the vertical axis.
    """
    curves = {scheme: _of_runs(figures, scheme, lambda run: _curve(run, quantity)) for scheme in figures["schemes"]}
    floor = 50 / figures["data"]["val_images"] if quantity.startswith("top") else 1e-6  # half an image, on a log scale
    values = np.maximum(np.concatenate(list(curves.values())), floor)
    return plot(lambda axes: _draw_curves(axes, figures, curves, floor, values.max() > 10 * values.min()), title, unit)


def _curve(run: Mapping[str, Any], quantity: str) -> list[float]:
    return [epoch[quantity] for epoch in run["epochs"]]


def _draw_curves(axes: Axes, figures: Mapping[str, Any], curves: Mapping[str, Any], floor: float, log: bool) -> None:
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    for scheme, rows in curves.items():
        epochs = np.arange(1, rows.shape[1] + 1)
        look: dict[str, Any] = {"color": SCHEME_COLOURS[scheme], "linestyle": SCHEME_DASHES[scheme]}
        shown = np.maximum(rows, floor) if log else rows
        if len(shown) > 1:
            axes.plot(epochs, shown.T, linewidth=0.8, alpha=0.3, color=SCHEME_COLOURS[scheme])
        marker = "o" if len(epochs) == 1 else None
        axes.plot(epochs, shown.mean(axis=0), linewidth=2, marker=marker, label=figures["schemes"][scheme], **look)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def gradients(figures: Mapping[str, Any], moment: str, *, relative: bool, title: str) -> str:
    """Gradient magnitude of each weight layer, a line per scheme: the paper's Figure 1.

    Args:
        figures: as `relaylab.demo_report.collect` returns them.
        moment: "start" or "end" of training.
        relative: divide by the weights' magnitude.
        title: above the picture.
    """
    names = list(figures["runs"][0]["gradients"][moment])

    def row(run: Mapping[str, Any]) -> list[float]:
        layers = run["gradients"][moment].values()
        return [layer["gradient"] / (layer["weight"] if relative else 1.0) for layer in layers]

    def draw(axes: Axes) -> None:
        if any(_of_runs(figures, scheme, row).max() > 0 for scheme in SCHEME_COLOURS):  # a dead network has no log
            axes.set_yscale("log")
        for scheme, colour in SCHEME_COLOURS.items():
            mean = _of_runs(figures, scheme, row).mean(axis=0)
            dashes = SCHEME_DASHES[scheme]
            # Lines coincide where windows do: the solid one is wide and lies below, so that the dashed ones show.
            width, order = (3.5, 2) if dashes == "-" else (1.4, 3)
            look: dict[str, Any] = {"linestyle": dashes, "linewidth": width, "zorder": order, "marker": "o"}
            axes.plot(mean, **look, markersize=4, color=colour, label=figures["schemes"][scheme])
        labels = [name.replace("segment", "").replace("classifier.", "").replace(".conv", "-") for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=60 if len(names) > 14 else 0, fontsize=9)
        axes.set_xlabel("weight layer, lowest on the left (segment-convolution, fc)")

    return plot(draw, title, "mean |gradient| / mean |weight|" if relative else "mean |gradient|")


def _of_runs(
    figures: Mapping[str, Any], scheme: str, values: Callable[[Mapping[str, Any]], Sequence[float]]
) -> np.ndarray:
    return np.array([values(run) for run in figures["runs"] if run["scheme"] == scheme])


def network(figures: Mapping[str, Any], scheme: str) -> str:
    """The network under one scheme as in the paper's Figure 2: black goes forward, colours show what each loss trains.

    Args:
        figures: as `relaylab.demo_report.collect` returns them.
        scheme: whose windows to draw.
    """
    parts: list[dict[str, Any]] = figures["network"]["parts"]
    names = [part["name"] for part in parts]
    windows: dict[str, dict[str, Any]] = figures["plans"][scheme]["windows"]
    depths: dict[str, int] = figures["plans"][scheme]["depths"]
    spans = {loss: _span(names, window) for loss, window in windows.items()}
    left, middle, right = 56, 56 + COLUMN / 2, 56 + COLUMN
    height = (ROW + GAP) * len(parts) + 80

    def top_of(index: int) -> float:
        return height - 24 - (ROW + GAP) * (index + 1)

    shapes = [_text(middle, height - 6, "image", size=14)]
    for index, part in enumerate(parts):
        y = top_of(index)
        losses = [loss for loss, (low, high) in spans.items() if low <= index <= high]
        for number, loss in enumerate(losses):  # a layer that several losses train has a stripe of each one's colour
            stripe = COLUMN / len(losses)
            look = f'width="{stripe}" height="{ROW}" fill="{LOSS_TINTS[loss]}"'
            shapes.append(f'<rect x="{left + stripe * number}" y="{y}" {look}/>')
        shapes.append(f'<rect x="{left}" y="{y}" width="{COLUMN}" height="{ROW}" fill="none" stroke="{INK}"/>')
        shapes.append(_text(middle, y + 19, part["name"], size=14, weight=600))
        shapes.append(_text(middle, y + 36, part["text"], size=12))
        shapes.append(_arrow(middle, y + ROW + GAP - 1, middle, y + ROW + 2, INK, 1.6))
    shapes.append(_arrow(middle, top_of(len(parts) - 1) - 1, middle, 32, INK, 1.6))
    for loss, window in windows.items():
        low, high = spans[loss]
        colour, depth_of = LOSS_COLOURS[loss], depths[loss]
        if loss == "primary":
            bar, start, y = left - 22, middle - 56, 16.0
            shapes.append(_box(start, 3, 112, 27, ["primary loss"], colour))
        else:
            bar, start, y = right + 22, right + 46, top_of(high) + 8
            shapes.append(f'<path d="M{middle} {y - 18}H{start - 8}" stroke="{INK}" stroke-width="1.6"/>')
            shapes.append(_arrow(start - 8, y - 18, start - 1, y - 18, INK, 1.6))
            lines = ["head, auxiliary loss", f"weight {window['weight']:g}"]
            shapes.append(_box(start, y - 32, 136, 46, lines, colour))
        end = top_of(low) + ROW
        shapes.append(f'<path d="M{start} {y}H{bar}V{end - 10}" stroke="{colour}" stroke-width="5" fill="none"/>')
        shapes.append(_arrow(bar, end - 12, bar, end, colour, 5))
        shapes.append(_text(bar, end + 16, f"N = {depth_of}", size=12, weight=600))
    label = escape(_in_words(figures, scheme), quote=True)
    return f'<svg viewBox="0 0 392 {height}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'


def _span(names: list[str], window: Mapping[str, Any]) -> tuple[int, int]:
    top, bottom = window.get("top"), window.get("bottom")
    low = 0 if bottom is None else names.index(bottom)
    return low, len(names) - 1 if top is None else names.index(top)


def _in_words(figures: Mapping[str, Any], scheme: str) -> str:
    names = [part["name"] for part in figures["network"]["parts"]]
    reach: list[str] = []
    for loss, window in figures["plans"][scheme]["windows"].items():
        low, high = _span(names, window)
        reach.append(f"the {loss} loss trains {names[low]} to {names[high]}")
    return f"{figures['schemes'][scheme]}: {'; '.join(reach)}."


def _text(x: float, y: float, text: str, *, size: int, weight: int = 400, colour: str = INK) -> str:
    look = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="middle"'
    return f'<text x="{x}" y="{y}" {look}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, lines: Sequence[str], colour: str) -> str:
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="#ffffff" stroke="{colour}"/>'
    first = y + height / 2 + 5 - 8.5 * (len(lines) - 1)
    text = (_text(x + width / 2, first + 17 * i, line, size=13, colour=colour) for i, line in enumerate(lines))
    return frame + "".join(text)


def _arrow(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    """A straight arrow along one axis, its head within its length."""
    size = 4 + 1.4 * width
    dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    base_x, base_y = x2 - dx * size, y2 - dy * size
    half = size * 0.6
    points = f"{x2},{y2} {base_x + dy * half},{base_y + dx * half} {base_x - dy * half},{base_y - dx * half}"
    line = f'<path d="M{x1} {y1}L{base_x} {base_y}" stroke="{colour}" stroke-width="{width}" fill="none"/>'
    return f'{line}<polygon points="{points}" fill="{colour}"/>'
