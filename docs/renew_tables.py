"""Generate the tables in docs/reference from the recipes.

python docs/renew_tables.py    # replaces the text between the markers of the pages
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relaylab.files import write_text
from relaylab.recipes import ENSEMBLES, PAPER
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import Recipe, value_text
from relaylab.report.costs import cost_table
from relaylab.tables import Table, markdown_lines, renewed

PAGES = tuple(sorted((Path(__file__).parent / "reference").glob("*.md")))
# One recipe of each kind; the remaining rows of a table differ from it in network, scheme and evaluation.
KINDS = {
    "places2": "table3-model-a-relay",
    "places2-vgg": "table1-vgg22-places2",
    "imagenet-vgg": "table1-vgg19-imagenet",
    "resnet50": "table6-resnet50-relay",
    "inception-v3": "table6-inception-v3-relay",
}


def rows() -> Table:
    """Return a table of all recipes and their distinguishing values."""
    lines: list[tuple[str, ...]] = []
    for r in PAPER.values():
        rates = (None, None) if r.reported is None else (r.reported.top1, r.reported.top5)
        tested = f"{r.evaluation.protocol} at {value_text(r.evaluation.scales)}"
        cells = [f"`{r.name}`", r.row, f"{r.network.architecture}, {r.network.image_size} px", r.scheme, tested]
        lines.append((*cells, *("-" if rate is None else f"{rate:.2f}" for rate in rates)))
    for e in ENSEMBLES.values():
        members = ", ".join(f"`{member.name}`" for member in e.members)
        lines.append((f"`{e.name}`", e.row, members, "-", e.combine, "-", f"{e.reported.top5:.2f} (test)"))
    return Table("Recipes", ("recipe", "row", "network", "scheme", "tested", "top-1", "top-5"), tuple(lines))


def fields(recipe: Recipe) -> Table:
    """Return a table of a recipe's values and their sources."""
    lines = tuple((name, value_text(value), source) for name, value, source in recipe.fields())
    return Table(recipe.row, (f"`{recipe.name}`", "value", "source"), lines)


def sections() -> Mapping[str, Callable[[], Sequence[str]]]:
    """Return functions that generate the text between the markers of the pages, by marker name."""
    recipes = list(PAPER.values())
    tables: dict[str, Callable[[], Table]] = {"rows": rows}
    for kind, name in KINDS.items():
        tables[kind] = lambda name=name: fields(PAPER[name])
    tables["cost"] = lambda: cost_table(recipes)
    tables["cost-small"] = lambda: cost_table([at_scale(recipe, "small") for recipe in recipes])
    return {name: lambda make=make: markdown_lines(make(), is_marked=True) for name, make in tables.items()}


def page_of(name: str) -> Path:
    """Return the page that contains a marker of this name."""
    (page,) = (path for path in PAGES if f"<!-- {name} -->" in path.read_text(encoding="utf-8"))
    return page


if __name__ == "__main__":
    for name, make in sections().items():
        page = page_of(name)
        write_text(page, renewed(page.read_text(encoding="utf-8"), {name: make()}))
