"""Recipes: all values of a training run, typed, each with its source. No torch in here."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from relaylab.errors import InputError

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
SCHEMES: Mapping[str, str] = {  # the paper's names for tables, in their order
    "standard": "standard BP",
    "multi_loss": "multi-loss + standard BP",
    "relay": "Relay BP",
    "isolated": "isolated windows",  # ours: relay without the overlap
}
SCHEME_NAMES: Mapping[str, str] = {**SCHEMES, "multi_loss": "multi-loss"}  # for sentences, legends and headers
GROUPS = ("network", "plan", "scheme", "images", "augmentation", "optimizer", "loss", "evaluation")  # of values
Sampling = Literal["class-aware", "shuffled", "square-root"]
Gain = Literal["default", "he", "quiet"]  # as in relaybackprop.heads; a test compares the two
Scale = Literal["paper", "small", "tiny"]
LIBRARIES = ("timm", "torchvision")  # whose networks have names
UNMENTIONED = (  # values that no paper of the tables mentions, of methods that came later
    "augmentation.crop_scale", "augmentation.crop_ratio", "augmentation.padding", "augmentation.policy",
    "augmentation.policy_operations", "augmentation.policy_magnitude", "augmentation.erasing", "augmentation.mixup",
    "augmentation.cutmix",
    "optimizer.betas", "optimizer.eps", "optimizer.decay_norms_and_biases", "optimizer.layer_decay",
    "optimizer.ema_decay", "optimizer.warmup", "optimizer.clip_norm", "loss.label_smoothing", "loss.class_weights",
)  # fmt: skip
LACKING = ("network", "plan", "images")  # groups in which None is an option that a recipe lacks


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """A network without its auxiliary heads; see `relaylab.models`."""

    architecture: str
    """A name in `relaylab.models.building.NETWORKS`, or a network of other code: timm:NAME, torchvision:NAME,
    package.module:function or path/to/file.py:function; see `relaylab.models.named`."""
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
    gain: Gain | None = None
    """Initialisation of the last layer: "he" draws weights of variance 2 / fan-in, as the paper's networks do by
    themselves; "quiet" draws small ones, so that training starts near the loss of guessing; "default" is PyTorch's."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Further arguments of a network of other code, beside num_classes: numbers, text, true, false, lists of these."""
    pretrained: str | None = None
    """File of weights to start from, safetensors or a state dict of PyTorch's; what does not fit, such as the last
    layer for other classes, keeps its fresh weights."""

    @property
    def is_named(self) -> bool:
        """Whether it is a network of other code."""
        return ":" in self.architecture

    @property
    def is_code(self) -> bool:
        """Whether it is a function, for which code is imported that the lab does not know."""
        return self.is_named and self.architecture.partition(":")[0] not in LIBRARIES


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimaryConfig:
    """The window of the loss on the network's output: its gradient stops at the input of one module, or after one."""

    bottom: str | None = None
    after: str | None = None
    """A module's name; several, separated by commas, where values enter the window from the side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryConfig:
    """An auxiliary loss: its head and the head's place, its weight, and the end of its window."""

    top: str
    bottom: str | None = None
    after: str | None = None
    weight: float = 0.3
    head: str = "googlenet"
    """A name in `relaylab.models.building.HEADS`, or "auto" for the one that fits what it reads."""
    gain: Gain | None = None
    """Initialisation of the head's last layer, as `network.gain`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """The windows of relay backpropagation; the other schemes follow from them."""

    primary: PrimaryConfig = PrimaryConfig()
    auxiliary: Mapping[str, AuxiliaryConfig] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    """The images, and their size before they are cropped to the network's `image_size`."""

    data_set: Literal["Places2 challenge", "ImageNet 2012", "MiniPlaces", "digits", "any"]
    short_side: int
    """Length of the shorter side after resizing, in pixels; the aspect ratio is kept."""
    sampling: Sampling
    held_out: int | float | None = None
    """Training images of each class, or below 1 their share, that are set aside and take the place of the validation
    images: where there are none, or for choosing a learning rate by images that no reported error is measured on."""
    set_aside: int | float | None = None
    """Training images of each class, or below 1 their share, that are set aside beside those held out, and that
    training validates on instead: `relaylab compare --tune` chooses values by them."""
    val_split: Literal["val", "test"] | None = None
    """Part of the data that training validates on; "val" if none is given."""
    long_tail: float | None = None
    """Largest to smallest class, if the training images are thinned so that class sizes fall exponentially."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentationConfig:
    """Augmentation of training crops, and the normalisation, which evaluation has too."""

    flip: bool = True
    """Mirror half of the images."""
    colour_shift: float = 0.1
    """Strength of AlexNet's shift along the principal components of colour; 0 for none."""
    mean: Literal["pixel", "channel"] = "pixel"
    """Subtract the training images' mean image, or their mean colour."""
    divide: bool = False
    """Divide by each channel's standard deviation."""
    crop: Literal["window", "resized"] = "window"
    """The paper's crop, a window of fixed scale at a random place; or a random resized crop, a box of random area and
    aspect ratio that is resized to a square."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest area of a resized crop, as a share of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest aspect ratio of a resized crop, width to height."""
    padding: int = 0
    """Black pixels around the resized image, before a training crop is taken."""
    policy: Literal["randaugment", "trivialaugment", "autoaugment"] | None = None
    """Random operations on the colours and the geometry of each crop; see `relaylab.data.policies`."""
    policy_operations: int = 2
    """Operations on each crop, of RandAugment."""
    policy_magnitude: int = 9
    """Strength of the operations, of RandAugment, 0 to 30."""
    erasing: float = 0.0
    """Probability of erasing a random box from an image, after normalisation; erased pixels are 0."""
    mixup: float = 0.0
    """Mix pairs of images and of their targets, in proportions of the distribution Beta(mixup, mixup); 0 for none."""
    cutmix: float = 0.0
    """Put a box of one image into another, its area of the distribution Beta(cutmix, cutmix), and mix their targets; 0
    for none. With mixup too, one of the two is chosen for each batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlateauConfig:
    """Multiply the learning rate by `factor` after `patience` evaluations without a smaller error."""

    kind: Literal["plateau"] = "plateau"
    factor: float = 0.1
    patience: int
    least: float = 0.01
    """Learning rates below this share of the first one are not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsConfig:
    """Multiply the learning rate by `factor` at these shares of the iterations."""

    kind: Literal["steps"] = "steps"
    factor: float = 0.1
    at: tuple[float, ...] = (0.7, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayConfig:
    """Multiply the learning rate by `factor` every `every` iterations."""

    kind: Literal["decay"] = "decay"
    factor: float
    every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineConfig:
    """Decay the learning rate along half a cosine, from the first iteration to the last."""

    kind: Literal["cosine"] = "cosine"
    least: float = 0.0
    """Share of the first rate that is left at the end."""


ScheduleConfig = PlateauConfig | StepsConfig | DecayConfig | CosineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the length of the training. An algorithm ignores the values that only others have."""

    algorithm: Literal["sgd", "adamw"] = "sgd"
    """A name in `relaylab.train.optimizers.OPTIMIZERS`."""
    lr: float
    momentum: float = 0.9
    """SGD only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only: decay rates of the averages of gradients and of their squares."""
    eps: float = 1e-8
    """AdamW only: added to the denominator."""
    weight_decay: float
    """SGD adds it to the gradient, times the weight; with AdamW it is decoupled from the gradient."""
    decay_norms_and_biases: bool = True
    """Weight decay on all parameters, as in Caffe; False: not on those with at most one dimension, nor on those that
    the network names by `no_weight_decay()`, as timm's networks do."""
    layer_decay: float | None = None
    """Factor on the learning rate from each layer of the network to the one below it, for fine-tuning; the last layer
    and the heads have 1. See `relaylab.train.layers`."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; see `relaylab.train.averaging`."""
    batch_size: int = 256
    """Images of one update, over all processes."""
    iterations: int
    schedule: ScheduleConfig
    evaluate_every: int = 5_000
    """Iterations between two evaluations."""
    warmup: int = 0
    """Iterations over which the learning rate rises linearly to what the schedule says."""
    clip_norm: float | None = None
    """Gradients of a larger norm are scaled down to it."""
    segment_lr: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """By segment, a factor on its learning rate; 1 where none is given. A segment is named by the losses that train it,
    joined by "+" from the lowest head up, such as "aux" or "aux+primary"; a head is "head aux"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The loss of the network's scores and of those of each auxiliary head, in training."""

    function: Literal["cross-entropy", "binary"] = "cross-entropy"
    """Softmax cross-entropy; or a sigmoid and a binary cross-entropy for each class, of which the mean is taken."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all classes."""
    class_weights: Literal["balanced", "square-root"] | None = None
    """Weight of an image: in proportion to 1 / n of the n training images of its class, or to 1 / sqrt(n), with the
    mean 1 over all training images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Protocol of testing a trained network."""

    protocol: Literal["single crop", "dense"] = "single crop"
    scales: tuple[int, ...] = (256,)
    """Shorter sides of the images, in pixels; scores are averaged over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedErrors:
    """Error rates in per cent."""

    top1: float | None = None
    top5: float | None = None
    split: Literal["val", "test"] = "val"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One row of a table of the paper."""

    name: str
    row: str
    """Its place in the paper, and its name there."""
    network: NetworkConfig
    plan: PlanConfig = PlanConfig()
    scheme: Scheme
    images: ImagesConfig
    augmentation: AugmentationConfig
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    evaluation: EvaluationConfig
    reported: ReportedErrors | None = None
    """The paper's errors."""
    trained_as: str | None = None
    """The recipe whose trained network this one tests; None if it trains its own."""
    sources: Mapping[str, str]
    """By dotted name, the source of a value: "the paper" or another paper with the place in it, or "ours" with the
    reason. The name of a group is for all its fields that have no source of their own."""

    def fields(self) -> Iterator[tuple[str, Any, str]]:
        """Yield every value of the recipe: its dotted name, the value and its source."""
        for group in GROUPS:
            for name, value in _leaves(group, getattr(self, group)):
                if value is not None or group not in LACKING:
                    yield name, value, self.source_of(name)

    def source_of(self, name: str) -> str:
        """Return the source of a value, by its dotted name."""
        while name not in self.sources:
            if "." not in name:
                raise InputError(f"recipe {self.name}: no source is given for {name}")
            name = name.rpartition(".")[0]
        return self.sources[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Several recipes' networks, tested together: their probabilities are combined."""

    name: str
    row: str
    members: tuple[Recipe, ...]
    combine: Literal["average", "product", "learnt weights"]
    """Weights are learnt on the validation images."""
    reported: ReportedErrors
    """The paper's error on the test images."""
    validation: ReportedErrors
    """The paper's error on the validation images (section 5.1)."""
    sources: Mapping[str, str]


def changed(recipe: Recipe, source: str, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe with other values and their source.

    Args:
        recipe: is not changed.
        source: of the new values.
        changes: by dotted name.

    Raises:
        InputError: an unknown field.
    """
    sources = dict(recipe.sources)
    for name, value in changes.items():
        try:
            recipe = _replaced(recipe, name.split("."), value)
        except (AttributeError, TypeError):
            raise InputError(f"recipe {recipe.name}: no field {name}") from None
        sources = {other: old for other, old in sources.items() if not other.startswith(f"{name}.")} | {name: source}
    return dataclasses.replace(recipe, sources=MappingProxyType(sources))


def _replaced(old: Any, path: Sequence[str], value: Any) -> Any:
    """Return a dataclass or mapping with another value at a path inside it."""
    if not path:
        return value
    name, *rest = path
    if isinstance(old, Mapping):
        return MappingProxyType({**old, name: _replaced(old.get(name), rest, value)})
    return dataclasses.replace(old, **{name: _replaced(getattr(old, name), rest, value)})


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
