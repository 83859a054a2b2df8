"""Layer-wise learning rate decay: number the layers of a network from the names of its parameters."""

from collections.abc import Iterable

from torch import nn

LISTS = ("blocks", "layers")  # submodules that hold the blocks of a stage in timm networks


def layers_of(network: nn.Module, parameters: Iterable[str]) -> dict[str, int]:
    """Return the layer index of each parameter of a network, from 0 for the lowest layer.

    A layer is a block, such as `layer1.0`, `blocks.3` or `encoder_layer_0`, or else a single module. Outside blocks,
    parameters of at most one dimension (norms, biases) and those without a leaf module (tokens, position embeddings)
    belong to the preceding layer, or to the first one.

    Args:
        network: the network.
        parameters: names of the parameters, from lowest to highest.
    """
    indices: dict[str, int] = {}
    layers: dict[str, int] = {}
    for name in parameters:
        layer = _layer_name(network, name)
        if (_has_children(network, layer) and layer[-1:].isdigit()) or _is_weight_of_module(network, name):
            layers[name] = indices.setdefault(layer, len(indices))
        else:
            layers[name] = max(0, len(indices) - 1)
    return layers


def layer_factors(network: nn.Module, parameters: Iterable[str], decay: float) -> dict[str, float]:
    """Return the learning rate factor of each parameter: 1 in the last layer, times `decay` for each layer below."""
    layers = layers_of(network, parameters)
    last = max(layers.values(), default=0)
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def _layer_name(network: nn.Module, parameter: str) -> str:
    """Return the block that contains a parameter, or the module that owns it."""
    *path, _ = parameter.split(".")
    depth = next((depth for depth, part in enumerate(path, 1) if part[-1:].isdigit()), len(path))
    while depth < len(path):
        step = 2 if path[depth] in LISTS and depth + 1 < len(path) else 1
        block = ".".join(path[: depth + step])
        if not (block[-1:].isdigit() and _has_children(network, block)):
            break
        depth += step
    return ".".join(path[:depth])


def _has_children(network: nn.Module, name: str) -> bool:
    return any(True for _ in network.get_submodule(name).children())


def _is_weight_of_module(network: nn.Module, parameter: str) -> bool:
    """Return whether a parameter has several dimensions and belongs to a module without children."""
    return network.get_parameter(parameter).ndim > 1 and not _has_children(network, parameter.rpartition(".")[0])
