"""The likeliest classes of images, from their centre crops."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from relaylab.data.decode import decode
from relaylab.data.faults import ImageFault
from relaylab.data.geometry import Pixels
from relaylab.data.sources.listing import is_image
from relaylab.errors import InputError
from relaylab.evaluate.protocols import Pass, cut
from relaylab.evaluate.trained import find_trained
from relaylab.models.export import Classifier
from relaylab.models.file import InputConfig, ModelFile, read_model

TOP, BATCH = 5, 32
STDIN = "-"


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class Network:
    """A trained network, whatever file it comes from.

    Attributes:
        classes: their names.
        input: which size of images it takes.
        scores: from RGB crops (batch, 3, crop, crop), float32 with values 0 to 255, to class scores (batch, classes).
    """

    classes: tuple[str, ...]
    input: InputConfig
    scores: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Picture:
    """An encoded image.

    Attributes:
        name: for people.
        read: gives its bytes, or raises an OSError.
    """

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Prediction:
    """What a network takes an image for.

    Attributes:
        name: of the image.
        pixels: uint8 (h, w, 3).
        guesses: the five likeliest classes, or as many as there are, the likeliest first.
    """

    name: str
    pixels: Pixels
    guesses: tuple[Guess, ...]


def open_network(path: Path) -> Network:
    """A trained network by its run's folder, its model file or its ONNX program.

    Raises:
        InputError: no such file, an unfinished run, or a file that is not what `relaylab` writes.
    """
    if path.suffix == ".pt2":
        # torch.export.load unpickles what the archive calls pickled, with weights_only=False.
        raise InputError(f"{path}: reading .pt2 can run code that it holds; take the .safetensors or the .onnx file")
    if path.suffix == ".onnx" and path.is_file():
        return _open_onnx(path)
    return network_of(read_model(find_trained([path])[0].file))


def network_of(model: ModelFile) -> Network:
    """A model file's network.

    Raises:
        InputError: the weights are not the network's.
    """
    return Network(model.classes, model.input, Classifier(model).eval())


def find_pictures(paths: Sequence[Path], stdin: Callable[[], bytes]) -> list[Picture]:
    """The images that people named.

    Args:
        paths: files, folders with images at any depth, or "-" for one image from stdin.
        stdin: reads all of it.

    Raises:
        InputError: no images, or a folder without any.
    """
    pictures: list[Picture] = []
    for path in paths:
        if str(path) == STDIN:
            pictures.append(Picture("stdin", stdin))
        elif path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and is_image(file.name))
            if not inside:
                raise InputError(f"{path} holds no images")
            pictures += [Picture(str(file), file.read_bytes) for file in inside]
        else:
            pictures.append(Picture(str(path), path.read_bytes))
    if not pictures:
        raise InputError("which images? Give files or folders, or - for one from stdin")
    return pictures


def predict(network: Network, pictures: Sequence[Picture]) -> Iterator[Prediction | InputError]:
    """The likeliest classes of each image, in order; or, for an image that cannot be read, why.

    Args:
        network: trained.
        pictures: encoded images.
    """
    for start in range(0, len(pictures), BATCH):
        read = [_read(picture) for picture in pictures[start : start + BATCH]]
        crops = [crop_of(each[1], network.input) for each in read if not isinstance(each, InputError)]
        with torch.inference_mode():
            shares = iter(network.scores(torch.stack(crops)).softmax(dim=1) if crops else ())
        for each in read:
            if isinstance(each, InputError):
                yield each
                continue
            best = next(shares).topk(min(TOP, len(network.classes)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            yield Prediction(*each, tuple(Guess(network.classes[number], share) for number, share in pairs))


def crop_of(pixels: Pixels, config: InputConfig) -> Tensor:
    """An image's centre crop as the network's classifier takes it.

    Args:
        pixels: uint8 (h, w, 3), RGB.
        config: to which size it is resized, and cropped.

    Returns:
        float32 (3, crop, crop), RGB, 0 to 255.
    """
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
        told = json.loads(about["input"])
        config = InputConfig(resize=told["resize"], how=told["how"], crop=told["crop"], mean=(0.0, 0.0, 0.0))
        classes = tuple(json.loads(about["classes"]))
        name = session.get_inputs()[0].name
    except InputError:
        raise
    except Exception as error:  # onnxruntime has its own kinds, which share no base
        raise InputError(f"{path} is no program that `relaylab export` has written: {error}") from None

    def scores(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return Network(classes, config, scores)
