"""The cost of training steps as a table: parameters, FLOPs and activation memory, per network and scheme."""

from collections.abc import Sequence

import torch

from relaybackprop import cost
from relaybackprop.planning.cost import Cost
from relaylab.models.building import build_heads, build_network, build_plan
from relaylab.recipes.schema import SCHEME_NAMES, Recipe
from relaylab.tables import Table

SCHEMES = ("standard", "multi_loss", "relay")
BATCH = 2  # images; batch normalisation needs two
GIGA, MEGA = 1e9, 1e6


def cost_table(recipes: Sequence[Recipe]) -> Table:
    """Return the cost of a training step of each network with its heads, per image; equal costs share a row."""
    header = ("network", "parameters", "heads", *(f"GFLOPs, {SCHEME_NAMES[scheme]}" for scheme in SCHEMES))
    header += ("lower bound", "relay / standard", "MB saved, standard", "multi-loss and relay")
    rows: list[tuple[str, ...]] = []
    for recipe in distinct(recipes):
        found = cost_of(recipe)
        totals, network = found.totals, recipe.network
        heads = sum(part.parameters for part in found.parts if part.name.startswith("head "))
        parameters = sum(part.parameters for part in found.parts) - heads
        branches = len(recipe.plan.auxiliary)
        name = f"{network.architecture}, {network.image_size} px, {network.num_classes} classes"
        name += f", {branches} branches" if branches > 1 else ""
        flops = [totals[scheme].flops / GIGA / BATCH for scheme in SCHEMES]
        saved = [totals[scheme].saved / MEGA / BATCH for scheme in ("standard", "relay")]
        cells = [name, f"{parameters / MEGA:.1f} M", f"{heads / MEGA:.1f} M", *(f"{value:.3g}" for value in flops)]
        cells += [f"{found.lower_bound / GIGA / BATCH:.3g}", f"{found.ratios['relay']:.3f}"]
        rows.append((*cells, *(f"{value:.3g}" for value in saved)))
    return Table("Cost of a training step, per image", header, tuple(rows))


def cost_of(recipe: Recipe) -> Cost:
    """Return the cost of a training step of a recipe's plan for a batch of `BATCH` images. Nothing is computed."""
    with torch.device("meta"):
        model = build_network(recipe.network)
        heads = build_heads(recipe.plan, recipe.network, model)
        images = torch.empty(BATCH, 3, recipe.network.image_size, recipe.network.image_size)
    return cost(model, build_plan(recipe.plan), images, heads)


def distinct(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return one recipe for each distinct network and plan."""
    return list({repr((recipe.network, recipe.plan)): recipe for recipe in reversed(recipes)}.values())[::-1]
