"""Parts that the paper's networks share."""

from collections import OrderedDict

from torch import nn

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
