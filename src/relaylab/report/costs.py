"""The cost of training steps as a table: parameters, FLOPs and activation memory, per network and scheme."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from relaybackprop import RelayError, cost
from relaybackprop.planning.cost import Cost
from relaylab.errors import InputError
from relaylab.models.building import build_relay
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
        flops = [f"{totals[scheme].flops / GIGA / BATCH:.3g}" if scheme in totals else "" for scheme in SCHEMES]
        cells = [name, f"{parameters / MEGA:.1f} M", f"{heads / MEGA:.1f} M", *flops]
        cells += [f"{found.lower_bound / GIGA / BATCH:.3g}", f"{found.ratios['relay']:.3f}" if branches else ""]
        saved = ("standard", *(["relay"] if branches else []))
        cells += [f"{totals[scheme].saved / MEGA / BATCH:.3g}" for scheme in saved]
        rows.append((*cells, *[""] * (2 - len(saved))))
    return Table("Cost of a training step, per image", header, tuple(rows))


def cost_of(recipe: Recipe) -> Cost:
    """Return the cost of a training step of a recipe's plan for a batch of `BATCH` images. Nothing is computed.

    Raises:
        InputError: a network, heads or windows that do not go together.
    """
    size = recipe.network.image_size
    relay = build_relay(replace(recipe, scheme="relay" if recipe.plan.auxiliary else "standard"), on_meta=True)
    try:
        return cost(
            relay.model, relay.plan, torch.empty(BATCH, 3, size, size, device="meta"), dict(relay.heads.items())
        )
    except RelayError as error:
        raise InputError(f"recipe {recipe.name}: {error}") from error


def distinct(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return one recipe for each distinct network and plan."""
    return list({repr((recipe.network, recipe.plan)): recipe for recipe in reversed(recipes)}.values())[::-1]
