"""The rows of the paper's tables, and ours, as typed recipes, by name."""

from relaylab.errors import InputError, nearest
from relaylab.recipes import digits, imagenet, places2
from relaylab.recipes.schema import Ensemble, Recipe

__all__ = ["ENSEMBLES", "PAPER", "RECIPES", "find_recipe"]

PAPER: dict[str, Recipe] = {recipe.name: recipe for recipe in (*imagenet.ROWS, *places2.ROWS)}
ENSEMBLES: dict[str, Ensemble] = {places2.ENSEMBLE.name: places2.ENSEMBLE}
for _ensemble in ENSEMBLES.values():
    PAPER |= {member.name: member for member in _ensemble.members if member.name not in PAPER}
RECIPES: dict[str, Recipe] = {**PAPER, **{recipe.name: recipe for recipe in digits.ROWS}}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name; the InputError for an unknown one gives the nearest names."""
    if name in RECIPES:
        return RECIPES[name]
    if name in ENSEMBLES:
        members = ", ".join(member.name for member in ENSEMBLES[name].members)
        raise InputError(f"{name} is an ensemble; name one of its members: {members}")
    advice = nearest(name, [*RECIPES, *ENSEMBLES]) or "; 'relaylab recipes' lists them"
    raise InputError(f"unknown recipe {name!r}{advice}")
