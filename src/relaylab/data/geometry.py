"""Crops: the window of an image that the network sees, and its size.

Note [Windows]
1. Resizing the shorter side to 256 and cropping 224 uses the pixels of a window of 224/256 of the shorter side. Only
   that window is resized, since the rest of the image would be discarded.
2. A training window has integer pixel coordinates, since no library's fast resize accepts fractional ones. The shorter
   side is thus resized to `short_side` to within half a source pixel. Window positions refer to the source, not to
   the resized image; a larger source has at least as many.
3. The resize filters do not see pixels outside a training window, so the outermost one or two pixels differ slightly
   from those of a crop of the resized image.
4. The evaluation crop is exactly torchvision's `Resize(short_side)` and `CenterCrop(size)`, rounding included: a window
   with fractional coordinates whose filters see the pixels outside. Values agree to one level, or to two where the
   ratio of the sizes yields exact halves, which are rounded either way in each direction.
5. Interpolation is antialiased bilinear. On processors with the required vector instructions, PyTorch's resize of uint8
   takes a fifth of Pillow's time; the two differ by at most one level.
6. A window that already has the required size is copied.
7. Where a window extends beyond the image, which padding allows, its pixels are black.
"""

import platform
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from relaylab.errors import InputError

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
Window = tuple[int, int, int, int]  # left, top, width, height in pixels

FAST_RESIZE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in (
    "arm64",
    "aarch64",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CropSpec:
    """Resize and crop size of the network's input (the paper's section 5.1).

    Example::

        crop_spec = CropSpec(size=224, short_side=256)  # Resize(256), then a crop of 224

    Attributes:
        size: side of the square crop that the network sees, in pixels.
        short_side: length to which the image's shorter side is resized before cropping, in pixels.
        reduced_decoding: decode JPEGs at 1/2, 1/4 or 1/8 scale if the result is still at least `short_side`. This is
            faster for large images and changes pixels slightly: training and evaluation must use the same value.

    Raises:
        InputError: the size is below 1, or larger than `short_side`.
    """

    size: int = 224
    short_side: int = 256
    reduced_decoding: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.short_side:
            raise InputError(
                f"crop size {self.size} with short_side {self.short_side}: expected 1 <= size <= short_side"
            )


def training_window(spec: CropSpec, height: int, width: int, across: float, down: float, edge: int = 0) -> Window:
    """Return the square window of a training crop, in pixels of the source. See Note [Windows] 2.

    Args:
        spec: size of the crop.
        height: height of the image in pixels.
        width: width of the image in pixels.
        across: horizontal position in [0, 1), from left to right; uniform numbers give uniform positions.
        down: vertical position in [0, 1), from top to bottom.
        edge: pixels by which the window may extend beyond the image.
    """
    side = max(1, (2 * spec.size * min(height, width) + spec.short_side) // (2 * spec.short_side))  # rounded
    left, top = (int(place * (end + 2 * edge - side + 1)) - edge for place, end in ((across, width), (down, height)))
    return left, top, side, side


def centre_box(spec: CropSpec, height: int, width: int) -> Box:
    """Return the centre crop's box (left, top, right, bottom) in fractional source pixels. See Note [Windows] 4."""
    short = min(height, width)
    resized = [spec.short_side * side // short for side in (width, height)]  # rounded as by torchvision
    offsets = [round((side - spec.size) / 2) for side in resized]  # rounded as by torchvision
    scales = width / resized[0], height / resized[1]
    left, top = (offset * scale for offset, scale in zip(offsets, scales, strict=True))
    return left, top, left + spec.size * scales[0], top + spec.size * scales[1]


def cut_window(pixels: Pixels, window: Window, out: Tensor) -> None:
    """Crop a window from an image and resize it into `out`, uint8 (size, size, 3)."""
    region, size = _region(pixels, window), len(out)
    if region.shape[:2] == (size, size):
        out.copy_(torch.from_numpy(region))
    elif FAST_RESIZE:
        # Add the batch dimension before permuting: in the other order PyTorch does not recognise channels-last strides,
        # and the resize takes twice as long.
        planes = torch.from_numpy(region)[None].permute(0, 3, 1, 2)
        resized = functional.interpolate(planes, (size, size), mode="bilinear", antialias=True)
        out.copy_(resized[0].permute(1, 2, 0))
    else:
        resized = Image.fromarray(region).resize((size, size), Image.Resampling.BILINEAR)
        out.copy_(torch.from_numpy(np.array(resized)))


def _region(pixels: Pixels, window: Window) -> Pixels:
    """Return the pixels in a window, black outside the image."""
    left, top, width, height = window
    region = pixels[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if region.shape[:2] == (height, width):
        return region
    padded = np.zeros((height, width, 3), np.uint8)
    padded[max(0, -top) :, max(0, -left) :][: region.shape[0], : region.shape[1]] = region
    return padded


def cut_box(pixels: Pixels, box: Box, out: Tensor) -> None:
    """Crop a box with fractional coordinates from an image and resize it into `out`, uint8 (size, size, 3)."""
    left, top, right, bottom = box
    size = len(out)
    if right - left == bottom - top == size and left == int(left) and top == int(top):
        out.copy_(torch.from_numpy(pixels[int(top) : int(top) + size, int(left) : int(left) + size]))
        return
    # Pass to Pillow only the pixels that the filters read: the box and their support around it.
    reach_x, reach_y = (max(1.0, (end - start) / size) + 1 for start, end in ((left, right), (top, bottom)))
    first_x, first_y = max(0, int(left - reach_x)), max(0, int(top - reach_y))
    region = pixels[first_y : int(bottom + reach_y) + 1, first_x : int(right + reach_x) + 1]
    height, width = region.shape[:2]
    moved = (left - first_x, top - first_y, min(right - first_x, width), min(bottom - first_y, height))
    resized = Image.fromarray(region).resize((size, size), Image.Resampling.BILINEAR, box=moved)
    out.copy_(torch.from_numpy(np.array(resized)))


def resized(pixels: Pixels, short_side: int, *, square: bool = False) -> Pixels:
    """Resize a whole image as for evaluation, to a contiguous array. See Note [Windows] 4 and 5.

    Args:
        pixels: uint8 (h, w, 3).
        short_side: shorter side of the result in pixels. The longer side keeps the aspect ratio, rounded as by
            torchvision.
        square: resize both sides to `short_side`.
    """
    short = min(pixels.shape[:2])
    height, width = (short_side if square else short_side * side // short for side in pixels.shape[:2])
    if (height, width) == pixels.shape[:2]:
        return np.ascontiguousarray(pixels)
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
