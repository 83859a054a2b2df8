"""The studies of docs/evidence/first-check.md: which runs each table and figure compares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.findings import Finding, Size

METHODS = {"standard BP": "standard", "multi-loss": "multi_loss", "Relay BP": "relay", "isolated windows": "isolated"}
RATES = (0.005, 0.01, 0.02, 0.04, 0.08)  # grid of learning rates
PER_CLASS = 900  # training images of MiniPlaces
TAIL = 50  # ratio of the largest to the smallest class


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of several arms.

    Attributes:
        title: title of the table.
        arms: arms by label.
        against: labels of the baselines, each with a column of differences.
        seeds: seeds to compare; None for all.
    """

    title: str
    arms: Mapping[str, str]
    against: tuple[str, ...]
    seeds: tuple[int, ...] | None = None

    def runs(self, label: str, findings: Sequence[Finding]) -> list[Finding]:
        """Return the runs of the arm with this label."""
        arm_runs = [run for run in findings if run.arm == self.arms[label]]
        return [run for run in arm_runs if self.seeds is None or run.seed in self.seeds]


def _table3(group: str, title: str) -> Study:
    arms = {label: f"{group}/{scheme}" for label, scheme in METHODS.items()}
    return Study(title=f"Question 1: Table 3, {title}", arms=arms, against=("standard BP", "Relay BP"))


STUDIES: Mapping[str, Study] = {
    "model-a": _table3("model-a", "model A"),
    "model-b-cores": _table3("model-b-cores", "model B to its end, on two cores"),
    "weight": Study(
        title="Question 2: auxiliary weight",
        arms={
            "standard BP": "model-a/standard",
            "multi-loss, 0.3": "model-a/multi_loss",
            "multi-loss, 1": "multi-loss-weight-1/multi_loss",
            "Relay BP, 0.3": "model-a/relay",
            "Relay BP, 1": "relay-weight-1/relay",
        },
        against=("standard BP", "multi-loss, 0.3"),
    ),
    "equal-rate": Study(
        title="Question 2: Relay BP at a rate of 0.01, standard BP's own at 32 pixels",
        arms={
            "standard BP": "model-a/standard",
            "multi-loss, 0.3": "model-a/multi_loss",
            "multi-loss, 1": "multi-loss-weight-1/multi_loss",
            "Relay BP, 0.3": "equal-rate/relay-weight-0.3",
            "Relay BP, 1": "equal-rate/relay-weight-1",
            "Relay BP, 0.3, rate x 3.33 below": "equal-rate/relay-lr-3.33",
        },
        against=("standard BP", "multi-loss, 0.3"),
        seeds=(0,),
    ),
    "overlap": Study(
        title="Question 2: the overlap",
        arms={
            "none (isolated windows)": "model-a/isolated",
            "1 stage (the paper's)": "model-a/relay",
            "2 stages": "overlap/2-stages",
            "3 stages": "overlap/3-stages",
            "all 4 (multi-loss)": "model-a/multi_loss",
        },
        against=("1 stage (the paper's)",),
    ),
    "clipped": Study(
        title="Question 2: gradients clipped to a norm of 1",
        arms={
            "standard BP": "model-a/standard",
            "clipped, 0.01": "clipped/standard-0.01",
            "clipped, 0.02": "clipped/standard-0.02",
            "clipped, 0.04": "clipped/standard-0.04",
            "Relay BP": "model-a/relay",
        },
        against=("standard BP",),
        seeds=(0,),
    ),
    "length-2": Study(
        title="Question 2: 2 times the iterations",
        arms={
            **{label: f"length-2/{scheme}" for label, scheme in METHODS.items()},
            "Relay BP, weight 1": "length-2/relay-weight-1",
        },
        against=("standard BP",),
        seeds=(0,),
    ),
    "branches": Study(
        title="Question 2: branches, VGG-19",
        arms={
            "none (standard BP)": "vgg/19-standard",
            "one": "vgg-equal-rate/19-relay",
            "two (Figure 2)": "vgg-equal-rate/19-relay-2-branches",
        },
        against=("none (standard BP)",),
    ),
    "depth": Study(
        title="Question 3: Table 1, depth",
        arms={
            "VGG-19, standard BP": "vgg/19-standard",
            "VGG-22, standard BP": "vgg/22-standard",
            "VGG-25, standard BP": "vgg/25-standard",
            "VGG-19, Relay BP": "vgg-equal-rate/19-relay",
            "VGG-25, Relay BP": "vgg-equal-rate/25-relay",
            "VGG-25, Relay BP at model A's rate": "vgg/25-relay",
        },
        against=("VGG-19, standard BP",),
    ),
    "resnet50": Study(
        title="Question 4: Table 6, ResNet-50",
        arms={"standard BP": "resnet50/standard", "Relay BP": "resnet50/relay"},
        against=("standard BP",),
    ),
    "inception-v3": Study(
        title="Question 4: Table 6, Inception-v3",
        arms={"standard BP with its own head": "inception-v3/multi_loss", "Relay BP": "inception-v3/relay"},
        against=("standard BP with its own head",),
    ),
    f"tail-{TAIL}": Study(
        title=f"Question 5: sampling, largest to smallest class {TAIL} : 1",
        arms={kind: f"tail-{TAIL}/{kind}" for kind in ("shuffled", "class-aware")},
        against=("shuffled",),
    ),
}
# Studies in the plots of errors and of learning curves, by image size.
PLOTTED: Mapping[Size, tuple[str, ...]] = {"32px": tuple(STUDIES), "64px": ("model-a", "weight")}
CURVES: Mapping[Size, tuple[str, ...]] = {"32px": ("model-a", "model-b-cores"), "64px": ("model-a",)}
