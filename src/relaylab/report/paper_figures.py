"""The paper's figures from runs: gradients per layer, networks with windows, images with predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from relaylab.data.decode import decode
from relaylab.data.faults import ImageFault
from relaylab.data.geometry import Pixels
from relaylab.data.sources.source import Source
from relaylab.errors import InputError
from relaylab.evaluate.predict import Prediction
from relaylab.models.building import build_meta_network, build_plan
from relaylab.outside.showing import picture
from relaylab.recipes.schema import Recipe
from relaylab.report.network import draw_network
from relaylab.report.stages import stages_of
from relaylab.report.style import BELOW_AXIS, STYLE, layer_name

RIGHT = "#00664a"
COLUMNS, ROWS = 4, 2
TOP = 5
MOST_TICKS = 30  # maximum number of layer names on an axis
QUANTITIES = {"gradient": "mean |gradient|", "ratio": "mean |gradient| / mean |weight|"}


@dataclass(frozen=True)
class Photo:
    """An image with its true class and a network's predictions.

    Attributes:
        pixels: uint8 (h, w, 3).
        truth: name of the true class.
        guesses: names and probabilities of the most likely classes, most likely first.
    """

    pixels: Pixels
    truth: str
    guesses: tuple[tuple[str, float], ...]


def gradient_figure(runs: Mapping[str, Sequence[Mapping[str, Any]]], only: str | None = None) -> Figure:
    """Plot Figure 1: the mean absolute gradient of each layer, and its ratio to that of the weights.

    Args:
        runs: metrics of each run, by title.
        only: title of the only run to plot, with the axis limits of all runs.

    Raises:
        InputError: a run has no gradient statistics.
    """
    probes = {title: [line for line in lines if line["kind"] == "gradients"] for title, lines in runs.items()}
    for title, probe in probes.items():
        if not probe:
            raise InputError(f"{title} has no gradient statistics: train it with --diagnose-every N, at least 1")
    series = {
        (title, quantity): [_by_layer(line, list(probe[-1]["layers"]), quantity) for line in probe]
        for title, probe in probes.items()
        for quantity in QUANTITIES
    }
    shown = [title for title in probes if only in (None, title)]
    last = max(line["step"] for probe in probes.values() for line in probe)
    colours, norm = colormaps["viridis"], Normalize(0, last * 1.1)
    size, shape = ((11, 3.1 * len(probes) + 0.6), (len(shown), 2)) if only is None else ((5.6, 6.6), (2, 1))
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(*shape, squeeze=False).reshape(len(shown), 2)
        for row, title in zip(axes, shown, strict=True):
            for panel, (quantity, unit) in zip(row, QUANTITIES.items(), strict=True):
                for line, values in zip(probes[title], series[title, quantity], strict=True):
                    panel.plot(values, color=colours(norm(line["step"])), linewidth=1.2)
                every = np.concatenate([values for key in series if key[1] == quantity for values in series[key]])
                panel.set_ylim(0.8 * np.nanmin(every), 1.25 * np.nanmax(every))
                panel.set_yscale("log")
                panel.yaxis.set_minor_formatter(NullFormatter())
                panel.set_title(picture(title))
                panel.set_ylabel(unit)
                names = [picture(layer_name(name)) for name in probes[title][-1]["layers"]]
                step = -(-len(names) // MOST_TICKS)
                panel.set_xticks(range(0, len(names), step), names[::step], **BELOW_AXIS)
                panel.tick_params(labelbottom=True)
        for panel in axes[-1]:
            panel.set_xlabel("weight layer, lowest on the left")
        steps = [line["step"] for line in probes[shown[0]]]
        few = sorted({steps[round(place)] for place in np.linspace(0, len(steps) - 1, 6)})
        handles = [Line2D([], [], color=colours(norm(step)), label=f"{step:,}") for step in few]
        place: dict[str, Any] = {"loc": "outside right center"} if only is None else {"loc": "outside lower center"}
        figure.legend(handles=handles, title="iteration", ncols=1 if only is None else 6, **place)
    return figure


def _by_layer(line: Mapping[str, Any], names: Sequence[str], quantity: str) -> NDArray[np.float64]:
    values = [line["layers"].get(name, {}).get(quantity, np.nan) for name in names]
    return np.maximum(np.array(values, dtype=float), 1e-12)


def window_figure(recipe: Recipe, title: str) -> Figure:
    """Draw Figure 2: the network with its segments, heads and windows under the recipe's scheme."""
    stages, losses = stages_of(
        build_meta_network(recipe.network), build_plan(recipe.plan, recipe.scheme), recipe.network.image_size
    )
    return draw_network(stages, losses, title, room_for_heads=True)


