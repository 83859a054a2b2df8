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
# The groups of a recipe's values.
GROUPS = ("network", "plan", "scheme", "images", "augmentation", "optimizer", "loss", "evaluation")
Sampling = Literal["class-aware", "shuffled", "square-root"]
Gain = Literal["default", "he", "quiet"]  # as in relaybackprop.heads; a test compares the two
Scale = Literal["paper", "small", "tiny"]
LIBRARIES = ("timm", "torchvision")  # libraries whose networks are called LIBRARY:NAME
UNMENTIONED = (  # values of later methods, which no paper of the tables mentions
    "augmentation.crop_scale", "augmentation.crop_ratio", "augmentation.padding", "augmentation.policy",
    "augmentation.policy_operations", "augmentation.policy_magnitude", "augmentation.erasing", "augmentation.mixup",
    "augmentation.cutmix",
    "optimizer.betas", "optimizer.eps", "optimizer.decay_norms_and_biases", "optimizer.layer_decay",
    "optimizer.ema_decay", "optimizer.warmup", "optimizer.clip_norm", "loss.label_smoothing", "loss.class_weights",
)  # fmt: skip
# In these groups, a value of None means that the recipe does not set the option.
LACKING = ("network", "plan", "images")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """A network without its auxiliary heads; see `relaylab.models`."""

    architecture: str
    """A name in `relaylab.models.building.NETWORKS`, or an external network: timm:NAME, torchvision:NAME,
    package.module:function or path/to/file.py:function; see `relaylab.models.named`."""
    num_classes: int
    image_size: int
    """Side of the square crops that the network sees, in pixels."""
    width: int | None = None
    """Filters of the first segment (VGGs, model A, ResNet-50) or k of the first inception modules (model B), which
    scales all layers; 64 in the paper. Not for Inception-v3."""
    convs: int | None = None
    """Convolutions in each segment of the small VGG."""
    pyramid: tuple[int, ...] | None = None
    """Bins along a side of each grid of the spatial pyramid (models A and B)."""
    gain: Gain | None = None
    """Initialisation of the last layer: "he" draws weights with variance 2 / fan-in, the default of the paper's
    networks; "quiet" draws small weights, so that the initial loss is near chance level; "default" is PyTorch's
    initialisation."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Additional keyword arguments of an external network, excluding num_classes: numbers, text, true, false, or lists
    of these."""
    pretrained: str | None = None
    """File of pretrained weights, safetensors or a PyTorch state dict. Tensors that do not fit, such as the last layer
    for different classes, keep their random initialisation."""

    @property
    def is_named(self) -> bool:
        """Whether this is an external network."""
        return ":" in self.architecture

    @property
    def is_code(self) -> bool:
        """Whether this is a function in a package or file, whose code is imported."""
        return self.is_named and self.architecture.partition(":")[0] not in LIBRARIES


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimaryConfig:
    """The window of the loss on the network's output. Its gradient stops at the input of a module, or after one."""

    bottom: str | None = None
    after: str | None = None
    """Name of a module; several names, separated by commas, if the window has side inputs; see `ends_of`."""


