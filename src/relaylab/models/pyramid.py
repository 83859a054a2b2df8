"""Spatial pyramid pooling as the authors' networks have it (the paper's [28] and Table 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from relaylab.errors import InputError

STRIDE = 16  # of the maps that the pyramid of models A and B pools, in pixels of the image


class SpatialPyramid(nn.Module):
    """Max pooling of one map into grids of several sizes, flattened and concatenated, the coarsest grid first.

    A grid of b x b bins has windows of ceil(map_size / b) pixels side by side. The map's edge may cut off the last
    ones, since Caffe rounds the number of windows up. `nn.AdaptiveMaxPool2d` is something else: its windows overlap.

    Args:
        bins: grids, by their number of bins along a side; 7, 3, 2 and 1 in the paper.
        map_size: side of the map in pixels; 14 in the paper.

    Raises:
        InputError: a grid that windows of one size cannot make on a map of this size.

    Shape:
        (batch, c, map_size, map_size) to (batch, c * sum of all b^2), each grid with its channels outermost.
    """

    def __init__(self, bins: Sequence[int] = (7, 3, 2, 1), map_size: int = 14) -> None:
        super().__init__()
        if unfit := misfits(bins, map_size):
            raise InputError(
                f"a pyramid of {braces(bins)} bins does not fit a map of {map_size} x {map_size}: windows of one size "
                f"give {', '.join(f'{-(-map_size // window(b, map_size))} bins for {b}' for b in unfit)}. "
                f"{_sizes_that_fit(bins, map_size)}"
            )
        self.bins = tuple(sorted(bins))
        self.map_size = map_size

    def forward(self, features: Tensor) -> Tensor:
        """Pool all grids; raises InputError for a map of another size."""
        if features.shape[-2:] != (self.map_size, self.map_size):
            raise InputError(
                f"the pyramid pools maps of {self.map_size} x {self.map_size} and received one of "
                f"{features.shape[-2]} x {features.shape[-1]}: the images have another size than image_size of the "
                "network that was built"
            )
        grids: list[Tensor] = []
        for b in self.bins:
            size = window(b, self.map_size)
            grids.append(functional.max_pool2d(features, size, size, ceil_mode=True).flatten(1))
        return torch.cat(grids, dim=1)

    def extra_repr(self) -> str:
        """Return the arguments for `print(model)`."""
        return f"bins={self.bins}, map_size={self.map_size}"


def window(bins: int, map_size: int) -> int:
    """Return side and stride of the windows that pool a map into so many bins along a side."""
    return -(-map_size // bins)


def misfits(bins: Sequence[int], map_size: int) -> list[int]:
    """Return the grids that windows of one size, side by side, cannot make on a map of this size."""
    return [b for b in bins if b < 1 or map_size < 1 or -(-map_size // window(b, map_size)) != b]


def pyramid_for(image_size: int, bins: Sequence[int]) -> SpatialPyramid:
    """Build the pyramid on the last map of models A and B for square crops of `image_size` pixels.

    Raises:
        InputError: images too small for it, or of a size that it does not fit.
    """
    return SpatialPyramid(bins, -(-image_size // STRIDE))


def num_features(channels: int, bins: Sequence[int]) -> int:
    """Return the number of features that a pyramid gives."""
    return channels * sum(b * b for b in bins)


def braces(bins: Sequence[int]) -> str:
    """Format a pyramid as Table 2 does."""
    return "{" + ", ".join(map(str, sorted(bins, reverse=True))) + "}"


def _sizes_that_fit(bins: Sequence[int], map_size: int) -> str:
    """Advise the nearest sizes of images for this pyramid."""
    fitting = [size for size in range(1, 65) if not misfits(bins, size)]
    nearest = sorted(sorted(fitting, key=lambda size: abs(size - map_size))[:4])
    images = ", ".join(str(STRIDE * size) for size in nearest)
    return f"Image sizes that fit it: {images}." if images else "No image size up to 1024 fits it."
