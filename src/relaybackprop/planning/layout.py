"""Layout detection: which dimension of a module's output holds the channels.

Note [Evidence]
Layers vote, each by its own output. Convolutions, pooling, batch and group normalisation have their channels in
dimension 1; linear layers, embeddings and layer normalisation in the last one; any other layer with a one-dimensional
weight in the only dimension of the weight's size. The first of these groups with votes decides, if it is unanimous:
1. layers inside the module whose output has the shape of the module's output;
2. layers inside the module: the dimension of the module's output that has the size of their channels;
3. layers inside the module whose output has as many dimensions as the module's output;
4. layers anywhere in the model whose output has the shape of the module's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm
_POOLS = nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d


@dataclass(frozen=True)
class Layer:
    """A vote: the shape of a layer's output and its channel dimension."""

    name: str
    shape: tuple[int, ...]
    axis: int


def layers_in(name: str, module: nn.Module, output: Any) -> list[Layer]:
    """Return the vote of a module by its output, if it has one."""
    if not isinstance(output, Tensor) or output.ndim < 3:
        return []
    shape = tuple(output.shape)
    axis = _axis(module, shape)
    return [] if axis is None else [Layer(name, shape, axis)]


def votes(layers: Sequence[Layer], name: str, shape: tuple[int, ...]) -> list[tuple[str, int]]:
    """Return the first group that votes on a module's output, as layer names and dimensions (Note [Evidence]).

    Args:
        layers: the votes of a forward pass, in its order.
        name: the module's name.
        shape: the shape of its output.
    """
    ends = 1, len(shape) - 1
    inside = [layer for layer in layers if f"{layer.name}.".startswith(f"{name}.")]
    sizes = [(layer, [axis for axis in ends if shape[axis] == layer.shape[layer.axis]]) for layer in inside]
    groups = (
        [(layer.name, layer.axis) for layer in inside if layer.shape == shape],
        [(layer.name, axes[0]) for layer, axes in sizes if len(axes) == 1],
        [(layer.name, layer.axis) for layer in inside if len(layer.shape) == len(shape)],
        [(layer.name, layer.axis) for layer in layers if layer.shape == shape],
    )
    return next((group for group in groups if group), groups[-1])


def sides(layers: Sequence[Layer], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of the map, or the number of tokens, in a module's output; empty for vectors.

    Without a unanimous vote, three dimensions are tokens, and more are a channels-first map.
    """
    if len(shape) < 3:
        return ()
    axes = {axis for _, axis in votes(layers, name, shape)}
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
