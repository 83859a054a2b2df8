"""VGGNet-13, 16 and 19 as in torchvision, and the paper's 22 and 25 (Table 1)."""

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.vgg import VGG, make_layers

from relaylab.errors import InputError
from relaylab.models.layers import classifier, initialise
from relaylab.recipes.schema import VGG_CONVOLUTIONS

STRIDE = 32  # of the last map in pixels of the image


def vgg(depth: int, num_classes: int = 1000, *, width: int = 64, image_size: int = 224) -> VGG:
    """Build a VGGNet with He's initialisation and without batch normalisation.

    With the defaults, VGGNet-13, 16 and 19 have torchvision's modules, names and shapes, so its weights can be loaded.

    Args:
        depth: 13, 16, 19, 22 or 25 weight layers.
        num_classes: number of classes, the length of the output.
        width: filters of the first segment, which scales all layers; 64 in the paper.
        image_size: side of the images in pixels. Below 224 the classifier reads the correspondingly smaller map; from
            224 on it follows torchvision's pooling to 7x7.

    Returns:
        `features`, `avgpool` and `classifier`: images (batch, 3, image_size, image_size) to class scores (batch,
        num_classes).

    Raises:
        InputError: the depth is unknown, or the images are smaller than 32 pixels.
    """
    if depth not in VGG_CONVOLUTIONS:
        raise InputError(f"VGGNet-{depth}: the depth must be one of {', '.join(map(str, VGG_CONVOLUTIONS))}")
    if image_size < STRIDE:
        raise InputError(f"images of {image_size} pixels: VGGNet requires at least {STRIDE}")
    side, channels = min(7, image_size // STRIDE), 8 * width
    features = make_layers(_plan(VGG_CONVOLUTIONS[depth], width))
    with torch.device("meta"):  # avoids allocating its classifier of 120 million weights, which is replaced
        model = VGG(features, init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(side)
    layers = classifier(channels * side**2, 64 * width, num_classes)
    model.classifier = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Flatten)))
    initialise(model)
    return model


def _plan(convolutions: Sequence[int], width: int) -> list[str | int]:
    """Return the argument of `make_layers`: filters, and "M" for max pooling."""
    layers: list[str | int] = []
    for number, count in enumerate(convolutions):
        layers += [width * min(2**number, 8)] * count + ["M"]
    return layers
