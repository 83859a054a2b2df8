"""The commands about networks and recipes, once their options have been read. See `relaylab.model_config`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.model_config import CostConfig, DrawConfig, ExportConfig, ImportCaffeConfig, PredictConfig, ShowConfig
from relaylab.recipes import ENSEMBLES, RECIPES, find_recipe
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import Errors, Recipe

if TYPE_CHECKING:
    from relaybackprop.cost import Cost
    from relaylab.evaluate.predict import Prediction

MOST_DRAWN = 40  # images in one picture
WIDTH_UNKNOWN = 140  # columns, where the output is no terminal
COST_SCHEMES = {"standard": "standard BP", "multi_loss": "multi-loss", "relay": "relay"}
UNITS = {"G": 1e9, "MB": 1e6}


def list_recipes() -> int:
    """Print the names of all recipes, where they stand in the paper, and its errors."""
    table = Table("recipe", "row of the paper", "network", "top-1", "top-5", box=None, pad_edge=False)
    for recipe in RECIPES.values():
        network = f"{recipe.network.architecture}, {recipe.network.image_size} px"
        table.add_row(recipe.name, recipe.row, network, *_errors(recipe.reported))
    for ensemble in ENSEMBLES.values():
        members = f"{len(ensemble.members)} networks"
        table.add_row(ensemble.name, ensemble.row, members, *_errors(ensemble.reported))
    _print(table)
    print("\nErrors in per cent, as the paper reports them. 'relaylab recipes show RECIPE' shows one with its sources.")
    return 0


def _errors(errors: Errors | None) -> tuple[str, str]:
    rates = (None, None) if errors is None else (errors.top1, errors.top5)
    mark = " (test)" if errors is not None and errors.split == "test" else ""
    top1, top5 = ("" if rate is None else f"{rate:.2f}{mark}" for rate in rates)
    return top1, top5


def show(config: ShowConfig) -> int:
    """Print a recipe's values, each with its source."""
    if config.name in ENSEMBLES:
        if config.scale != "paper":
            raise InputError(f"{config.name} has no scale of its own: show its members with --scale {config.scale}")
        return _show_ensemble(config.name)
    recipe = at_scale(find_recipe(config.name), config.scale)
    print(f"{recipe.name}: {recipe.row}" + (f", at {config.scale} scale" if config.scale != "paper" else ""))
    if recipe.trained_as is not None:
        print(f"tests the network that {recipe.trained_as} trains")
    if recipe.reported is not None:
        top1, top5 = _errors(recipe.reported)
        print(f"the paper's error: top-1 {top1 or '-'} %, top-5 {top5 or '-'} %")
    print()
    table = Table("field", "value", "where it comes from", box=None, pad_edge=False)
    for name, value, source in recipe.fields():
        table.add_row(name, text_of(value), source)
    _print(table)
    return 0


def _show_ensemble(name: str) -> int:
    ensemble = ENSEMBLES[name]
    print(f"{ensemble.name}: {ensemble.row}")
    for errors in (ensemble.reported, ensemble.validation):
        print(f"the paper's error: top-5 {errors.top5:.2f} % on the {errors.split} images")
    print()
    print(f"members ({ensemble.sources['members']}):")
    for member in ensemble.members:
        print(f"  {member.name}")
    print(f"probabilities are combined by their {ensemble.combine} ({ensemble.sources['combine']})")
    return 0


def text_of(value: object) -> str:
    """A recipe's value in words."""
    match value:
        case True | False:
            return "yes" if value else "no"
        case None:
            return "none"
        case int() if value >= 10_000:
            return f"{value:,}"
        case tuple():
            return ", ".join(map(text_of, value))
        case _:
            return str(value)


def costs(config: CostConfig) -> int:
    """Print what training steps cost, a Markdown table that a terminal can show too."""
    recipes = [at_scale(find_recipe(name), config.scale) for name in config.names or RECIPES]
    lines = cost_table(recipes)
    if not config.segments:
        print("\n".join(lines))
        print("\nA training step, per image. MB saved: activations that are kept for the backward pass.")
        return 0
    for recipe in _distinct(recipes):
        print(f"{recipe.row}\n\n{cost_of(recipe)}\n")
    return 0


def cost_table(recipes: Sequence[Recipe]) -> list[str]:
    """Lines of Markdown: per image, the cost of a training step of each network, with its heads.

    Args:
        recipes: those whose networks and plans are the same make one line.
    """
    header = ["network", "parameters", "heads", *(f"GFLOPs, {name}" for name in COST_SCHEMES.values())]
    header += ["lower bound", "relay / standard", "MB saved, standard", "multi-loss and relay"]
    lines = [_line(header), _line(["---"] + ["---:"] * (len(header) - 1))]
    for recipe in _distinct(recipes):
        cost = cost_of(recipe)
        totals, network = cost.totals, recipe.network
        heads = sum(part.parameters for part in cost.parts if part.name.startswith("head "))
        parameters = sum(part.parameters for part in cost.parts) - heads
        flops = [totals[scheme].flops / UNITS["G"] / BATCH for scheme in COST_SCHEMES]
        branches = len(recipe.plan.auxiliary)
        name = f"{network.architecture}, {network.image_size} px, {network.num_classes} classes"
        name += f", {branches} branches" if branches > 1 else ""
        cells = [name, f"{parameters / 1e6:.1f} M", f"{heads / 1e6:.1f} M", *(f"{value:.3g}" for value in flops)]
        cells += [f"{cost.lower_bound / UNITS['G'] / BATCH:.3g}", f"{cost.ratios['relay']:.3f}"]
        cells += [f"{totals[scheme].saved / UNITS['MB'] / BATCH:.3g}" for scheme in ("standard", "relay")]
        lines.append(_line(cells))
    return lines


