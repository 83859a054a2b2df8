"""Networks of the benchmarks, each with a head, the paper's windows and a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from relaybackprop import AuxiliaryHead, Plan, Window

if TYPE_CHECKING:
    from torchvision.models import ResNet


class VGG22(nn.Module):
    """The paper's 22-layer network (Table 1): VGGNet-19 and one more convolution on each of the three smallest maps.

    Five segments of 3x3 convolutions and ReLU, each ending in max pooling, and three fully connected layers. No batch
    normalisation, and no dropout, which would only add noise.

    Args:
        width: number of filters of the first segment; 64 in the paper.
        pixels: side of the images, a multiple of 32.
        classes: number of classes.
    """

    def __init__(self, width: int, pixels: int, classes: int) -> None:
        super().__init__()
        self.segment1 = _segment(3, width, 2)
        self.segment2 = _segment(width, 2 * width, 2)
        self.segment3 = _segment(2 * width, 4 * width, 5)
        self.segment4 = _segment(4 * width, 8 * width, 5)
        self.segment5 = _segment(8 * width, 8 * width, 5)
        hidden = 64 * width
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(8 * width * (pixels // 32) ** 2, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # With PyTorch's default, activations vanish over 19 layers without normalisation.
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores (batch, classes) of images (batch, 3, pixels, pixels)."""
        x = self.segment3(self.segment2(self.segment1(images)))
        return self.classifier(self.segment5(self.segment4(x)))


def _segment(channels: int, filters: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU(inplace=True)]
        channels = filters
    return nn.Sequential(*layers, nn.MaxPool2d(2))


@dataclass(frozen=True)
class Workload:
    """A network with one head, its plan and a batch. Hand-written contenders use its layers in three parts.

    Args:
        model: the whole network, without the head.
        below: layers below the overlap of the two windows.
        overlap: layers in both windows. The head reads their output.
        above: layers above the overlap.
        head: maps the output of the overlap to class scores.
        plan: the paper's windows.
        images: images of a batch.
        labels: labels of the batch.
    """

    model: nn.Module
    below: nn.Module
    overlap: nn.Module
    above: nn.Module
    head: nn.Module
    plan: Plan
    images: Tensor
    labels: Tensor

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the model and of the head."""
        return [*self.model.parameters(), *self.head.parameters()]

    def clear(self) -> None:
        """Set all gradients to None."""
        for parameter in self.parameters:
            parameter.grad = None


def vgg22(width: int, pixels: int, batch: int, *, classes: int = 100, device: str = "cpu") -> Workload:
    """Return VGG-22 with the windows of the paper's Table 2: both losses train segment 4, which has the head."""
    with torch.device(device):
        model = VGG22(width, pixels, classes)
        head = AuxiliaryHead(8 * width, classes)
        images, labels = _batch(batch, pixels, classes)
    below = nn.Sequential(model.segment1, model.segment2, model.segment3)
    above = nn.Sequential(model.segment5, model.classifier)
    plan = Plan(Window(bottom="segment4"), {"aux": Window(top="segment4")})
    return Workload(model, below, model.segment4, above, head, plan, images, labels)


def resnet50(pixels: int, batch: int, *, classes: int = 1000, device: str = "cpu") -> Workload:
    """Return torchvision's ResNet-50 with the paper's windows: both losses train conv4.1 to conv4.4 (section 5.2)."""
    from torchvision.models import resnet50 as build  # lazy: takes a second, and VGG-22 does not need it

    return residual(build, pixels, batch, classes=classes, device=device)


def residual(
    build: "Callable[..., ResNet]", pixels: int, batch: int, *, classes: int = 1000, device: str = "cpu"
) -> Workload:
    """Return a network of bottleneck blocks. Both losses train the first four blocks of the third stage."""
    with torch.device(device):
        model = build(num_classes=classes)
        head = AuxiliaryHead(1024, classes)
        images, labels = _batch(batch, pixels, classes)
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    below = nn.Sequential(*stem, model.layer1, model.layer2)
    overlap, rest = model.layer3[:4], model.layer3[4:]
    above = nn.Sequential(*rest, model.layer4, model.avgpool, nn.Flatten(), model.fc)
    plan = Plan(Window(bottom="layer3.0"), {"aux": Window(top="layer3.3")})
    return Workload(model, below, overlap, above, head, plan, images, labels)


def without_dropout(workload: Workload) -> Workload:
    """Disable dropout in place, so that gradients are deterministic, and return the workload."""
    for module in (workload.model, workload.head):
        for submodule in module.modules():
            if isinstance(submodule, nn.Dropout):
                submodule.p = 0.0
    return workload


def _batch(batch: int, pixels: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, pixels, pixels), torch.randint(classes, (batch,))
