"""Random boxes with areas and aspect ratios from given ranges, for random resized crops and random erasing.

Note [Boxes]
1. The rule is torchvision's (`RandomResizedCrop`, `RandomErasing`): a uniform area and a log-uniform aspect ratio are
   drawn up to ten times. The first pair that fits is used, at a uniform position.
2. The `NUMBERS` random numbers of a box are passed as an argument, so that a box is a function of (seed, draw).
   Torchvision draws them from torch's generator, which takes ten times as long.
"""

import math
from collections.abc import Sequence

from relaylab.data.geometry import Window

ATTEMPTS = 10
NUMBERS = 2 * ATTEMPTS + 2  # an area and an aspect ratio for each attempt, and the position
Range = tuple[float, float]


def random_box(
    numbers: Sequence[float], height: int, width: int, areas: Range, ratios: Range, *, smaller: bool = False
) -> Window | None:
    """Choose a box in an image, or return None if no attempt fits. See Note [Boxes].

    Args:
        numbers: `NUMBERS` random numbers, uniform in [0, 1).
        height: height of the image in pixels.
        width: width of the image in pixels.
        areas: minimum and maximum area of the box, as a fraction of the image's area.
        ratios: minimum and maximum width of the box, as a multiple of its height.
        smaller: allow only boxes that are narrower and lower than the image.

    Example:
        >>> random_box([0.5] * NUMBERS, 100, 100, areas=(0.04, 0.04), ratios=(1.0, 1.0))
        (40, 40, 20, 20)
    """
    *pairs, to_left, to_top = numbers
    for area, ratio in zip(pairs[::2], pairs[1::2], strict=True):
        target = height * width * (areas[0] + (areas[1] - areas[0]) * area)
        shape = ratios[0] * (ratios[1] / ratios[0]) ** ratio
        across, down = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < across <= width - smaller and 0 < down <= height - smaller:
            return int(to_left * (width - across + 1)), int(to_top * (height - down + 1)), across, down
    return None


def central_box(height: int, width: int, ratios: Range) -> Window:
    """Return the largest centred box whose aspect ratio is within `ratios`."""
    least, most = ratios
    across = min(width, round(height * most))
    down = min(height, round(width / least))
    return (width - across) // 2, (height - down) // 2, across, down
