"""Parts that the paper's networks share."""

from collections import OrderedDict

from torch import nn

from relaybackprop.heads import Gain, initialise_last
from relaylab.errors import InputError

DROPOUT = 0.5  # the paper's, section 5.1


def classifier(features: int, hidden: int, num_classes: int) -> nn.Sequential:
    """Three fully connected layers, the first two with ReLU and dropout of 0.5 (Table 2).

    Shape:
        (batch, features), or (batch, c, h, w) with as many elements, to (batch, num_classes).
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
    """He's initialisation of all convolutions and fully connected layers, in place; biases start at zero.

    The paper's [7], by the number of inputs, as Caffe's "msra" filler does it.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def set_gain(module: nn.Module, gain: Gain, num_classes: int) -> None:
    """Initialise the last layer of a network or head anew, in place; see `relaybackprop.heads.initialise_last`.

    Raises:
        InputError: no linear or convolutional layer has `num_classes` outputs.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    last = next((layer for layer in reversed(layers) if layer.weight.shape[0] == num_classes), None)
    if last is None:
        raise InputError(
            f"gain {gain!r} needs a linear or convolutional layer with {num_classes} outputs, and "
            f"{type(module).__name__} has none; leave the gain out"
        )
    if gain == "default":
        last.reset_parameters()
    else:
        initialise_last(last, gain)
