"""Spatial pyramid pooling as in the authors' networks (the paper's [28] and Table 2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from relaylab.errors import InputError

STRIDE = 16  # of the map that models A and B pool, in pixels of the image


class SpatialPyramid(nn.Module):
    """Max pooling of a map into grids of several sizes, flattened and concatenated, coarsest grid first.

    A grid of b x b bins has adjacent windows of ceil(map_size / b) pixels. The last ones may be truncated at the edge
    of the map, since Caffe rounds the number of windows up. `nn.AdaptiveMaxPool2d` differs: its windows overlap.

    Args:
        bins: number of bins along a side of each grid; 7, 3, 2 and 1 in the paper.
        map_size: side of the map in pixels; 14 in the paper.

    Raises:
        InputError: windows of one size cannot form one of the grids on a map of this size.

    Shape:
        (batch, c, map_size, map_size) to (batch, c * sum of all b^2), each grid with its channels outermost.
    """

    def __init__(self, bins: Sequence[int] = (7, 3, 2, 1), map_size: int = 14) -> None:
        super().__init__()
        if unfit := misfits(bins, map_size):
            raise InputError(
                f"a pyramid of {braces(bins)} bins does not fit a map of {map_size} x {map_size}: equal windows give "
                f" {', '.join(f'{-(-map_size // window(b, map_size))} bins for {b}' for b in unfit)}. "
                f"{_sizes_that_fit(bins, map_size)}"
            )
        self.bins = tuple(sorted(bins))
        self.map_size = map_size

    def forward(self, features: Tensor) -> Tensor:
        """Pool all grids. Raises InputError for a map of a different size."""
        if features.shape[-2:] != (self.map_size, self.map_size):
            raise InputError(
                f"the pyramid expects a map of {self.map_size} x {self.map_size}, but received one of "
                f"{features.shape[-2]} x {features.shape[-1]}: use images of the network's image_size"
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
    """Return side and stride of the windows that pool a map into `bins` bins along a side."""
    return -(-map_size // bins)


def misfits(bins: Sequence[int], map_size: int) -> list[int]:
    """Return the grids that adjacent windows of one size cannot form on a map of this size."""
    return [b for b in bins if b < 1 or map_size < 1 or -(-map_size // window(b, map_size)) != b]


def pyramid_for(image_size: int, bins: Sequence[int]) -> SpatialPyramid:
    """Build the pyramid for the last map of models A and B, for square crops of `image_size` pixels.

    Raises:
        InputError: the pyramid does not fit images of this size.
    """
    return SpatialPyramid(bins, -(-image_size // STRIDE))


def num_features(channels: int, bins: Sequence[int]) -> int:
    """Return the number of features of a pyramid."""
    return channels * sum(b * b for b in bins)


def braces(bins: Sequence[int]) -> str:
    """Format the bins of a pyramid as in Table 2."""
    return "{" + ", ".join(map(str, sorted(bins, reverse=True))) + "}"


def _sizes_that_fit(bins: Sequence[int], map_size: int) -> str:
    """Return advice on the nearest image sizes that fit this pyramid."""
    fitting = [size for size in range(1, 65) if not misfits(bins, size)]
    nearest = sorted(sorted(fitting, key=lambda size: abs(size - map_size))[:4])
    images = ", ".join(str(STRIDE * size) for size in nearest)
    return f"Image sizes that fit it: {images}." if images else "No image size up to 1024 fits it."
