"""Commands for networks: `draw`, `cost`, `export` and `import-caffe`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from relaylab.commands.recipes import AtScale, named_recipe
from relaylab.errors import InputError
from relaylab.files import ROOT, new_folder, timestamp, write_text
from relaylab.options import File, Folder, Model, MustExist, Name, Names, writable
from relaylab.recipes import RECIPES


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawOptions(AtScale):
    """Draw a recipe's network with its heads and windows.

    The drawing follows the paper's Figure 2, the table its Table 2.
    """

    name: Name
    """Name of a recipe (see `relaylab recipes`), or a recipe file (.toml)."""

    out: Folder = None
    """Folder for NAME.svg, NAME.png and NAME.md (default: runs/draw)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostOptions(AtScale):
    """Predict parameters, FLOPs and memory of a training step.

    Networks are built on the meta device: nothing is computed, and no memory is allocated.
    """

    names: Names = ()
    """Names of recipes, or recipe files (.toml); equal costs share a row (default: all recipes)."""

    segments: bool = False
    """Print the cost of each segment, not only the totals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Export a trained network: state dict, torch.export, ONNX.

    Exported programs take RGB images (n, 3, size, size), 0 to 255, and return class scores (n, classes).
    """

    model: Model
    """Folder of a finished run, or a model file (.safetensors)."""

    format: tuple[Literal["safetensors", "pt2", "onnx"], ...] = ("safetensors", "pt2", "onnx")
    """Formats to write."""

    out: Folder = None
    """Output folder; must be new or empty (default: runs/export/TIME)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportCaffeOptions:
    """Import the authors' released Model B from Caffe files."""

    prototxt: Annotated[Path, MustExist, Positional, tyro.conf.arg(metavar="PROTOTXT")]
    """Network definition (deploy.prototxt)."""

    caffemodel: Annotated[Path, MustExist, Positional, tyro.conf.arg(metavar="CAFFEMODEL")]
    """Weights (.caffemodel)."""

    classes: Annotated[File, MustExist] = None
    """Text file with one class name per line, in the order of the network's outputs (default: numbers)."""

    out: File = None
    """Output file (default: name of the weights with .safetensors, in the current folder)."""


def draw(options: DrawOptions) -> int:
    """Write the drawing as SVG and PNG, and the table as Markdown."""
    with new_folder(options.out, ROOT / "draw", may_hold=True) as folder:
        from relaylab.models.building import build_meta_network, build_plan
        from relaylab.report.network import draw_network
        from relaylab.report.stages import layer_table, stages_of
        from relaylab.report.style import write_figure
        from relaylab.tables import markdown_lines

        recipe = named_recipe(options.name, options.scale)
        stages, losses = stages_of(
            build_meta_network(recipe.network), build_plan(recipe.plan, recipe.scheme), recipe.network.image_size
        )
        figure = draw_network(stages, losses, recipe.row)
        table = "\n".join(markdown_lines(layer_table(stages, losses, recipe.row))) + "\n"
        for suffix in ("svg", "png"):
            write_figure(figure, folder / f"{recipe.name}.{suffix}")
        write_text(folder / f"{recipe.name}.md", table)
    print(table)
    print(f"Drawn: {(folder / recipe.name).resolve()}.svg, .png and .md")
    return 0


def cost(options: CostOptions) -> int:
    """Print the cost of a training step for each recipe."""
    from relaylab.report.costs import cost_of, cost_table, distinct
    from relaylab.tables import markdown_lines

    recipes = [named_recipe(name, options.scale) for name in options.names or RECIPES]
    if not options.segments:
        print("\n".join(markdown_lines(cost_table(recipes))))
        print("\nA training step, per image. Saved MB: activations kept for the backward pass.")
        return 0
    for recipe in distinct(recipes):
        print(f"{recipe.row}\n\n{cost_of(recipe)}\n")
    return 0


def export(options: ExportOptions) -> int:
    """Write a trained network in each requested format."""
    with new_folder(options.out, ROOT / "export" / timestamp()) as folder:
        from relaylab.evaluate.trained import find_trained
        from relaylab.models.export import export as write
        from relaylab.models.file import read_model

        (trained,) = find_trained([options.model], most=1)
        for file in write(read_model(trained.file), folder, tuple(dict.fromkeys(options.format))):
            print(f"{file.resolve()} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


def import_caffe(options: ImportCaffeOptions) -> int:
    """Convert a Caffe network and its weights to a model file."""
    out = writable(options.out or Path(f"{options.caffemodel.stem}.safetensors"))
    if out.exists():
        raise InputError(f"{out} already exists: choose a different --out, or remove it")
    from relaylab.models.caffe.importing import import_caffe as read
    from relaylab.models.file import save_model

    model = read(options.prototxt, options.caffemodel, options.classes)
    save_model(out, model)
    parameters = sum(tensor.numel() for tensor in model.state.values())
    print(f"Model B, {len(model.classes)} classes, {parameters:,} parameters: {out.resolve()}")
    return 0
