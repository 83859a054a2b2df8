"""Build networks, plans, heads and losses from the plain values of a recipe."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models.inception import InceptionAux

from relaybackprop import AuxiliaryHead, LinearHead, Plan, Relay, RelayError, RelayLoss, Window, head_for
from relaybackprop.engine.hooks import find_module
from relaylab import models
from relaylab.errors import InputError, nearest
from relaylab.models.layers import initialise, set_gain
from relaylab.models.losses import BinaryCrossEntropy, WeightedCrossEntropy, class_weights
from relaylab.models.named import build_named
from relaylab.recipes.schema import LIBRARIES, AuxiliaryConfig, LossConfig, NetworkConfig, PlanConfig, Recipe, ends_of

LARGEST = {"num_classes": 10_000_000, "image_size": 16_384, "width": 65_536, "convs": 1000}
INCEPTION_HEAD_MAP = 17  # pixels; a pooling of 5x5 with stride 3, then a convolution of 5x5


@dataclass(frozen=True)
class Entry:
    """An architecture: its builder, called with num_classes, image_size and those `options` that are set."""

    build: Callable[..., nn.Module]
    options: tuple[str, ...]


NETWORKS: Mapping[str, Entry] = {
    "vgg13": Entry(partial(models.vgg, 13), ("width",)),
    "vgg16": Entry(partial(models.vgg, 16), ("width",)),
    "vgg19": Entry(partial(models.vgg, 19), ("width",)),
    "vgg22": Entry(partial(models.vgg, 22), ("width",)),
    "vgg25": Entry(partial(models.vgg, 25), ("width",)),
    "model_a": Entry(models.model_a, ("width", "pyramid")),
    "model_a_printed": Entry(models.model_a_printed, ("width", "pyramid")),
    "model_b": Entry(models.model_b, ("width", "pyramid")),
    "resnet50": Entry(models.resnet50, ("width",)),
    "small_vgg": Entry(models.small_vgg, ("width", "convs")),
    "inception_v3": Entry(models.inception_v3, ()),
}


def build_network(config: NetworkConfig) -> nn.Module:
    """Build a network with random weights.

    Example::

        model = build_network(NetworkConfig(architecture="resnet50", num_classes=10, image_size=224))

    Raises:
        InputError: the architecture is unknown or lacks an option, there are fewer than two classes, the images are too
            small, or a gain is set for a network whose last layer does not compute the class scores.
    """
    model = _build_network(config)
    if config.gain is not None:
        set_gain(model, config.gain, config.num_classes)
    return model


def _build_network(config: NetworkConfig) -> nn.Module:
    name = config.architecture
    if not config.is_named and name not in NETWORKS:
        others = f"{', '.join(f'{place}:NAME' for place in LIBRARIES)}, package.module:function, file.py:function"
        raise InputError(f"unknown architecture {name!r}{nearest(name, NETWORKS)}; or an external network: {others}")
    _check_sizes(config)
    own = () if config.is_named else NETWORKS[name].options
    given = {option: getattr(config, option) for option in ("width", "convs", "pyramid")}
    options = {option: value for option, value in given.items() if value is not None}
    for option in options:
        if option not in own:
            raise InputError(f"{name} has no {option}: remove network.{option}")
    if config.is_named:
        return build_named(config)
    if config.options:
        instead = f"set {', '.join(own)} instead" if own else "remove them"
        raise InputError(f"{name} does not take network.options: {instead}")
    try:
        return NETWORKS[name].build(num_classes=config.num_classes, image_size=config.image_size, **options)
    except (RuntimeError, OverflowError, MemoryError, TypeError, ValueError) as error:  # exceptions that torch raises
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot be built with {config.num_classes} classes and {options}: {reason}") from None


def _check_sizes(config: NetworkConfig) -> None:
    for name in ("num_classes", "image_size", "width", "convs"):
        value = getattr(config, name)
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"network.{name} is {value!r}: expected an integer of at least 1")
        if value is not None and value > LARGEST[name]:
            raise InputError(f"network.{name} is {value}: expected at most {LARGEST[name]}")
    is_grids = isinstance(config.pyramid, tuple) and all(type(b) is int and 0 < b <= 1000 for b in config.pyramid)
    if config.pyramid is not None and (not is_grids or not 1 <= len(config.pyramid) <= 100):
        raise InputError(f"network.pyramid is {config.pyramid!r}: expected one or more integers of at least 1")
    if config.num_classes < 2:
        raise InputError(f"num_classes is {config.num_classes}: expected at least 2")


def build_meta_network(config: NetworkConfig) -> nn.Module:
    """Build a network on the meta device, where tensors have no values; check the output of an external network.

    Raises:
        InputError: the same cases as in `build_network`; or the network does not accept the images or does not return
            class scores.
    """
    try:
        with torch.device("meta"):
            model = build_network(config)
    except InputError as error:
        if not config.is_named or error.__cause__ is None:  # from a check of the lab, not from the network's code
            raise
        with torch.random.fork_rng(devices=[]):  # its constructor needs values; keep the random state
            model = build_network(config).to("meta")
    if config.is_named:
        _check_output(config, model)
    return model


def _check_output(config: NetworkConfig, model: nn.Module) -> None:
    name, size, wanted = config.architecture, config.image_size, (2, config.num_classes)
    try:
        with torch.no_grad():
            output = model(torch.empty(2, 3, size, size, device="meta"))
    except Exception as error:  # third-party code can raise anything
        remedy = "change network.image_size, or the image size in network.options"
        if "meta" in str(error):  # a value was needed, and tensors on the meta device have none
            remedy = (
                "its forward pass depends on the values of tensors, so relaylab cannot place windows or predict costs; "
                "train it in your own loop with relaybackprop, which supports it"
            )
        raise InputError(
            f"{name} does not run on images (2, 3, {size}, {size}): {type(error).__name__}: {error}; {remedy}"
        ) from error
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != wanted:
        found = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        has_heads = any(field.startswith("aux_logits") for field in getattr(output, "_fields", ()))
        remedy = "; network.options.aux_logits=false removes its own auxiliary classifiers" if has_heads else ""
        raise InputError(f"{name} returns {found} for two images: expected class scores of shape {wanted}{remedy}")


def build_plan(config: PlanConfig, scheme: str = "relay") -> Plan:
    """Build the plan of a scheme ("standard", "multi_loss", "isolated" or "relay") from relay's windows.

    Raises:
        InputError: the scheme is unknown, or is not "standard" and the plan has no auxiliary losses.
    """
    auxiliary = {
        name: Window(top=window.top, bottom=window.bottom, after=ends_of(window.after), weight=window.weight)
        for name, window in config.auxiliary.items()
    }
    plan = Plan(Window(bottom=config.primary.bottom, after=ends_of(config.primary.after)), auxiliary)
    makers: dict[str, Callable[[], Plan]] = {
        "standard": plan.standard,
        "multi_loss": plan.multi_loss,
        "isolated": plan.isolated,
        "relay": lambda: plan,
    }
    if scheme not in makers:
        raise InputError(f"unknown scheme {scheme!r}: expected one of {', '.join(makers)}")
    if not auxiliary and scheme != "standard":
        raise InputError(f"the scheme {scheme!r} requires auxiliary losses, and the plan has none")
    return makers[scheme]()


def build_heads(plan: PlanConfig, network: NetworkConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Build the auxiliary heads with random weights, for the maps of `model`, which is not changed.

    Raises:
        InputError: an unknown head or place, a map too small for it, or features that it does not read.
    """
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    shaped = {name: window for name, window in plan.auxiliary.items() if window.head != AUTO}
    shapes = head_inputs(replace(plan, auxiliary=shaped), network, model) if shaped else {}
    heads: dict[str, nn.Module] = {}
    for name, window in plan.auxiliary.items():
        if window.head == AUTO:
            heads[name] = _fitting_head(window, network, model)
        else:
            heads[name] = build_head(window.head, shapes[name], network.num_classes, batch_norm)
        if window.gain is not None:
            set_gain(heads[name], window.gain, network.num_classes)
    return heads


