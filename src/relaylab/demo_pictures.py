"""The report's pictures as SVG text: the network with its windows, learning curves, gradient magnitudes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from relaylab.report.network import draw_network
from relaylab.report.stages import Loss, Stage
from relaylab.report.style import SCHEME_COLOURS, SCHEME_DASHES, figure_text, plot


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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


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
        if any(_of_runs(figures, scheme, row).max() > 0 for scheme in figures["schemes"]):  # a dead network has no log
            axes.set_yscale("log")
        for scheme in figures["schemes"]:
            colour = SCHEME_COLOURS[scheme]
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
    """The network under one scheme as in the paper's Figure 2, as SVG text.

    Args:
        figures: as `relaylab.demo_report.collect` returns them.
        scheme: whose windows to draw.
    """
    parts: list[dict[str, Any]] = figures["network"]["parts"]
    windows: dict[str, dict[str, Any]] = figures["plans"][scheme]["windows"]
    depths: dict[str, int] = figures["plans"][scheme]["depths"]
    spans = {loss: _span([part["name"] for part in parts], window) for loss, window in windows.items()}
    stages = [
        Stage(part["name"], (part["text"],), None, (), tuple(loss for loss in spans if _holds(spans[loss], number)))
        for number, part in enumerate(parts)
    ]
    losses = [Loss(loss, windows[loss]["weight"], *span, depths[loss]) for loss, span in spans.items()]
    return figure_text(draw_network(stages, losses, room_for_heads=True))


def _span(names: list[str], window: Mapping[str, Any]) -> tuple[int, int]:
    top, bottom = window.get("top"), window.get("bottom")
    low = 0 if bottom is None else names.index(bottom)
    return low, len(names) - 1 if top is None else names.index(top)


def _holds(span: tuple[int, int], number: int) -> bool:
    return span[0] <= number <= span[1]


def network_in_words(figures: Mapping[str, Any], scheme: str) -> str:
    """What `network` shows, for those who cannot see it."""
    names = [part["name"] for part in figures["network"]["parts"]]
    reach: list[str] = []
    for loss, window in figures["plans"][scheme]["windows"].items():
        low, high = _span(names, window)
        reach.append(f"the {loss} loss trains {names[low]} to {names[high]}")
    return f"{figures['schemes'][scheme]}: {'; '.join(reach)}."
