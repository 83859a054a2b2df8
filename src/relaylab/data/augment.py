"""The paper's augmentation: flips, AlexNet's colour shift and the mean image, on whole batches of uint8, on any device.

Note [Augmentation]
1. What happens to an image is a function of (seed, draw) alone; `Column` says which of the draw's random numbers
   decides what. The workers cut the window, and all arithmetic follows here, on the device, in one go for a batch:
   between worker and device an image is then a quarter of the size.
2. Values are Caffe's: 0 to 255, minus the mean of the training images, not divided by anything unless asked for.
3. The colour shift (Krizhevsky, Sutskever and Hinton, 2012, section 4.1) adds [p1 p2 p3] [a1 l1, a2 l2, a3 l3]^T to all
   pixels of an image, a ~ N(0, 0.1), p and l eigenvectors and eigenvalues of the covariance of RGB over the training
   set's pixels. The product a * l depends on the unit of the pixels, which the paper does not give. Here, as in the
   well-known reimplementations, l is for pixels in [0, 1], and the sum is brought to 0 to 255 afterwards.
4. The order is flip, shift, minus the mean, erasing. The mean image itself is not flipped.
5. Random erasing (Zhong et al., 2020) puts zeros, which are the mean, in place of a box, by torchvision's default range
   of areas and aspect ratios. It is one operation for a whole batch, where torchvision's kernel takes one image.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from relaylab.data.boxes import NUMBERS, random_box
from relaylab.data.keyed import uniforms
from relaylab.errors import InputError


class Column(IntEnum):
    """Index of a draw's random number by its use."""

    ACROSS = 0
    DOWN = 1
    FLIP = 2
    COLOUR = 3  # and the three after it
    REPLACEMENT = 7  # and the seven after it, one for each attempt
    RESIZED = 15  # and those of Note [Boxes] after it
    ERASING = RESIZED + NUMBERS  # whether, and the same for where
    POLICY = ERASING + 1 + NUMBERS  # seeds torch's generator
    MIXING = POLICY + 1  # that of a batch's first draw


ERASED_AREAS, ERASED_RATIOS = (0.02, 0.33), (1 / 3.3, 1 / 0.3)  # of boxes: torchvision's, which divides height by width


@dataclass(frozen=True, eq=False)
class ColourComponents:
    """Principal components of RGB over the training set's pixels, which are in [0, 1].

    Attributes:
        eigenvalues: (3,) variances, in squares of that unit.
        vectors: (3, 3), a component in each column.
    """

    eigenvalues: NDArray[np.float64]
    vectors: NDArray[np.float64]


# As published with fb.resnet.torch and copied since. Use those of your own training set where you can
# (`relaylab.data.statistics`): their sum is above the variance of ImageNet's pixels as it is usually given.
IMAGENET_COMPONENTS = ColourComponents(
    np.array([0.2175, 0.0188, 0.0045]),
    np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]),
)


def random_flips(seed: int, draws: ArrayLike) -> NDArray[np.bool_]:
    """Return whether each of n draws is mirrored, (n,): about half are."""
    return uniforms(seed, draws, Column.FLIP + 1)[:, Column.FLIP] < 0.5


def random_shifts(
    seed: int, draws: ArrayLike, components: ColourComponents, strength: float = 0.1
) -> NDArray[np.float64]:
    """Return AlexNet's colour shifts (n, 3) of n draws, to be added to R, G and B in 0 to 255.

    See Note [Augmentation] 3. `strength` is the standard deviation of the factors a, 0.1 in AlexNet.
    """
    numbers = uniforms(seed, draws, Column.COLOUR + 4)[:, Column.COLOUR :]
    radii = np.sqrt(-2 * np.log1p(-numbers[:, [0, 0, 2]]))  # Box and Muller; three of the four that it gives
    angles = 2 * np.pi * numbers[:, [1, 1, 3]]
    factors = strength * radii * np.where([True, False, True], np.cos(angles), np.sin(angles))
    return 255 * (factors * components.eigenvalues) @ components.vectors.T


def random_erasures(seed: int, draws: ArrayLike, size: int, probability: float) -> NDArray[np.int64]:
    """Return boxes (n, 4) to erase from square crops: left, top, width and height, which are 0 for no box."""
    numbers = uniforms(seed, draws, Column.ERASING + 1 + NUMBERS)[:, Column.ERASING :]
    boxes = np.zeros((len(numbers), 4), np.int64)
    for row in np.flatnonzero(numbers[:, 0] < probability):
        box = random_box(numbers[row, 1:].tolist(), size, size, ERASED_AREAS, ERASED_RATIOS, smaller=True)
        boxes[row] = box or 0
    return boxes


