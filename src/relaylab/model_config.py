"""The options of the commands about networks and recipes. No torch in here; see `relaylab.options`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relaylab.options import File, Folder
from relaylab.recipes.schema import Dial

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")]
Model = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")]
Pictures = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListConfig:
    """List the recipes: one for each row of the paper's tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowConfig:
    """Show a recipe's values, each with the place in the paper that it comes from, or that it is our choice."""

    name: Name
    """A recipe's name; `relaylab recipes` lists them."""

    scale: Dial = "paper"
    """The paper's size, or the same row on MiniPlaces (small) or on next to nothing (tiny)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostConfig:
    """What a training step costs: parameters, FLOPs and activation memory of standard BP, multi-loss and relay.

    Nothing is trained; no memory is needed.
    """

    names: Names = ()
    """Recipes; those that cost the same are shown once. (default: all)."""

    scale: Dial = "paper"
    """The paper's size, or the same row on MiniPlaces (small) or on next to nothing (tiny)."""

    segments: bool = False
    """Show each segment, not the sums alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawConfig:
    """Draw a recipe's network with its segments, heads and windows (Figure 2), and its table (Table 2)."""

    name: Name
    """A recipe's name; `relaylab recipes` lists them."""

    scale: Dial = "paper"
    """The paper's size, or the same row on MiniPlaces (small) or on next to nothing (tiny)."""

    out: Folder = None
    """Folder for NAME.svg, NAME.png and NAME.md. (default: runs/draw)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportCaffeConfig:
    """Read the authors' released Model B, a Caffe definition and its weights, and write it as a model file."""

    prototxt: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PROTOTXT")]
    """The definition, a deploy.prototxt."""

    caffemodel: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CAFFEMODEL")]
    """The weights."""

    classes: File = None
    """Text file with a class's name on each line, in the order of the network's output. (default: numbers)."""

    out: File = None
    """Where to write. (default: the weights' name with .safetensors, in the current folder)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Write a trained network for use elsewhere: a plain state dict, a torch.export program, an ONNX model.

    The programs take RGB images (n, 3, size, size) with values from 0 to 255 and give class scores (n, classes).
    """

    model: Model
    """A model file, as `relaylab import-caffe` writes it."""

    formats: tuple[Literal["safetensors", "pt2", "onnx"], ...] = ("safetensors", "pt2", "onnx")
    """What to write."""

    out: Folder = None
    """Folder to write into; it must be new or empty. (default: runs/export/TIME)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Name the five likeliest classes of images, from their centre crops."""

    model: Model
    """A finished run's folder, a model file (.safetensors), or an exported ONNX program (.onnx)."""

    images: Pictures
    """Image files, folders of images, or - for one image from stdin."""

    format: Literal["text", "json"] = "text"
    """Of what is printed."""

    picture: File = None
    """Also draw the images with their classes, to this .png or .svg file."""


ModelConfig = ListConfig | ShowConfig | CostConfig | DrawConfig | ImportCaffeConfig | ExportConfig | PredictConfig
