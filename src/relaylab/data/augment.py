"""The paper's augmentation: flips, AlexNet's colour shift and the mean image, on whole uint8 batches, on any device.

Note [Augmentation]
1. The augmentation of an image is a function of (seed, draw) alone; `Column` assigns the draw's random numbers to their
   uses. The workers crop; all arithmetic is done here, on the device, for a whole batch at once. Between worker and
   device an image then has a quarter of the size.
2. Values are Caffe's: 0 to 255 minus the mean of the training images, divided by a standard deviation only on request.
3. The colour shift (Krizhevsky, Sutskever and Hinton, 2012, section 4.1) adds [p1 p2 p3] [a1 l1, a2 l2, a3 l3]^T to all
   pixels of an image, with a ~ N(0, 0.1), and p and l the eigenvectors and eigenvalues of the covariance of RGB over
   the pixels of the training set. The product a * l depends on the unit of the pixels, which the paper does not give.
   Here, as in the well-known reimplementations, l is for pixels in [0, 1], and the sum is scaled to 0 to 255.
4. The order is flip, shift, subtraction of the mean, erasing. The mean image itself is not flipped.
5. Random erasing (Zhong et al., 2020) replaces a box by zeros, which are the mean, with torchvision's default ranges of
   areas and aspect ratios. It is one operation for the whole batch, whereas torchvision's kernel takes one image.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from relaylab.data.boxes import NUMBERS, random_box
from relaylab.data.copying import to_device
from relaylab.data.keyed import uniforms
from relaylab.errors import InputError


class Column(IntEnum):
    """Index of each use's first random number among those of a draw."""

    ACROSS = 0
    DOWN = 1
    FLIP = 2
    COLOUR = 3  # four numbers
    REPLACEMENT = 7  # eight, one per attempt
    RESIZED = 15  # `NUMBERS`, see Note [Boxes]
    ERASING = RESIZED + NUMBERS  # one for whether to erase, and `NUMBERS` for the box
    POLICY = ERASING + 1 + NUMBERS  # seed for torch's generator
    MIXING = POLICY + 1  # read from the first draw of a batch


ERASED_AREAS, ERASED_RATIOS = (0.02, 0.33), (1 / 3.3, 1 / 0.3)  # torchvision's ranges; it divides height by width


@dataclass(frozen=True, eq=False)
class ColourComponents:
    """Principal components of RGB over the pixels of a training set, for pixels in [0, 1].

    Attributes:
        eigenvalues: (3,) variances of the components.
        vectors: (3, 3), one component per column.
    """

    eigenvalues: NDArray[np.float64]
    vectors: NDArray[np.float64]


# The values published with fb.resnet.torch and copied ever since. If possible, use your own training set's values
# (`relaylab.data.statistics`): the sum of these is larger than the usual figure for the variance of ImageNet's pixels.
IMAGENET_COMPONENTS = ColourComponents(
    np.array([0.2175, 0.0188, 0.0045]),
    np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]),
)


def random_flips(seed: int, draws: ArrayLike) -> NDArray[np.bool_]:
    """Return whether each of n draws is mirrored, (n,), with probability 0.5."""
    return uniforms(seed, draws, Column.FLIP + 1)[:, Column.FLIP] < 0.5


def random_shifts(
    seed: int, draws: ArrayLike, components: ColourComponents, strength: float = 0.1
) -> NDArray[np.float64]:
    """Return the colour shifts (n, 3) of n draws, to be added to R, G and B in 0 to 255. See Note [Augmentation] 3.

    `strength` is the standard deviation of the factors a, 0.1 in AlexNet.
    """
    numbers = uniforms(seed, draws, Column.COLOUR + 4)[:, Column.COLOUR :]
    radii = np.sqrt(-2 * np.log1p(-numbers[:, [0, 0, 2]]))  # Box-Muller; three of its four results are used
    angles = 2 * np.pi * numbers[:, [1, 1, 3]]
    factors = strength * radii * np.where([True, False, True], np.cos(angles), np.sin(angles))
    return 255 * (factors * components.eigenvalues) @ components.vectors.T


def random_erasures(seed: int, draws: ArrayLike, size: int, probability: float) -> NDArray[np.int64]:
    """Return the boxes (n, 4) to erase from square crops: left, top, width and height, all 0 for no box."""
    numbers = uniforms(seed, draws, Column.ERASING + 1 + NUMBERS)[:, Column.ERASING :]
    boxes = np.zeros((len(numbers), 4), np.int64)
    for row in np.flatnonzero(numbers[:, 0] < probability):
        box = random_box(numbers[row, 1:].tolist(), size, size, ERASED_AREAS, ERASED_RATIOS, smaller=True)
        boxes[row] = box or 0
    return boxes


