"""Descriptions of Caffe layers and PyTorch modules. Equal descriptions mean that the computation is the same."""

from typing import Any

from torch import nn

from relaylab.models.caffe.network import Layer
from relaylab.outside.showing import brief

PLAIN = {  # layers without parameters
    "ReLU": "ReLU",
    "Flatten": "flattening",
    "Concat": "a concatenation along axis 1",
    "Softmax": "softmax along axis 1",
}


def describe(layer: Layer) -> str:
    """Describe the computation of a layer in a prototxt, including options that our modules do not support."""
    message = layer.message
    match layer.type:
        case "Convolution":
            return _convolution(message.convolution_param)
        case "InnerProduct":
            options = message.inner_product_param
            unusual = {"no bias": not options.bias_term, "transposed": options.transpose, "axis": options.axis != 1}
            return _joined(f"a fully connected layer with {options.num_output} outputs", unusual)
        case "Pooling":
            return _pooling(message.pooling_param)
        case "ReLU":
            return _joined("ReLU", {"with a negative slope": message.relu_param.negative_slope != 0})
        case "Concat":
            options = message.concat_param
            axis = options.concat_dim if options.HasField("concat_dim") else options.axis
            return f"a concatenation along axis {axis}"
        case "Flatten":
            options = getattr(message, "flatten_param", None)  # absent in the old format
            unusual = options is not None and (options.axis != 1 or options.end_axis not in (-1, 3))
            return _joined("flattening", {"of other axes": unusual})
        case "Softmax":
            return f"softmax along axis {message.softmax_param.axis}"
        case _:
            return f"a layer of type {brief(layer.type)}"


def describe_module(module: nn.Module) -> str:
    """Describe the computation of a module of model B."""
    match module:
        case nn.Conv2d():
            kernel, stride, padding = _sides(module.kernel_size), _sides(module.stride), _sides(module.padding)
            return f"a {kernel} convolution with {module.out_channels} filters, stride {stride}, padding {padding}"
        case nn.Linear():
            return f"a fully connected layer with {module.out_features} outputs"
        case nn.MaxPool2d():
            return max_pooling(module.kernel_size)  # pyright: ignore[reportArgumentType] (Model B's are square)
        case _:
            raise TypeError(f"no description of {type(module).__name__}")


def max_pooling(size: int) -> str:
    """Describe the max pooling of model B and its pyramid, with adjacent windows of `size` pixels."""
    return f"max pooling of {size}x{size}, stride {size}x{size}"


def window(layer: Layer) -> int:
    """Return the side of a pooling layer's windows in pixels, or their height if they are not square."""
    return _pair(layer.message.pooling_param, "kernel", 0)[0]


def _convolution(options: Any) -> str:
    kernel, stride, padding = _pair(options, "kernel", 0), _pair(options, "stride", 1), _pair(options, "pad", 0)
    unusual = {
        f"{options.group} groups": options.group != 1,
        "dilated": any(dilation != 1 for dilation in options.dilation),
        "no bias": not options.bias_term,
        f"axis {options.axis}": options.axis != 1,
    }
    words = f"a {_sides(kernel)} convolution with {options.num_output} filters, stride {_sides(stride)}"
    return _joined(f"{words}, padding {_sides(padding)}", unusual)


def _pooling(options: Any) -> str:
    if options.global_pooling:
        return "pooling of the whole map"
    kind = {0: "max", 1: "average"}.get(options.pool, "stochastic")
    kernel, stride, padding = _pair(options, "kernel", 0), _pair(options, "stride", 1), _pair(options, "pad", 0)
    unusual = {f"padding {_sides(padding)}": any(padding), "rounding down": options.round_mode != 0}
    return _joined(f"{kind} pooling of {_sides(kernel)}, stride {_sides(stride)}", unusual)


def _pair(options: Any, name: str, default: int) -> tuple[int, int]:
    """Return height and width of a kernel, stride or padding. Caffe has three notations for them."""
    if options.HasField(f"{name}_h") or options.HasField(f"{name}_w"):
        return getattr(options, f"{name}_h"), getattr(options, f"{name}_w")
    field = "kernel_size" if name == "kernel" else name
    value = getattr(options, field)
    if isinstance(value, int):
        value = [value] if options.HasField(field) else []
    sides = list(value) or [default]
    return sides[0], sides[-1]


def _sides(sides: tuple[int, ...] | str) -> str:
    return "x".join(map(str, sides))


def _joined(words: str, unusual: dict[str, bool]) -> str:
    return ", ".join([words, *(name for name, there in unusual.items() if there)])
