"""docs/evidence.md and the README say what results/evidence-SIZE.json has, and the tables there are made from it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from experiments import page, tables
from experiments.studies import ARMS, STUDIES
from experiments.tables import Finding
from relaylab.report.verdict import difference_text
from relaylab.tables import render, renewed

README = page.ROOT / "README.md"


def found(size: str) -> list[Finding]:
    values = json.loads((page.RESULTS / f"evidence-{size}.json").read_text())
    return [tables.finding_from(each) for each in values["runs"]]


def test_tables_of_the_page_are_those_of_the_runs() -> None:
    text = page.PAGE.read_text()
    sections = page.sections()
    assert renewed(text, sections) == text, "run: python -m experiments.page"
    name = "model-a-64px"
    assert renewed(text, {name: [*sections[name][:-1], "| something else |"]}) != text


@pytest.mark.parametrize("size", ["32px", "64px"])
def test_the_whole_tables_are_those_of_the_runs(size: str) -> None:
    text = (page.RESULTS / f"evidence-{size}.md").read_text()
    own = [each for each in found(size) if each.ended]
    names = tables.shown_studies({each.arm for each in own})
    assert {"selection", "model-a"} <= set(names)
    for name in names:
        assert render(tables.table_of(STUDIES[name], own), "markdown") in text, name


def test_the_readme_quotes_the_runs() -> None:
    _, _, *rows = page.brief("model-a", found("64px"))
    words = {"standard BP": "standard BP", "multi-loss": "multi-loss + standard BP", "Relay BP": "Relay BP"}
    quoted = {line.split(" | ")[0].removeprefix("| "): line for line in README.read_text().splitlines() if "| " in line}
    for row in rows:
        word, _, top1, _, minus, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        line = quoted[words.get(word, "isolated windows (no overlap)")]
        assert top1.split(" ")[0] in line
        assert minus in line
        assert ("collapsed" in top1) == ("collapsed" in line)


def test_the_readme_quotes_32_pixels() -> None:
    top1 = {(each.arm, each.seed): each.top1 for each in found("32px")}

    def lead(arm: str, base: str) -> str:
        return f"{top1[base, 0] - top1[arm, 0]:.1f}"

    at_19 = lead("vgg-equal-rate/19-relay", "vgg/19-standard")
    at_25 = lead("vgg-equal-rate/25-relay", "vgg/25-standard")
    text = " ".join(README.read_text().split())
    relay, standard = "model-b-cores/relay", "model-b-cores/standard"
    model_b = difference_text([top1[relay, seed] - top1[standard, seed] for seed in ARMS[relay].seeds])
    assert f"on model B at 32 pixels too ({model_b})" in text
    assert f"with relay VGG-19 and VGG-25 did better by {at_19} and {at_25} points" in text
    assert f"ResNet-50, with batch normalisation, worse by {lead('resnet50/standard', 'resnet50/relay')} after" in text


def test_pictures_of_the_page_are_there() -> None:
    for text, folder in ((page.PAGE.read_text(), page.PAGE.parent), (README.read_text(), README.parent)):
        for link in (part.split(")")[0] for part in text.split("](")[1:]):
            if not link.startswith(("http", "#")):
                assert (folder / Path(link.partition("#")[0])).exists(), link
