"""Tables and plots of the tuning of a comparison."""

from collections.abc import Mapping

from matplotlib.axes import Axes

from relaylab.outside.showing import picture
from relaylab.recipes.schema import SCHEME_NAMES
from relaylab.report.style import SCHEME_COLOURS, SCHEME_DASHES, plot
from relaylab.tables import Table
from relaylab.train.metrics import Measure, is_at_chance
from relaylab.train.tuning import Axis, Choice, Trial, Tuning


def tuning_table(tuning: Tuning, guess: float, measure: Measure) -> Table:
    """Return a table of all trials with their errors and outcomes; `guess` is the chance level."""
    keys = list(dict.fromkeys(axis.key for choice in tuning.choices.values() for axis in choice.axes))
    rows: list[tuple[str, ...]] = []
    for scheme, choice in tuning.choices.items():
        for trial in choice.trials:
            values = dict(zip((axis.key for axis in choice.axes), trial.point, strict=True))
            error = "" if trial.error is None else f"{trial.error:.2f}"
            cells = (*(values.get(key, "") for key in keys), error, _outcome(choice, trial, guess))
            rows.append((SCHEME_NAMES[scheme], *cells))
    header = ("method", *keys, f"{measure.title}, %", "outcome")
    share = "" if tuning.share == 1 else f", for {tuning.share:g} of the recipe's iterations"
    unit = "images per class" if tuning.images >= 1 else "of the training images of each class"
    count = f"{int(tuning.images)}" if tuning.images >= 1 else f"{100 * tuning.images:g} %"
    note = f"One run per trial with seed {tuning.seed}{share}, evaluated on held-out data: {count} {unit}."
    lost = ((SCHEME_NAMES[scheme], choice.chance_text(guess)) for scheme, choice in tuning.choices.items())
    return Table("Tuning trials", header, tuple(rows), (note, *(f"{name}: {text}." for name, text in lost if text)))


def _outcome(choice: Choice, trial: Trial, guess: float) -> str:
    if trial.error is None:
        return "diverged; chosen, since all trials diverged" if trial.point == choice.point else "diverged"
    outcome = "at chance level" if is_at_chance(trial.error, guess) else ""
    if trial.point == choice.point:
        chosen = "chosen" if choice.enclosed else "chosen, at the edge of the tried values"
        outcome = f"{outcome}; {chosen}".lstrip("; ")
    added = any(text not in axis.values for axis, text in zip(choice.axes, trial.point, strict=True))
    return f"{outcome}; added to the grid".lstrip("; ") if added else outcome


def tuning_plots(tuning: Tuning, measure: Measure) -> dict[str, str]:
    """Return a plot as SVG text for each numeric axis with several values, by key."""
    axes = {axis.key: axis for choice in tuning.choices.values() for axis in choice.axes}
    return {
        key: _picture(tuning, axis, measure) for key, axis in axes.items() if axis.kind != "choice" and axis.values[1:]
    }


def _picture(tuning: Tuning, axis: Axis, measure: Measure) -> str:
    curves = {scheme: curve for scheme, choice in tuning.choices.items() if (curve := _curve(choice, axis.key))}
    values = {value for curve in curves.values() for value in curve}
    is_log = min(values) > 0

    def draw(axes: Axes) -> None:
        errors = [error for curve in curves.values() for error in curve.values() if error is not None]
        top = max(errors, default=100.0) + 0.08 * (max(errors, default=100.0) - min(errors, default=0.0) + 1)
        for scheme, curve in curves.items():
            look = {"color": SCHEME_COLOURS[scheme], "linestyle": SCHEME_DASHES[scheme], "linewidth": 2.0}
            seen = {value: error for value, error in curve.items() if error is not None}
            axes.plot(list(seen), list(seen.values()), marker="o", markersize=4, label=SCHEME_NAMES[scheme], **look)
            lost = [value for value, error in curve.items() if error is None]
            axes.plot(lost, [top] * len(lost), marker="x", linestyle="", color=SCHEME_COLOURS[scheme], markersize=8)
            chosen = float(tuning.choices[scheme].values[axis.key])
            if chosen in seen:
                ring = {"marker": "o", "markersize": 11, "fillstyle": "none", "linestyle": ""}
                axes.plot([chosen], [seen[chosen]], color=SCHEME_COLOURS[scheme], **ring)
        if is_log:
            axes.set_xscale("log")
            axes.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)], fontsize=9)
            axes.minorticks_off()
        axes.set_xlabel(f"{picture(axis.key)} (ring: chosen; cross: diverged)")

    return plot(
        draw, f"Error of the trials against {axis.title}", f"{measure.title}, per cent", size=(5.6, 3.6), legend=True
    )


def _curve(choice: Choice, key: str) -> Mapping[float, float | None]:
    """Return the lowest error at each value of an axis over all other axes; None if all trials diverged."""
    index = next((i for i, axis in enumerate(choice.axes) if axis.key == key), None)
    if index is None:
        return {}
    lowest: dict[float, float | None] = {}
    for trial in choice.trials:
        value, before = float(trial.point[index]), lowest.get(float(trial.point[index]))
        lowest[value] = trial.error if before is None else min(before, before if trial.error is None else trial.error)
    return dict(sorted(lowest.items()))