def _fitting_head(window: AuxiliaryConfig, network: NetworkConfig, model: nn.Module) -> nn.Module:
    """Build the head that `relaybackprop.head_for` chooses."""
    images = torch.empty(2, 3, network.image_size, network.image_size, device="meta")
    plan = Plan(auxiliary={AUTO: Window(top=window.top)})
    return head_for(model, plan, images, network.num_classes)[AUTO]


def _googlenet(shape: tuple[int, ...], num_classes: int, batch_norm: bool) -> nn.Module:
    head = AuxiliaryHead(shape[0], num_classes, batch_norm=batch_norm)
    initialise(head)
    return head


def _linear(shape: tuple[int, ...], num_classes: int, batch_norm: bool) -> nn.Module:  # noqa: ARG001
    head = LinearHead(shape[0], num_classes)
    initialise(head)
    return head


def _inception(shape: tuple[int, ...], num_classes: int, batch_norm: bool) -> nn.Module:  # noqa: ARG001
    channels, height, width = shape
    if min(height, width) < INCEPTION_HEAD_MAP:
        raise InputError(
            f"torchvision's Inception head requires a map of at least {INCEPTION_HEAD_MAP} x {INCEPTION_HEAD_MAP}, but "
            f"this one is {height} x {width}; use a different head or larger images"
        )
    return InceptionAux(channels, num_classes)


