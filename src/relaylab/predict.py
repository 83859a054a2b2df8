"""The likeliest classes of images, from their centre crops."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relaylab.data.decode import decode
from relaylab.data.faults import ImageFault
from relaylab.data.geometry import Box, Pixels, View, centre_box, cut_box
from relaylab.errors import InputError
from relaylab.exporting import Classifier
from relaylab.model_file import InputConfig, ModelFile

TOP = 5


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    name: str
    probability: float


def predict(model: ModelFile, paths: list[Path]) -> list[list[Guess] | InputError]:
    """The likeliest classes of each image.

    Args:
        model: a trained network and how to use it.
        paths: of image files.

    Returns:
        For each, its five likeliest classes (or as many as there are), the likeliest first; or, for an image that
        cannot be read, why.

    Raises:
        InputError: the weights are not the network's.
    """
    classifier = Classifier(model).eval()
    results: list[list[Guess] | InputError] = []
    for path in paths:
        try:
            image = read_crop(path, model.input)
        except InputError as error:
            results.append(error)
            continue
        with torch.inference_mode():
            probabilities: Tensor = classifier(image[None]).softmax(dim=1)[0]
        best = probabilities.topk(min(TOP, len(model.classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        results.append([Guess(model.classes[number], probability) for number, probability in pairs])
    return results


def read_crop(path: Path, config: InputConfig) -> Tensor:
    """An image's centre crop as the network's classifier takes it.

    Args:
        path: of an image file of any common format.
        config: to which size it is resized, and cropped.

    Returns:
        float32 (3, crop, crop), RGB, 0 to 255.

    Raises:
        InputError: it cannot be read.
    """
    try:
        pixels = decode(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ImageFault as fault:
        raise InputError(f"cannot decode {path}: {fault}") from None
    crop = torch.empty(config.crop, config.crop, 3, dtype=torch.uint8)
    cut_box(pixels, _box(pixels, config), crop)
    return crop.permute(2, 0, 1).float()


def _box(pixels: Pixels, config: InputConfig) -> Box:
    """The part of the image that the crop shows."""
    height, width = pixels.shape[:2]
    if config.how == "shorter side":
        return centre_box(View(size=config.crop, short_side=config.resize), height, width)
    margin, across, down = (config.resize - config.crop) // 2, width / config.resize, height / config.resize
    far = margin + config.crop
    return margin * across, margin * down, far * across, far * down
