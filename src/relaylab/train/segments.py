"""Segments: a *segment* is the part of a network that the same losses train."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from relaybackprop import Relay, RelayError, reach
from relaylab.errors import InputError
from relaylab.models.building import build_relay
from relaylab.recipes.schema import OptimizerConfig, Recipe

UNTRAINED = "no loss"


@dataclass(frozen=True)
class Segments:
    """The parameters of a `Relay` by segment.

    Attributes:
        of: segment of each parameter: the losses that reach it, joined by "+" from the lowest head up, such as
            "aux+primary"; for a head, "head aux".
        losses: losses of each segment; for a head, its own loss.
    """

    of: Mapping[str, str]
    losses: Mapping[str, tuple[str, ...]]

    @property
    def overlaps(self) -> dict[str, tuple[str, ...]]:
        """The segments that several losses train, with these losses."""
        return {name: losses for name, losses in self.losses.items() if len(losses) > 1}

    def parameters(self, segment: str) -> list[str]:
        """Return the parameters of a segment, from lowest to highest."""
        return [name for name, other in self.of.items() if other == segment]


def segments_of(recipe: Recipe) -> Segments:
    """Derive the segments of a recipe from the graph of a forward pass on the meta device.

    Raises:
        InputError: the network, heads and windows do not match.
    """
    size = recipe.network.image_size
    relay = build_relay(recipe, on_meta=True)
    try:
        return segments_from(relay, torch.empty(2, 3, size, size, device="meta"))
    except RelayError as error:
        raise InputError(f"recipe {recipe.name}: {error}") from error


def segments_from(relay: Relay, images: torch.Tensor) -> Segments:
    """Derive the segments of a `Relay` from the graph of a forward pass.

    Raises:
        RelayError: the images, heads or windows do not match the model.
    """
    reached = reach(relay, images)
    order = [*relay.plan.auxiliary, "primary"]
    of: dict[str, str] = {}
    losses: dict[str, tuple[str, ...]] = {}
    for name in reached.parameters:
        reaching = tuple(loss for loss in order if name in reached.losses[loss])
        is_head = name.startswith("heads.")
        segment = f"head {name.split('.')[1]}" if is_head else "+".join(reaching) or UNTRAINED
        of[name], losses[segment] = segment, reaching
    return Segments(of, losses)


def segment_problems(config: OptimizerConfig, segments: Segments) -> list[str]:
    """Return error messages for learning rate factors of unknown segments."""
    names = ", ".join(segments.losses)
    return [
        f"optimizer.segment_lr.{name}: unknown segment; there are {names}"
        for name in config.segment_lr
        if name not in segments.losses
    ]
