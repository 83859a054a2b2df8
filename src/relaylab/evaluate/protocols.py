"""Evaluation protocols: the crops of an image, and how their class scores are combined.

Note [Protocols]
1. A view is one pass over all images, each as one crop, ten crops or a whole image, and yields log-probabilities: class
   scores are averaged over the map of a dense view, probabilities over crops and mirrored images.
2. A protocol has one or several views, whose probabilities are averaged: dense evaluation has one view per scale.
3. A mean image has the size of a crop; for images of other sizes its mean colour is subtracted.
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
SCALES, OF = (224, 256, 320, 384, 448), 256  # as in the paper, for training images of 256 pixels


@dataclass(frozen=True, slots=True)
class View:
    """One pass over all images. See Note [Protocols].

    Attributes:
        kind: the protocol.
        scale: for dense, the shorter side of the images in pixels.
        flip: for dense, whether mirrored images are included.
    """

    kind: Kind
    scale: int | None = None
    flip: bool = False

    @property
    def name(self) -> str:
        """The folder name of its scores."""
        return "-".join([self.kind, *([str(self.scale)] if self.scale else []), *(["flip"] if self.flip else [])])


def views_of(kind: Kind, config: InputConfig, scales: Iterable[int] = (), *, flip: bool = False) -> list[View]:
    """Return the views of a protocol; dense evaluation has one per scale.

    Args:
        kind: the protocol.
        config: input size of the network.
        scales: for dense, shorter sides in pixels; by default the paper's sizes, in proportion to the training images.
        flip: for dense, whether to include mirrored images.

    Raises:
        InputError: an unknown protocol, or a scale smaller than the network's crops.

    Example:
        >>> [view.name for view in views_of("dense", config, [256, 320])]
        ['dense-256', 'dense-320']
    """
    if kind not in PROTOCOLS:
        raise InputError(f"unknown protocol {kind!r}: expected one of {', '.join(PROTOCOLS)}")
    if kind != "dense":
        return [View(kind)]
    chosen = list(dict.fromkeys(scales)) or default_scales(config)
    small = [scale for scale in chosen if scale < config.crop]
    if small:
        raise InputError(f"scale {small[0]}: expected at least {config.crop} pixels, the network's crop size")
    return [View("dense", scale, flip) for scale in chosen]


def default_scales(config: InputConfig) -> list[int]:
    """Return the paper's five scales in proportion to the size of the training images, without duplicates."""
    return list(dict.fromkeys(max(config.crop, round(scale * config.resize / OF)) for scale in SCALES))


def cut(pixels: Pixels, view: View, config: InputConfig) -> Tensor:
    """Return the crops of an image for a view.

    Args:
        pixels: uint8 (h, w, 3).
        view: the view.
        config: input size of the network.

    Returns:
        uint8 (n, h, w, 3): one crop, five crops, or the whole image resized.
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


def mirrored(view: View) -> bool:
    """Return whether a view includes mirrored images."""
    return view.flip or view.kind == "ten-crop"


def average(log_probabilities: Tensor, dim: int) -> Tensor:
    """Average probabilities over a dimension, given and returned as log-probabilities."""
    return log_probabilities.logsumexp(dim) - torch.tensor(log_probabilities.shape[dim]).log()


def _centre(pixels: Pixels, config: InputConfig) -> tuple[float, float, float, float]:
    """Return the box of the centre crop."""
    height, width = pixels.shape[:2]
    if config.how == "shorter side":
        return centre_box(CropSpec(size=config.crop, short_side=config.resize), height, width)
    margin, across, down = (config.resize - config.crop) // 2, width / config.resize, height / config.resize
    far = margin + config.crop
    return margin * across, margin * down, far * across, far * down
