"""A small VGG for images of any size: the paper's model A with fewer layers, for demos on a CPU."""

import math
from collections import OrderedDict

from torch import nn

from relaylab.errors import InputError
from relaylab.models.layers import classifier, initialise

SMALLEST = 8  # pixels
MOST_SEGMENTS = 5  # of model A, for images of 224 pixels


def segment_count(image_size: int) -> int:
    """Return the number of segments for images of this size."""
    return min(MOST_SEGMENTS, int(math.log2(image_size)))


def small_vgg(num_classes: int, *, width: int = 32, convs: int = 3, image_size: int = 8) -> nn.Sequential:
    """Build a plain VGG: segments of 3x3 convolutions that end in max pooling, then three fully connected layers.

    It has He's initialisation and no batch normalisation. The last segment is not pooled and has a map of at least 2x2
    pixels; the paper's networks have a pooling pyramid there. Images of 8 pixels give three segments, those of 32
    pixels and more give five.

    Args:
        num_classes: number of classes, the length of the output.
        width: filters of the first segment; they double from segment to segment, up to eightfold.
        convs: convolutions in each segment.
        image_size: side of the images in pixels.

    Returns:
        `segment1` to `segmentN` and `classifier` in forward order: images (batch, 3, image_size, image_size) to class
        scores (batch, num_classes).

    Raises:
        InputError: the images are smaller than 8 pixels.
    """
    if image_size < SMALLEST:
        raise InputError(f"images of {image_size} pixels: small_vgg requires at least {SMALLEST}")
    count = segment_count(image_size)
    modules = OrderedDict[str, nn.Module]()
    channels, side = 3, image_size
    for number in range(1, count + 1):
        filters = width * min(2 ** (number - 1), 8)
        layers = OrderedDict[str, nn.Module]()
        for i in range(1, convs + 1):
            layers[f"conv{i}"] = nn.Conv2d(channels, filters, 3, padding=1)
            layers[f"relu{i}"] = nn.ReLU()
            channels = filters
        if number < count:
            layers["pool"] = nn.MaxPool2d(2)
            side //= 2
        modules[f"segment{number}"] = nn.Sequential(layers)
    modules["classifier"] = classifier(channels * side * side, 8 * width, num_classes)
    network = nn.Sequential(modules)
    initialise(network)
    return network
