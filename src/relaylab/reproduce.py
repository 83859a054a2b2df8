"""The tables of docs/reproduce.md, from the recipes themselves.

python -m relaylab.reproduce docs/reproduce.md    # renews what stands between the page's markers
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from relaylab.files import write_text
from relaylab.model_commands import cost_table, text_of
from relaylab.recipes import ENSEMBLES, RECIPES
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import Recipe

# One of each kind; the other rows of a table differ from it in network, scheme and evaluation.
KINDS = {
    "places2": "table3-model-a-relay",
    "places2-vgg": "table1-vgg22-places2",
    "imagenet-vgg": "table1-vgg19-imagenet",
    "resnet50": "table6-resnet50-relay",
    "inception-v3": "table6-inception-v3-relay",
}


def rows() -> list[str]:
    """All recipes, with what distinguishes them."""
    lines = [
        "| recipe | row | network | scheme | tested | top-1 | top-5 |",
        "| --- | --- | --- | --- | --- | ---: | ---: |",
    ]
    for r in RECIPES.values():
        rates = (None, None) if r.reported is None else (r.reported.top1, r.reported.top5)
        tested = f"{r.evaluation.protocol} at {text_of(r.evaluation.scales)}"
        cells = [f"`{r.name}`", r.row, f"{r.network.architecture}, {r.network.image_size} px", r.scheme, tested]
        lines.append(_line([*cells, *("-" if rate is None else f"{rate:.2f}" for rate in rates)]))
    for e in ENSEMBLES.values():
        members = ", ".join(f"`{member.name}`" for member in e.members)
        lines.append(_line([f"`{e.name}`", e.row, members, "-", e.combine, "-", f"{e.reported.top5:.2f} (test)"]))
    return lines


def fields(recipe: Recipe) -> list[str]:
    """A recipe's values and where each comes from."""
    lines = [f"| `{recipe.name}` | value | where it comes from |", "| --- | --- | --- |"]
    return lines + [_line([name, text_of(value), source]) for name, value, source in recipe.fields()]


def sections() -> Mapping[str, Callable[[], Sequence[str]]]:
    """What stands between the markers of the page, by their names."""
    recipes = list(RECIPES.values())
    tables: dict[str, Callable[[], Sequence[str]]] = {"rows": rows}
    for kind, name in KINDS.items():
        tables[kind] = lambda name=name: fields(RECIPES[name])
    tables["cost"] = lambda: cost_table(recipes)
    tables["cost-small"] = lambda: cost_table([at_scale(recipe, "small") for recipe in recipes])
    return tables


def renewed(page: str, tables: Mapping[str, Sequence[str]]) -> str:
    """The page with other tables between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    for name, lines in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(
            pattern, lambda m, lines=lines: m[1] + "\n".join(lines) + "\n" + m[2], page, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"the page has {count} markers <!-- {name} -->: expected one, and <!-- end --> after it")
    return page


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    write_text(file, renewed(file.read_text(encoding="utf-8"), {name: make() for name, make in sections().items()}))
