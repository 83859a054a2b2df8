"""Prediction: the likeliest classes of images, from their centre crops."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relaylab.data.decode import decode
from relaylab.data.faults import ImageFault
from relaylab.data.geometry import Pixels
from relaylab.data.sources.classes import Classes
from relaylab.data.sources.listing import is_image, is_system_folder, told_apart
from relaylab.errors import InputError
from relaylab.evaluate.protocols import Pass, cut
from relaylab.evaluate.trained import find_trained
from relaylab.models.export import Classifier
from relaylab.models.file import InputConfig, ModelFile, read_model

TOP, BATCH = 5, 32
LEAST = 0.5  # probability of a class of several
STDIN = "-"


@dataclass(frozen=True)
class Guess:
    """A class, by its display name and by its key, and its probability."""

    name: str
    probability: float
    key: str


@dataclass(frozen=True)
class Network:
    """A trained network, from a model file or an ONNX program.

    Attributes:
        classes: in the order of its output.
        input: the size of its images.
        has_several_labels: whether each class has a probability of its own.
        scores: maps RGB crops (batch, 3, crop, crop), float32 from 0 to 255, to class scores (batch, classes).
    """

    classes: Classes
    input: InputConfig
    scores: Callable[[Tensor], Tensor]
    has_several_labels: bool = False


@dataclass(frozen=True)
class Picture:
    """An encoded image; `read` returns its bytes, or raises an OSError."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Prediction:
    """A network's prediction for one image: its pixels, uint8 (h, w, 3), and the likeliest classes, likeliest first.

    They are at most five; of a network for several labels, all with a probability of at least `LEAST`, perhaps none.
    """

    name: str
    pixels: Pixels
    guesses: tuple[Guess, ...]


def open_network(path: Path) -> Network:
    """Open a trained network by its run's folder, its model file or its ONNX program.

    Raises:
        InputError: no such file, an unfinished run, or a file that `relaylab` has not written.
    """
    if path.suffix == ".pt2":
        # torch.export.load unpickles what the archive calls pickled, with weights_only=False.
        raise InputError(f"{path}: reading .pt2 can run code that it holds; take the .safetensors or the .onnx file")
    if path.suffix == ".onnx" and path.is_file():
        return _open_onnx(path)
    return network_of(read_model(find_trained([path])[0].file))


def network_of(model: ModelFile) -> Network:
    """Build a model file's network.

    Raises:
        InputError: the weights belong to another network.
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
                raise InputError(f"{path} holds no images")
            pictures += [Picture(str(file), file.read_bytes) for file in inside]
        else:
            pictures.append(Picture(str(path), path.read_bytes))
    if not pictures:
        raise InputError("no images are given: name files or folders, or - for one from stdin")
    return pictures


def _images_below(folder: Path) -> list[Path]:
    """Return the images in a folder, except those in hidden folders and in a system's own."""
    found: list[Path] = []
    for inside, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_system_folder(name)]
        paths = [Path(inside, name) for name in files if is_image(name)]
        found += [path for path in paths if path.is_file()]
    return sorted(found)


def predict(network: Network, pictures: Sequence[Picture]) -> Iterator[Prediction | InputError]:
    """Return the likeliest classes of each image, in order; an error for an image that cannot be read."""
    names = told_apart(network.classes.names, network.classes.keys)
    for start in range(0, len(pictures), BATCH):
        read = [_read(picture) for picture in pictures[start : start + BATCH]]
        crops = [crop_of(each[1], network.input) for each in read if not isinstance(each, InputError)]
        with torch.inference_mode():
            scores = network.scores(torch.stack(crops)) if crops else torch.empty(0, 1)
            shares = iter(scores.sigmoid() if network.has_several_labels else scores.softmax(dim=1))
        for each in read:
            if isinstance(each, InputError):
                yield each
            else:
                own = next(shares)
                best = own.topk(int((own >= LEAST).sum()) if network.has_several_labels else min(TOP, len(own)))
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                guesses = (Guess(names[index], share, network.classes.keys[index]) for index, share in pairs)
                yield Prediction(*each, tuple(guesses))


def crop_of(pixels: Pixels, config: InputConfig) -> Tensor:
    """Return the centre crop of an image, uint8 (h, w, 3), as float32 (3, crop, crop), RGB, 0 to 255."""
    return cut(pixels, Pass("single-crop"), config)[0].permute(2, 0, 1).float()


def _read(picture: Picture) -> tuple[str, Pixels] | InputError:
    try:
        return picture.name, decode(picture.read())
    except OSError as error:
        return InputError(f"cannot read {picture.name}: {error.strerror}")
    except ImageFault as fault:
        return InputError(f"cannot decode {picture.name}: {fault}")


def _open_onnx(path: Path) -> Network:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise InputError(f'{path}: to run it, pip install onnxruntime; or take the ".safetensors" file') from None
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        size = json.loads(about["input"])
        config = InputConfig(resize=size["resize"], how=size["how"], crop=size["crop"], mean=(0.0, 0.0, 0.0))
        keys = json.loads(about["keys"]) if "keys" in about else None
        classes = Classes.stored(json.loads(about["classes"]), keys, numbered=False)
        name = session.get_inputs()[0].name
    except InputError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise InputError(f"{path} is not a program that `relaylab export` has written: {error}") from None

    def scores(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return Network(classes, config, scores, about.get("has_several_labels") == "true")
