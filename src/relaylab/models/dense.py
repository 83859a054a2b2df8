"""Networks slid over images larger than those that they were trained on: a map of class scores from one pass.

Note [Dense]
1. A network that sees crops of one size ends in layers that take a map of one size, M x M. On a larger map they are
   applied to every window of M x M, stride 1: the fully-convolutional testing of the paper's [5]. What comes out is
   exactly what each window by itself would give.
2. Neighbouring windows of a pyramid share their bins' maxima. A bin is a maximum over h x w pixels; pooled once with
   stride 1, the map holds that bin of every window, each at its own offset. Nothing is pooled twice.
3. Fully connected layers then take all windows as one batch, which reads their weights once: the same products as
   convolving with them, without a second form of the weights.
4. Global average pooling and a linear layer commute, so that ResNet and Inception as they stand already give the mean
   over their score map. They are asked for that.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import VGG

from relaylab.errors import InputError
from relaylab.models.pyramid import SpatialPyramid, window


def dense(model: nn.Module, *, map_size: int | None = None) -> nn.Module:
    """Turn a network into one for images of any size from that of its crops up. See Note [Dense].

    Args:
        model: one of `relaylab.models`, or another with global average pooling; its layers are shared, not copied.
        map_size: side of the last map of its crops, in pixels; needed for VGGNets only.

    Returns:
        A module: images (batch, 3, h, w) to class scores (batch, classes, rows, columns).

    Raises:
        InputError: a network of another kind.
    """
    if isinstance(model, VGG):
        if map_size is None:
            raise InputError("a VGGNet does not say which map its crops give: map_size is missing")
        last = nn.Sequential(model.avgpool, nn.Flatten(), model.classifier)
        return _Sliding(model.features, _Windows(map_size), last)
    parts = OrderedDict(model.named_children())
    if "classifier" in parts and isinstance(model, nn.Sequential):
        classifier = parts.pop("classifier")
        name, last = parts.popitem()
        pyramid = getattr(last, "spp", None)
        if isinstance(pyramid, SpatialPyramid):
            parts[name] = nn.Sequential(*(layer for layer in last.children() if layer is not pyramid))
            return _Sliding(nn.Sequential(parts), SlidingPyramid(pyramid), classifier)
    if any(map(_pools_globally, model.modules())):
        return _Global(model)
    raise InputError(
        f"{type(model).__name__} has no dense form: expected a VGGNet, model A or B, or global average pooling, as in "
        "ResNet and Inception"
    )


def _pools_globally(module: nn.Module) -> bool:
    is_timms = getattr(module, "pool_type", None) == "avg" and getattr(module, "flatten", None) is not None
    return is_timms or (isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)))


class SlidingPyramid(nn.Module):
    """The pyramid of every window of a map, stride 1. See Note [Dense] 2.

    Shape:
        (batch, c, h, w) to (batch, h - map_size + 1, w - map_size + 1, features).
    """

    def __init__(self, pyramid: SpatialPyramid) -> None:
        super().__init__()
        self.bins, self.map_size = pyramid.bins, pyramid.map_size

    def forward(self, features: Tensor) -> Tensor:
        """Pool all windows; raises InputError for a map smaller than a window."""
        rows, columns = _positions(features, self.map_size)
        # Channels innermost: pooling and copying so take a fifth of the time.
        features = features.contiguous(memory_format=torch.channels_last)
        grids: list[Tensor] = []
        for b in self.bins:
            edges = _edges(b, self.map_size)
            sizes = {size for _, size in edges}
            pooled = {
                size: functional.max_pool2d(features, size, stride=1).permute(0, 2, 3, 1)
                for size in itertools.product(sizes, sizes)
            }
            bins = [
                pooled[high, wide][:, top : top + rows, left : left + columns]
                for (top, high), (left, wide) in itertools.product(edges, edges)
            ]
            grids.append(torch.stack(bins, dim=-1).flatten(3))  # as SpatialPyramid flattens: channels outermost
        return torch.cat(grids, dim=-1)


def _edges(bins: int, map_size: int) -> list[tuple[int, int]]:
    """Return start and length of each bin along a side; the last one may be cut off."""
    size = window(bins, map_size)
    return [(start, min(size, map_size - start)) for start in range(0, map_size, size)]


class _Windows(nn.Module):
    """Every window of a map, stride 1: (batch, c, h, w) to (batch, rows, columns, c, size, size)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, features: Tensor) -> Tensor:
        _positions(features, self.size)
        windows = features.unfold(2, self.size, 1).unfold(3, self.size, 1)
        return windows.permute(0, 2, 3, 1, 4, 5)


class _Sliding(nn.Module):
    """A network whose last layers are applied to every window of its map."""

    def __init__(self, body: nn.Module, windows: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.body, self.windows, self.last = body, windows, last

    def forward(self, images: Tensor) -> Tensor:
        windows = self.windows(self.body(images))
        scores = cast(Tensor, self.last(windows.flatten(0, 2)))
        return scores.unflatten(0, windows.shape[:3]).permute(0, 3, 1, 2)


class _Global(nn.Module):
    """The mean over the map, as a map of one pixel. See Note [Dense] 4."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, :, None, None]


def _positions(features: Tensor, size: int) -> Sequence[int]:
    positions = [side - size + 1 for side in features.shape[-2:]]
    if min(positions) < 1:
        raise InputError(
            f"a map of {features.shape[-2]} x {features.shape[-1]} for windows of {size} x {size}: "
            "the images are smaller than the network's crops"
        )
    return positions
