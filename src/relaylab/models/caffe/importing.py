"""Import of the authors' released model B from its two Caffe files."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from relaylab.data.sources.class_names import name_and_number, read_categories, without_letter
from relaylab.errors import InputError
from relaylab.models import pyramid
from relaylab.models.building import build_network
from relaylab.models.caffe.describing import PLAIN, describe, describe_module, max_pooling, window
from relaylab.models.caffe.matching import ADVICE, GRIDS, follow
from relaylab.models.caffe.network import Layer, Source, read_network
from relaylab.models.caffe.reading import Blobs, read_limited, read_weights
from relaylab.models.file import InputConfig, ModelFile
from relaylab.outside.showing import brief
from relaylab.recipes.schema import NetworkConfig

MEAN = (105.448, 113.768, 116.052)  # the authors' means of blue, green and red, 0 to 255
RESIZE, CROP = 256, 224  # the authors' sizes in pixels
MOST_CLASSES, MOST_FILTERS, MOST_PIXELS = 1_000_000, 2048, 8192  # larger values mean that the file is damaged
LARGEST_LIST = 16 << 20  # bytes of a file with class names
WEIGHTS = ("weight", "bias")  # in the order of a layer's blobs


def import_caffe(prototxt: Path, caffemodel: Path, classes: Path | None = None) -> ModelFile:
    """Import model B from the authors' release.

    Width, classes, image size and pyramid are taken from the prototxt. Channels are BGR, with values from 0 to 255. The
    mean and the resize are taken from the prototxt if given there; otherwise they are the authors' values.

    Example::

        model = import_caffe(Path("Places2-401-CNN.prototxt"), Path("Places2-401-CNN.caffemodel"))
        save_model(Path("model-b.safetensors"), model)

    Args:
        prototxt: definition of the network.
        caffemodel: weights; importing needs twice their size in memory.
        classes: file with one class name per line, or NAME INDEX as in the lists of Places; None numbers the classes
            "class 0", "class 1" and so on.

    Raises:
        InputError: a file is missing, damaged or not of the expected kind, or the network is not model B.
    """
    caffe = read_network(prototxt)
    layers, images = follow(caffe)
    source = caffe.sources[images]
    network = _network_config(prototxt, layers, source)
    with torch.device("meta"):
        model = build_network(network)
    _compare(prototxt, layers, model)
    names = _class_names(classes, network.num_classes)
    weights = read_weights(caffemodel, {layer.name for layer in layers.values()})
    return ModelFile(
        network=network,
        classes=names,
        numbered=True,
        input=_input_config(prototxt, source, network.image_size),
        state=_state(caffemodel, layers, weights, model),
        about=f"imported from Caffe: {prototxt.name} and {caffemodel.name} of SHA-256 {_sha256(caffemodel)}",
    )


def _network_config(path: Path, layers: Mapping[str, Layer], source: Source) -> NetworkConfig:
    if len(source.size) != 3 or source.size[0] != 3 or source.size[1] != source.size[2] or source.size[1] < 1:
        raise InputError(
            f"{path}: {brief(source.name)!r} has the size {source.size}: expected 3 channels and a square, from "
            "input_dim, input_shape, an Input layer, or transform_param { crop_size }"
        )
    size, first = source.size[1], layers["segment1.conv1"].message.convolution_param.num_output
    if first % 2 or not first:
        raise InputError(f"{path}: the first convolution has {first} filters: expected an even number; {ADVICE}")
    classes = layers["classifier.fc3"].message.inner_product_param.num_output
    if classes > MOST_CLASSES or first > MOST_FILTERS or size > MOST_PIXELS:
        raise InputError(
            f"{path}: {classes} classes, {first} filters first and images of {size} pixels: expected at most "
            f"{MOST_CLASSES}, {MOST_FILTERS} and {MOST_PIXELS}; is the file damaged?"
        )
    return NetworkConfig(
        architecture="model_b",
        num_classes=classes,
        image_size=size,
        width=first // 2,
        pyramid=_bins(path, layers, -(-size // pyramid.STRIDE)),
    )


def _bins(path: Path, layers: Mapping[str, Layer], side: int) -> tuple[int, ...]:
    """Return the bins along a side of each grid of the pyramid on a map of `side` pixels, finest grid first."""
    grids = [layers[name] for name in layers if re.fullmatch(rf"{re.escape(GRIDS)}\.\d+", name)]
    bins = [-(-side // window(grid)) if window(grid) else 0 for grid in grids]
    for b, grid in zip(bins, grids, strict=True):
        if not b or describe(grid) != max_pooling(pyramid.window(b, side)):
            raise InputError(
                f"{path}: layer {brief(grid.name)!r} is {describe(grid)}, where Model B has max pooling of a "
                f"{side}x{side} map into a grid, with adjacent windows; {ADVICE}"
            )
    if bins != sorted(set(bins)):
        raise InputError(
            f"{path}: layer {brief(layers[GRIDS].name)!r} joins grids of {bins} bins a side: expected the coarsest "
            f"first, each once; {ADVICE}"
        )
    return tuple(reversed(bins))


def _compare(path: Path, layers: dict[str, Layer], model: nn.Module) -> None:
    """Raise InputError if the computation of a layer differs from its counterpart in our model."""
    modules = dict(model.named_modules())
    for place in reversed(layers):  # from the input upwards, so that the first difference is reported
        layer = layers[place]
        if layer.type in ("Convolution", "InnerProduct", "Pooling") and place in modules:
            expected = describe_module(modules[place])
        else:
            expected = PLAIN.get(layer.type, describe(layer))
        if describe(layer) != expected:
            raise InputError(
                f"{path}: layer {brief(layer.name)!r} is {describe(layer)}, where Model B has {expected} "
                f"({place}); {ADVICE}"
            )


def _input_config(path: Path, source: Source, size: int) -> InputConfig:
    blue, green, red = MEAN
    if source.mean is not None:
        if len(source.mean) != 3:
            raise InputError(f"{path}: {len(source.mean)} values of mean_value: expected one for each of 3 channels")
        blue, green, red = source.mean
    height, width = source.resize or (RESIZE * size // CROP,) * 2
    if height != width or height < size:
        raise InputError(f"{path}: images are resized to {height}x{width}: expected a square of at least {size}")
    return InputConfig(resize=height, how="both sides", crop=size, channels="BGR", mean=(blue, green, red))


def _state(path: Path, layers: Mapping[str, Layer], weights: dict[str, Blobs], model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict in the model's order. `weights` is emptied to save memory."""
    own, state = model.state_dict(), dict[str, Tensor]()
    for place in dict.fromkeys(key.rpartition(".")[0] for key in own):
        name = layers[place].name
        where = f"{path}: layer {brief(name)!r}"
        if name not in weights:
            raise InputError(
                f"{where} is missing: expected its weights; is the file truncated, or for a different network?"
            )
        blobs = weights.pop(name)
        if len(blobs) != len(WEIGHTS):
            raise InputError(
                f"{where} has {len(blobs)} blobs: expected two, weights and biases; is the file truncated?"
            )
        for kind, blob in zip(WEIGHTS, blobs, strict=True):
            state[f"{place}.{kind}"] = _tensor(f"{where}, {kind}", blob, tuple(own[f"{place}.{kind}"].shape))
    return state


def _tensor(where: str, blob: NDArray[np.float32], shape: tuple[int, ...]) -> Tensor:
    if _without_ones(blob.shape) != _without_ones(shape):  # in old files, every blob has four dimensions
        raise InputError(f"{where}: shape {blob.shape}, expected {shape}; the prototxt and the caffemodel do not match")
    if not np.isfinite(blob).all():
        raise InputError(f"{where} has values that are infinite or NaN; is the file damaged?")
    return torch.from_numpy(blob.reshape(shape).copy())


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape[:1] == (1,):
        shape = shape[1:]
    return shape


def _class_names(path: Path | None, count: int) -> tuple[str, ...]:
    if path is None:
        return tuple(f"class {label}" for label in range(count))
    data = read_limited(path, LARGEST_LIST, "expected a list of class names")
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text: expected one class name per line") from None
    numbered = bool(lines) and all(name_and_number(line)[0] for line in lines)
    names = read_categories(path) if numbered else tuple(without_letter(line) for line in lines)
    if len(names) != count:
        raise InputError(f"{path} has {len(names)} class names: expected {count}, the number of the network's outputs")
    return names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
