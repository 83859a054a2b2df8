"""Model B: modified inception modules and a pyramid (Table 2), as in the authors' released definition."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from relaylab.models.layers import classifier, initialise
from relaylab.models.pyramid import num_features, pyramid_for

PYRAMID = (7, 3, 2, 1)
MODULES = 4  # inception modules of each segment


class Inception(nn.Module):
    """The paper's modified inception module: three branches, concatenated.

    Args:
        channels: channels of the input.
        k: the paper's k.

    Shape:
        (batch, channels, h, w) to (batch, 4 k, h, w): k of a 1x1 convolution, k of a 3x3 one, 2 k of two 3x3 ones.
    """

    def __init__(self, channels: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.branch1x1 = _convolution(channels, k, 1)
        self.branch3x3 = _convolution(channels, k, 3)
        self.branch3x3dbl = nn.Sequential(*_convolution(channels, 2 * k, 3), *_convolution(2 * k, 2 * k, 3))

    def forward(self, features: Tensor) -> Tensor:
        """Concatenate the branches' outputs."""
        return torch.cat([self.branch1x1(features), self.branch3x3(features), self.branch3x3dbl(features)], dim=1)


def _convolution(channels: int, filters: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, filters, size, padding=size // 2), nn.ReLU(inplace=True))


def model_b(
    num_classes: int = 401, *, width: int = 64, image_size: int = 224, pyramid: Sequence[int] = PYRAMID
) -> nn.Sequential:
    """Build the paper's model B: 28 weight layers on its longest path, no batch normalisation, He's initialisation.

    Args:
        num_classes: number of classes, the length of the output.
        width: k of the first inception modules, which scales all layers; 64 in the paper.
        image_size: side of the images in pixels.
        pyramid: bins along a side of each grid of the pyramid; (4, 2, 1) suits images of 64 pixels.

    Returns:
        `segment1` to `segment4` and `classifier` in forward order: images (batch, 3, image_size, image_size) to class
        scores (batch, num_classes). The auxiliary classifier is not included; it is attached to `segment3`.

    Raises:
        InputError: the pyramid does not fit images of this size.
    """
    bins = pyramid_for(image_size, pyramid)
    stem = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, 2 * width, 7, stride=2, padding=3), relu1=nn.ReLU(inplace=True), pool=_pool()
    )
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            segment1=nn.Sequential(stem),
            segment2=_segment(2 * width, width, _pool(), "pool"),
            segment3=_segment(4 * width, 2 * width, _pool(), "pool"),
            segment4=_segment(8 * width, 2 * width, bins, "spp"),
            classifier=classifier(num_features(8 * width, pyramid), 64 * width, num_classes),
        )
    )
    initialise(model)
    return model


def _segment(channels: int, k: int, end: nn.Module, name: str) -> nn.Sequential:
    layers = OrderedDict[str, nn.Module]()
    for i in range(1, MODULES + 1):
        layers[f"inception{i}"] = Inception(channels, k)
        channels = 4 * k
    layers[name] = end
    return nn.Sequential(layers)


def _pool() -> nn.Module:
    return nn.MaxPool2d(2, ceil_mode=True)  # Caffe rounds up
