"""The input path written plainly, one image at a time, in Pillow and float64: the reference for the fast path.

Slow; for tests and benchmarks. It shares with the fast path the rule for the position of a window and the draws' random
numbers; everything that is done to pixels is done here a second time.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from relaylab.data.augment import ColourComponents, random_flips, random_shifts
from relaylab.data.geometry import CropSpec, training_window
from relaylab.data.keyed import uniforms


def plain_image(data: bytes) -> Image.Image:
    """Decode by Pillow at full scale: upright, RGB."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def plain_training_crop(data: bytes, spec: CropSpec, *, seed: int, draw: int) -> NDArray[np.uint8]:
    """Return a draw's crop before anything is done to its values, (size, size, 3).

    Args:
        data: an encoded image.
        spec: sizes.
        seed: of the run.
        draw: its number.
    """
    image = plain_image(data)
    across, down = uniforms(seed, [draw], 2)[0]
    left, top, side, _ = training_window(spec, image.height, image.width, across, down)
    box = (left, top, left + side, top + side)
    return np.array(image.resize((spec.size, spec.size), Image.Resampling.BILINEAR, box=box))


def plain_centre_crop(data: bytes, spec: CropSpec) -> NDArray[np.uint8]:
    """The evaluation's crop as it is usually made, (size, size, 3): the whole image resized, then cropped."""
    image = plain_image(data)
    short = min(image.size)
    width, height = (int(spec.short_side * side / short) for side in image.size)
    left, top = (round((side - spec.size) / 2) for side in (width, height))
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + spec.size, top + spec.size)))


def plain_input(
    data: bytes,
    spec: CropSpec,
    mean: NDArray[np.float64],
    *,
    seed: int,
    draw: int,
    components: ColourComponents,
    strength: float = 0.1,
) -> NDArray[np.float64]:
    """One draw's network input: crop, flip, colour shift, minus the mean.

    Args:
        data: an encoded image.
        spec: sizes.
        mean: (size, size, 3) or (3,), in 0 to 255.
        seed: of the run.
        draw: its number.
        components: of the colour shift.
        strength: of the colour shift.

    Returns:
        (3, size, size).
    """
    values = plain_training_crop(data, spec, seed=seed, draw=draw).astype(np.float64)
    if random_flips(seed, [draw])[0]:
        values = values[:, ::-1]
    values = values + random_shifts(seed, [draw], components, strength)[0] - mean
    return values.transpose(2, 0, 1)
