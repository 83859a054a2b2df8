"""Which runs answer which question of docs/evidence.md. Plain values; nothing is run here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from relaylab.recipes.schema import SCHEMES

Size = Literal["32px", "64px", "tiny"]

# Learning rates to choose from, by the error on training images that were set aside.
RATES = (0.005, 0.01, 0.02, 0.04, 0.08)
EQUAL_RATE = 0.01  # at 32 pixels standard BP's and multi-loss's own
BATCH_NORM_RATE = 0.025  # for 64 images: 0.1 for 256, as ResNet-50's own paper has it
WEIGHTS = (0.3, 1.0)
CLIPPED = (0.01, 0.02, 0.04)  # rates of standard BP with clipped gradients
PER_CLASS = 900  # training images
HELD_OUT = 50  # of them
SELECTION = "selection"  # group of the runs that the rates are chosen by
SELECTION_SEED = 100  # no other run has it
SELECTION_LENGTH = 1 / 4
FULL_WEIGHT = "plan.auxiliary.aux.weight=1.0"
A, B = "table3-model-a-relay", "table3-model-b-relay"

# What all runs of a size share. A small recipe is on 100 classes of Places2, see relaylab.recipes.scales.
SHARED: Mapping[Size, tuple[str, ...]] = {
    "32px": (
        "network.image_size=32",
        "images.short_side=36",
        "optimizer.batch_size=64",
        "optimizer.warmup=500",
    ),
    "64px": ("optimizer.warmup=500",),
    "tiny": ("network.image_size=32", "images.short_side=36", "network.num_classes=5", "optimizer.batch_size=4"),
}
ITERATIONS: Mapping[Size, int] = {"32px": 12_000, "64px": 8_400, "tiny": 6}
# Of networks that have such a dial, and of models A and B.
WIDTH: Mapping[Size, int] = {"32px": 16, "64px": 16, "tiny": 4}
PYRAMID: Mapping[Size, str] = {"32px": "2,1", "64px": "4,2,1", "tiny": "2,1"}
EVALUATIONS = 6
THREE = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train a network, under several seeds.

    Attributes:
        recipe: of `relaylab recipes`, at small scale.
        scheme: that trains it.
        changes: of the recipe, besides those that all runs of a size share.
        rate: the learning rate; None for the one that was chosen for the scheme.
        length: in shares of a size's iterations.
        length_at_32px: what the length is multiplied by at that size.
        seeds: of weights, batches, crops and dropout.
    """

    recipe: str
    scheme: str
    changes: tuple[str, ...] = ()
    rate: float | None = None
    length: float = 1.0
    length_at_32px: float = 1.0
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table of the evidence.

    Attributes:
        title: above it.
        arms: names of `ARMS` by the words that the table has for them.
        against: the words of the arms that the others are compared with, a column each.
        seeds: the only ones that count; None for all that an arm has.
    """

    title: str
    arms: Mapping[str, str]
    against: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None

    def counts(self, arm: str, seed: int) -> bool:
        """Whether an arm's run under a seed belongs to the study."""
        return arm in self.arms.values() and (self.seeds is None or seed in self.seeds)


def _selection() -> dict[str, Arm]:
    held_out = (f"images.held_out={HELD_OUT}",)
    return {
        f"{SELECTION}/{scheme}-{rate:g}": Arm(
            recipe=A,
            scheme=scheme,
            changes=held_out,
            rate=rate,
            length=SELECTION_LENGTH,
            seeds=(SELECTION_SEED,),
        )
        for scheme in SCHEMES
        for rate in RATES
    }


def _vgg(depth: int, scheme: str, rate: float | None = None) -> Arm:
    return Arm(recipe=f"table1-vgg{depth}-places2", scheme=scheme, rate=rate)


def _length(length: float) -> dict[str, Arm]:
    name = f"length-{length:g}"
    arms = {f"{name}/{scheme}": Arm(recipe=A, scheme=scheme, length=length) for scheme in SCHEMES}
    return {**arms, f"{name}/relay-weight-1": Arm(recipe=A, scheme="relay", changes=(FULL_WEIGHT,), length=length)}


def _relay(*changes: str) -> Arm:
    return Arm(recipe=A, scheme="relay", changes=changes, seeds=THREE)


SAMPLING = ("shuffled", "class-aware")
TAILS = (7.5, 50)  # 30,000 : 4,000 as in Places2, and more


def _tails() -> dict[str, Arm]:
    return {
        f"tail-{ratio:g}/{kind}": Arm(
            recipe=A,
            scheme="standard",
            changes=(f"images.long_tail={ratio:g}", f"images.sampling={kind}"),
            seeds=(0, 1),
        )
        for ratio in TAILS
        for kind in SAMPLING
    }


