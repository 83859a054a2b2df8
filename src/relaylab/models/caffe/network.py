"""A prototxt as a graph of layers. Blobs are numbered, so that in-place layers need no special treatment."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaylab.errors import InputError
from relaylab.models.caffe.reading import read_prototxt
from relaylab.models.caffe.schema import PHASE_TEST, V1_TYPES
from relaylab.outside.showing import brief

MOST_TOPS = 100  # of a layer that reads images
RENAMED = {"Relu": "ReLU"}  # types that are in capitals in the old format


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer.

    Attributes:
        name: name, as in the caffemodel.
        type: type, such as "Convolution".
        bottoms: numbers of the blobs that it reads.
        tops: numbers of the blobs that it produces. An in-place layer produces a new one.
        message: parameters under Caffe's names.
    """

    name: str
    type: str
    bottoms: tuple[int, ...]
    tops: tuple[int, ...]
    message: Any


@dataclass(frozen=True, slots=True)
class Source:
    """An input blob, or the output of a layer that reads images.

    Attributes:
        name: name of the blob.
        size: (channels, height, width), as far as the file gives it.
        mean: mean of each channel, 0 to 255, in Caffe's BGR order; None if the file does not give it.
        resize: (height, width) before the crop; None if the file does not give it.
    """

    name: str
    size: tuple[int, ...]
    mean: tuple[float, ...] | None = None
    resize: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """The network of a prototxt in its test phase.

    Attributes:
        path: path of the prototxt, for error messages.
        layers: layers in file order, without data layers, losses and metrics.
        sources: input blobs by number.
    """

    path: Path
    layers: tuple[Layer, ...]
    sources: Mapping[int, Source]


def read_network(path: Path) -> Network:
    """Read a prototxt.

    Raises:
        InputError: the file cannot be read, is not a prototxt file, or its layers are not connected.
    """
    message = read_prototxt(path)
    layers = list[Layer]()
    sources = dict[int, Source]()
    current = dict[str, int]()  # number of the latest blob of each name, which later layers read
    for count, (name, size) in enumerate(_inputs(message, path)):
        current[name] = count
        sources[count] = Source(name, size)
    count = len(sources)
    for entry in (*message.layers, *message.layer):
        if not _in_test_phase(entry):
            continue
        kind, where = _type(entry), f"{path}: layer {brief(entry.name)!r}"
        for name in entry.bottom:
            if name not in current:
                raise InputError(f"{where} reads {brief(name)!r}, which no earlier layer produces")
        bottoms = tuple(current[name] for name in entry.bottom)
        below = set(entry.bottom)
        for name in entry.top:
            if name in current and name not in below:
                raise InputError(f"{where} produces {brief(name)!r}, which an earlier layer also produces")
            current[name] = count
            count += 1
        tops = tuple(current[name] for name in entry.top)
        if not bottoms:
            if len(entry.top) > MOST_TOPS:
                raise InputError(f"{where} produces {len(entry.top):,} blobs: expected images and labels")
            sources |= {top: _source(entry, name, where) for top, name in zip(tops, entry.top, strict=True)}
        elif not _only_measures(kind):
            layers.append(Layer(entry.name, kind, bottoms, tops, entry))
    return Network(path, tuple(layers), sources)


def _inputs(message: Any, path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the inputs that are not layers: names, and sizes without the batch dimension."""
    for number, name in enumerate(message.input):
        if number < len(message.input_shape):
            yield name, tuple(message.input_shape[number].dim)[1:]
        elif 4 * number + 4 <= len(message.input_dim):
            yield name, tuple(message.input_dim[4 * number + 1 : 4 * number + 4])
        else:
            raise InputError(f"{path}: input {brief(name)!r} has no size: expected input_shape or four input_dim")


def _in_test_phase(layer: Any) -> bool:
    def met(rules: Sequence[Any]) -> bool:
        return any(not rule.HasField("phase") or rule.phase == PHASE_TEST for rule in rules)

    return met(layer.include) if layer.include else not met(layer.exclude)


def _type(layer: Any) -> str:
    if isinstance(layer.type, str):
        return layer.type
    name: str = V1_TYPES[layer.type].title().replace("_", "")  # INNER_PRODUCT is InnerProduct since
    return RENAMED.get(name, name)


def _only_measures(kind: str) -> bool:
    """Return whether layers of this type only measure the scores."""
    return kind in ("Accuracy", "Silence") or kind.endswith("Loss")


def _source(layer: Any, name: str, where: str) -> Source:
    if _type(layer) == "Input":
        shapes = layer.input_param.shape
        if not shapes:
            raise InputError(f"{where} has no size: expected input_param {{ shape {{ dim: ... }} }}")
        return Source(name, tuple(shapes[min(list(layer.top).index(name), len(shapes) - 1)].dim)[1:])
    transform, images = layer.transform_param, layer.image_data_param
    if transform.mean_file or transform.scale != 1:
        raise InputError(
            f"{where} subtracts a mean image or scales its values: expected values from 0 to 255 and a mean_value for "
            "each channel, as in the authors' file"
        )
    side = transform.crop_size
    # Rounded, since Caffe's float 105.448 is 105.44799804... as a double.
    means = tuple(float(f"{value:.7g}") for value in transform.mean_value) or (0.0,)
    resize = (images.new_height, images.new_width) if images.new_height and images.new_width else None
    return Source(name, (3, side, side), 3 * means if len(means) == 1 else means, resize)
