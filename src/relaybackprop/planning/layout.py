"""Layout detection: which dimension of a module's output holds the channels.

Note [Evidence]
Each layer votes by its own output. Convolutions, pooling, batch and group normalisation have their channels in
dimension 1. Linear layers, embeddings and layer normalisation have them in the last dimension. Any other layer with a
one-dimensional weight has them in the only dimension of the weight's size. The first of these groups with votes
decides, if it is unanimous:
1. Layers inside the module whose output has the shape of the module's output.
2. Layers inside the module, which vote for the dimension of the module's output that has the size of their channels.
3. Layers inside the module whose output has as many dimensions as the module's output.
4. Layers anywhere in the model whose output has the shape of the module's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm
_POOLS = nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d


@dataclass(frozen=True)
class Vote:
    """A layer's vote: the shape of its output and its channel dimension."""

    name: str
    shape: tuple[int, ...]
    axis: int


def votes_of(name: str, module: nn.Module, output: Any) -> list[Vote]:
    """Return the vote of a module for its output, or an empty list if the module has no vote."""
    if not isinstance(output, Tensor) or output.ndim < 3:
        return []
    shape = tuple(output.shape)
    axis = _axis(module, shape)
    return [] if axis is None else [Vote(name, shape, axis)]


def deciding_votes(votes: Sequence[Vote], name: str, shape: tuple[int, ...]) -> list[tuple[str, int]]:
    """Return the first group that votes on a module's output, as layer names and dimensions (Note [Evidence]).

    Args:
        votes: the votes of a forward pass, in its order.
        name: name of the module.
        shape: shape of the module's output.
    """
    ends = 1, len(shape) - 1
    inside = [vote for vote in votes if f"{vote.name}.".startswith(f"{name}.")]
    sizes = [(vote, [axis for axis in ends if shape[axis] == vote.shape[vote.axis]]) for vote in inside]
    groups = (
        [(vote.name, vote.axis) for vote in inside if vote.shape == shape],
        [(vote.name, axes[0]) for vote, axes in sizes if len(axes) == 1],
        [(vote.name, vote.axis) for vote in inside if len(vote.shape) == len(shape)],
        [(vote.name, vote.axis) for vote in votes if vote.shape == shape],
    )
    return next((group for group in groups if group), groups[-1])


def spatial_shape(votes: Sequence[Vote], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the map, or the number of tokens, in a module's output; empty for vectors.

    Without a unanimous vote, three dimensions are tokens, and more are a channels-first map.
    """
    if len(shape) < 3:
        return ()
    axes = {axis for _, axis in deciding_votes(votes, name, shape)}
    channels = axes.pop() if len(axes) == 1 else len(shape) - 1 if len(shape) == 3 else 1
    return tuple(size for axis, size in enumerate(shape) if axis not in (0, channels))


def _axis(module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Return the channel dimension of a layer's output, or None if the layer does not determine it."""
    last = len(shape) - 1
    if isinstance(module, (*_CONVOLUTIONS, *_NORMS, *_POOLS)):
        return 1
    # Subclasses of LayerNorm may permute, such as LayerNorm2d in torchvision and timm.
    if isinstance(module, (nn.Linear, nn.Embedding)) or type(module) in (nn.LayerNorm, nn.RMSNorm):
        return last
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or len(weight) == 1:
        return None
    axes = [axis for axis in (1, last) if shape[axis] == len(weight)]
    return axes[0] if len(axes) == 1 else None
