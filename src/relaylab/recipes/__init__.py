"""The rows of the paper's tables as typed recipes, by name."""

from relaylab.errors import InputError, nearest
from relaylab.recipes import imagenet, places2
from relaylab.recipes.schema import Ensemble, Recipe

__all__ = ["ENSEMBLES", "RECIPES", "find_recipe"]

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*imagenet.ROWS, *places2.ROWS)}
ENSEMBLES: dict[str, Ensemble] = {places2.ENSEMBLE.name: places2.ENSEMBLE}
for _ensemble in ENSEMBLES.values():
    RECIPES |= {member.name: member for member in _ensemble.members if member.name not in RECIPES}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        InputError: there is none; the nearest names are given.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name in ENSEMBLES:
        members = ", ".join(member.name for member in ENSEMBLES[name].members)
        raise InputError(f"{name} is an ensemble; name one of its members: {members}")
    advice = nearest(name, [*RECIPES, *ENSEMBLES]) or "; 'relaylab recipes' lists them"
    raise InputError(f"unknown recipe {name!r}{advice}")
