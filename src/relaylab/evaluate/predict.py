"""Prediction: the most likely classes of images, from their centre crops."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from relaylab.data.decode import decode
from relaylab.data.faults import ImageFault
from relaylab.data.geometry import Pixels
from relaylab.data.sources.classes import Classes
from relaylab.data.sources.listing import is_image, is_system_folder, told_apart
from relaylab.data.sources.source import LARGEST_FILE
from relaylab.errors import InputError
from relaylab.evaluate.protocols import View, cut
from relaylab.evaluate.trained import find_trained
from relaylab.models.export import Classifier
from relaylab.models.file import InputConfig, ModelFile, read_model
from relaylab.outside.reading import check_keys, parse, read_bytes
from relaylab.outside.showing import reason

TOP, BATCH = 5, 32
LEAST = 0.5  # probability, for multi-label networks
LARGEST_SHOWN = 1024  # pixels per side
STDIN = "-"


@dataclass(frozen=True)
class Guess:
    """A predicted class: its display name, probability and key."""

    name: str
    probability: float
    key: str


@dataclass(frozen=True)
class Network:
    """A trained network, from a model file or an ONNX program.

    Attributes:
        classes: class names in the order of the outputs.
        input: size of the input images.
        has_several_labels: whether the network is multi-label: each class has its own sigmoid probability.
        scores: maps RGB crops (batch, 3, crop, crop), float32 from 0 to 255, to class scores (batch, classes).
    """

    classes: Classes
    input: InputConfig
    scores: Callable[[Tensor], Tensor]
    has_several_labels: bool = False


@dataclass(frozen=True)
class Picture:
    """An encoded image. `read` returns its bytes, or raises an OSError."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Prediction:
    """A network's prediction for one image.

    Attributes:
        name: name of the image.
        pixels: uint8 (h, w, 3); large images are downscaled.
        guesses: the five most likely classes, most likely first. For a multi-label network, all classes with a
            probability of at least `LEAST`, possibly none.
        below: for a multi-label network without such a class, the five most likely ones; otherwise empty.
    """

    name: str
    pixels: Pixels
    guesses: tuple[Guess, ...]
    below: tuple[Guess, ...] = ()


def open_network(path: Path) -> Network:
    """Open a trained network: the folder of a run, a model file or an ONNX program.

    Raises:
        InputError: no such file, an unfinished run, or a file not written by `relaylab`.

    Example:
        >>> network = open_network(Path("runs/digits/20261128T224500Z-s0"))
        >>> pictures = find_pictures([Path("photo.jpg")], sys.stdin.buffer.read)
        >>> for prediction in predict(network, pictures):
        ...     print(prediction.guesses[0].name)
    """
    if path.suffix == ".pt2":
        # torch.export.load unpickles parts of the archive with weights_only=False.
        raise InputError(f"{path}: loading .pt2 files can execute code; use the .safetensors or the .onnx file")
    if path.suffix == ".onnx" and path.is_file():
        return _open_onnx(path)
    return network_of(read_model(find_trained([path])[0].file))


def network_of(model: ModelFile) -> Network:
    """Build the network of a model file.

    Raises:
        InputError: the weights do not match the network.
    """
    return Network(model.identity, model.input, Classifier(model).eval(), model.has_several_labels)


def find_pictures(paths: Sequence[Path], stdin: Callable[[], bytes]) -> list[Picture]:
    """Resolve the image arguments: files, folders with images at any depth, or "-" for one image from stdin.

    Raises:
        InputError: no images, or a folder without any.
    """
    pictures: list[Picture] = []
    for path in paths:
        if str(path) == STDIN:
            pictures.append(Picture("stdin", stdin))
        elif path.is_dir():
            inside = _images_below(path)
            if not inside:
                raise InputError(f"{path} contains no images")
            pictures += [Picture(str(file), partial(read_bytes, file, LARGEST_FILE)) for file in inside]
        else:
            pictures.append(Picture(str(path), partial(read_bytes, path, LARGEST_FILE)))
    if not pictures:
        raise InputError("no images given: pass files or folders, or - to read one image from stdin")
    return pictures


