"""Segments: a *segment* is the part of a network that the same losses train."""

import itertools
from collections.abc import Mapping, Sequence
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


def window_warnings(recipe: Recipe, segments: Segments) -> list[str]:
    """Return warnings about layers that no loss trains, and about windows of relay that do not overlap."""
    warnings: list[str] = []
    untrained = segments.parameters(UNTRAINED)
    for lower, upper in _neighbours(recipe) if recipe.scheme == "relay" else ():
        if any({lower, upper} <= set(losses) for losses in segments.losses.values()):
            continue
        gap = [name for name in _between(segments, lower, upper) if name in untrained]
        untrained = [name for name in untrained if name not in gap]
        verb = "is" if len(modules := _modules(segments, gap)) == 1 else "are"
        more = f" ({', '.join(modules)} {verb} between them and {verb} not trained)" if modules else ""
        group, window = (
            ("primary", recipe.plan.primary)
            if upper == "primary"
            else (f"auxiliary.{upper}", recipe.plan.auxiliary[upper])
        )
        end = "bottom" if window.after is None else "after"
        warnings.append(
            f"the windows of {upper} and {lower} do not overlap{more}: this is not relay; lower plan.{group}.{end}"
        )
    return [*warnings, *([f"no loss reaches {', '.join(untrained)}"] if untrained else [])]


def _neighbours(recipe: Recipe) -> list[tuple[str, str]]:
    """Return pairs (lower, upper) of losses with adjacent heads; heads on one module share their lower neighbour."""
    tops = {name: window.top for name, window in recipe.plan.auxiliary.items()}  # the lowest head first
    levels = [list(names) for _, names in itertools.groupby(tops, key=tops.__getitem__)]
    return [(lower[-1], upper) for lower, level in itertools.pairwise([*levels, ["primary"]]) for upper in level]


def _between(segments: Segments, lower: str, upper: str) -> list[str]:
    """Return the parameters between the windows of two losses, which do not overlap."""
    names = [name for name in segments.of if not name.startswith("heads.")]
    reached = {
        loss: [i for i, name in enumerate(names) if loss in segments.losses[segments.of[name]]]
        for loss in (lower, upper)
    }
    return names[max(reached[lower], default=0) : min(reached[upper], default=len(names))]


def _modules(segments: Segments, parameters: Sequence[str]) -> list[str]:
    """Return the outermost modules of the network that contain only these parameters."""
    others = [f"{name}." for name in segments.of if name not in parameters]
    modules: list[str] = []
    for name in parameters:
        parts = name.split(".")
        prefixes = [".".join(parts[:count]) for count in range(2, len(parts) + 1)]  # the first part is "model"
        outer = next((p for p in prefixes if not any(other.startswith(f"{p}.") for other in others)), name)
        modules.append(outer.removeprefix("model."))
    return list(dict.fromkeys(modules))
