"""Layers and initialisation shared by the paper's networks."""

from collections import OrderedDict

from torch import nn

from relaybackprop.heads import Gain, initialise_last
from relaylab.errors import InputError

DROPOUT = 0.5  # as in the paper, section 5.1


def classifier(features: int, hidden: int, num_classes: int) -> nn.Sequential:
    """Build three fully connected layers, the first two with ReLU and dropout of 0.5 (Table 2).

    Shape:
        (batch, features), or (batch, c, h, w) with c * h * w = features, to (batch, num_classes).
    """
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    for i in (1, 2):
        layers[f"fc{i}"] = nn.Linear(features, hidden)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"dropout{i}"] = nn.Dropout(DROPOUT)
        features = hidden
    layers["fc3"] = nn.Linear(features, num_classes)
    return nn.Sequential(layers)


def initialise(module: nn.Module) -> None:
    """Apply He's initialisation to all convolutions and fully connected layers, in place; biases are set to zero.

    It is the initialisation of the paper's reference [7], scaled by fan-in, as in Caffe's "msra" filler.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def set_gain(module: nn.Module, gain: Gain, num_classes: int) -> None:
    """Reinitialise the last layer of a network or head, in place; see `relaybackprop.heads.initialise_last`.

    Raises:
        InputError: no linear or convolutional layer has `num_classes` outputs.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    last = next((layer for layer in reversed(layers) if layer.weight.shape[0] == num_classes), None)
    if last is None:
        raise InputError(
            f"gain {gain!r} requires a linear or convolutional layer with {num_classes} outputs, and "
            f"{type(module).__name__} has none: remove the gain"
        )
    if gain == "default":
        last.reset_parameters()
    else:
        initialise_last(last, gain)
