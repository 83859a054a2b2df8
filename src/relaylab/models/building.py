"""From a recipe's plain values to networks, plans, heads and losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models.inception import InceptionAux

from relaybackprop import AuxiliaryHead, LinearHead, Plan, Relay, RelayLoss, Window
from relaylab import models
from relaylab.errors import InputError, nearest
from relaylab.models.layers import initialise
from relaylab.recipes.schema import NetworkConfig, OptimizerConfig, PlanConfig, Recipe

INCEPTION_HEAD_MAP = 17  # pixels; a pooling of 5x5 with stride 3, then a convolution of 5x5


@dataclass(frozen=True)
class Entry:
    """The builder of an architecture, a function of num_classes, image_size and the options that it has."""

    build: Callable[..., nn.Module]
    options: tuple[str, ...]
    batch_norm: bool = False


NETWORKS: Mapping[str, Entry] = {
    "vgg13": Entry(partial(models.vgg, 13), ("width",)),
    "vgg16": Entry(partial(models.vgg, 16), ("width",)),
    "vgg19": Entry(partial(models.vgg, 19), ("width",)),
    "vgg22": Entry(partial(models.vgg, 22), ("width",)),
    "vgg25": Entry(partial(models.vgg, 25), ("width",)),
    "model_a": Entry(models.model_a, ("width", "pyramid")),
    "model_a_printed": Entry(models.model_a_printed, ("width", "pyramid")),
    "model_b": Entry(models.model_b, ("width", "pyramid")),
    "resnet50": Entry(models.resnet50, ("width",), batch_norm=True),
    "small_vgg": Entry(models.small_vgg, ("width", "convs")),
    "inception_v3": Entry(models.inception_v3, (), batch_norm=True),
}


def build_network(config: NetworkConfig) -> nn.Module:
    """Build a network with fresh weights.

    Raises:
        InputError: an unknown architecture, an option that it lacks, fewer than two classes, or images that are too
            small.
    """
    kind = NETWORKS.get(config.architecture)
    if kind is None:
        raise InputError(f"unknown architecture {config.architecture!r}{nearest(config.architecture, NETWORKS)}")
    for name in ("num_classes", "image_size", "width", "convs"):
        value = getattr(config, name)
        if value is not None and (type(value) is not int or value < 1):
            raise InputError(f"network.{name} is {value!r}: expected a whole number of at least 1")
    is_grids = isinstance(config.pyramid, tuple) and all(type(b) is int and b > 0 for b in config.pyramid)
    if config.pyramid is not None and not is_grids:
        raise InputError(f"network.pyramid is {config.pyramid!r}: expected whole numbers of at least 1")
    if config.num_classes < 2:
        raise InputError(f"num_classes is {config.num_classes}: a classifier needs at least 2")
    given = {name: getattr(config, name) for name in ("width", "convs", "pyramid")}
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in kind.options:
            raise InputError(f"{config.architecture} has no {name}; leave network.{name} out")
    return kind.build(num_classes=config.num_classes, image_size=config.image_size, **options)


def build_plan(config: PlanConfig, scheme: str = "relay") -> Plan:
    """Build the plan of a scheme ("standard", "multi_loss", "isolated" or "relay") from relay's windows.

    Raises:
        InputError: another scheme, or another one than "standard" without auxiliary losses.
    """
    auxiliary = {
        name: Window(top=window.top, bottom=window.bottom, after=window.after, weight=window.weight)
        for name, window in config.auxiliary.items()
    }
    plan = Plan(Window(bottom=config.primary.bottom, after=config.primary.after), auxiliary)
    makers: dict[str, Callable[[], Plan]] = {
        "standard": plan.standard,
        "multi_loss": plan.multi_loss,
        "isolated": plan.isolated,
        "relay": lambda: plan,
    }
    if scheme not in makers:
        raise InputError(f"unknown scheme {scheme!r}: expected one of {', '.join(makers)}")
    if not auxiliary and scheme != "standard":
        raise InputError(f"the scheme {scheme!r} needs auxiliary losses, and the plan has none")
    return makers[scheme]()


def build_heads(plan: PlanConfig, network: NetworkConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Build the auxiliary heads with fresh weights, for the maps of `model`, which is not changed.

    Raises:
        InputError: an unknown head, or a map too small for it.
    """
    shapes = head_inputs(plan, network, model)
    return {
        name: build_head(window.head, shapes[name], network.num_classes, NETWORKS[network.architecture].batch_norm)
        for name, window in plan.auxiliary.items()
    }


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
            f"torchvision's Inception head needs a map of at least {INCEPTION_HEAD_MAP} pixels a side, but this one "
            f"is {height} x {width}; use another head or larger images"
        )
    return InceptionAux(channels, num_classes)


HEADS: Mapping[str, Callable[[tuple[int, ...], int, bool], nn.Module]] = {
    "googlenet": _googlenet,  # `relaybackprop.AuxiliaryHead`, our default
    "inception": _inception,  # torchvision's of Inception-v3, always with batch normalisation
    "linear": _linear,  # `relaybackprop.LinearHead`
}


def build_head(head: str, shape: tuple[int, ...], num_classes: int, batch_norm: bool) -> nn.Module:
    """Build an auxiliary head for a map of shape (c, h, w).

    Args:
        head: a name in `HEADS`.
        shape: of the map.
        num_classes: length of the output.
        batch_norm: whether the network has batch normalisation.

    Raises:
        InputError: another name, or a map too small for it.
    """
    if head not in HEADS:
        raise InputError(f"unknown head {head!r}{nearest(head, HEADS)}")
    return HEADS[head](shape, num_classes, batch_norm)


def head_inputs(plan: PlanConfig, network: NetworkConfig, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape (c, h, w) of the map that each auxiliary head reads, by loss, without computing anything."""
    with torch.device("meta"):
        twin = build_network(network) if any(p.device.type != "meta" for p in model.parameters()) else model
    shapes: dict[str, tuple[int, ...]] = {}
    for name, window in plan.auxiliary.items():

        def note(_module: nn.Module, _args: Any, output: torch.Tensor, name: str = name) -> None:
            shapes[name] = tuple(output.shape[1:])

        twin.get_submodule(window.top).register_forward_hook(note)
    with torch.no_grad():
        twin.eval()(torch.empty(1, 3, network.image_size, network.image_size, device="meta"))
    return shapes


def build_relay(recipe: Recipe) -> Relay:
    """Build a recipe's network and heads under its plan, with fresh weights from the default random generator.

    Raises:
        InputError: values that are inconsistent.
    """
    model = build_network(recipe.network)
    plan = build_plan(recipe.plan, recipe.scheme)
    return Relay(model, plan, build_heads(recipe.plan, recipe.network, model) if plan.auxiliary else None)


def build_criterion(config: OptimizerConfig) -> RelayLoss:
    """Build the weighted sum of cross-entropies."""
    return RelayLoss(nn.CrossEntropyLoss(label_smoothing=config.label_smoothing))