BATCH = 2  # batch normalisation needs two


def cost_of(recipe: Recipe) -> "Cost":
    """What a training step of a recipe's plan costs, for a batch of `BATCH` images. Nothing is computed."""
    import torch

    from relaybackprop import cost
    from relaylab.models.building import build_heads, build_network, build_plan

    with torch.device("meta"):
        model = build_network(recipe.network)
        heads = build_heads(recipe.plan, recipe.network, model)
        images = torch.empty(BATCH, 3, recipe.network.image_size, recipe.network.image_size)
    return cost(model, build_plan(recipe.plan), images, heads)


def _distinct(recipes: Sequence[Recipe]) -> list[Recipe]:
    """One of those that cost the same."""
    return list({repr((recipe.network, recipe.plan)): recipe for recipe in reversed(recipes)}.values())[::-1]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(config: DrawConfig, folder: Path) -> int:
    """Write a recipe's network as SVG, PNG and, in the form of Table 2, as Markdown."""
    import torch

    from relaylab.models.building import build_network, build_plan
    from relaylab.report.network import draw_network
    from relaylab.report.stages import markdown_table, stages_of
    from relaylab.report.style import write_figure

    recipe = at_scale(find_recipe(config.name), config.scale)
    with torch.device("meta"):
        model = build_network(recipe.network)
    stages, losses = stages_of(model, build_plan(recipe.plan, recipe.scheme), recipe.network.image_size)
    figure = draw_network(stages, losses, recipe.row)
    table = markdown_table(stages, losses, recipe.row)
    for suffix in ("svg", "png"):
        write_figure(figure, folder / f"{recipe.name}.{suffix}")
    write_text(folder / f"{recipe.name}.md", table)
    print(table)
    print(f"Drawn: {(folder / recipe.name).resolve()}.svg, .png and .md")
    return 0


def import_caffe(config: ImportCaffeConfig) -> int:
    """Turn a Caffe definition and its weights into a model file."""
    from relaylab.models.caffe.importing import import_caffe as read
    from relaylab.models.file import save_model

    out = config.out or Path(f"{config.caffemodel.stem}.safetensors")
    if out.exists():
        raise InputError(f"{out} exists; give another name with --out, or remove it")
    if not out.parent.is_dir():
        raise InputError(f"no such folder: {out.parent}")
    model = read(config.prototxt, config.caffemodel, config.classes)
    save_model(out, model)
    parameters = sum(tensor.numel() for tensor in model.state.values())
    print(f"Model B, {len(model.classes)} classes, {parameters:,} parameters: {out.resolve()}")
    return 0


def export(config: ExportConfig, folder: Path) -> int:
    """Write a trained network for use elsewhere."""
    from relaylab.models.export import export as write
    from relaylab.models.file import read_model

    for file in write(read_model(config.model), folder, tuple(dict.fromkeys(config.formats))):
        print(f"{file.resolve()} ({file.stat().st_size / 1e6:.1f} MB)")
    return 0


def predict(config: PredictConfig) -> int:
    """Print the likeliest classes of images. Images that cannot be read are named, and the exit code says so."""
    from relaylab.evaluate.predict import find_pictures, open_network
    from relaylab.evaluate.predict import predict as guess
    from relaylab.report.paper_figures import default_path, prediction_figure
    from relaylab.report.style import write_figure

    path = None if config.picture is None else default_path("", config.picture, "--picture")
    network = open_network(config.model)
    pictures = find_pictures(config.images, sys.stdin.buffer.read)
    if path is not None and len(pictures) > MOST_DRAWN:
        raise InputError(f"--picture: {len(pictures)} images; at most {MOST_DRAWN} can be drawn")
    told: list[dict[str, object]] = []
    found: list[Prediction] = []
    failed = 0
    for picture, result in zip(pictures, guess(network, pictures), strict=True):
        if isinstance(result, InputError):
            print(f"relaylab: {result}", file=sys.stderr)
            told.append({"image": picture.name, "error": str(result)})
            failed = InputError.exit_code
            continue
        told.append({"image": result.name, "classes": [dataclasses.asdict(each) for each in result.guesses]})
        if path is not None:
            found.append(result)
        if config.format == "text":
            print(result.name)
            for best in result.guesses:
                print(f"  {100 * best.probability:5.1f} %  {best.name}")
    if config.format == "json":
        print(json.dumps(told, indent=1))
    if path is not None and found:
        write_figure(prediction_figure(found), path)
    return failed


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(WIDTH_UNKNOWN, console.measure(table).maximum))
    console.print(table)
