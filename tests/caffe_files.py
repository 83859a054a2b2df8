"""Model B as Caffe's files, for tests: the definition in the forms that are about, and weights beside it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from google.protobuf import text_format
from torch import Tensor

from relaylab.models.building import build_network
from relaylab.models.caffe.schema import V1_TYPES, NetParameter
from relaylab.models.pyramid import window
from relaylab.recipes.schema import NetworkConfig

Change = Callable[[Any], None]
V1 = {"InnerProduct": "INNER_PRODUCT", "ImageData": "IMAGE_DATA"}
THIN = NetworkConfig(architecture="model_b", num_classes=5, image_size=64, width=2, pyramid=(4, 2, 1))
FULL = NetworkConfig(architecture="model_b", num_classes=401, image_size=224, width=64, pyramid=(7, 3, 2, 1))


def random_state(config: NetworkConfig) -> dict[str, Tensor]:
    """He's weights, and biases that are not zero, so that none can be mistaken for another."""
    state = build_network(config).state_dict()
    for key, tensor in state.items():
        if key.endswith("bias"):
            tensor.normal_(std=0.1)
    return state


def write_pair(
    folder: Path, config: NetworkConfig, state: Mapping[str, Tensor], change: Change | None = None, **form: Any
) -> tuple[Path, Path]:
    """Write prototxt and caffemodel.

    Args:
        folder: existing.
        config: of the network.
        state: its weights.
        change: made to the definition before it is written.
        form: of the definition, see `definition`.
    """
    network, places = definition(config, **form)
    write_weights(folder / "net.caffemodel", places, state, old=form.get("old", False))
    if change is not None:
        change(network)
    (folder / "net.prototxt").write_text(text_format.MessageToString(network))
    return folder / "net.prototxt", folder / "net.caffemodel"


def definition(
    config: NetworkConfig,
    *,
    source: str = "Input",
    old: bool = False,
    in_place: bool = True,
    dropout: bool = True,
    softmax: bool = True,
) -> tuple[Any, dict[str, str]]:
    """A network's definition.

    Args:
        config: of Model B.
        source: "Input", "input_dim", "input_shape" or "ImageData", the authors' own.
        old: layers of the form before 2015.
        in_place: ReLU and dropout write over what they read.
        dropout: whether it is there.
        softmax: whether it is there.

    Returns:
        The NetParameter, and the name of each layer with weights by its module in our model.
    """
    network, places = NetParameter(name="B"), dict[str, str]()
    k, size = config.width or 64, config.image_size

    def add(kind: str, name: str, *bottoms: str, top: str = "") -> Any:
        layer = (network.layers if old else network.layer).add(name=name)
        layer.type = V1_TYPES.index(V1.get(kind, kind.upper())) if old else kind
        layer.bottom.extend(bottoms)
        layer.top.append(top or name)
        return layer

    def over(kind: str, name: str, blob: str) -> str:
        add(kind, name, blob, top=blob if in_place else name)
        return blob if in_place else name

    def convolution(place: str, blob: str, filters: int, side: int, stride: int = 1) -> str:
        name = place.removeprefix("segment").replace(".", "/")
        options = add("Convolution", name, blob).convolution_param
        options.num_output, options.pad[:], options.kernel_size[:] = filters, [side // 2], [side]
        if stride > 1:
            options.stride.append(stride)
        places[place] = name
        return over("ReLU", f"{name}/relu", name)

    def pooling(name: str, blob: str, side: int) -> str:
        options = add("Pooling", name, blob).pooling_param
        options.kernel_size = options.stride = side
        return name

    def inception(place: str, blob: str, k: int) -> str:
        branches = [
            convolution(f"{place}.branch1x1.0", blob, k, 1),
            convolution(f"{place}.branch3x3.0", blob, k, 3),
            convolution(f"{place}.branch3x3dbl.2", convolution(f"{place}.branch3x3dbl.0", blob, 2 * k, 3), 2 * k, 3),
        ]
        name = place.removeprefix("segment").replace(".", "/")
        add("Concat", name, *branches)
        return name

    _add_source(network, add, source, size)
    blob = pooling("pool1", convolution("segment1.conv1", "data", 2 * k, 7, 2), 2)
    for segment, width in ((2, k), (3, 2 * k), (4, 2 * k)):
        for module in range(1, 5):
            blob = inception(f"segment{segment}.inception{module}", blob, width)
        if segment < 4:
            blob = pooling(f"pool{segment}", blob, 2)
    grids = list[str]()
    for bins in config.pyramid or ():  # the finest first, as the authors' file has them
        pooling(f"grid{bins}", blob, window(bins, -(-size // 16)))
        add("Flatten", f"flat{bins}", f"grid{bins}")
        grids.insert(0, f"flat{bins}")
    add("Concat", "pyramid", *grids).concat_param.concat_dim = 1
    blob = "pyramid"
    for number, outputs in ((1, 64 * k), (2, 64 * k), (3, config.num_classes)):
        add("InnerProduct", f"fc{number}", blob).inner_product_param.num_output = outputs
        places[f"classifier.fc{number}"] = blob = f"fc{number}"
        if number < 3:
            blob = over("ReLU", f"relu{number}", blob)
            blob = over("Dropout", f"dropout{number}", blob) if dropout else blob
    if softmax:
        add("Softmax", "prob", blob)
    if source == "ImageData":
        add("Accuracy", "accuracy", "prob", "label")
    return network, places


def _add_source(network: Any, add: Callable[..., Any], source: str, size: int) -> None:
    shape = [1, 3, size, size]
    if source == "Input":
        add("Input", "data").input_param.shape.add(dim=shape)
    elif source == "ImageData":
        layer = add("ImageData", "images", top="data")
        layer.top.append("label")
        layer.transform_param.crop_size = size
        layer.transform_param.mean_value.extend([100.5, 110.25, 120.1])
        layer.image_data_param.new_height = layer.image_data_param.new_width = size + 8
        layer.include.add(phase=1)
        training = add("ImageData", "images", top="data")
        training.top.append("label")
        training.include.add(phase=0)
    else:
        network.input.append("data")
        if source == "input_dim":
            network.input_dim.extend(shape)
        else:
            network.input_shape.add(dim=shape)


def messages(places: Mapping[str, str], state: Mapping[str, Tensor], old: bool = False) -> Iterator[Any]:
    """A NetParameter for each layer with weights; one after another they are a caffemodel."""
    for place, name in places.items():
        network = NetParameter()
        layer = (network.layers if old else network.layer).add(name=name)
        for kind in ("weight", "bias"):
            tensor = state[f"{place}.{kind}"]
            blob = layer.blobs.add(data=tensor.numpy().tobytes())
            if old:
                blob.num, blob.channels, blob.height, blob.width = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
            else:
                blob.shape.dim.extend(tensor.shape)
        yield network


def write_weights(path: Path, places: Mapping[str, str], state: Mapping[str, Tensor], old: bool = False) -> None:
    """Write a caffemodel, layer by layer: messages of protobuf are joined by writing them one after another."""
    with torch.no_grad(), path.open("wb") as file:
        for network in messages(places, state, old):
            file.write(network.SerializeToString())