def pick_photos(
    source: Source, classes: Sequence[str], log_probabilities: Tensor, *, right: bool, count: int = COLUMNS * ROWS
) -> list[Photo]:
    """Return correctly or incorrectly classified images, one per class, most confident first, as in Figures 3 and 4.

    Correct: the true class is the most likely one. Incorrect: it is not among the five most likely classes (with up to
    five classes: not the most likely one).

    Args:
        source: the images.
        classes: names of the classes.
        log_probabilities: (images, classes).
        right: whether to return correctly classified images.
        count: maximum number of images.

    Raises:
        InputError: an image is unreadable.
    """
    labels = torch.as_tensor(source.labels[:].astype("int64"))
    best = log_probabilities.topk(min(TOP, len(classes)), dim=1)
    hit = (best.indices == labels[:, None]).any(dim=1)
    first = best.indices[:, 0] == labels
    candidates = (first if right else ~hit if len(classes) > TOP else ~first).nonzero().flatten()
    order = candidates[best.values[candidates, 0].argsort(descending=True, stable=True)]
    chosen: dict[int, int] = {}
    for index in order.tolist():  # the most confident of each class
        chosen.setdefault(int(labels[index]), index)
        if len(chosen) == count:
            break
    photos: list[Photo] = []
    for label, index in chosen.items():
        try:
            pixels = decode(source.read(index))
        except (OSError, ImageFault) as error:
            raise InputError(f"unreadable image {source.name(index)}: {error}") from None
        names = (classes[int(class_index)] for class_index in best.indices[index].tolist())
        guesses = tuple(zip(names, best.values[index].exp().tolist(), strict=True))
        photos.append(Photo(pixels, classes[label], guesses))
    return photos


def photo_figure(photos: Sequence[Photo], title: str) -> Figure:
    """Plot Figures 3 and 4: images with their class and the five most likely classes, the true one in bold."""
    columns = min(COLUMNS, len(photos))
    rows = -(-len(photos) // columns)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(2.7 * columns, 4.1 * rows + 0.5), layout="constrained")
        figure.suptitle(picture(title), fontsize=12, x=0.01, ha="left")
        panels = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[1.9, 1.5] * rows)
        for panel in panels.flat:
            panel.set_axis_off()
        for index, photo in enumerate(photos):
            row, column = divmod(index, columns)
            panels[2 * row][column].imshow(photo.pixels, interpolation="lanczos")
            panels[2 * row][column].set_anchor("W")
            text = panels[2 * row + 1][column]
            text.text(0, 1.0, picture(plain(photo.truth)), fontsize=10.5, fontweight="bold", va="top")
            for rank, (name, share) in enumerate(photo.guesses, 1):
                is_right = name == photo.truth
                words = f"{100 * share:3.0f} %  {picture(plain(name))}" + ("  ✓" if is_right else "")
                colour, weight = (RIGHT, "bold") if is_right else ("#333333", "normal")
                text.text(0, 1.0 - 0.16 * rank, words, fontsize=9.5, va="top", color=colour, fontweight=weight)
    return figure


def prediction_figure(predictions: Sequence[Prediction]) -> Figure:
    """Plot images with their file names and predicted classes."""
    photos: list[Photo] = []
    for prediction in predictions:
        guesses = tuple((guess.name, guess.probability) for guess in prediction.guesses or prediction.below)
        photos.append(Photo(prediction.pixels, Path(prediction.name).name, guesses))
    return photo_figure(photos, "")


def plain(name: str) -> str:
    """Return the name of a class without a leading number and underscores, such as "tree frog" for "31_tree_frog"."""
    prefix, mark, rest = name.partition("_")
    return (rest if mark and prefix.isdecimal() else name).replace("_", " ")
