"""What a training run is: plain values, typed, with the place that each comes from. No torch in here."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from relaylab.errors import InputError

Architecture = Literal[
    "vgg13", "vgg16", "vgg19", "vgg22", "vgg25", "model_a", "model_a_printed", "model_b", "resnet50", "inception_v3",
    "small_vgg",
]  # fmt: skip
# 3x3 convolutions by segment. "VGGNet-22 and VGGNet-25 are obtained by simply adding 3 and 6 layers on VGGNet-19": one
# and two on each of the three smallest maps, as in model A.
VGG_CONVOLUTIONS = {
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
    22: (2, 2, 5, 5, 5),
    25: (2, 2, 6, 6, 6),
}
Scheme = Literal["standard", "multi_loss", "relay", "isolated"]
SCHEMES: Mapping[str, str] = {  # their names for people, in the order of tables
    "standard": "standard BP",
    "multi_loss": "multi-loss + standard BP",
    "relay": "Relay BP",
    "isolated": "isolated windows",  # ours: relay without the overlap
}
Head = Literal["googlenet", "inception", "linear"]
Sampling = Literal["class-aware", "shuffled", "square-root"]
Dial = Literal["paper", "small", "tiny"]
LACKING = ("network", "plan", "images")  # groups in which None is an option that a recipe lacks


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """A network without its auxiliary heads; see `relaylab.models`."""

    architecture: Architecture
    num_classes: int
    image_size: int
    """Side of the square crops that the network sees, in pixels."""
    width: int | None = None
    """Filters of the first segment (VGGs, model A, ResNet-50) or k of the first inception modules (model B), and with
    it the width of everything; 64 in the paper. Inception-v3 has none."""
    convs: int | None = None
    """Convolutions in each segment of the small VGG."""
    pyramid: tuple[int, ...] | None = None
    """Bins along a side of each grid of the spatial pyramid; models A and B have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimaryConfig:
    """The window of the loss on the network's output: its gradient stops at the input of one module, or above one."""

    bottom: str | None = None
    above: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryConfig:
    """An auxiliary loss: where its head is, which head, how much it counts and where its gradient stops."""

    top: str
    bottom: str | None = None
    above: str | None = None
    weight: float = 0.3
    head: Head = "googlenet"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """The windows of relay backpropagation; the other schemes follow from them."""

    primary: PrimaryConfig = PrimaryConfig()
    auxiliary: Mapping[str, AuxiliaryConfig] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    """Which images, and how each becomes a crop of the network's `image_size`."""

    data_set: Literal["Places2 challenge", "ImageNet 2012", "MiniPlaces", "digits", "any"]
    short_side: int
    """To which the shorter side is resized, in pixels, the aspect ratio kept."""
    sampling: Sampling
    held_out: int | None = None
    """Training images of each class that are set aside and take the place of the validation images: for choosing a
    learning rate, say, by images that no reported error is measured on."""
    long_tail: float | None = None
    """Largest to smallest class, if the training images are thinned so that class sizes fall exponentially."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentationConfig:
    """What happens to training crops; all but the normalisation is left out in evaluation."""

    flip: bool = True
    """Mirror half of the images."""
    colour_shift: float = 0.1
    """Strength of AlexNet's shift along the principal components of colour; 0 for none."""
    mean: Literal["pixel", "channel"] = "pixel"
    """Subtract the training images' mean image, or their mean colour."""
    divide: bool = False
    """Divide by each channel's standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlateauConfig:
    """The learning rate is multiplied by `factor` when `patience` evaluations have not brought a smaller error."""

    kind: Literal["plateau"] = "plateau"
    factor: float = 0.1
    patience: int
    least: float = 0.01
    """Learning rates below this share of the first one are not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsConfig:
    """The learning rate is multiplied by `factor` at these shares of the iterations."""

    kind: Literal["steps"] = "steps"
    factor: float = 0.1
    at: tuple[float, ...] = (0.7, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayConfig:
    """The learning rate is multiplied by `factor` every so many iterations."""

    kind: Literal["decay"] = "decay"
    factor: float
    every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineConfig:
    """The learning rate falls along half a cosine, from the first iteration to the last."""

    kind: Literal["cosine"] = "cosine"
    least: float = 0.0
    """Share of the first rate that is left at the end."""


ScheduleConfig = PlateauConfig | StepsConfig | DecayConfig | CosineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Stochastic gradient descent with momentum."""

    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    """Images of one update, over all processes."""
    iterations: int
    schedule: ScheduleConfig
    evaluate_every: int
    """Iterations between two evaluations."""
    warmup: int = 0
    """Iterations over which the learning rate rises linearly to what the schedule says."""
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    """Gradients of a larger norm are scaled down to it."""
    segment_lr: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """By segment, a factor on its learning rate; 1 where none is given. A segment is named by the losses that train it,
    joined by "+" from the lowest head up, such as "aux" or "aux+primary"; a head is "head aux"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """How a trained network is tested."""

    protocol: Literal["single crop", "dense"] = "single crop"
    scales: tuple[int, ...] = (256,)
    """Shorter sides of the images, in pixels; scores are averaged over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Error rates in per cent."""

    top1: float | None = None
    top5: float | None = None
    split: Literal["val", "test"] = "val"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One row of a table of the paper.

    Attributes:
        name: by which the command line knows it.
        row: where it stands in the paper, and what it is called there.
        network: what is trained.
        plan: windows and heads.
        scheme: which method trains it: one of the paper's three, or isolated windows.
        images: what it is trained on.
        augmentation: of the training images.
        optimizer: and its schedule.
        evaluation: how the errors are measured.
        reported: the paper's errors.
        trained_as: the recipe whose trained network this one tests; None if it trains its own.
        sources: for each field, by its dotted name, where its value comes from: "the paper" and the place in it,
            another paper and the place, or "ours" and the reason. The name of a group stands for all its fields that
            are not named themselves.
    """

    name: str
    row: str
    network: NetworkConfig
    plan: PlanConfig
    scheme: Scheme
    images: ImagesConfig
    augmentation: AugmentationConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    reported: Errors | None = None
    trained_as: str | None = None
    sources: Mapping[str, str]

    def fields(self) -> Iterator[tuple[str, Any, str]]:
        """Every value of the recipe by its dotted name, and where it comes from."""
        for group in ("network", "plan", "scheme", "images", "augmentation", "optimizer", "evaluation"):
            for name, value in _leaves(group, getattr(self, group)):
                if value is not None or group not in LACKING:
                    yield name, value, self.source_of(name)

    def source_of(self, name: str) -> str:
        """Where a field's value comes from.

        Args:
            name: dotted, as in `fields`.
        """
        while name not in self.sources:
            if "." not in name:
                raise InputError(f"recipe {self.name}: no source is given for {name}")
            name = name.rpartition(".")[0]
        return self.sources[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Several recipes' networks, tested together.

    Attributes:
        name: by which the command line knows it.
        row: where it stands in the paper.
        members: each trained and tested by itself; their probabilities are combined.
        combine: how: by their mean, by their product, or by weights learnt on the validation images.
        reported: the paper's error on the test images.
        validation: and on the validation images (section 5.1).
        sources: where `members` and `combine` come from.
    """

    name: str
    row: str
    members: tuple[Recipe, ...]
    combine: Literal["average", "product", "learnt weights"]
    reported: Errors
    validation: Errors
    sources: Mapping[str, str]


def changed(recipe: Recipe, source: str, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, and with where they come from.

    Args:
        recipe: is not changed.
        source: of the new values.
        changes: by dotted name.

    Raises:
        InputError: there is no such field.
    """
    values: dict[str, Any] = {}
    for name, value in changes.items():
        group, _, leaf = name.partition(".")
        old = values.get(group, getattr(recipe, group, None))
        if old is None or (leaf and leaf not in {entry.name for entry in dataclasses.fields(old)}):
            raise InputError(f"recipe {recipe.name}: no field {name}")
        values[group] = dataclasses.replace(old, **{leaf: value}) if leaf else value
    sources = {**recipe.sources, **dict.fromkeys(changes, source)}
    # What stands below a changed field is not what it was before.
    for name in [name for name in sources if any(name.startswith(f"{other}.") for other in changes)]:
        del sources[name]
    return dataclasses.replace(recipe, **values, sources=MappingProxyType(sources))


def value_text(value: object) -> str:
    """Return a recipe's value as `--set` takes it: true, none, 800000, "7,3,2,1"."""
    match value:
        case True | False | None:
            return str(value).lower()
        case tuple():
            return ",".join(map(value_text, value))
        case _:
            return str(value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        parts = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        parts = value
    else:
        yield name, value
        return
    for key, part in parts.items():
        yield from _leaves(f"{name}.{key}", part)
