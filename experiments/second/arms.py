"""The results of the second check: comparisons of results/second-check/ by scheme.

python -m experiments.second.arms COMPARISON.json SCHEME    # prints the values that were chosen for a scheme
"""

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from relaylab.report.verdict import difference_text, mean_text
from relaylab.train.metrics import is_at_chance

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "second-check"
GAIN, RATE, BELOW = "network.gain", "optimizer.lr", "optimizer.segment_lr.aux+primary"
SCHEMES = ("standard", "multi_loss", "relay", "isolated")


@dataclass(frozen=True)
class Arm:
    """A scheme of a comparison.

    Args:
        errors: top-1 errors of the last validation by seed, in per cent; None for a run that failed.
        values: the chosen values, by key; empty if nothing was tuned.
        trials: values and error of each trial.
        guessing: error of guessing, in per cent.
        curve: top-1 error at each validation, mean over the seeds, by iteration.
    """

    errors: Mapping[int, float | None]
    values: Mapping[str, str]
    trials: tuple[tuple[Mapping[str, str], float | None], ...]
    guessing: float
    curve: Mapping[int, float]

    @property
    def learnt(self) -> dict[int, float]:
        """The errors of the runs that learnt something."""
        return {
            seed: error
            for seed, error in self.errors.items()
            if error is not None and not is_at_chance(error, self.guessing)
        }

    @property
    def error_text(self) -> str:
        """Mean and spread, with the number of failed and collapsed runs."""
        lost = len(self.errors) - len(self.learnt)
        note = f" ({lost} of {len(self.errors)} failed)" if lost else ""
        return (mean_text(list(self.learnt.values())) if self.learnt else "") + note

    def differences(self, base: "Arm") -> list[float]:
        """Return the error minus that of another arm for each seed, without failed and collapsed runs."""
        return [self.learnt[seed] - base.learnt[seed] for seed in self.learnt.keys() & base.learnt]

    def minus(self, base: "Arm") -> str:
        """Return the paired difference to another arm with its interval, without failed and collapsed runs."""
        return difference_text(self.differences(base))


def read(name: str) -> dict[str, Arm]:
    """Return the arms of a comparison by scheme; none if it has not been run."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    errors: dict[str, dict[int, float | None]] = {}
    curves: dict[str, dict[int, list[float]]] = {}
    for run in found["runs"]:
        errors.setdefault(run["scheme"], {})[run["seed"]] = run["validations"][-1]["top1"]
        for validation in run["validations"]:
            curves.setdefault(run["scheme"], {}).setdefault(validation["step"], []).append(validation["top1"])
    for run in found["failures"]:
        errors.setdefault(run["scheme"], {})[run["seed"]] = None
    arms: dict[str, Arm] = {}
    for scheme, own in errors.items():
        curve = {step: statistics.fmean(values) for step, values in curves.get(scheme, {}).items()}
        choice = found["tuning"]["choices"][scheme] if found["tuning"] else {"axes": [], "trials": [], "point": []}
        keys = [name for axis in choice["axes"] for name in axis["names"][:1]]
        points = [dict(zip(keys, trial["point"], strict=True)) for trial in choice["trials"]]
        trials = tuple(zip(points, (trial["error"] for trial in choice["trials"]), strict=True))
        arms[scheme] = Arm(own, dict(zip(keys, choice["point"], strict=True)), trials, found["guessing"], curve)
    return arms


def chosen(comparison: Path, scheme: str) -> list[str]:
    """Return the values that a comparison chose for a scheme, as arguments of `--set`."""
    choice = json.loads(comparison.read_text(encoding="utf-8"))["tuning"]["choices"][scheme]
    pairs = zip(choice["axes"], choice["point"], strict=True)
    return [f"{name}={value}" for axis, value in pairs for name in axis["names"]]


if __name__ == "__main__":
    print(*chosen(Path(sys.argv[1]), sys.argv[2]))
