"""Evaluation protocols: the crops of an image, and how their class scores are combined.

Note [Protocols]
1. A pass evaluates each image once, in one crop, in ten, or as a whole, and yields log-probabilities: the class scores
   are averaged over the map of a dense pass, and the probabilities over crops and mirror images.
2. A protocol is one or several passes, whose probabilities are averaged: dense testing has one for each scale.
3. A mean image has the size of a crop. From images of other sizes its mean colour is subtracted instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from relaylab.data.geometry import CropSpec, Pixels, centre_box, cut_box, resized
from relaylab.errors import InputError
from relaylab.models.file import InputConfig

Kind = Literal["single-crop", "ten-crop", "dense"]
PROTOCOLS: tuple[Kind, ...] = ("single-crop", "ten-crop", "dense")
SCALES, OF = (224, 256, 320, 384, 448), 256  # the paper's, for networks whose training images have 256 pixels


@dataclass(frozen=True, slots=True)
class Pass:
    """One evaluation of all images: in their centre crop, in ten crops, or dense, as a whole.

    Attributes:
        scale: of a dense pass, the image's shorter side in pixels.
        flip: of a dense pass, whether mirror images are included.
    """

    kind: Kind
    scale: int | None = None
    flip: bool = False

    @property
    def name(self) -> str:
        """The name of its scores' folder."""
        return "-".join([self.kind, *([str(self.scale)] if self.scale else []), *(["flip"] if self.flip else [])])


def passes_of(kind: Kind, config: InputConfig, scales: Iterable[int] = (), *, flip: bool = False) -> list[Pass]:
    """Return the passes of a protocol; dense testing has one for each scale.

    By default the scales are the paper's, in proportion to the network's images.

    Raises:
        InputError: an unknown protocol, or a scale smaller than the network's crops.
    """
    if kind not in PROTOCOLS:
        raise InputError(f"unknown protocol {kind!r}: expected one of {', '.join(PROTOCOLS)}")
    if kind != "dense":
        return [Pass(kind)]
    chosen = list(dict.fromkeys(scales)) or default_scales(config)
    small = [scale for scale in chosen if scale < config.crop]
    if small:
        needed = f"the network sees crops of {config.crop} pixels, and images cannot be smaller"
        raise InputError(f"scale {small[0]}: {needed}")
    return [Pass("dense", scale, flip) for scale in chosen]


def default_scales(config: InputConfig) -> list[int]:
    """Return the paper's five scales, in proportion to the size of the training images, without repetitions."""
    return list(dict.fromkeys(max(config.crop, round(scale * config.resize / OF)) for scale in SCALES))


def cut(pixels: Pixels, view: Pass, config: InputConfig) -> Tensor:
    """Return the crops of an image, uint8 (h, w, 3), for a pass.

    Returns:
        uint8 (n, h, w, 3): one crop, five of them, or the whole image resized.
    """
    size = config.crop
    if view.kind == "single-crop":
        crop = torch.empty(size, size, 3, dtype=torch.uint8)
        cut_box(pixels, _centre(pixels, config), crop)
        return crop[None]
    image = torch.from_numpy(resized(pixels, view.scale or config.resize, square=config.how == "both sides"))
    if view.kind == "dense":
        return image[None]
    down, right = (length - size for length in image.shape[:2])
    corners = [(0, 0), (0, right), (down, 0), (down, right), (round(down / 2), round(right / 2))]
    return torch.stack([image[top : top + size, left : left + size] for top, left in corners])


def mirrored(view: Pass) -> bool:
    """Return whether a pass includes mirror images."""
    return view.flip or view.kind == "ten-crop"


def average(log_probabilities: Tensor, dim: int) -> Tensor:
    """Return the logarithm of the mean of probabilities, given their logarithms."""
    return log_probabilities.logsumexp(dim) - torch.tensor(log_probabilities.shape[dim]).log()


def _centre(pixels: Pixels, config: InputConfig) -> tuple[float, float, float, float]:
    """The box of the centre crop."""
    height, width = pixels.shape[:2]
    if config.how == "shorter side":
        return centre_box(CropSpec(size=config.crop, short_side=config.resize), height, width)
    margin, across, down = (config.resize - config.crop) // 2, width / config.resize, height / config.resize
    far = margin + config.crop
    return margin * across, margin * down, far * across, far * down