def _conv(shape: tuple[int, ...], num_classes: int, batch_norm: bool) -> nn.Module:
    channels, hidden = shape[0], 128
    layers = OrderedDict[str, nn.Module](conv=nn.Conv2d(channels, channels, 3, padding=1, bias=not batch_norm))
    layers["norm"] = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
    layers |= {"relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    layers |= {"fc1": nn.Linear(channels, hidden), "relu1": nn.ReLU(), "fc2": nn.Linear(hidden, num_classes)}
    head = nn.Sequential(layers)
    initialise(head)
    return head


AUTO = "auto"  # the head is chosen by `relaybackprop.head_for`
HEADS: Mapping[str, Callable[[tuple[int, ...], int, bool], nn.Module]] = {
    "conv": _conv,  # a 3x3 convolution and two linear layers, "1c2f" in papers on local learning (Wang et al., 2021)
    "googlenet": _googlenet,  # `relaybackprop.AuxiliaryHead`, our default
    "inception": _inception,  # torchvision's of Inception-v3, always with batch normalisation
    "linear": _linear,  # `relaybackprop.LinearHead`
}


def build_head(head: str, shape: tuple[int, ...], num_classes: int, batch_norm: bool) -> nn.Module:
    """Build an auxiliary head for a map of shape (c, h, w).

    Args:
        head: a name in `HEADS`.
        shape: shape of the map.
        num_classes: number of classes, the length of the output.
        batch_norm: whether the head has batch normalisation, as its network does.

    Raises:
        InputError: the head is unknown, or the map is too small.
    """
    if head not in HEADS:
        raise InputError(f"unknown head {head!r}{nearest(head, [AUTO, *HEADS])}")
    if len(shape) != 3:
        raise InputError(
            f"the head {head!r} expects a map (c, h, w), but its input has shape {shape}: use the head {AUTO!r}"
        )
    return HEADS[head](shape, num_classes, batch_norm)


def head_inputs(plan: PlanConfig, network: NetworkConfig, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape (c, h, w) of each auxiliary head's input, by loss, computed on the meta device."""
    twin = build_meta_network(network) if any(p.device.type != "meta" for p in model.parameters()) else model
    shapes: dict[str, tuple[int, ...]] = {}
    for name, window in plan.auxiliary.items():

        def note(_module: nn.Module, _args: Any, output: torch.Tensor, name: str = name) -> None:
            shapes[name] = tuple(output.shape[1:])

        find_module(twin, window.top).register_forward_hook(note)
    with torch.no_grad():
        twin.eval()(torch.empty(1, 3, network.image_size, network.image_size, device="meta"))
    return shapes


def build_relay(recipe: Recipe, *, on_meta: bool = False) -> Relay:
    """Build a recipe's network and heads under its plan, with random weights from the default random generator.

    With `on_meta` they are on the meta device; see `build_meta_network`.

    Raises:
        InputError: values that are inconsistent.
    """
    model = build_meta_network(recipe.network) if on_meta else build_network(recipe.network)
    try:
        with torch.device("meta") if on_meta else nullcontext():
            plan = build_plan(recipe.plan, recipe.scheme)
            return Relay(model, plan, build_heads(recipe.plan, recipe.network, model) if plan.auxiliary else None)
    except RelayError as error:
        raise InputError(f"recipe {recipe.name}: {error}") from error


def build_criterion(config: LossConfig, counts: Sequence[int] = ()) -> RelayLoss:
    """Build the weighted sum of the losses.

    Args:
        config: the recipe's loss.
        counts: number of training images of each class; required for class weights.

    Raises:
        InputError: class weights are set and counts are missing.
    """
    if config.class_weights is not None and not counts:
        raise InputError(f"loss.class_weights is {config.class_weights}: the number of images of each class is missing")
    weights = None if config.class_weights is None else class_weights(config.class_weights, counts)
    if config.function == "binary":
        return RelayLoss(BinaryCrossEntropy(config.label_smoothing, weights))
    if weights is not None:
        return RelayLoss(WeightedCrossEntropy(config.label_smoothing, weights))
    return RelayLoss(nn.CrossEntropyLoss(label_smoothing=config.label_smoothing))
