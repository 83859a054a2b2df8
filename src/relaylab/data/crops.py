"""Training crops: the choice of the window, and the policy that changes the pixels of the crop.

Note [Crops]
1. "window" is the paper's crop: a square of `size / short_side` of the shorter side at a random position. "resized" is
   Inception's random resized crop (Szegedy et al., 2015): a box of random area and aspect ratio, resized to a square;
   see Note [Boxes]. If none of the ten attempts fits, it is torchvision's central box.
2. Padding adds a black border before the window is chosen, as is usual for images of 32 pixels. Its width is in pixels
   of the resized image and is scaled for a larger source image.
3. To add a kind of crop, write a function that returns the window; add it to `WINDOWS` with the columns of the draw's
   random numbers that it uses; and add the name to `augmentation.crop` (`relaylab.recipes.schema`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from relaylab.data.augment import Column
from relaylab.data.boxes import NUMBERS, Range, central_box, random_box
from relaylab.data.geometry import CropSpec, Window, training_window
from relaylab.data.keyed import uniforms
from relaylab.data.policies import Policy, apply_policy
from relaylab.errors import InputError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """Settings of training crops. The default is the paper's crop.

    Example::

        crops = Crops(kind="resized", policy=Policy(name="randaugment"))  # as in many ImageNet recipes

    Attributes:
        kind: a name in `WINDOWS`.
        areas: minimum and maximum area of a resized crop, as a fraction of the image's area.
        ratios: minimum and maximum width of a resized crop, as a multiple of its height.
        padding: width of the black border around the resized image, in pixels.
        policy: policy that changes the pixels of the crop; None for no change.

    Raises:
        InputError: the kind is unknown.
    """

    kind: str = "window"
    areas: Range = (0.08, 1.0)
    ratios: Range = (3 / 4, 4 / 3)
    padding: int = 0
    policy: Policy | None = None

    def __post_init__(self) -> None:
        if self.kind not in WINDOWS:
            raise InputError(f"unknown crop {self.kind!r}{nearest(self.kind, list(WINDOWS))}")

    @property
    def are_windows(self) -> bool:
        """Whether crops are windows of the decoded images as they are: neither resized nor changed by a policy."""
        return not self.are_resized and self.policy is None

    @property
    def are_resized(self) -> bool:
        """Whether windows of an image whose shorter side is `short_side` may differ in size from the crop."""
        return self.kind != "window"

    def random_numbers(self, seed: int, draws: ArrayLike) -> NDArray[np.float64]:
        """Return the random numbers (n, ...) that choose the windows of n draws."""
        columns = WINDOWS[self.kind].columns
        return uniforms(seed, draws, columns.stop)[:, columns.start :]

    def window(self, spec: CropSpec, height: int, width: int, numbers: Sequence[float]) -> Window:
        """Return a window in pixels of the image. With padding it may extend beyond the image.

        Args:
            spec: size of the crop.
            height: height of the image in pixels.
            width: width of the image in pixels.
            numbers: a row of `random_numbers`.
        """
        return WINDOWS[self.kind].choose(self, spec, height, width, numbers)

    def edge(self, spec: CropSpec, height: int, width: int) -> int:
        """Return the width of the padding in pixels of the source image."""
        return (2 * self.padding * min(height, width) + spec.short_side) // (2 * spec.short_side)  # rounded

    def finish(self, images: Tensor, seed: int, draws: ArrayLike) -> None:
        """Apply the policy, if any, to crops in place; see `apply_policy`."""
        if self.policy is not None:
            apply_policy(self.policy, images, seed, draws)


class Choice(NamedTuple):
    """A method to choose windows: the columns of a draw's random numbers that it uses, and the function."""

    columns: range
    choose: Callable[[Crops, CropSpec, int, int, Sequence[float]], Window]


def _window(crops: Crops, spec: CropSpec, height: int, width: int, numbers: Sequence[float]) -> Window:
    across, down = numbers
    return training_window(spec, height, width, across, down, edge=crops.edge(spec, height, width))


def _resized(crops: Crops, spec: CropSpec, height: int, width: int, numbers: Sequence[float]) -> Window:
    edge = crops.edge(spec, height, width)
    height, width = height + 2 * edge, width + 2 * edge
    box = random_box(numbers, height, width, crops.areas, crops.ratios)
    left, top, across, down = box or central_box(height, width, crops.ratios)
    return left - edge, top - edge, across, down


WINDOWS: Mapping[str, Choice] = {
    "window": Choice(range(Column.ACROSS, Column.DOWN + 1), _window),
    "resized": Choice(range(Column.RESIZED, Column.RESIZED + NUMBERS), _resized),
}
