"""The results of the first check: one finding per finished run in results/evidence-SIZE.json."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Size = Literal["32px", "64px"]

RESULTS = Path(__file__).parents[1] / "results"
SIZES: tuple[Size, ...] = ("32px", "64px")
COLLAPSED = 98.0  # per cent of top-1 error; chance level with 100 classes is 99

_SCHEME_OF_GROUP = {"overlap": "relay", "tail-50": "standard"}  # arms whose names do not include the scheme


@dataclass(frozen=True)
class Finding:
    """The result of one run.

    Attributes:
        arm: name of the configuration, GROUP/NAME, such as "model-a/relay".
        seed: seed of the run.
        rate: learning rate.
        top1: top-1 validation error after the last iteration, in per cent.
        top5: top-5 validation error after the last iteration, in per cent.
        curve: top-1 error by iteration.
        by_class: top-1 error per class.
        gflops: cost of a training step, per image.
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
        """Whether the run ended at chance level."""
        return self.top1 >= COLLAPSED


def scheme_of(arm: str) -> str:
    """Return the scheme of an arm."""
    group, _, name = arm.partition("/")
    named = re.search("standard|multi_loss|relay|isolated", name)
    return named[0] if named else _SCHEME_OF_GROUP[group]


def read_findings(size: Size) -> list[Finding]:
    """Return the findings of all finished runs of an image size."""
    values = json.loads((RESULTS / f"evidence-{size}.json").read_text(encoding="utf-8"))
    return [_finding(run) for run in values["runs"] if run["ended"]]


def _finding(run: Mapping[str, Any]) -> Finding:
    return Finding(
        **{name: run[name] for name in ("arm", "seed", "rate", "top1", "top5", "gflops")},
        curve={int(step): top1 for step, top1 in run["curve"].items()},
        by_class=tuple(run["tested"]["by_class"]),
    )
