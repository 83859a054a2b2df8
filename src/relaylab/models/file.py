"""Trained networks as safetensors files: a plain state dict, and a header with everything needed to use it.

Note [Model files]
1. The tensors are the plain model's state dict, with its keys, so any safetensors reader can load them. Heads are not
   included.
2. The header entry `relaylab` is JSON text: network, classes and preprocessing.
3. A mean image is not part of a state dict. It is stored next to the file, as FILE.mean.safetensors.
4. The header entry `relaylab.sha256` is a hash of everything else, which is verified when the file is read. To change
   the weights but keep the header, remove this entry.
5. The same model is written as the same bytes.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from relaylab.data.sources.classes import Classes
from relaylab.data.sources.listing import few
from relaylab.errors import InputError
from relaylab.files import atomic_write
from relaylab.models.building import build_meta_network, build_network
from relaylab.outside.reading import DamagedFileError, parse, typed
from relaylab.outside.showing import reason
from relaylab.recipes.schema import NetworkConfig

log = logging.getLogger("relaylab.models")

LENGTH_BYTES = 8  # of a safetensors file: the length of its header, which follows
KEY, HASH, FORMAT = "relaylab", "relaylab.sha256", "relaylab model 1"
LARGEST_SIDE = 16_384  # pixels
NAMED = 5  # keys in an error message


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """Preprocessing: resize, crop, subtract the mean from values 0 to 255, divide by the standard deviation.

    Attributes:
        resize: length of the resized side in pixels.
        how: "shorter side" keeps the aspect ratio; "both sides" makes a square.
        crop: side of the centre crop in pixels.
        channels: order of the channels.
        mean: mean of each channel, 0 to 255, in the order of `channels`. With a mean image, it is the mean of that
            image, for other input sizes.
        std: standard deviation of each channel, in the same order; None for no division.

    Raises:
        InputError: a value is out of range, for example in a damaged file.
    """

    resize: int = 256
    how: Literal["shorter side", "both sides"] = "shorter side"
    crop: int = 224
    channels: Literal["RGB", "BGR"] = "RGB"
    mean: tuple[float, float, float]
    std: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        sizes, colours = (self.resize, self.crop), (self.mean, self.std or (1.0, 1.0, 1.0))
        if any(type(size) is not int for size in sizes) or not 1 <= self.crop <= self.resize <= LARGEST_SIDE:
            raise InputError(
                f"resize {self.resize!r}, crop {self.crop!r}: expected 1 <= crop <= resize <= {LARGEST_SIDE} (pixels)"
            )
        if self.how not in ("shorter side", "both sides") or self.channels not in ("RGB", "BGR"):
            raise InputError(
                f"how {self.how!r}, channels {self.channels!r}: expected 'shorter side' or 'both sides', RGB or BGR"
            )
        for values in colours:
            if len(values) != 3 or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
                raise InputError(f"mean {self.mean!r}, std {self.std!r}: expected three numbers each, one per channel")
        if min(colours[1]) <= 0:
            raise InputError(f"std {self.std!r}: expected positive numbers")


@dataclass(frozen=True, eq=False, kw_only=True)
class ModelFile:
    """A trained network with its classes and preprocessing. `read_model` returns one.

    Example::

        model = read_model(Path("model.safetensors"))
        scores = model.model()(images)   # preprocessed according to `model.input`; names: model.classes

    Attributes:
        network: architecture and sizes.
        classes: class names in the order of the output.
        keys: keys of the classes; None in files of earlier versions. See Note [Classes] in
            `relaylab.data.sources.classes`.
        numbered: whether the outputs are the labels of a list.
        input: preprocessing of images.
        state: state dict of the plain model.
        mean_image: (crop, crop, 3) mean image to subtract instead of `input.mean`; or None.
        about: origin of the network, in a sentence.
        has_several_labels: whether the network is multi-label: the probability of each class is the sigmoid of its
            score.

    Raises:
        InputError: a number of classes, a crop or a mean image that do not fit the network.
    """

    network: NetworkConfig
    classes: tuple[str, ...]
    input: InputConfig
    state: Mapping[str, Tensor]
    mean_image: Tensor | None = None
    about: str = ""
    keys: tuple[str, ...] | None = None
    numbered: bool = False
    has_several_labels: bool = False

    def __post_init__(self) -> None:
        network, size = self.network, self.input.crop
        if not all(isinstance(name, str) for name in (*self.classes, *(self.keys or ()))):
            raise InputError("class names and keys must be text")
        if len(self.classes) != network.num_classes:
            raise InputError(f"{len(self.classes)} class names for a network of {network.num_classes} classes")
        _ = self.identity  # raises InputError for invalid keys
        if size != network.image_size:
            raise InputError(f"crop is {size} pixels, but the network expects images of {network.image_size}")
        if self.mean_image is not None and tuple(self.mean_image.shape) != (size, size, 3):
            raise InputError(
                f"the mean image has shape {tuple(self.mean_image.shape)}: expected {(size, size, 3)}, the crop size"
            )

    @property
    def identity(self) -> Classes:
        """The classes with their keys, to pass to `open_source`."""
        return Classes.stored(self.classes, self.keys, numbered=self.numbered)

    def model(self) -> nn.Module:
        """Build the network with its weights, in evaluation mode.

        Raises:
            InputError: the weights do not fit the network, or are not finite.
        """
        # Built on the meta device, buffers outside the state dict would have no values; the paper's networks have none.
        with torch.device("cpu" if self.network.is_named else "meta"), torch.random.fork_rng(devices=[]):
            model = build_network(self.network)
        load_state(model, self.state)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise InputError(f"the weights {name} are not finite: the file is damaged, or training diverged")
        return model.eval()


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load copies of a state dict's tensors into a model, which may be on the meta device.

    Raises:
        InputError: keys are missing or unknown, or shapes or types differ. The message lists them.
    """
    own = model.state_dict()
    problems = {
        "lacks": [key for key in own if key not in state],
        "has the unknown keys": [key for key in state if key not in own],
        "has a different shape for": [
            f"{key} {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
        "has a different type for": [
            f"{key} {state[key].dtype}, not {own[key].dtype}"
            for key in own
            if key in state and _kind(state[key]) != _kind(own[key])
        ],
    }
    if any(problems.values()):
        complaints = [f"{problem} {few(keys, NAMED)}" for problem, keys in problems.items() if keys]
        raise InputError(f"the state dict {'; it '.join(complaints)}")
    # Copy, since tensors may be mapped from a file, and convert half to single precision.
    copies = {key: tensor.to(own[key].dtype, copy=True) for key, tensor in state.items()}
    model.load_state_dict(copies, assign=True)


def _kind(tensor: Tensor) -> str:
    """Return the kind of a tensor's dtype; precisions of the same kind are converted on loading."""
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def save_model(path: Path, model: ModelFile) -> None:
    """Write a model file, and its mean image next to it. See Note [Model files].

    Raises:
        InputError: the state dict does not fit the network.
        OSError: the file cannot be written.
    """
    with torch.device("meta"):
        load_state(build_meta_network(model.network), {key: torch.empty_like(t) for key, t in model.state.items()})
    header = {
        "format": FORMAT,
        "network": network_values(model.network),
        "classes": model.classes,
        "keys": model.identity.keys,
        "numbered": model.identity.numbered,
        "input": dataclasses.asdict(model.input),
        "has_mean_image": model.mean_image is not None,
        "about": model.about,
    }
    if model.has_several_labels:
        header["has_several_labels"] = True
    if model.mean_image is not None:
        save_tensors({"mean_image": model.mean_image}, mean_path(path), {})
    save_tensors(model.state, path, {KEY: json.dumps(header)})


def network_values(network: NetworkConfig) -> dict[str, Any]:
    """Return a network's values for JSON, without `pretrained`, since the trained weights are stored."""
    values = {entry.name: getattr(network, entry.name) for entry in dataclasses.fields(network)}
    return values | {"options": dict(network.options), "pretrained": None}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a safetensors file atomically, with a hash of its content in the header."""
    kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(kept, temporary, header | {HASH: _hash(kept, header)})
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the entries of a file's metadata in place: safetensors writes them in a random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        values = json.loads(file.read(length))
        values["__metadata__"] = dict(sorted(values["__metadata__"].items()))
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # padding with spaces is part of the format
            file.seek(LENGTH_BYTES)
            file.write(text.ljust(length))


def _hash(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    content = sha256(json.dumps(sorted(header.items())).encode())
    for key, tensor in sorted(tensors.items()):
        content.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def mean_path(path: Path) -> Path:
    """Return the path of a model file's mean image."""
    return path.with_name(f"{path.stem}.mean.safetensors")


def read_model(path: Path) -> ModelFile:
    """Read a model file.

    Raises:
        InputError: the file does not exist, is not a safetensors file, or was not written by `save_model`.
    """
    tensors, metadata = read_tensors(path)
    if KEY not in metadata:
        raise InputError(
            f"{path} does not state its network: expected a model file written by relaylab, with its header"
        )
    where = f"the header of {path}"
    values = parse(metadata[KEY], dict[str, Any], where)
    if values.get("format", FORMAT) != FORMAT:
        raise InputError(f"{path} has the format {values['format']!r}; this version reads {FORMAT!r}")
    header = typed(values, _Header, where)
    for group in ("network", "input"):  # unknown values could change the scores, so they are not ignored
        unknown = values[group].keys() - {entry.name for entry in dataclasses.fields(getattr(header, group))}
        if unknown:
            raise DamagedFileError(f"{where} has {group}.{few(sorted(unknown))}, which this version does not know")
    network = replace(header.network, options=_tuples(header.network.options))
    if network.is_code:
        log.warning("%s: importing the code of its network, %s", path, network.architecture)
    try:
        return ModelFile(
            network=network,
            classes=header.classes,
            input=header.input,
            state=tensors,
            mean_image=_read_mean(mean_path(path)) if header.has_mean_image else None,
            about=header.about,
            keys=header.keys,
            numbered=header.numbered,
            has_several_labels=header.has_several_labels,
        )
    except DamagedFileError:
        raise
    except InputError as error:
        raise DamagedFileError(f"{path} is damaged, or was not written by relaylab: {error}") from None


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The entry `relaylab` of a model file's header."""

    format: str
    network: NetworkConfig
    classes: tuple[str, ...]
    input: InputConfig
    has_mean_image: bool
    about: str
    keys: tuple[str, ...] | None = None
    numbered: bool = False
    has_several_labels: bool = False


def _read_mean(path: Path) -> Tensor:
    mean = read_tensors(path)[0].get("mean_image")
    if mean is None or mean.dtype != torch.float32 or not bool(mean.isfinite().all()):
        raise DamagedFileError(f"{path} is damaged: expected a mean image of finite float32 values")
    return mean


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and the metadata in its header.

    Raises:
        InputError: the file is absent, or is not a valid safetensors file.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a FIFO or a device"
        raise InputError(f"{path} is {what}: expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        stored = header.pop(HASH, None)
        if stored is not None and stored != _hash(tensors, header):
            raise DamagedFileError(
                f"{path} is damaged or was changed: its content does not match the hash in its header"
            )
        return tensors, header
    except DamagedFileError:
        raise
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise DamagedFileError(
            f"{path} is not a valid safetensors file (truncated or corrupt?): {reason(error)}"
        ) from None


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