class Augmentation(nn.Module):
    """Convert uint8 batches (n, size, size, 3) into the network's input. See Note [Augmentation].

    In training mode the module flips, shifts and erases; in evaluation mode it only subtracts the mean and, if `std` is
    given, divides by it. It runs on its own device without synchronising with it.

    Example::

        augment = Augmentation(torch.from_numpy(statistics.mean_image), seed=0).to("cuda")
        for batch in loader:
            batch = batch.to("cuda")
            output = model(augment(batch.images, batch.draws))

    Args:
        mean: mean to subtract, in 0 to 255: (size, size, 3) per pixel, or (3,) per channel.
        std: (3,) standard deviations to divide by, in the same unit; None, as in the paper, for no division.
        seed: seed of the run, the same as for the loader.
        flip: mirror half of the images.
        components: principal components for the colour shift; None for no shift.
        strength: standard deviation of the colour shift's factors.
        erasing: probability of erasing a box from an image.
        dtype: dtype of the result. The arithmetic is in float32.

    Raises:
        InputError: shapes other than those above, or a standard deviation that is not positive.
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
            raise InputError(f"mean has shape {tuple(mean.shape)}: expected (size, size, 3) or (3,)")
        if std is not None and (std.shape != (3,) or not bool((std > 0).all())):
            raise InputError(f"std is {std.tolist()}: expected three numbers above 0")
        self.mean: Tensor
        self.scale: Tensor | None
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("scale", None if std is None else 1 / std.float())
        self.seed, self.flip, self.components, self.strength, self.dtype = seed, flip, components, strength, dtype
        self.erasing = erasing

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Augment images and subtract the mean.

        Args:
            images: uint8 (n, size, size, 3). They are not modified.
            draws: int64 (n,), `Batch.draws`, on the CPU; required in training mode.

        Returns:
            (n, 3, size, size) of `dtype`, in channels-last memory format.

        Raises:
            InputError: the module is in training mode and `draws` is None.
        """
        flips, shifts, boxes = None, None, None
        if self.training:
            if draws is None:
                raise InputError("Augmentation in training mode requires the batch's draws; call eval() for evaluation")
            flips, shifts, boxes = self._random_parts(draws.cpu().numpy(), images.shape[2], images.device)
        result = arithmetic(images, self.mean, self.scale, flips, shifts, self.dtype)
        return result if boxes is None else erase(result, boxes)

    def _random_parts(
        self, draws: NDArray[np.int64], size: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return flips, shifts and boxes on a device, in a single copy; None for those that are disabled."""
        parts: dict[str, NDArray[Any]] = {}
        if self.flip:
            parts["flips"] = random_flips(self.seed, draws)[:, None]
        if self.components is not None:
            parts["shifts"] = random_shifts(self.seed, draws, self.components, self.strength)
        if self.erasing:
            parts["boxes"] = random_erasures(self.seed, draws, size, self.erasing)
        if not parts:
            return None, None, None
        # float32 holds the boxes' coordinates exactly.
        table = torch.from_numpy(np.concatenate(list(parts.values()), axis=1).astype(np.float32))
        columns = to_device(table, device).split([part.shape[1] for part in parts.values()], dim=1)
        moved = dict(zip(parts, columns, strict=True))
        flips = moved["flips"][:, 0].bool() if "flips" in moved else None
        return flips, moved.get("shifts"), moved["boxes"].long() if "boxes" in moved else None


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
        planes = images.permute(0, 3, 1, 2)  # on a CPU, only this order of dimensions has a fast flip
        images = torch.where(flips[:, None, None, None], planes.flip(3), planes).permute(0, 2, 3, 1)
    # Work on whole rows of pixels: broadcasting over three channels is ten times slower on a CPU.
    rows = images.reshape(*images.shape[:2], size * 3).float()
    rows -= mean.flatten(1) if mean.ndim == 3 else mean.repeat(size)
    if shifts is not None:
        rows += shifts.repeat(1, size)[:, None, :]
    if scale is not None:
        rows *= scale.repeat(size)
    return rows.to(dtype).unflatten(2, (size, 3)).permute(0, 3, 1, 2)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Set boxes (n, 4), as from `random_erasures`, of images (n, c, h, w) to 0 in place, and return the images."""
    left, top, width, height = boxes[:, :, None].unbind(1)
    across, down = (torch.arange(length, device=images.device) for length in (images.shape[3], images.shape[2]))
    columns, rows = (across >= left) & (across < left + width), (down >= top) & (down < top + height)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
