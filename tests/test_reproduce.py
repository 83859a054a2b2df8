"""docs/reference says what the recipes say."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="needs the lab extra")

from docs.renew_tables import page_of, sections
from relaylab.errors import InputError
from relaylab.recipes import ENSEMBLES, PAPER
from relaylab.tables import renewed

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "paper.md"


COSTLY = ("cost", "cost-small")  # every network's passes are counted


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in COSTLY else name for name in sections()]
)
def test_tables_are_those_of_the_recipes(name: str) -> None:
    page = page_of(name).read_text()
    table = sections()[name]()
    assert len(table) > 5
    assert renewed(page, {name: table}) == page, "run: python docs/renew_tables.py"
    assert renewed(page, {name: [*table[:-1], "| something else |"]}) != page


def test_a_lost_marker_is_found_out() -> None:
    with pytest.raises(ValueError, match="0 markers <!-- rows -->"):
        renewed("no tables", {"rows": ["|"]})


def test_every_recipe_and_every_deviation_is_on_the_page() -> None:
    page = PAGE.read_text()
    assert all(f"`{name}`" in page for name in (*PAPER, *ENSEMBLES))
    sources = "".join(path.read_text() for path in (PAGE.parents[2] / "src" / "relaylab").rglob("*.py"))
    for deviation in re.findall(r"DEVIATION\(([\w-]+)\)", sources):
        assert f"| {deviation} |" in page


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(block + "\nimport torch; print(relay.eval()(torch.zeros(1, 3, 64, 64)).shape)", {"__name__": "page"})
    assert capsys.readouterr().out.strip() == "torch.Size([1, 100])"


def test_its_commands_are_real() -> None:

    from relaylab.cli import parse

    for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL):
        for line in block.splitlines():
            command = line.split("#")[0].split()
            assert command[0] == "relaylab"
            assert parse(command[1:]) is not None
    with pytest.raises(InputError, match="unknown command 'recipes shew'; nearest: recipes show"):
        parse(["recipes", "shew"])
