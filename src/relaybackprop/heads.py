"""Auxiliary output modules: what stands between an inner layer and its loss, in training only."""

from torch import Tensor, nn


class AuxiliaryHead(nn.Module):
    """GoogLeNet's auxiliary classifier in size-free form.

    Adaptive average pooling to 4x4, a 1x1 convolution to 128 channels, ReLU, a fully connected layer of 1024, ReLU,
    dropout of 0.7, and the classifier. The paper does not give the layers of its auxiliary branch; this is our choice.

    Args:
        channels: channels of the feature map that comes in.
        classes: number of classes.
        batch_norm: put a batch normalisation after the convolution. Off, as in the paper's networks A and B.

    Shape:
        (batch, channels, height, width) to (batch, classes), for any height and width of at least 1.
    """

    def __init__(self, channels: int, classes: int, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.conv = nn.Conv2d(channels, 128, kernel_size=1, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(128) if batch_norm else nn.Identity()
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(0.7)
        self.fc2 = nn.Linear(1024, classes)
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        """Class scores (batch, classes) from a feature map (batch, channels, height, width)."""
        x = self.relu(self.norm(self.conv(self.pool(features))))  # (batch, 128, 4, 4)
        return self.fc2(self.dropout(self.relu(self.fc1(x.flatten(1)))))


class LinearHead(nn.Module):
    """The smallest head: global average pooling and one fully connected layer.

    Args:
        channels: channels of the feature map that comes in.
        classes: number of classes.

    Shape:
        (batch, channels, height, width) to (batch, classes).
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Class scores (batch, classes) from a feature map (batch, channels, height, width)."""
        return self.fc(features.mean(dim=(2, 3)))
