"""Redraws the tables and figures of docs/evidence/second-check.md from results/second-check/.

python -m experiments.second.page [runs/second]    # first copies the results of comparisons from their folders
"""

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.second.windows import ARMS, ISOLATED
from relaylab.files import write_text
from relaylab.recipes.schema import SCHEME_NAMES
from relaylab.report.style import SCHEME_COLOURS, SCHEME_DASHES, STYLE, write_figure
from relaylab.report.verdict import difference_text, mean_text
from relaylab.tables import Table, markdown_lines, renewed

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evidence" / "second-check.md"
RESULTS = ROOT / "results" / "second-check"
STEPS = ROOT / "results" / "windows.json"
PAIRS = (("relay", "standard"), ("relay", "multi_loss"), ("multi_loss", "standard"), ("isolated", "relay"))
STANDARD = "windows-15-1-standard"
GAIN = "network.gain"


@dataclass(frozen=True)
class Arm:
    """A scheme of a comparison: top-1 errors by seed, the chosen values, and the trials that they were chosen by."""

    errors: Mapping[int, float]
    values: Mapping[str, str]
    trials: tuple[tuple[Mapping[str, str], float | None], ...]


def read(name: str) -> dict[str, Arm]:
    """Return the arms of a comparison by scheme; none if it has not been run."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    errors: dict[str, dict[int, float]] = {}
    for run in found["runs"]:
        errors.setdefault(run["scheme"], {})[run["seed"]] = run["validations"][-1]["top1"]
    arms: dict[str, Arm] = {}
    for scheme, own in errors.items():
        choice = found["tuning"]["choices"][scheme]
        keys = [name for axis in choice["axes"] for name in axis["names"][:1]]
        points = [dict(zip(keys, trial["point"], strict=True)) for trial in choice["trials"]]
        trials = zip(points, (trial["error"] for trial in choice["trials"]), strict=True)
        arms[scheme] = Arm(own, dict(zip(keys, choice["point"], strict=True)), tuple(trials))
    return arms


def differences(ours: Arm, base: Arm) -> str:
    """Return the paired difference of two arms' errors, with its interval."""
    return difference_text([ours.errors[seed] - base.errors[seed] for seed in ours.errors.keys() & base.errors.keys()])


def schemes_table(name: str, title: str) -> Table | None:
    """Return a comparison's errors by scheme with the differences of the protocol; None if it has not been run."""
    arms = read(name)
    if not arms:
        return None
    has_gains = any(GAIN in arm.values for arm in arms.values())
    rows: list[tuple[str, ...]] = []
    for scheme, arm in arms.items():
        minus = [
            f"{differences(arm, arms[base])} ({SCHEME_NAMES[base]})"
            for ours, base in PAIRS
            if ours == scheme and base in arms
        ]
        gain = (arm.values.get(GAIN, ""),) if has_gains else ()
        rate = arm.values["optimizer.lr"]
        rows.append((SCHEME_NAMES[scheme], *gain, rate, mean_text(list(arm.errors.values())), "; ".join(minus)))
    gains = ("gain",) if has_gains else ()
    return Table(title, ("", *gains, "rate", "top-1 error", "minus"), tuple(rows))


@dataclass(frozen=True)
class Division:
    """A way to train ResNet-32.

    Args:
        label: name in table and figure.
        scheme: scheme of the runs.
        step: cost of a training step at the published size, by metric of `benchmarks.windows`.
        arm: errors of the runs.
    """

    label: str
    scheme: str
    step: Mapping[str, float]
    arm: Arm


def divisions() -> list[Division]:
    """Return each way to train ResNet-32 that has been run, by the memory of a step."""
    figures: dict[str, float] = json.loads(STEPS.read_text(encoding="utf-8"))["figures"]

    def step(name: str) -> Mapping[str, float]:
        prefix = f"resnet32_{name}_"
        return {key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)}

    named = [
        (STANDARD, "standard BP", "standard", "standard"),
        (STANDARD, "standard BP, blocks checkpointed", "standard", "checkpointed"),
        ("windows-15-1-multi-loss", "15 windows, multi-loss", "multi_loss", "multi_loss"),
    ]
    for windows, shared in ISOLATED[32]:
        label = f"{windows} windows, isolated"
        named.append((f"windows-{windows}-{shared}-isolated", label, "isolated", f"{windows}_{shared}_isolated"))
    for windows, shared in ARMS[32]:
        label = f"{windows} windows, {shared} shared"
        named.append((f"windows-{windows}-{shared}-relay", label, "relay", f"{windows}_{shared}_relay"))
    found: list[Division] = []
    for name, label, scheme, metric in named:
        if arms := read(name):
            found.append(Division(label, scheme, step(metric), arms[scheme]))
    return sorted(found, key=lambda own: own.step["peak_mb"])


