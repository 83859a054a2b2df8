"""The page about information along the network: a picture, a table, and what they do and do not show."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relaylab.diagnose.information import ACTIVATIONS, Reading
from relaylab.files import write_text
from relaylab.recipes.schema import SCHEMES
from relaylab.report.style import SCHEME_COLOURS, STYLE, figure_text
from relaylab.tables import Table, render

PICTURE, FIGURES, PAGE = "information.svg", "information.json", "information.md"
MARKERS = ("o", "s", "^", "D")
EXPLANATION = """\
## What is measured

For each weight layer, a linear classifier is trained on one half of the images to name an image's class from what the
layer gives it, and tested on the other half. By how many bits it does better than knowing only how often each class
occurs is a lower bound on the information about the class: at most {entropy:.2f} bits, at least none. Below zero, it
has learnt nothing that holds for new images. Bars are 95 % intervals over the tested images.

- **Activations**: the layer's output, going up. At the bottom stands the image; higher up the class should become
  easier to read.
- **Gradients**: each image's own gradient of one loss with respect to the layer's output, going down. At the top
  stands the loss, which is *told* the class: there it can be read in full. The paper's argument is that some of that
  is lost on the way down.

## What is shown, and what is not

- The curves of gradients say how much of the class that a loss was told can still be read, by a linear classifier,
  further down. They do not say that a gradient which tells more is a better one to learn from: a gradient is useful
  if it lowers the loss, and this is not measured here.
- A gradient passes through the derivative of what lies above, which depends on the image. Part of what is read may be
  the image itself, shining through the pattern of active units, and not the label that came from above. The
  activations' curve at the same layer says how much of that there is to be read.
- It is a bound from below. What is lost to a linear classifier may be there for another one; maps are averaged over 2
  x 2 fields and multiplied by a random matrix down to 256 numbers, which loses some; and a classifier of few images
  finds less than one of many.
- The networks are trained, at the checkpoint named below, without dropout. During training the picture changes.
- A line is drawn through where the loss trains the layer, and faint where its window does not reach.
"""


def write(folder: Path, runs: Mapping[str, Sequence[Reading]], about: Mapping[str, Any]) -> Path:
    """Write figures, picture and page.

    Args:
        folder: an existing one.
        runs: by name, what was read.
        about: "schemes" by name, "entropy" in bits, and whatever else is worth keeping.

    Returns:
        The page.

    Raises:
        OSError: they cannot be written.
    """
    schemes = about["schemes"]
    figures = {**about, "runs": {name: [asdict(each) for each in own] for name, own in runs.items()}}
    write_text(folder / FIGURES, json.dumps(figures, indent=1) + "\n")
    write_text(folder / PICTURE, figure_text(draw(runs, schemes, about["entropy"])))
    parts = [
        "# Information about the class, layer by layer\n",
        f"{about['images']:,} images, half to fit on and half to test; {', '.join(about['checkpoints'].values())}.\n",
        f"![Bits about the class that a linear probe reads from each layer]({PICTURE})\n",
        EXPLANATION.format(entropy=about["entropy"]),
        "## Figures\n",
        *(
            render(table_of(f"{SCHEMES[about['schemes'][name]]} ({name})", own), "markdown")
            for name, own in runs.items()
        ),
    ]
    write_text(folder / PAGE, "\n".join(parts))
    return folder / PAGE


def table_of(title: str, readings: Sequence[Reading]) -> Table:
    """One run's readings: a row for each layer; in brackets where the loss does not train it."""
    sources = list(dict.fromkeys(each.source for each in readings))
    sources.sort(key=lambda source: source != ACTIVATIONS)
    found = {(each.layer, each.source): each for each in readings}
    rows: list[tuple[str, ...]] = []
    for layer in dict.fromkeys(each.layer for each in readings):
        cells = [layer]
        for source in sources:
            each = found.get((layer, source))
            text = "" if each is None else each.bits.text()
            cells.append(f"({text})" if each is not None and not each.trained else text)
        rows.append(tuple(cells))
    header = ("layer", *(s if s == ACTIVATIONS else f"gradient of {s}" for s in sources))
    return Table(f"{title}: bits about the class", header, tuple(rows))


def draw(runs: Mapping[str, Sequence[Reading]], schemes: Mapping[str, str], entropy: float) -> Figure:
    """Bits against layers: gradients above, activations below; a colour for each scheme, a marker for each loss."""
    layers = list(dict.fromkeys(each.layer for own in runs.values() for each in own))
    place = {layer: number for number, layer in enumerate(layers)}
    losses = sorted(
        {each.source for own in runs.values() for each in own} - {ACTIVATIONS}, key=lambda s: s != "primary"
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 8), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for name, own in runs.items():
            colour, method = SCHEME_COLOURS[schemes[name]], SCHEMES[schemes[name]]
            for marker, loss in zip(MARKERS, losses, strict=False):
                parts = [each for each in own if each.source == loss]
                label = f"{method}: {loss} ({name})"
                _line(above, [e for e in parts if not e.trained], place, color=colour, marker=marker, alpha=0.3, lw=0.8)
                _line(above, [e for e in parts if e.trained], place, color=colour, marker=marker, label=label)
            _line(
                below,
                [e for e in own if e.source == ACTIVATIONS],
                place,
                color=colour,
                marker="o",
                label=f"{method} ({name})",
            )
        for panel, title in ((above, "Gradients of single images, by loss"), (below, "Activations")):
            panel.set_title(title)
            panel.set_ylabel("bits about the class")
            for level in (0, entropy):
                panel.axhline(level, color="#777777", linewidth=0.9, linestyle=":")
            panel.text(0, entropy, "all there is", fontsize=9, va="bottom", color="#555555")
            panel.legend(fontsize=9, loc="best")
        short = [layer.replace("segment", "").replace("classifier.", "").replace(".conv", "-") for layer in layers]
        below.set_xticks(range(len(layers)), short, rotation=60 if len(layers) > 14 else 0, fontsize=8)
        below.set_xlabel("weight layer, lowest on the left")
    return figure


def _line(panel: Axes, readings: Sequence[Reading], place: Mapping[str, int], **look: Any) -> None:
    if not readings:
        return
    x = [place[each.layer] for each in readings]
    values = np.array([each.bits.value for each in readings])
    ends = np.array([(each.bits.low, each.bits.high) for each in readings]).T
    panel.errorbar(x, values, yerr=np.abs(ends - values), markersize=4, elinewidth=0.8, capsize=2, **look)
