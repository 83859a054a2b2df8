"""Dense evaluation: apply a network to images larger than its training crops, for a map of class scores in one pass.

Note [Dense]
1. A network trained on crops of one size ends in layers that take a map of one size, M x M. On a larger map they are
   applied to every M x M window, with stride 1: the fully convolutional testing of the paper's [5]. The scores are
   exactly those of each window alone.
2. Neighbouring windows of a pyramid share the maxima of their bins. A bin is a maximum over h x w pixels; pooling the
   map once with stride 1 gives that bin of every window, each at its own offset. Nothing is pooled twice.
3. The fully connected layers then process all windows as one batch, which reads their weights once. The products are
   those of a convolution, but the weights keep their shape.
4. Global average pooling and a linear layer commute, so ResNet and Inception already return the mean over their score
   map. Their output is used unchanged, as a map of one pixel.
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
    """Convert a network to one for images of its crop size or larger. See Note [Dense].

    Example::

        scores = dense(vgg16, map_size=7)(images)   # (batch, 3, 384, 384) to (batch, classes, rows, columns)

    Args:
        model: a network of `relaylab.models`, or another with global average pooling. Its layers are shared, not
            copied.
        map_size: side of the last map for the network's crops, in pixels; required for VGGNets only.

    Returns:
        A module from images (batch, 3, h, w) to class scores (batch, classes, rows, columns).

    Raises:
        InputError: the network has no dense form, or `map_size` is missing.
    """
    if isinstance(model, VGG):
        if map_size is None:
            raise InputError("map_size is missing: a VGGNet requires the side of its last map, 7 for crops of 224")
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
    """The spatial pyramid of every window of a map, with stride 1. See Note [Dense] 2.

    Shape:
        (batch, c, h, w) to (batch, h - map_size + 1, w - map_size + 1, features).
    """

    def __init__(self, pyramid: SpatialPyramid) -> None:
        super().__init__()
        self.bins, self.map_size = pyramid.bins, pyramid.map_size

    def forward(self, features: Tensor) -> Tensor:
        """Pool all windows; raises InputError for a map smaller than a window."""
        rows, columns = _positions(features, self.map_size)
        # Channels-last pooling and copying takes a fifth of the time.
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
            grids.append(torch.stack(bins, dim=-1).flatten(3))  # channels outermost, like SpatialPyramid
        return torch.cat(grids, dim=-1)


def _edges(bins: int, map_size: int) -> list[tuple[int, int]]:
    """Return start and length of each bin along a side; the last bin may be truncated."""
    size = window(bins, map_size)
    return [(start, min(size, map_size - start)) for start in range(0, map_size, size)]


class _Windows(nn.Module):
    """All windows of a map, with stride 1: (batch, c, h, w) to (batch, rows, columns, c, size, size)."""

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
    """Class scores averaged over the map, as a map of one pixel. See Note [Dense] 4."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, :, None, None]


def _positions(features: Tensor, size: int) -> Sequence[int]:
    positions = [side - size + 1 for side in features.shape[-2:]]
    if min(positions) < 1:
        raise InputError(
            f"the map is {features.shape[-2]} x {features.shape[-1]}, smaller than the windows of {size} x {size}: "
            "use images at least as large as the network's crops"
        )
    return positions
