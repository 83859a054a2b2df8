"""The figures of models A and B: error against learning rate in the trials, and during training."""

from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.second.arms import GAIN, RATE, SCHEMES, read
from relaylab.recipes.schema import SCHEME_NAMES
from relaylab.report.style import SCHEME_COLOURS, SCHEME_DASHES, STYLE

TICKS = (0.0025, 0.01, 0.04)
LINES = {"he": ("-", "o"), "quiet": ("--", "s")}  # by gain: dashes, marker


def rates_figure(models: Sequence[str]) -> Figure:
    """Plot the errors of the trials on held-out images: one row per model, one panel per scheme, one line per gain."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 2.8 * len(models)), layout="constrained")
        grid = figure.subplots(len(models), len(SCHEMES), sharex=True, sharey="row", squeeze=False)
        panels: list[list[Axes]] = grid.tolist()
        for model, row in zip(models, panels, strict=True):
            arms = read(model)
            for scheme, axes in zip(SCHEMES, row, strict=True):
                for gain, (dashes, marker) in LINES.items():
                    points = sorted(
                        (float(values[RATE]), error)
                        for values, error in arms[scheme].trials
                        if values.get(GAIN) == gain and error is not None
                    )
                    if points:
                        rates, errors = zip(*points, strict=True)
                        axes.plot(
                            rates, errors, dashes, marker=marker, color=SCHEME_COLOURS[scheme], label=f'gain "{gain}"'
                        )
                axes.set_xscale("log")
                axes.set_xticks(TICKS, [f"{rate:g}" for rate in TICKS])
                axes.minorticks_off()
                axes.set_title(SCHEME_NAMES[scheme], fontsize=10)
            row[0].set_ylabel(f"{_title(model)}: top-1 error, %")
        for axes in panels[-1]:
            axes.set_xlabel("learning rate")
        figure.legend(handles=panels[0][0].get_lines(), loc="outside upper right", ncols=2, fontsize=9)
        return figure


def curves_figure(models: Sequence[str]) -> Figure:
    """Plot the top-1 error on validation images during training, mean over seeds: one panel per model."""
    with rc_context(STYLE):
        figure = Figure(figsize=(4.5 * len(models), 3.4), layout="constrained")
        panels: list[Axes] = figure.subplots(1, len(models), squeeze=False)[0].tolist()
        for model, axes in zip(models, panels, strict=True):
            arms = read(model)
            for scheme in SCHEMES:
                steps, errors = zip(*sorted(arms[scheme].curve.items()), strict=True)
                colour, dashes = SCHEME_COLOURS[scheme], SCHEME_DASHES[scheme]
                axes.plot(steps, errors, label=SCHEME_NAMES[scheme], color=colour, linestyle=dashes)
            axes.set_title(_title(model), fontsize=10)
            axes.set_xlabel("iterations")
        panels[0].set_ylabel("top-1 error, %")
        panels[0].legend(fontsize=9)
        return figure


def _title(model: str) -> str:
    return f"Model {model.removeprefix('model-').upper()}"
