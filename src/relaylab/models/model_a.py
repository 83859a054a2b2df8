"""Model A: VGGNet-19 with one more convolution on each of the three smallest maps, and a pyramid (Table 2)."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from relaylab.models.layers import classifier, initialise
from relaylab.models.pyramid import num_features, pyramid_for

PYRAMID = (7, 3, 2, 1)
CONVOLUTIONS = (2, 2, 5, 5, 5)  # 3x3 convolutions of each segment


def model_a(
    num_classes: int = 401, *, width: int = 64, image_size: int = 224, pyramid: Sequence[int] = PYRAMID
) -> nn.Sequential:
    """Build the paper's model A: 22 weight layers, no batch normalisation, He's initialisation.

    DEVIATION(model-a-filters): Table 2 prints 256 filters for the last five convolutions, but the text says "VGGNet-19
    plus three layers", which has 512. This function follows the text; `model_a_printed` follows the table.

    Args:
        num_classes: number of classes, the length of the output.
        width: filters of the first segment, which scales all layers; 64 in the paper.
        image_size: side of the images in pixels.
        pyramid: bins along a side of each grid of the pyramid; (4, 2, 1) suits images of 64 pixels.

    Returns:
        `segment1` to `segment5` and `classifier` in forward order: images (batch, 3, image_size, image_size) to class
        scores (batch, num_classes). The auxiliary classifier is not included; it is attached to `segment4`.

    Raises:
        InputError: the pyramid does not fit images of this size.
    """
    return _build(num_classes, (width, 2 * width, 4 * width, 8 * width, 8 * width), image_size, pyramid)


def model_a_printed(
    num_classes: int = 401, *, width: int = 64, image_size: int = 224, pyramid: Sequence[int] = PYRAMID
) -> nn.Sequential:
    """Build model A as printed in Table 2, with 256 filters in the last segment. See `model_a`."""
    return _build(num_classes, (width, 2 * width, 4 * width, 8 * width, 4 * width), image_size, pyramid)


def _build(num_classes: int, filters: Sequence[int], image_size: int, bins: Sequence[int]) -> nn.Sequential:
    pyramid = pyramid_for(image_size, bins)
    segments = OrderedDict[str, nn.Module]()
    channels = 3
    for number, (count, width) in enumerate(zip(CONVOLUTIONS, filters, strict=True), start=1):
        layers = OrderedDict[str, nn.Module]()
        for i in range(1, count + 1):
            layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1)
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
            channels = width
        if number < len(filters):
            layers["pool"] = nn.MaxPool2d(2, ceil_mode=True)  # Caffe rounds up
        else:
            layers["spp"] = pyramid
        segments[f"segment{number}"] = nn.Sequential(layers)
    model = nn.Sequential(segments)
    model.add_module("classifier", classifier(num_features(channels, bins), 64 * filters[0], num_classes))
    initialise(model)
    return model
