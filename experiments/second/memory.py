"""Tables and figure of question 3: error of ResNet-32 in windows against the memory of a training step."""

import itertools
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
# The labels of these are above their points, so that they hide no other point.
ABOVE = ("15 windows, 1 shared", "8 windows, 2 shared", "4 windows, 4 shared")
SIMILAR = (  # divisions that take about as much memory, as the protocol lists them: windows, shared blocks
    ((15, 1), (8, 0)),
    ((15, 2), (8, 2), (4, 0)),
    ((15, 3), (4, 4), (2, 0)),
)


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
        ("windows-15-1-multi-loss", "multi-loss, 14 auxiliary heads", 15, "multi_loss", "multi_loss"),
    ]
    for windows, shared in ISOLATED[32]:
        label = _label(windows, 0)
        metric = f"{windows}_{shared}_isolated"
        named.append((f"windows-{windows}-{shared}-isolated", label, windows, "isolated", metric))
    for windows, shared in ARMS[32]:
        label = _label(windows, shared)
        named.append((f"windows-{windows}-{shared}-relay", label, windows, "relay", f"{windows}_{shared}_relay"))
    found: list[Division] = []
    for name, label, windows, scheme, metric in named:
        prefix = f"resnet32_{metric}_"
        step = {key.removeprefix(prefix): value for key, value in figures.items() if key.startswith(prefix)}
        if arms := read(name):
            found.append(Division(label, windows, scheme, step, arms[scheme]))
    return sorted(found, key=lambda own: own.step["peak_mb"])


def windows_tables() -> dict[str, Table]:
    """Return the tables of ResNet-32 in windows, by the page's marker; none without standard BP."""
    found = {own.label: own for own in divisions()}
    if STANDARD not in found:
        return {}
    return {"windows": _windows_table(found), "overlap": _overlap_table(found), "similar": _similar_table(found)}


def _windows_table(found: Mapping[str, Division]) -> Table:
    """Error, memory and time of each way to train ResNet-32, by memory."""
    standard = found[STANDARD].arm
    rows = [
        (
            own.label,
            f"{own.step['peak_mb']:,.0f}",
            *_cost(own, found),
            own.arm.values[RATE],
            own.arm.error_text,
            "" if own.label in (STANDARD, CHECKPOINTED) else own.arm.minus(standard),
        )
        for own in found.values()
    ]
    header = ("", "peak MB", "memory", "time", "learning rate", "top-1 error", "minus standard BP")
    return Table("ResNet-32 in windows", header, tuple(rows))


def _overlap_table(found: Mapping[str, Division]) -> Table:
    """The difference in error between windows that share blocks and as many isolated windows."""
    rows = [
        (f"{windows}", f"{shared}", *_cost(ours, found), ours.arm.minus(isolated.arm))
        for windows, shared in ARMS[32]
        if (ours := found.get(_label(windows, shared))) and (isolated := found.get(_label(windows, 0)))
    ]
    header = ("windows", "shared blocks", "memory", "time", "minus isolated windows")
    return Table("overlap", header, tuple(rows))


def _similar_table(found: Mapping[str, Division]) -> Table:
    """The difference in error between more and fewer windows at about equal memory."""
    pairs = [
        (found[_label(*more)], found[_label(*fewer)])
        for group in SIMILAR
        for more, fewer in itertools.combinations(group, 2)
        if {_label(*more), _label(*fewer)} <= found.keys()
    ]
    rows = [
        (
            *(own.label.replace(" windows", "") for own in pair),
            *(" / ".join(both) for both in zip(*(_cost(own, found) for own in pair), strict=True)),
            pair[0].arm.minus(pair[1].arm),
        )
        for pair in pairs
    ]
    header = ("more windows", "fewer windows", "memory", "time", "difference in error")
    return Table("about equal memory", header, tuple(rows))


def _cost(division: Division, found: Mapping[str, Division]) -> tuple[str, str]:
    """Memory and time relative to standard BP."""
    return f"{division.step['peak_mb'] / found[STANDARD].step['peak_mb']:.2f}", f"{division.step['time']:.2f}"


def _label(windows: int, shared: int) -> str:
    return f"{windows} windows, {f'{shared} shared' if shared else 'isolated'}"


def windows_figure() -> Figure:
    """Plot top-1 error against the peak memory of a step at the published size.

    One line connects the isolated divisions. For each number of windows, another connects those that share blocks.
    Multi-loss, which saves no memory, is left out.
    """
    found = [own for own in divisions() if own.scheme != "multi_loss"]
    lines: dict[tuple[str, int], list[tuple[float, float]]] = {}
    full = next(own.step["peak_mb"] for own in found if own.label == STANDARD)
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for own in found:
            x, y = own.step["peak_mb"] / full, statistics.fmean(own.arm.learnt.values())
            lines.setdefault((own.scheme, own.windows if own.scheme == "relay" else 0), []).append((x, y))
            offset = (6, 4 if own.scheme != "relay" or own.label in ABOVE else -11)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.annotate(own.label, (x, y), xytext=offset, textcoords="offset points", fontsize=8, bbox=box)
        for (scheme, _), points in lines.items():
            style = "o" if scheme == "standard" else "o-"
            axes.plot(*zip(*points, strict=True), style, color=SCHEME_COLOURS[scheme], linewidth=1)
        axes.margins(0.15)
        axes.set_xlabel("peak memory of a training step, relative to standard BP (published size)")
        axes.set_ylabel("top-1 error, % (width 8, 16 pixels)")
        return figure
