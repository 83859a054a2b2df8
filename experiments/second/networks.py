"""Networks of the second check: the ResNets of He et al. (2016) for CIFAR, section 4.2, at any width."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


def resnet(num_classes: int, depth: int = 32, width: int = 16) -> nn.Module:
    """Build a ResNet for small images, with blocks named layer1.0 to layer3.N.

    Args:
        num_classes: length of the output.
        depth: weight layers, 6n + 2; 20, 32, 44, 56 and 110 in the paper.
        width: filters of the first stage; 16 in the paper.
    """
    blocks, remainder = divmod(depth - 2, 6)
    if remainder or blocks < 1:
        raise ValueError(f"depth is {depth}: expected 6n + 2, such as 20, 32 or 110")
    conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
    layers = OrderedDict[str, nn.Module](stem=nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
    channels = width
    for stage in (1, 2, 3):
        filters = width * 2 ** (stage - 1)
        strides = [1 if stage == 1 else 2, *[1] * (blocks - 1)]
        layers[f"layer{stage}"] = nn.Sequential(
            *(Block(channels if i == 0 else filters, filters, stride) for i, stride in enumerate(strides))
        )
        channels = filters
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


class Block(nn.Module):
    """A residual block of two 3x3 convolutions, with a projection where the shape changes.

    Shape:
        (batch, channels, h, w) to (batch, filters, h / stride, w / stride).
    """

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.shortcut = nn.Identity()
        if stride != 1 or channels != filters:
            projection = nn.Conv2d(channels, filters, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(filters))

    def forward(self, images: Tensor) -> Tensor:
        """Sum of the shortcut and the two convolutions."""
        residual = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(images)))))
        return torch.relu(residual + self.shortcut(images))
