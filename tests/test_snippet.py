"""The generated program of a method: it runs, with the network, weights and optimizer of the recipe."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaylab.models.building import HEADS, build_network, build_relay
from relaylab.recipes import find_recipe
from relaylab.recipes.changes import with_changes
from relaylab.recipes.schema import Recipe
from relaylab.report.snippet import snippet

NETWORK = """
from torch import nn
def net(num_classes):
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, num_classes))
"""


def recipe_with(*changes: str) -> Recipe:
    recipe, problems = with_changes(find_recipe("digits"), ["network.width=2", "network.convs=1", *changes])
    assert not problems
    return recipe


def run(recipe: Recipe) -> dict[str, Any]:
    found: dict[str, Any] = {}
    exec(compile(snippet(recipe), "relay.py", "exec"), found)
    assert found["loss"].isfinite()
    return found


@pytest.mark.parametrize("scheme", ["relay", "multi_loss", "isolated"])
@pytest.mark.parametrize("function", ["cross-entropy", "binary"])
def test_programs_of_all_methods_and_losses_run(scheme: str, function: str) -> None:
    found = run(recipe_with(f"scheme={scheme}", f"loss.function={function}", "loss.label_smoothing=0.1"))
    assert isinstance(found["optimizer"], torch.optim.SGD)


@pytest.mark.parametrize("head", sorted(HEADS.keys() - {"inception"}))  # Inception's requires a larger map
def test_programs_build_every_head(head: str) -> None:
    recipe = recipe_with(f"plan.auxiliary.aux.head={head}")
    built = build_relay(recipe, on_meta=True).heads["aux"].state_dict()
    own = run(recipe)["heads"]["aux"].state_dict()
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in built.items()}


def test_the_optimizer_has_all_values_of_its_own() -> None:
    found = run(recipe_with("optimizer.algorithm=adamw", "optimizer.betas=0.8,0.95", "optimizer.eps=1e-6"))
    (group,) = found["optimizer"].param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


def test_the_program_starts_from_the_recipes_weights(tmp_path: Path) -> None:
    recipe = recipe_with(f"network.pretrained={tmp_path / 'weights.pt'}", "optimizer.lr=1e-12")
    model = build_network(recipe.network)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for parameter in run(recipe)["model"].parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 0.5))


def test_the_program_starts_at_the_recipes_gains() -> None:
    found = run(recipe_with("network.gain=quiet", "plan.auxiliary.aux.gain=quiet", "optimizer.lr=1e-12"))
    for layer in (found["model"].classifier.fc3, list(found["heads"]["aux"].children())[-1]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.1 / layer.in_features**0.5, rel=0.2)


@pytest.mark.usefixtures("own_imports")
@pytest.mark.parametrize("name", ["net.py", "my-net.py"])
def test_networks_of_files_are_imported_from_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(NETWORK)
    changes = [f"network.architecture={tmp_path / name}:net", "network.width=none", "network.convs=none"]
    recipe, problems = with_changes(recipe_with(), [*changes, "plan.auxiliary.aux.head=auto"])
    assert not problems
    code = snippet(recipe).partition("example = ")[0]  # the digits' windows are of another network
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["model"][-1].out_features == recipe.network.num_classes
