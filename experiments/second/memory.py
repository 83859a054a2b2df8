"""Table and figure of question 3: error of ResNet-32 in windows against the memory of a training step."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.second.arms import RATE, ROOT, Arm, read
from experiments.second.windows import ARMS, ISOLATED
from relaylab.report.style import SCHEME_COLOURS, STYLE
from relaylab.tables import Table

STEPS = ROOT / "results" / "windows.json"
STANDARD = "standard BP"
CHECKPOINTED = "standard BP, checkpointed blocks"


@dataclass(frozen=True)
class Division:
    """A way to train ResNet-32.

    Args:
        label: name in table and figure.
        windows: number of windows; 1 for standard BP.
        scheme: scheme of the runs.
        step: cost of a training step at the published size, by metric of `benchmarks.windows`.
        arm: errors of the runs.
    """

    label: str
    windows: int
    scheme: str
    step: Mapping[str, float]
    arm: Arm


def divisions() -> list[Division]:
    """Return each way to train ResNet-32 that has been run, by the memory of a step."""
    figures: dict[str, float] = json.loads(STEPS.read_text(encoding="utf-8"))["figures"]
    named = [
        ("windows-15-1-standard", STANDARD, 1, "standard", "standard"),
        ("windows-15-1-standard", CHECKPOINTED, 1, "standard", "checkpointed"),
        ("windows-15-1-multi-loss", "15 windows, multi-loss", 15, "multi_loss", "multi_loss"),
    ]
    for windows, shared in ISOLATED[32]:
        label = f"{windows} windows, isolated"
        metric = f"{windows}_{shared}_isolated"
        named.append((f"windows-{windows}-{shared}-isolated", label, windows, "isolated", metric))
    for windows, shared in ARMS[32]:
        label = f"{windows} windows, {shared} shared"
        named.append((f"windows-{windows}-{shared}-relay", label, windows, "relay", f"{windows}_{shared}_relay"))
    found: list[Division] = []
    for name, label, windows, scheme, metric in named:
        prefix = f"resnet32_{metric}_"
        step = {key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)}
        if arms := read(name):
            found.append(Division(label, windows, scheme, step, arms[scheme]))
    return sorted(found, key=lambda own: own.step["peak_mb"])


def windows_table() -> Table | None:
    """Return error, memory and time of each way to train ResNet-32, by memory; None without standard BP."""
    found = divisions()
    standard = next((own for own in found if own.label == STANDARD), None)
    if standard is None:
        return None
    rows = [
        (
            own.label,
            f"{own.step['peak_mb']:,.0f}",
            f"{own.step['peak_mb'] / standard.step['peak_mb']:.2f}",
            f"{own.step['time']:.2f}",
            own.arm.values[RATE],
            own.arm.error_text,
            "" if own.arm is standard.arm or own.label == CHECKPOINTED else own.arm.minus(standard.arm),
        )
        for own in found
    ]
    header = ("", "peak MB", "memory", "time", "learning rate", "top-1 error", "minus standard BP")
    return Table("ResNet-32 in windows", header, tuple(rows))


def windows_figure() -> Figure:
    """Plot top-1 error against the peak memory of a step at the published size.

    One line connects the isolated divisions. For each number of windows, another connects those that share blocks.
    """
    found = divisions()
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    full = next(own.step["peak_mb"] for own in found if own.label == STANDARD)
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for own in found:
            x, y = own.step["peak_mb"] / full, statistics.fmean(own.arm.learnt.values())
            lines.setdefault((own.scheme, own.windows if own.scheme == "relay" else 0), []).append((x, y))
            offset = (6, -11) if own.scheme == "relay" else (6, 4)
            axes.annotate(own.label, (x, y), xytext=offset, textcoords="offset points", fontsize=8)
        for (scheme, _), points in lines.items():
            style = "o" if scheme == "standard" else "o-"
            axes.plot(*zip(*points, strict=True), style, color=SCHEME_COLOURS[scheme], linewidth=1)
        axes.margins(0.15)
        axes.set_xlabel("peak memory of a training step, relative to standard BP (published size)")
        axes.set_ylabel("top-1 error, % (width 8, 16 pixels)")
        return figure