def windows_table() -> Table | None:
    """Return error, memory and time of each way to train ResNet-32, by memory."""
    found = divisions()
    standard = next((own for own in found if own.scheme == "standard"), None)
    if standard is None:
        return None
    rows = [
        (
            own.label,
            f"{own.step['peak_mb']:,.0f}",
            f"{own.step['peak_mb'] / standard.step['peak_mb']:.2f}",
            f"{own.step['flops']:.2f}",
            own.arm.values["optimizer.lr"],
            mean_text(list(own.arm.errors.values())),
            "" if own is standard else differences(own.arm, standard.arm),
        )
        for own in found
    ]
    header = ("", "peak MB", "of standard BP", "FLOPs", "rate", "top-1 error", "minus standard BP")
    return Table("ResNet-32 in windows", header, tuple(rows))


def windows_figure() -> Figure:
    """Plot top-1 error against the peak memory of a step at the published size."""
    found = divisions()
    full = next(own.step["peak_mb"] for own in found if own.scheme == "standard")
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for own in found:
            x, y = own.step["peak_mb"] / full, statistics.fmean(own.arm.errors.values())
            axes.plot(x, y, "o", color=SCHEME_COLOURS[own.scheme])
            axes.annotate(own.label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes.margins(0.15)
        axes.set_xlabel("peak memory of a training step, relative to standard BP (published size)")
        axes.set_ylabel("top-1 error in per cent (width 8, 16 pixels)")
        return figure


def rates_figure(name: str) -> Figure:
    """Plot the errors of the trials against the learning rate, one panel per scheme and one line per gain."""
    arms = read(name)
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        panels: list[Axes] = list(figure.subplots(1, len(arms), sharey=True, squeeze=False)[0])
        for axes, (scheme, arm) in zip(panels, arms.items(), strict=True):
            for gain, marker in (("he", "o"), ("quiet", "s")):
                points = sorted(
                    (float(point["optimizer.lr"]), error)
                    for point, error in arm.trials
                    if point.get(GAIN) == gain and error is not None
                )
                axes.plot(*zip(*points, strict=True), marker=marker, color=SCHEME_COLOURS[scheme], label=gain,
                          linestyle=SCHEME_DASHES["standard"] if gain == "quiet" else "-")  # fmt: skip
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_title(SCHEME_NAMES[scheme], fontsize=10)
            axes.set_xlabel("learning rate")
        panels[0].set_ylabel("top-1 error on held-out images, per cent")
        panels[0].legend(fontsize=9, title="gain")
        return figure


def copy_results(runs: Path) -> None:
    """Copy the results of all comparisons that have finished."""
    for path in sorted(runs.glob("*/comparison.json")):
        write_text(RESULTS / f"{path.parent.name}.json", path.read_text(encoding="utf-8"))


def tables() -> dict[str, list[str]]:
    """Return the lines of each table of the page that has results, by the table's marker."""
    found = {"windows": windows_table()}
    for name, title in (("model-a", "Model A"), ("model-b", "Model B")):
        found[name] = schemes_table(name, title)
    for name in ("resnet18", "resnet18-tuned", "vit", "vit-tuned"):
        found[name] = schemes_table(name, name)
    return {name: markdown_lines(table) for name, table in found.items() if table is not None}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        copy_results(Path(sys.argv[1]))
    write_text(PAGE, renewed(PAGE.read_text(encoding="utf-8"), tables()))
    if (RESULTS / f"{STANDARD}.json").exists():
        write_figure(windows_figure(), RESULTS / "windows.svg")
    for model in ("model-a", "model-b"):
        if (RESULTS / f"{model}.json").exists():
            write_figure(rates_figure(model), RESULTS / f"{model}-rates.svg")
