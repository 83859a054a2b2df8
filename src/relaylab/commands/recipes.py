"""`relaylab recipes list`, `show` and `allow`: built-in recipes, recipe files, and trusted network code."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from relaylab.errors import InputError
from relaylab.options import Name
from relaylab.recipes import ENSEMBLES, RECIPES, find_recipe
from relaylab.recipes.changes import ARCHITECTURE, located
from relaylab.recipes.files import to_toml
from relaylab.recipes.schema import NetworkConfig, Recipe, ReportedErrors, Scale, value_text

if TYPE_CHECKING:
    from rich.table import Table

WIDTH_UNKNOWN = 140  # columns, where the output is not a terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOptions:
    """List the built-in recipes, one for each row of the paper's tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtScale:
    """Option --scale."""

    scale: Scale = "paper"
    """Size of the experiment: the paper's, reduced for MiniPlaces (small), or minimal for tests (tiny)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowOptions(AtScale):
    """Print the values of a recipe, each with its source."""

    name: Name
    """Name of a recipe (see `relaylab recipes`), or a recipe file (.toml)."""

    format: Literal["table", "toml"] = "table"
    """Output format: a table, or a recipe file to edit and train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowOptions:
    """Trust the network code that a run or a model file from elsewhere refers to.

    Code named on the command line or in a recipe file is trusted already.
    """

    name: Name
    """Network, as in the error message: package.module:function or path/to/file.py:function."""


def list_recipes(options: ListOptions) -> int:  # noqa: ARG001
    """Print each recipe: name, row of the paper, network, and the paper's errors."""
    from rich.table import Table

    table = Table("recipe", "row of the paper", "network", "top-1", "top-5", box=None, pad_edge=False)
    for recipe in RECIPES.values():
        network = f"{recipe.network.architecture}, {recipe.network.image_size} px"
        table.add_row(recipe.name, recipe.row, network, *_errors(recipe.reported))
    for ensemble in ENSEMBLES.values():
        members = f"{len(ensemble.members)} networks"
        table.add_row(ensemble.name, ensemble.row, members, *_errors(ensemble.reported))
    _print(table)
    print("\nError rates in per cent, from the paper. 'relaylab recipes show RECIPE' prints values and sources.")
    return 0


def show(options: ShowOptions) -> int:
    """Print a recipe's values, named as for `--set`, each with its source."""
    from rich.table import Table

    name, scale = options.name, options.scale
    if name in ENSEMBLES:
        if scale != "paper":
            raise InputError(f"{name} is an ensemble, which has no scale: use --scale {scale} with its members")
        if options.format == "toml":
            raise InputError(f"{name} is an ensemble, which has no recipe file: use --format toml with its members")
        return _show_ensemble(name)
    recipe = find_recipe(name, scale)
    if options.format == "toml":
        print(to_toml(recipe), end="")
        return 0
    print(f"{recipe.name}: {recipe.row}" + (f", at {scale} scale" if scale != "paper" else ""))
    if recipe.trained_as is not None:
        print(f"evaluates the network trained by {recipe.trained_as}")
    if recipe.reported is not None:
        top1, top5 = _errors(recipe.reported)
        print(f"the paper's error: top-1 {top1 or '-'} %, top-5 {top5 or '-'} %")
    print()
    table = Table("field", "value", "source", box=None, pad_edge=False)
    for field, value, source in recipe.fields():
        table.add_row(field, value_text(value), source)
    _print(table)
    return 0


def named_recipe(name: str, scale: Scale) -> Recipe:
    """Return the recipe that the user has named, and trust its network code."""
    from relaylab.models.named import allow

    recipe = find_recipe(name, scale)
    allow(recipe.network)
    return recipe


def allow_network(options: AllowOptions) -> int:
    """Record that the user trusts the code of a network."""
    from relaylab.models.named import allow

    network = NetworkConfig(architecture=located(ARCHITECTURE, options.name), num_classes=2, image_size=1)
    if not network.is_code:
        raise InputError(f"{options.name} is not a function: expected package.module:function or file.py:function")
    allow(network)
    print(f"allowed: {network.architecture}")
    return 0


def _show_ensemble(name: str) -> int:
    ensemble = ENSEMBLES[name]
    print(f"{ensemble.name}: {ensemble.row}")
    for errors in (ensemble.reported, ensemble.validation):
        print(f"the paper's error: top-5 {errors.top5:.2f} % on the {errors.split} images")
    print(f"\nmembers ({ensemble.sources['members']}):")
    for member in ensemble.members:
        print(f"  {member.name}")
    print(f"probabilities are combined by their {ensemble.combine} ({ensemble.sources['combine']})")
    return 0


def _errors(errors: ReportedErrors | None) -> tuple[str, str]:
    rates = (None, None) if errors is None else (errors.top1, errors.top5)
    mark = " (test)" if errors is not None and errors.split == "test" else ""
    top1, top5 = ("" if rate is None else f"{rate:.2f}{mark}" for rate in rates)
    return top1, top5


def _print(table: "Table") -> None:
    from rich.console import Console

    from relaylab.outside.showing import direct

    console = Console(file=direct(sys.stdout), highlight=False)
    if not console.is_terminal:
        width = max(WIDTH_UNKNOWN, console.measure(table).maximum)
        console = Console(file=direct(sys.stdout), highlight=False, width=width)
    console.print(table)