def ends_of(after: str | None) -> str | tuple[str, ...] | None:
    """Parse a window's `after`: return a tuple if it lists several modules, otherwise the value itself."""
    return tuple(name.strip() for name in after.split(",")) if after and "," in after else after


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryConfig:
    """An auxiliary loss: the position and type of its head, its weight, and the lower end of its window."""

    top: str
    bottom: str | None = None
    after: str | None = None
    weight: float = 0.3
    head: str = "googlenet"
    """A name in `relaylab.models.building.HEADS`, or "auto" to choose the head by the shape of its input."""
    gain: Gain | None = None
    """Initialisation of the head's last layer, like `network.gain`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """The windows of relay backpropagation. The plans of the other schemes are derived from them."""

    primary: PrimaryConfig = PrimaryConfig()
    auxiliary: Mapping[str, AuxiliaryConfig] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesConfig:
    """The images, and the size to which they are resized before cropping to the network's `image_size`."""

    data_set: Literal["Places2 challenge", "ImageNet 2012", "MiniPlaces", "digits", "any"]
    short_side: int
    """Length of the shorter side after resizing, in pixels; the aspect ratio is kept."""
    sampling: Sampling
    held_out: int | float | None = None
    """Number of training images per class, or share if below 1, to hold out and use as validation images: if there are
    no validation images, or to choose a learning rate without the images of the reported errors."""
    set_aside: int | float | None = None
    """Number of training images per class, or share if below 1, to hold out in addition to `held_out`, and to validate
    on instead. `relaylab compare --tune` chooses values by them."""
    val_split: Literal["val", "test"] | None = None
    """Split that training validates on; "val" if not set."""
    long_tail: float | None = None
    """Ratio of the largest to the smallest class of an artificial long tail, in which class sizes decrease
    exponentially; None to use all training images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentationConfig:
    """Augmentation of training crops, and the normalisation, which evaluation also uses."""

    flip: bool = True
    """Mirror half of the images."""
    colour_shift: float = 0.1
    """Standard deviation of AlexNet's shift along the principal components of colour; 0 disables it."""
    mean: Literal["pixel", "channel"] = "pixel"
    """Subtract the mean image of the training images ("pixel"), or their mean colour ("channel")."""
    divide: bool = False
    """Divide by the standard deviation of each channel."""
    crop: Literal["window", "resized"] = "window"
    """"window": the paper's crop, a window of fixed scale at a random position. "resized": a random resized crop, a box
    of random area and aspect ratio that is resized to a square."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Minimum and maximum area of a resized crop, as a fraction of the image's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Minimum and maximum aspect ratio (width / height) of a resized crop."""
    padding: int = 0
    """Width of the black border around the resized image, in pixels, before a training crop is taken."""
    policy: Literal["randaugment", "trivialaugment", "autoaugment"] | None = None
    """Random colour and geometry operations on each crop; see `relaylab.data.policies`."""
    policy_operations: int = 2
    """Number of operations on each crop (RandAugment only)."""
    policy_magnitude: int = 9
    """Strength of the operations, 0 to 30 (RandAugment only)."""
    erasing: float = 0.0
    """Probability of erasing a random box from an image after normalisation; erased pixels are 0."""
    mixup: float = 0.0
    """Mix pairs of images and their targets, in proportions drawn from Beta(mixup, mixup); 0 disables it."""
    cutmix: float = 0.0
    """Paste a box of one image into another, with an area drawn from Beta(cutmix, cutmix), and mix their targets; 0
    disables it. If mixup is also enabled, one of the two is chosen for each batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlateauConfig:
    """Multiply the learning rate by `factor` after `patience` evaluations without a smaller error."""

    kind: Literal["plateau"] = "plateau"
    factor: float = 0.1
    patience: int
    least: float = 0.01
    """Lower limit of the learning rate, as a fraction of the initial one."""


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
    """Decay the learning rate along half a cosine wave, from the first iteration to the last."""

    kind: Literal["cosine"] = "cosine"
    least: float = 0.0
    """Final learning rate, as a fraction of the initial one."""


ScheduleConfig = PlateauConfig | StepsConfig | DecayConfig | CosineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and the length of training. An algorithm ignores the values of other algorithms."""

    algorithm: Literal["sgd", "adamw"] = "sgd"
    """A name in `relaylab.train.optimizers.OPTIMIZERS`."""
    lr: float
    momentum: float = 0.9
    """SGD only."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW only: decay rates of the running averages of the gradients and their squares."""
    eps: float = 1e-8
    """AdamW only: added to the denominator."""
    weight_decay: float
    """SGD: L2 term `weight_decay * w` added to the gradient; AdamW: decoupled weight decay."""
    decay_norms_and_biases: bool = True
    """Apply weight decay to all parameters, as in Caffe; if false, not to those with at most one dimension, nor to
    those that the network lists in `no_weight_decay()`, as timm's networks do."""
    layer_decay: float | None = None
    """Factor on the learning rate from each layer to the one below it, for fine-tuning; it is 1 for the last layer and
    the heads. See `relaylab.train.layers`."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; see `relaylab.train.averaging`."""
    batch_size: int = 256
    """Images per update, over all processes."""
    iterations: int
    schedule: ScheduleConfig
    evaluate_every: int = 5_000
    """Iterations between two evaluations."""
    warmup: int = 0
    """Iterations over which the learning rate rises linearly to the schedule's value."""
    clip_norm: float | None = None
    """Maximum norm of the gradients; larger ones are scaled down to it."""
    segment_lr: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Factor on the learning rate of each segment; 1 if not given. A segment is named by the losses that train it,
    joined by "+" from the lowest head up, such as "aux" or "aux+primary"; a head is "head aux"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The training loss of the network's output and of each auxiliary head."""

    function: Literal["cross-entropy", "binary"] = "cross-entropy"
    """Softmax cross-entropy; or sigmoid and binary cross-entropy per class, averaged over classes."""
    label_smoothing: float = 0.0
    """Share of each target that is distributed over all classes."""
    class_weights: Literal["balanced", "square-root"] | None = None
    """Weight of an image, proportional to 1 / n ("balanced") or 1 / sqrt(n) ("square-root") for a class with n training
    images, with mean 1 over all training images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """The protocol for evaluating a trained network."""

    protocol: Literal["single crop", "dense"] = "single crop"
    scales: tuple[int, ...] = (256,)
    """Lengths of the images' shorter side in pixels; scores are averaged over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedErrors:
    """Published error rates in per cent."""

    top1: float | None = None
    top5: float | None = None
    split: Literal["val", "test"] = "val"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that defines a training run: network, windows, scheme, images, optimizer and evaluation.

    The built-in recipes are rows of the paper's tables.

    Example::

        recipe = find_recipe("table3-model-a-relay", "small")
        smaller = changed(recipe, "by hand", {"optimizer.batch_size": 64})
    """

    name: str
    row: str
    """Position in the paper and name there."""
    network: NetworkConfig
    plan: PlanConfig = PlanConfig()
    scheme: Scheme
    images: ImagesConfig
    augmentation: AugmentationConfig
    optimizer: OptimizerConfig
    loss: LossConfig = LossConfig()
    evaluation: EvaluationConfig
    reported: ReportedErrors | None = None
    """The paper's error rates."""
    trained_as: str | None = None
    """Name of the recipe whose trained network this one evaluates; None if it trains its own."""
    sources: Mapping[str, str]
    """Source of each value by dotted name: "the paper" or the name of a different paper, with the section, or "ours"
    with the reason. The source of a group applies to all its fields without their own."""

    def fields(self) -> Iterator[tuple[str, Any, str]]:
        """Yield the dotted name, value and source of every value of the recipe."""
        for group in GROUPS:
            for name, value in _leaves(group, getattr(self, group)):
                if value is not None or group not in LACKING:
                    yield name, value, self.source_of(name)

    def names(self) -> list[str]:
        """Return the dotted names of all values, including those that the recipe does not set."""
        return [name for group in GROUPS for name, _ in _leaves(group, getattr(self, group))]

    def source_of(self, name: str) -> str:
        """Return the source of the value with this dotted name."""
        while name not in self.sources:
            if "." not in name:
                raise InputError(f"recipe {self.name}: no source is given for {name}")
            name = name.rpartition(".")[0]
        return self.sources[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Several recipes whose networks are evaluated together, by combining their probabilities."""

    name: str
    row: str
    members: tuple[Recipe, ...]
    combine: Literal["average", "product", "learnt weights"]
    """Method of combining probabilities; weights are learnt on the validation images."""
    reported: ReportedErrors
    """The paper's error rates on the test images."""
    validation: ReportedErrors
    """The paper's error rates on the validation images (section 5.1)."""
    sources: Mapping[str, str]


def changed(recipe: Recipe, source: str, changes: Mapping[str, Any]) -> Recipe:
    """Return a copy of a recipe with changed values and their source.

    Args:
        recipe: recipe to copy; it is not modified.
        source: source of the new values.
        changes: new values by dotted name.

    Raises:
        InputError: a field is unknown.
    """
    sources = dict(recipe.sources)
    for name, value in changes.items():
        try:
            recipe = _replaced(recipe, name.split("."), value)
        except (AttributeError, TypeError):
            raise InputError(f"recipe {recipe.name} has no field {name}") from None
        sources = {other: old for other, old in sources.items() if not other.startswith(f"{name}.")} | {name: source}
    return dataclasses.replace(recipe, sources=MappingProxyType(sources))


def _replaced(old: Any, path: Sequence[str], value: Any) -> Any:
    """Return a copy of a dataclass or mapping with a different value at a path in it."""
    if not path:
        return value
    name, *rest = path
    if isinstance(old, Mapping):
        return MappingProxyType({**old, name: _replaced(old.get(name), rest, value)})
    return dataclasses.replace(old, **{name: _replaced(getattr(old, name), rest, value)})


def value_text(value: object) -> str:
    """Format a value of a recipe as `--set` accepts it: true, none, 800000, "7,3,2,1"."""
    match value:
        case True | False | None:
            return str(value).lower()
        case tuple():
            return ",".join(map(value_text, value))
        case _:
            return str(value)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        items = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    elif isinstance(value, Mapping):
        items = value
    else:
        yield name, value
        return
    for key, item in items.items():
        yield from _leaves(f"{name}.{key}", item)
