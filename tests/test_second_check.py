"""The networks and windows of the second check; its pages say what results/second-check/ has."""

import statistics

import pytest
import torch
from torch import nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from experiments.second import page, windows
from experiments.second.arms import Arm, read
from experiments.second.networks import resnet
from relaylab.models.building import build_relay
from relaylab.report.verdict import interval, range_text
from relaylab.tables import renewed
from relaylab.train.segments import segments_of


@pytest.mark.parametrize("depth", [32, 110])
def test_the_resnets_have_the_weight_layers_that_their_names_claim(depth: int) -> None:
    network = resnet(10, depth, width=4)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert len([layer for layer in layers if getattr(layer, "kernel_size", None) != (1, 1)]) == depth


def test_windows_share_their_lowest_blocks_with_the_window_below() -> None:
    recipe = windows.load(4, 2)
    relay = build_relay(recipe, on_meta=True)
    # 15 blocks in windows of 4, 4, 4 and 3, each with the two blocks below it.
    tops = ["layer1.3", "layer2.2", "layer3.1"]
    assert [window.top for window in relay.plan.auxiliary.values()] == tops
    assert [window.bottom for window in relay.plan.auxiliary.values()] == [None, "layer1.2", "layer2.1"]
    assert relay.plan.primary.bottom == "layer3.0"
    segments = segments_of(recipe)
    assert segments.overlaps.keys() == {"w0+w1", "w1+w2", "w2+primary"}
    shared = ("model.layer1.2.", "model.layer1.3.")
    assert all(name.startswith(shared) for name in segments.parameters("w0+w1"))


MOST_LOSSES = {(2, 2): 2, (4, 1): 2, (4, 4): 2, (8, 1): 2, (8, 2): 2, (15, 1): 2, (15, 2): 3, (15, 3): 4}


@pytest.mark.parametrize(("count", "shared"), windows.ARMS[32])
def test_every_block_is_in_a_window(count: int, shared: int) -> None:
    recipe = windows.load(count, shared)
    segments = segments_of(recipe)
    losses = {block: segments.losses[segments.of[f"model.{block}.conv1.weight"]] for block in windows.blocks(32)}
    assert len(recipe.plan.auxiliary) == count - 1
    assert max(map(len, losses.values())) == MOST_LOSSES[count, shared]
    assert losses["layer1.0"][0] == "w0"
    assert losses["layer3.4"] == ("primary",)


def test_tables_of_the_page_are_those_of_the_results() -> None:
    text, tables = page.PAGE.read_text(encoding="utf-8"), page.tables()
    assert {"start", "model-a", "model-b", "windows", "overlap", "similar"} <= tables.keys()
    assert renewed(text, tables) == text, "run: python -m experiments.second.page"
    assert renewed(text, {"model-a": [*tables["model-a"][:-1], "| something else |"]}) != text


def excess(worse: Arm, better: Arm) -> str:
    """Return the difference in error as an amount, with its interval."""
    differences = worse.differences(better)
    return range_text(statistics.fmean(differences), interval(differences))


def test_the_readme_quotes_the_results() -> None:
    text = page.README.read_text(encoding="utf-8")
    assert renewed(text, page.readme_tables()) == text, "run: python -m experiments.second.page"
    readme = " ".join(text.split())
    for name, worse, better in (
        ("model-a", "multi_loss", "relay"),
        ("model-b", "multi_loss", "relay"),
        ("resnet18", "relay", "standard"),
        ("resnet18-tuned", "relay", "standard"),
    ):
        arms = read(name)
        assert excess(arms[worse], arms[better]) in readme
    vit = read("vit")
    assert f"relay minus standard BP is {vit['relay'].minus(vit['standard'])} points" in readme
    base = read("resnet18")["standard"]
    for name, places in (("early", "layer1.1 and layer2.1"), ("two", "layer2.0 and layer3.0")):
        assert f"branches after {places} cost {excess(read(f'resnet18-{name}-branches')['relay'], base)}" in readme
    standard = read("windows-15-1-standard")["standard"]
    for count, words in ((4, "four cost {} points"), (8, "eight {}")):
        assert words.format(excess(read(f"windows-{count}-1-isolated")["isolated"], standard)) in readme
    isolated, shared = read("windows-4-1-isolated")["isolated"], read("windows-4-4-relay")["relay"]
    assert f"share four blocks are {excess(isolated, shared)} points better" in readme


# Differences of the page's text: first and second comparison, and their schemes.
QUOTED = (
    ("windows-4-4-relay", "relay", "windows-4-1-isolated", "isolated"),
    ("windows-8-2-relay", "relay", "windows-8-1-isolated", "isolated"),
    ("windows-15-3-relay", "relay", "windows-2-2-isolated", "isolated"),
    ("windows-15-3-relay", "relay", "windows-4-4-relay", "relay"),
    ("windows-15-1-multi-loss", "multi_loss", "windows-15-1-standard", "standard"),
    ("windows-15-1-multi-loss", "multi_loss", "windows-15-1-isolated", "isolated"),
    ("windows-15-1-multi-loss", "multi_loss", "windows-15-3-relay", "relay"),
    ("model-a-equal-time", "relay", "model-a", "standard"),
    ("model-a-equal-time", "relay", "model-a", "multi_loss"),
    ("model-b-weight-1", "relay", "model-b", "relay"),
    ("model-b-rates", "multi_loss", "model-b", "standard"),
    ("model-b-rates", "multi_loss", "model-b", "relay"),
    ("model-b-equal-time", "relay", "model-b", "standard"),
    ("model-b-equal-time", "relay", "model-b", "multi_loss"),
)


@pytest.mark.parametrize(("name", "scheme", "base", "base_scheme"), QUOTED)
def test_the_page_quotes_the_results(name: str, scheme: str, base: str, base_scheme: str) -> None:
    """Each difference is quoted with its sign, or as an amount."""
    text = " ".join(page.PAGE.read_text(encoding="utf-8").split())
    differences = read(name)[scheme].differences(read(base)[base_scheme])
    bounds = interval(differences)
    assert bounds
    mean, low, high = (round(value, 1) + 0.0 for value in (statistics.fmean(differences), *bounds))
    amounts = {f"{mean:.1f} [{low:.1f}, {high:.1f}]", f"{-mean:.1f} [{-high:.1f}, {-low:.1f}]"}
    assert any(quoted in text for quoted in {f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", *amounts}), amounts
