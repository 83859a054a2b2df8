"""The results of the first check: one finding for each finished run of results/evidence-SIZE.json."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Size = Literal["32px", "64px"]

RESULTS = Path(__file__).parents[1] / "results"
SIZES: tuple[Size, ...] = ("32px", "64px")
COLLAPSED = 98.0  # per cent of top-1 error; guessing among 100 classes gives 99

_SCHEME_OF_GROUP = {"overlap": "relay", "tail-50": "standard"}  # arms whose names do not include the scheme


@dataclass(frozen=True)
class Finding:
    """The result of one run.

    Attributes:
        arm: What was trained, as GROUP/NAME: "model-a/relay".
        seed: Seed of the run.
        rate: Learning rate.
        top1: Validation error after the last iteration, in per cent.
        top5: Top-5 error on the same images.
        curve: Top-1 error by iteration.
        by_class: Top-1 error on the validation images of each class.
        gflops: Cost of a training step, per image.
    """

    arm: str
    seed: int
    rate: float
    top1: float
    top5: float
    curve: Mapping[int, float]
    by_class: tuple[float, ...]
    gflops: float

    @property
    def collapsed(self) -> bool:
        """Whether the run ended at chance."""
        return self.top1 >= COLLAPSED


def scheme_of(arm: str) -> str:
    """Return the scheme of an arm."""
    group, _, name = arm.partition("/")
    named = re.search("standard|multi_loss|relay|isolated", name)
    return named[0] if named else _SCHEME_OF_GROUP[group]


def read_findings(size: Size) -> list[Finding]:
    """Return the findings of all runs of a size that finished."""
    values = json.loads((RESULTS / f"evidence-{size}.json").read_text(encoding="utf-8"))
    return [_finding(run) for run in values["runs"] if run["ended"]]


def _finding(run: Mapping[str, Any]) -> Finding:
    return Finding(
        **{name: run[name] for name in ("arm", "seed", "rate", "top1", "top5", "gflops")},
        curve={int(step): top1 for step, top1 in run["curve"].items()},
        by_class=tuple(run["tested"]["by_class"]),
    )
