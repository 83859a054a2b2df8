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
        of: by parameter, the segment's name: the losses that reach it, joined by "+" from the lowest head up, such as
            "aux+primary"; for a head, "head aux".
        losses: by segment, the losses; a head has its own one.
    """

    of: Mapping[str, str]
    losses: Mapping[str, tuple[str, ...]]

    @property
    def overlaps(self) -> dict[str, tuple[str, ...]]:
        """The segments that several losses train."""
        return {name: losses for name, losses in self.losses.items() if len(losses) > 1}

    def parameters(self, segment: str) -> list[str]:
        """Return a segment's parameters, from the lowest up."""
        return [name for name, own in self.of.items() if own == segment]


def segments_of(recipe: Recipe) -> Segments:
    """Derive a recipe's segments from the graph of a forward pass on the meta device.

    Raises:
        InputError: a network, heads or windows that do not go together.
    """
    size = recipe.network.image_size
    relay = build_relay(recipe, on_meta=True)
    try:
        return segments_from(relay, torch.empty(2, 3, size, size, device="meta"))
    except RelayError as error:
        raise InputError(f"recipe {recipe.name}: {error}") from error


def segments_from(relay: Relay, images: torch.Tensor) -> Segments:
    """Derive the segments of a relay from the graph of one forward pass on these images.

    Raises:
        RelayError: the images, the heads or the windows do not fit the model.
    """
    found = reach(relay, images)
    order = [*relay.plan.auxiliary, "primary"]
    of: dict[str, str] = {}
    losses: dict[str, tuple[str, ...]] = {}
    for name in found.parameters:
        reaching = tuple(loss for loss in order if name in found.losses[loss])
        is_head = name.startswith("heads.")
        segment = f"head {name.split('.')[1]}" if is_head else "+".join(reaching) or UNTRAINED
        of[name], losses[segment] = segment, reaching
    return Segments(of, losses)


def segment_problems(config: OptimizerConfig, segments: Segments) -> list[str]:
    """Return error messages for the factors on the learning rates of segments."""
    names = ", ".join(segments.losses)
    return [
        f"optimizer.segment_lr.{name}: there is no such segment; there are {names}"
        for name in config.segment_lr
        if name not in segments.losses
    ]