def _images_below(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, except hidden and system folders."""
    images: list[Path] = []
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_system_folder(name)]
        paths = [Path(inside, name) for name in files if is_image(name)]
        images += [path for path in paths if path.is_file()]
    return sorted(images)


@dataclass(frozen=True)
class _Read:
    name: str
    crop: Tensor
    pixels: Pixels


def predict(network: Network, pictures: Sequence[Picture]) -> Iterator[Prediction | InputError]:
    """Yield the prediction for each image in order, or an error if the image cannot be read.

    Only one image at a time is held in memory at full size.

    Raises:
        InputError: the network does not run, or its scores are not finite.
    """
    names = told_apart(network.classes.names, network.classes.keys)
    for start in range(0, len(pictures), BATCH):
        read = [_read(picture, network.input) for picture in pictures[start : start + BATCH]]
        crops = [image.crop for image in read if not isinstance(image, InputError)]
        with torch.inference_mode():
            scores = network.scores(torch.stack(crops)) if crops else torch.empty(0, len(names))
        if scores.shape != (len(crops), len(names)):
            raise InputError(f"the network returned shape {tuple(scores.shape)}, expected {(len(crops), len(names))}")
        rows = iter(scores.sigmoid() if network.has_several_labels else scores.softmax(dim=1))
        for image in read:
            if isinstance(image, InputError):
                yield image
                continue
            probabilities = next(rows)
            if not bool(probabilities.isfinite().all()):
                raise InputError(f"{image.name}: the network's scores are not finite; the model file may be damaged")
            above = int((probabilities >= LEAST).sum()) if network.has_several_labels else TOP
            best = probabilities.topk(min(above or TOP, len(probabilities)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            guesses = tuple(Guess(names[index], value, network.classes.keys[index]) for index, value in pairs)
            yield Prediction(image.name, image.pixels, guesses if above else (), () if above else guesses)


def crop_of(pixels: Pixels, config: InputConfig) -> Tensor:
    """Return the centre crop of an image, uint8 (h, w, 3), as float32 (3, crop, crop), RGB, 0 to 255."""
    return cut(pixels, View("single-crop"), config)[0].permute(2, 0, 1).float()


def _read(picture: Picture, config: InputConfig) -> _Read | InputError:
    try:
        pixels = decode(picture.read())
        return _Read(picture.name, crop_of(pixels, config), _small(pixels))
    except OSError as error:
        return InputError(f"cannot read {picture.name}: {error.strerror}")
    except ImageFault as fault:
        return InputError(f"cannot decode {picture.name}: {fault}")


def _small(pixels: Pixels) -> Pixels:
    if max(pixels.shape) <= LARGEST_SHOWN:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((LARGEST_SHOWN, LARGEST_SHOWN))
    return np.asarray(image)


def _open_onnx(path: Path) -> Network:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise InputError(f"{path}: pip install onnxruntime to run it, or use the .safetensors file") from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        name, outputs = session.get_inputs()[0].name, session.get_outputs()[0].shape
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise InputError(f"{path} is not an ONNX program written by `relaylab export`: {reason(error)}") from None
    check_keys(about, ("input", "classes"), str(path))
    size = parse(about["input"], _OnnxInput, f"{path}, input,")
    config = InputConfig(resize=size.resize, how=size.how, crop=size.crop, mean=(0.0, 0.0, 0.0))
    keys = parse(about["keys"], tuple[str, ...], f"{path}, keys,") if "keys" in about else None
    names = parse(about["classes"], tuple[str, ...], f"{path}, classes,")
    if not names or len(outputs) != 2 or outputs[1] != len(names):
        raise InputError(f"{path} has {len(names)} class names and outputs of shape {outputs}; it may be damaged")

    def scores(images: Tensor) -> Tensor:
        try:
            return torch.from_numpy(session.run(None, {name: images.numpy()})[0])
        except Exception as error:
            raise InputError(f"{path} does not run on crops of {config.crop} pixels: {reason(error)}") from None

    has_several = about.get("has_several_labels") == "true"
    return Network(Classes.stored(names, keys, numbered=False), config, scores, has_several)


@dataclass(frozen=True)
class _OnnxInput:
    resize: int
    how: Literal["shorter side", "both sides"]
    crop: int