class Augmentation(nn.Module):
    """Turn batches of uint8 (n, size, size, 3) into the network's input. See Note [Augmentation].

    In training mode it flips, shifts and erases; in evaluation mode it only subtracts the mean (and divides, if `std`
    is given). It runs on the device that it has been moved to, and never synchronises with it.

    Args:
        mean: subtracted from the images, in 0 to 255: (size, size, 3) for each pixel, or (3,) for each channel.
        std: (3,), divides the difference; None, as in the paper, for no division.
        seed: of the run, the same as the loader's.
        flip: mirror half of the images.
        components: of the colour shift; None for no shift.
        strength: of the colour shift.
        erasing: probability of erasing a box from an image.
        dtype: of the result. The arithmetic is in float32.

    Raises:
        InputError: shapes other than those above, or a std that is not positive.
    """

    def __init__(
        self,
        mean: Tensor,
        std: Tensor | None = None,
        *,
        seed: int = 0,
        flip: bool = True,
        components: ColourComponents | None = IMAGENET_COMPONENTS,
        strength: float = 0.1,
        erasing: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if mean.shape[-1:] != (3,) or mean.ndim not in (1, 3):
            raise InputError(f"mean: expected shape (size, size, 3) or (3,), not {tuple(mean.shape)}")
        if std is not None and (std.shape != (3,) or not bool((std > 0).all())):
            raise InputError(f"std: expected three numbers above 0, not {std.tolist()}")
        self.mean: Tensor
        self.scale: Tensor | None
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("scale", None if std is None else 1 / std.float())
        self.seed, self.flip, self.components, self.strength, self.dtype = seed, flip, components, strength, dtype
        self.erasing = erasing

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Augment and subtract the mean.

        Args:
            images: uint8 (n, size, size, 3). They are not changed.
            draws: int64 (n,), on the CPU; needed in training mode only.

        Returns:
            (n, 3, size, size) of `dtype`, in channels-last memory format.

        Raises:
            InputError: training mode without draws.
        """
        flips, shifts, boxes = None, None, None
        if self.training:
            if draws is None:
                raise InputError("Augmentation in training mode needs the batch's draws; call eval() for evaluation")
            numbers = draws.cpu().numpy()
            if self.flip:
                flips = torch.from_numpy(random_flips(self.seed, numbers)).to(images.device, non_blocking=True)
            if self.components is not None:
                shift = random_shifts(self.seed, numbers, self.components, self.strength)
                shifts = torch.from_numpy(shift).float().to(images.device, non_blocking=True)
            if self.erasing:
                erased = random_erasures(self.seed, numbers, images.shape[2], self.erasing)
                boxes = torch.from_numpy(erased).to(images.device, non_blocking=True)
        result = arithmetic(images, self.mean, self.scale, flips, shifts, self.dtype)
        return result if boxes is None else erase(result, boxes)


def arithmetic(
    images: Tensor,
    mean: Tensor,
    scale: Tensor | None = None,
    flips: Tensor | None = None,
    shifts: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute (flipped images + shifts - mean) * scale, without randomness or synchronisation, for `torch.compile`.

    Shapes: uint8 images (n, size, size, 3), mean (size, size, 3) or (3,), scale (3,), flips (n,) and shifts (n, 3) to
    (n, 3, size, size) in channels-last memory format.
    """
    size = images.shape[2]
    if flips is not None:
        planes = images.permute(0, 3, 1, 2)  # the CPU has a fast mirror for this order of dimensions only
        images = torch.where(flips[:, None, None, None], planes.flip(3), planes).permute(0, 2, 3, 1)
    # Whole rows of pixels at a time: adding three numbers over and over is ten times slower on a CPU.
    rows = images.reshape(*images.shape[:2], size * 3).float()
    rows -= mean.flatten(1) if mean.ndim == 3 else mean.repeat(size)
    if shifts is not None:
        rows += shifts.repeat(1, size)[:, None, :]
    if scale is not None:
        rows *= scale.repeat(size)
    return rows.to(dtype).unflatten(2, (size, 3)).permute(0, 3, 1, 2)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set boxes, (n, 4) as `random_erasures` returns them, of images (n, c, h, w) to 0 in place; return the images."""
    left, top, width, height = boxes[:, :, None].unbind(1)
    across, down = (torch.arange(length, device=images.device) for length in (images.shape[3], images.shape[2]))
    columns, rows = (across >= left) & (across < left + width), (down >= top) & (down < top + height)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