# In the order in which they are run.
ARMS: Mapping[str, Arm] = {
    **_selection(),
    **{f"model-a/{scheme}": Arm(recipe=A, scheme=scheme, seeds=THREE) for scheme in SCHEMES},
    "relay-weight-1/relay": _relay(FULL_WEIGHT),
    "multi-loss-weight-1/multi_loss": Arm(recipe=A, scheme="multi_loss", changes=(FULL_WEIGHT,), seeds=THREE),
    "overlap/2-stages": _relay("plan.primary.bottom=segment3"),
    "overlap/3-stages": _relay("plan.primary.bottom=segment2"),
    **{f"model-b/{scheme}": Arm(recipe=B, scheme=scheme, seeds=THREE) for scheme in SCHEMES},
    **{f"model-b-cores/{scheme}": Arm(recipe=B, scheme=scheme, seeds=(3, 4, 5)) for scheme in SCHEMES},
    **{
        f"equal-rate/relay-weight-{weight:g}": Arm(
            recipe=A, scheme="relay", changes=(f"plan.auxiliary.aux.weight={weight}",), rate=EQUAL_RATE
        )
        for weight in WEIGHTS
    },
    "equal-rate/relay-lr-3.33": Arm(
        recipe=A, scheme="relay", changes=("optimizer.segment_lr.aux=3.33",), rate=EQUAL_RATE
    ),
    **{
        f"clipped/standard-{rate:g}": Arm(recipe=A, scheme="standard", changes=("optimizer.clip_norm=1",), rate=rate)
        for rate in CLIPPED
    },
    **_length(2),
    **_length(0.5),
    "vgg/19-standard": _vgg(19, "standard"),
    "vgg/22-standard": _vgg(22, "standard"),
    "vgg/25-standard": _vgg(25, "standard"),
    "vgg/25-relay": _vgg(25, "relay"),
    "vgg-equal-rate/25-relay": _vgg(25, "relay", EQUAL_RATE),
    "vgg-equal-rate/19-relay": _vgg(19, "relay", EQUAL_RATE),
    "vgg-equal-rate/19-relay-2-branches": Arm(recipe="figure2-vgg19-relay", scheme="relay", rate=EQUAL_RATE),
    **_tails(),
    **{
        f"{network}/{scheme}": Arm(
            recipe=f"table6-{network}-relay", scheme=scheme, rate=BATCH_NORM_RATE, length_at_32px=0.25
        )
        for network, schemes in {"resnet50": ("standard", "relay"), "inception-v3": ("multi_loss", "relay")}.items()
        for scheme in schemes
    },
}
GROUPS = tuple(dict.fromkeys(name.partition("/")[0] for name in ARMS))

MODELS = {"model-a": "model A", "model-b": "model B", "model-b-cores": "model B to its end, on two cores"}
METHODS = {"standard BP": "standard", "multi-loss": "multi_loss", "Relay BP": "relay", "isolated windows": "isolated"}


def _lengths() -> dict[str, Study]:
    groups = {0.5: "length-0.5", 2.0: "length-2"}
    return {
        f"length-{length:g}": Study(
            title=f"Question 2: {length:g} times the iterations",
            arms={
                **{word: f"{group}/{scheme}" for word, scheme in METHODS.items()},
                "Relay BP, weight 1": f"{group}/relay-weight-1",
            },
            against=("standard BP",),
            seeds=(0,),
        )
        for length, group in groups.items()
    }


# By name, in the order of the questions of docs/evidence.md.
STUDIES: Mapping[str, Study] = {
    "selection": Study(
        title="Learning rates: errors on training images that were set aside",
        arms={
            f"{word}, {rate:g}": f"{SELECTION}/{scheme}-{rate:g}" for word, scheme in METHODS.items() for rate in RATES
        },
    ),
    **{
        group: Study(
            title=f"Question 1: Table 3, {title}",
            arms={word: f"{group}/{scheme}" for word, scheme in METHODS.items()},
            against=("standard BP", "Relay BP"),
        )
        for group, title in MODELS.items()
    },
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
        title=f"Question 2: Relay BP at a rate of {EQUAL_RATE:g}, standard BP's own at 32 pixels",
        arms={
            "standard BP": "model-a/standard",
            "multi-loss, 0.3": "model-a/multi_loss",
            "multi-loss, 1": "multi-loss-weight-1/multi_loss",
            **{f"Relay BP, {weight:g}": f"equal-rate/relay-weight-{weight:g}" for weight in WEIGHTS},
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
            **{f"clipped, {rate:g}": f"clipped/standard-{rate:g}" for rate in CLIPPED},
            "Relay BP": "model-a/relay",
        },
        against=("standard BP",),
        seeds=(0,),
    ),
    **_lengths(),
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
    **{
        f"tail-{ratio:g}": Study(
            title=f"Question 5: sampling, largest to smallest class {ratio:g} : 1",
            arms={kind: f"tail-{ratio:g}/{kind}" for kind in SAMPLING},
            against=("shuffled",),
        )
        for ratio in TAILS
    },
}
