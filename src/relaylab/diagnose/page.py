"""The HTML page on information by layer: figure, tables, and limitations."""

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
from relaylab.outside.showing import picture
from relaylab.recipes.schema import SCHEME_NAMES
from relaylab.report.html import render_template, svg_uri
from relaylab.report.style import BELOW_AXIS, SCHEME_COLOURS, STYLE, figure_text, layer_name
from relaylab.tables import Table, render

PICTURE, METRICS, PAGE = "information.svg", "information.json", "information.html"
MARKERS = ("o", "s", "^", "D")


def write(folder: Path, runs: Mapping[str, Sequence[Reading]], about: Mapping[str, Any]) -> Path:
    """Write the results, the figure and the page, and return the path of the page.

    Args:
        folder: an existing folder.
        runs: readings of each run by name.
        about: "schemes" by name, "entropy" in bits, and further entries to store.
    """
    schemes = about["schemes"]
    metrics = {**about, "runs": {name: [asdict(reading) for reading in group] for name, group in runs.items()}}
    picture = figure_text(draw(runs, schemes, about["entropy"]))
    tables = {name: table_of(f"{SCHEME_NAMES[schemes[name]]} ({name})", group) for name, group in runs.items()}
    write_text(folder / METRICS, json.dumps(metrics, indent=1) + "\n")
    write_text(folder / PICTURE, picture)
    text = render_template(
        "relaylab.diagnose",
        "page.html.j2",
        title="Class information in each layer",
        picture=svg_uri(picture),
        about=about,
        tables={name: render(table, "html") for name, table in tables.items()},
    )
    write_text(folder / PAGE, text)
    return folder / PAGE


def table_of(title: str, readings: Sequence[Reading]) -> Table:
    """Return the readings of a run as a table, one row per layer; in brackets if the loss does not train the layer."""
    sources = sorted(dict.fromkeys(reading.source for reading in readings), key=lambda source: source != ACTIVATIONS)
    cells = {(e.layer, e.source): e.bits.text() if e.trained else f"({e.bits.text()})" for e in readings}
    layers = dict.fromkeys(reading.layer for reading in readings)
    rows = tuple((layer_name(layer), *(cells.get((layer, source), "") for source in sources)) for layer in layers)
    header = ("layer", *(s if s == ACTIVATIONS else f"gradient of {s}" for s in sources))
    return Table(f"{title}: bits about the class", header, rows)


def draw(runs: Mapping[str, Sequence[Reading]], schemes: Mapping[str, str], entropy: float) -> Figure:
    """Plot bits by layer: gradients above, activations below; a colour per scheme, a marker per loss."""
    readings = [reading for group in runs.values() for reading in group]
    layers = list(dict.fromkeys(reading.layer for reading in readings))
    position = {layer: index for index, layer in enumerate(layers)}
    losses = sorted({reading.source for reading in readings} - {ACTIVATIONS}, key=lambda s: s != "primary")
    with rc_context(STYLE):
        figure = Figure(figsize=(7.4, 8.4), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for name, group in runs.items():
            colour, method = SCHEME_COLOURS[schemes[name]], SCHEME_NAMES[schemes[name]]
            for marker, loss in zip(MARKERS, losses, strict=False):
                parts = [reading for reading in group if reading.source == loss]
                label = picture(f"{method}: {loss} ({name})")
                _line(
                    above, [e for e in parts if not e.trained], position, color=colour, marker=marker, alpha=0.3, lw=0.8
                )
                _line(above, [e for e in parts if e.trained], position, color=colour, marker=marker, label=label)
            activations = [reading for reading in group if reading.source == ACTIVATIONS]
            _line(below, activations, position, color=colour, marker="o", label=picture(f"{method} ({name})"))
        for panel, title in ((above, "Per-image gradients, by loss"), (below, "Activations")):
            panel.set_title(title)
            panel.set_ylabel("bits about the class")
            for level in (0, entropy):
                panel.axhline(level, color="#777777", linewidth=0.9, linestyle=":")
            panel.text(0, entropy, "entropy of the class", fontsize=9, va="bottom", color="#555555")
            panel.legend(fontsize=9, loc="best")
        below.set_xticks(range(len(layers)), [picture(layer_name(layer)) for layer in layers], **BELOW_AXIS)
        below.set_xlabel("weight layer, lowest on the left")
    return figure


def _line(panel: Axes, readings: Sequence[Reading], position: Mapping[str, int], **style: Any) -> None:
    if not readings:
        return
    x = [position[reading.layer] for reading in readings]
    values = np.array([reading.bits.value for reading in readings])
    ends = np.array([(reading.bits.low, reading.bits.high) for reading in readings]).T
    panel.errorbar(x, values, yerr=np.abs(ends - values), markersize=4, elinewidth=0.8, capsize=2, **style)
