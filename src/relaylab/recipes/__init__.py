"""The built-in recipes by name: the rows of the paper's tables, and our own."""

from pathlib import Path

from relaylab.errors import InputError, nearest
from relaylab.recipes import digits, imagenet, places2
from relaylab.recipes.files import SUFFIX, is_file, read_recipe
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import Ensemble, Recipe, Scale

__all__ = ["ENSEMBLES", "PAPER", "RECIPES", "find_recipe"]

PAPER: dict[str, Recipe] = {recipe.name: recipe for recipe in (*imagenet.ROWS, *places2.ROWS)}
ENSEMBLES: dict[str, Ensemble] = {places2.ENSEMBLE.name: places2.ENSEMBLE}
for _ensemble in ENSEMBLES.values():
    PAPER |= {member.name: member for member in _ensemble.members if member.name not in PAPER}
RECIPES: dict[str, Recipe] = {**PAPER, **{recipe.name: recipe for recipe in digits.ROWS}}


def find_recipe(name: str, scale: Scale = "paper") -> Recipe:
    """Return a built-in recipe at a scale, or read a recipe file.

    Example::

        recipe = find_recipe("table3-model-a-relay", "small")
        recipe = find_recipe("mine.toml")

    Raises:
        InputError: the name is unknown, the file is not a recipe, or a scale is given for a file.
    """
    if is_file(name):
        if scale != "paper":
            raise InputError(f"--scale {scale}: {name} defines its own sizes; change them in the file or with --set")
        return read_recipe(Path(name))
    if name in RECIPES:
        return at_scale(RECIPES[name], scale)
    if name in ENSEMBLES:
        members = ", ".join(member.name for member in ENSEMBLES[name].members)
        raise InputError(f"{name} is an ensemble; choose one of its members: {members}")
    if ":" in name:
        raise InputError(f"unknown recipe {name!r}: it names a network; `relaylab recipes new {name} ...` writes one")
    advice = nearest(name, [*RECIPES, *ENSEMBLES]) or f"; 'relaylab recipes' lists them; a recipe file ends in {SUFFIX}"
    raise InputError(f"unknown recipe {name!r}{advice}")
