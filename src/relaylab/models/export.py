"""Trained networks for use elsewhere: safetensors, `torch.export`, ONNX. Heads are never in them."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim

from relaylab.files import atomic_write
from relaylab.models.file import ModelFile, network_values, save_model

Format = Literal["safetensors", "pt2", "onnx"]
NAME = "model"


class Classifier(nn.Module):
    """A trained network that includes its normalisation.

    Shape:
        RGB images (batch, 3, crop, crop), float32 with values from 0 to 255, to class scores (batch, classes).
    """

    def __init__(self, model: ModelFile) -> None:
        super().__init__()
        self.bgr = model.input.channels == "BGR"
        self.mean = nn.Buffer(mean_of(model))
        self.std = None if model.input.std is None else nn.Buffer(_planes(model.input.std))
        self.model = model.model()

    def forward(self, images: Tensor) -> Tensor:
        """Class scores (batch, classes)."""
        x = (images.flip(1) if self.bgr else images) - self.mean
        return self.model(x if self.std is None else x / self.std)


def mean_of(model: ModelFile) -> Tensor:
    """Return the mean in the order of the network's channels: (3, crop, crop), or (3, 1, 1) for one colour."""
    if model.mean_image is None:
        return _planes(model.input.mean)
    return model.mean_image.permute(2, 0, 1).contiguous()


def _planes(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(3, 1, 1)


def export(model: ModelFile, folder: Path, formats: Sequence[Format]) -> list[Path]:
    """Write a trained network to an existing folder in several formats.

    Returns:
        The files, for batches of any size. See `Classifier` for the programs' input.

    Raises:
        InputError: the weights are not the network's.
        OSError: a file cannot be written.
    """
    writers = {"safetensors": save_model, "pt2": _write_program, "onnx": _write_onnx}
    files = [folder / f"{NAME}.{suffix}" for suffix in formats]
    for file, suffix in zip(files, formats, strict=True):
        writers[suffix](file, model)
    return files


def about(model: ModelFile) -> dict[str, str]:
    """Return the metadata of every format, as text: the caller resizes and crops, the program normalises."""
    config = model.input
    sizes = {"resize": config.resize, "how": config.how, "crop": config.crop}
    return {
        "classes": json.dumps(model.classes),
        "keys": json.dumps(model.identity.keys),
        "input": json.dumps({**sizes, "channels": "RGB", "values": "0 to 255"}),
        "network": json.dumps(network_values(model.network)),
        "about": model.about,
        **({"has_several_labels": "true"} if model.has_several_labels else {}),
    }


def _write_program(path: Path, model: ModelFile) -> None:
    module, example = _module_and_example(model)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            torch.export.save(program, file, extra_files=about(model))


def _write_onnx(path: Path, model: ModelFile) -> None:
    module, example = _module_and_example(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's exporter warns of its own parts
        onnx = torch.onnx.export(
            module,
            (example,),
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=({0: "batch"},),
            dynamo=True,
            verbose=False,
        )
    onnx = cast(torch.onnx.ONNXProgram, onnx)
    onnx.model.metadata_props.update(about(model))
    with atomic_write(path) as temporary:
        onnx.save(temporary, external_data=False)  # the paper's networks stay below ONNX's 2 GB


def _module_and_example(model: ModelFile) -> tuple[nn.Module, Tensor]:
    return Classifier(model).eval(), torch.zeros(2, 3, model.input.crop, model.input.crop)
