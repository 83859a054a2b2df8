"""Crops: the window of an image that the network sees, and its size.

Note [Windows]
1. Resizing the shorter side to 256 and cropping 224 keeps the pixels of a window of 224/256 of the shorter side. Only
   that window is resized: the rest of the image would be thrown away.
2. In training the window lies on whole source pixels, since no library's fast resize takes fractions of them. The
   shorter side is thus resized to `short_side` to within half a source pixel, and the positions are those of the
   source, not of the resized image: as many or more of them, if it was larger.
3. Filters see nothing outside a training window, so that the outermost one or two pixels differ a little from those of
   a crop of the resized image.
4. In evaluation the crop is exactly the usual one, torchvision's `Resize(short_side)` and `CenterCrop(size)` with their
   rounding: a window in fractions of source pixels, whose filters see what lies outside. Pixels agree to one level; to
   two where the ratio of the sizes makes exact halves, which are then rounded either way, in each direction.
5. Antialiased bilinear throughout. Where the processor has the vector instructions for it, PyTorch's resize of uint8
   takes a fifth of Pillow's time; the two differ by at most one level.
6. A window of the size that is wanted is copied.
7. Where a window is partly outside of the image, which padding allows, the pixels there are black.
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
Window = tuple[int, int, int, int]  # left, top, width, height; whole pixels

FAST_RESIZE = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in (
    "arm64",
    "aarch64",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CropSpec:
    """Size and scale of the network's input (the paper's section 5.1).

    Attributes:
        size: side of the square crop that the network sees, in pixels.
        short_side: length of the image's shorter side before the crop is taken, aspect ratio kept, in pixels.
        reduced_decoding: decode JPEGs at 1/2, 1/4 or 1/8 scale where the result is still at least `short_side`. Faster
            on large images, and slightly different pixels: training and evaluation must agree on it.

    Raises:
        InputError: a size below 1 or a crop larger than the image.
    """

    size: int = 224
    short_side: int = 256
    reduced_decoding: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.short_side:
            raise InputError(
                f"crop size {self.size} of a shorter side of {self.short_side}: expected 1 <= size <= side"
            )


def training_window(spec: CropSpec, height: int, width: int, across: float, down: float, edge: int = 0) -> Window:
    """Return the square of a training crop, in pixels of the source. See Note [Windows] 2.

    `across` and `down`, in [0, 1), place it between left and right, top and bottom; uniform numbers give uniform
    positions. It may lie up to `edge` pixels outside of the image.
    """
    side = max(1, (2 * spec.size * min(height, width) + spec.short_side) // (2 * spec.short_side))  # rounded
    left, top = (int(place * (end + 2 * edge - side + 1)) - edge for place, end in ((across, width), (down, height)))
    return left, top, side, side


def centre_box(spec: CropSpec, height: int, width: int) -> Box:
    """Return the centre crop's box (left, top, right, bottom) in fractional source pixels. See Note [Windows] 4."""
    short = min(height, width)
    resized = [spec.short_side * side // short for side in (width, height)]  # torchvision's rounding
    offsets = [round((side - spec.size) / 2) for side in resized]  # and again
    scales = width / resized[0], height / resized[1]
    left, top = (offset * scale for offset, scale in zip(offsets, scales, strict=True))
    return left, top, left + spec.size * scales[0], top + spec.size * scales[1]


def cut_window(pixels: Pixels, window: Window, out: Tensor) -> None:
    """Cut a window of whole pixels out of an image, resized into `out`, uint8 (size, size, 3)."""
    part, size = _part(pixels, window), len(out)
    if part.shape[:2] == (size, size):
        out.copy_(torch.from_numpy(part))
    elif FAST_RESIZE:
        # The batch dimension first, then the permutation: the other way round the strides of a channels-last tensor are
        # not recognised, and the result costs twice as much.
        planes = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
        resized = functional.interpolate(planes, (size, size), mode="bilinear", antialias=True)
        out.copy_(resized[0].permute(1, 2, 0))
    else:
        resized = Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR)
        out.copy_(torch.from_numpy(np.array(resized)))


def _part(pixels: Pixels, window: Window) -> Pixels:
    """Return a window's pixels, black outside of the image."""
    left, top, width, height = window
    part = pixels[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if part.shape[:2] == (height, width):
        return part
    framed = np.zeros((height, width, 3), np.uint8)
    framed[max(0, -top) :, max(0, -left) :][: part.shape[0], : part.shape[1]] = part
    return framed


def cut_box(pixels: Pixels, box: Box, out: Tensor) -> None:
    """Cut a box (left, top, right, bottom) of fractional pixels, resized into `out`, uint8 (size, size, 3)."""
    left, top, right, bottom = box
    size = len(out)
    if right - left == bottom - top == size and left == int(left) and top == int(top):
        out.copy_(torch.from_numpy(pixels[int(top) : int(top) + size, int(left) : int(left) + size]))
        return
    # Only what the filters reach goes to Pillow: as far as their support beyond the box.
    reach_x, reach_y = (max(1.0, (end - start) / size) + 1 for start, end in ((left, right), (top, bottom)))
    first_x, first_y = max(0, int(left - reach_x)), max(0, int(top - reach_y))
    part = pixels[first_y : int(bottom + reach_y) + 1, first_x : int(right + reach_x) + 1]
    moved = (left - first_x, top - first_y, min(right - first_x, part.shape[1]), min(bottom - first_y, part.shape[0]))
    resized = Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR, box=moved)
    out.copy_(torch.from_numpy(np.array(resized)))


def resized(pixels: Pixels, short_side: int, *, square: bool = False) -> Pixels:
    """Resize a whole image, as for evaluation, to a contiguous array. See Note [Windows] 4 and 5.

    Args:
        pixels: uint8 (h, w, 3).
        short_side: of the result, in pixels; the longer side follows, rounded as in torchvision.
        square: give both sides that length.
    """
    short = min(pixels.shape[:2])
    height, width = (short_side if square else short_side * side // short for side in pixels.shape[:2])
    if (height, width) == pixels.shape[:2]:
        return np.ascontiguousarray(pixels)
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
