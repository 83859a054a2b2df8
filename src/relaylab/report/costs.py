"""Tables of training cost: parameters, FLOPs and activation memory per network and scheme."""

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
    """Return the cost per image of a training step of each network with its heads; equal costs share a row."""
    header = ("network", "parameters", "heads", *(f"GFLOPs, {SCHEME_NAMES[scheme]}" for scheme in SCHEMES))
    header += ("lower bound", "Relay BP / standard BP", "saved MB, standard BP", "saved MB, multi-loss and Relay BP")
    rows: list[tuple[str, ...]] = []
    for recipe in distinct(recipes):
        predicted = cost_of(recipe)
        totals, network = predicted.totals, recipe.network
        heads = sum(part.parameters for part in predicted.parts if part.name.startswith("head "))
        parameters = sum(part.parameters for part in predicted.parts) - heads
        branches = len(recipe.plan.auxiliary)
        name = f"{network.architecture}, {network.image_size} px, {network.num_classes} classes"
        name += f", {branches} branches" if branches > 1 else ""
        flops = [f"{totals[scheme].flops / GIGA / BATCH:.3g}" if scheme in totals else "" for scheme in SCHEMES]
        cells = [name, f"{parameters / MEGA:.1f} M", f"{heads / MEGA:.1f} M", *flops]
        cells += [f"{predicted.lower_bound / GIGA / BATCH:.3g}", f"{predicted.ratios['relay']:.3f}" if branches else ""]
        saved = ("standard", *(["relay"] if branches else []))
        cells += [f"{totals[scheme].saved / MEGA / BATCH:.3g}" for scheme in saved]
        rows.append((*cells, *[""] * (2 - len(saved))))
    return Table("Cost of a training step, per image", header, tuple(rows))


def cost_of(recipe: Recipe) -> Cost:
    """Predict the cost of a training step of a recipe for a batch of `BATCH` images, on the meta device.

    Raises:
        InputError: the network, heads and windows do not match.
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
    """Return one recipe per distinct network and plan."""
    return list({repr((recipe.network, recipe.plan)): recipe for recipe in reversed(recipes)}.values())[::-1]
