"""Optimizers of recipes: exact updates, parameter groups, and checkpoints."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaylab.errors import InputError
from relaylab.models.building import build_relay
from relaylab.recipes import find_recipe
from relaylab.recipes.changes import recipe_problems, with_changes
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import OptimizerConfig, Recipe
from relaylab.train import checkpoint, loop, requests, run_folder, session
from relaylab.train.optimizers import OPTIMIZERS, build_optimizer, parameter_groups, state_tensors
from relaylab.train.options import TrainOptions
from relaylab.train.schedule import learning_rate
from relaylab.train.seeding import seed_all
from relaylab.train.segments import segments_of
from test_train import assert_identical, final, lines_of, stop_after, train

ADAMW = ("optimizer.algorithm=adamw", "optimizer.lr=0.001", "optimizer.weight_decay=0.05", "optimizer.betas=0.9,0.95")
PLAIN = ("scheme=standard", "optimizer.decay_norms_and_biases=false")


def recipe_of(*texts: str, name: str = "table3-model-a-relay") -> Recipe:
    recipe, problems = with_changes(at_scale(find_recipe(name), "tiny"), texts)
    assert problems == []
    assert recipe_problems(recipe) == []
    return recipe


def groups_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the values of the parameter group of each parameter."""
    relay = build_relay(recipe, on_meta=True)
    groups = parameter_groups(relay, segments_of(recipe), recipe.optimizer)
    by_id = {id(parameter): group for group in groups for parameter in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in relay.named_parameters()}


def test_each_name_in_the_schema_is_an_optimizer() -> None:
    assert set(get_args(get_type_hints(OptimizerConfig)["algorithm"])) == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("changes", "count"), [((), 1), (("optimizer.momentum=0",), 0), (("optimizer.algorithm=adamw",), 2)]
)
def test_the_tensors_that_an_optimizer_keeps_are_counted(changes: tuple[str, ...], count: int) -> None:
    assert state_tensors(recipe_of(*changes).optimizer) == count


def test_every_optimizer_keeps_the_decay_of_its_groups() -> None:
    """Each parameter group decides on weight decay: a build function must not override it."""
    recipe = recipe_of("optimizer.weight_decay=0.25", "optimizer.decay_norms_and_biases=false")
    relay, segments = build_relay(recipe, on_meta=True), segments_of(recipe)
    for name in OPTIMIZERS:
        config = recipe_of(*PLAIN, "optimizer.weight_decay=0.25", f"optimizer.algorithm={name}").optimizer
        optimizer = build_optimizer(relay, segments, config)
        assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.25]


def test_norms_and_biases_are_spared_from_weight_decay_only_if_asked() -> None:
    everything = groups_of(recipe_of("optimizer.weight_decay=0.5"))
    assert {group["weight_decay"] for group in everything.values()} == {0.5}
    spared = groups_of(recipe_of("optimizer.weight_decay=0.5", "optimizer.decay_norms_and_biases=false"))
    for name, group in spared.items():
        assert group["weight_decay"] == (0.0 if name.endswith("bias") else 0.5), name
    relayed = build_relay(recipe_of(), on_meta=True)
    assert set(spared) == {name for name, _ in relayed.named_parameters()}  # heads too


def test_a_network_names_more_parameters_without_weight_decay() -> None:
    """timm's transformers name their position embeddings and tokens."""
    pytest.importorskip("timm", reason="needs timm")
    vit = (
        "scheme=standard", "network.architecture=timm:test_vit", "network.width=none", "network.pyramid=none",
        "optimizer.decay_norms_and_biases=false", "optimizer.weight_decay=0.5", "network.options.img_size=160",
        "network.image_size=160", "images.short_side=160",
    )  # fmt: skip
    found = groups_of(recipe_of(*vit))
    assert found["model.pos_embed"]["weight_decay"] == found["model.cls_token"]["weight_decay"] == 0.0
    assert found["model.patch_embed.proj.weight"]["weight_decay"] == 0.5
    assert found["model.norm.weight"]["weight_decay"] == found["model.head.bias"]["weight_decay"] == 0.0


def test_adamw_is_torchs_bit_for_bit(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three updates of a run, against a handwritten loop on the same batches."""
    changes = (*PLAIN, *ADAMW, "optimizer.iterations=3", "optimizer.evaluate_every=3", "optimizer.eps=1e-6")
    batches: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = loop.Trainer.backward

    def backward(self: loop.Trainer, batch: Any, *rest: Any) -> Any:
        augmented = self.augment(batch.images, batch.draws).clone(memory_format=torch.preserve_format)
        batches.append((augmented, batch.labels.clone()))
        return original(self, batch, *rest)

    monkeypatch.setattr(loop.Trainer, "backward", backward)
    out = tmp_path / "run"
    train(tiny_images, out, short=True, changes=changes, diagnose_every=0)
    recipe = requests.recipe_of(out)
    config = recipe.optimizer
    assert config.betas == (0.9, 0.95)
    torch.manual_seed(0)
    relay = build_relay(recipe).to(memory_format=torch.channels_last)  # pyright: ignore
    decayed = [p for p in relay.parameters() if p.ndim > 1]
    others = [p for p in relay.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    for step, (images, labels) in enumerate(batches):
        seed_all(0, step, 0)  # dropout's masks
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        nn.functional.cross_entropy(relay.train()(images).primary, labels).backward()
        optimizer.step()
    assert len(batches) == 3
    stored = final(out, 3)
    expected = {f"model/{name}": tensor for name, tensor in relay.state_dict().items()}
    for name, parameter in relay.named_parameters():
        expected |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    assert_identical(stored, expected)
    assert {int(stored[name]) for name in stored if name.endswith("/step")} == {3}


KINDS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw, fp16": {"precision": "fp16"},
    "adamw, early release": {"early_release": True, "accumulate": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_resumes_bit_for_bit(
    kind: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"changes": (*ADAMW, "optimizer.decay_norms_and_biases=false"), **KINDS[kind]}
    train(tiny_images, tmp_path / "whole", keep=9, **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        train(tiny_images, tmp_path / "stopped", **options)
    assert session.train(requests.resolve(TrainOptions(resume=str(tmp_path / "stopped")))).finished
    assert_identical(final(tmp_path / "stopped"), final(tmp_path / "whole"))
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "whole")
    kept = {name.rpartition("/")[2] for name in final(tmp_path / "whole") if name.startswith("optimizer/")}
    assert kept == {"step", "exp_avg", "exp_avg_sq"}
    with pytest.raises(AssertionError):  # negative control
        assert_identical(final(tmp_path / "whole"), final(tmp_path / "whole", 8))


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.betas=0.9",
        "optimizer.betas=0.9,1",
        "optimizer.betas=-0.1,0.9",
        "optimizer.eps=0",
        "optimizer.eps=nan",
    ],
)
def test_values_that_no_optimizer_takes_are_found(change: str) -> None:
    recipe, problems = with_changes(at_scale(find_recipe("table3-model-a-relay"), "tiny"), [change])
    assert problems == []
    assert [change.split("=")[0] in problem for problem in recipe_problems(recipe)] == [True]


def test_a_run_of_an_earlier_version_resumes(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that were not stored get the defaults, with which the run was trained."""
    train(tiny_images, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        train(tiny_images, tmp_path / "old")
    later = (
        "optimizer.algorithm", "optimizer.betas", "optimizer.eps", "optimizer.decay_norms_and_biases",
        "loss.function", "loss.label_smoothing", "loss.class_weights",
    )  # fmt: skip
    forget_values(tmp_path / "old", later)
    assert session.train(requests.resolve(TrainOptions(resume=str(tmp_path / "old")))).finished
    assert_identical(final(tmp_path / "old"), final(tmp_path / "whole"))
    train(tiny_images, tmp_path / "other", changes=("optimizer.algorithm=adamw",))
    forget_values(tmp_path / "other", later)
    with pytest.raises(InputError, match=r"optimizer.algorithm was 'sgd' and is 'adamw'"):
        requests.recipe_of(tmp_path / "other")


def forget_values(run: Path, names: Sequence[str]) -> None:
    """Remove values from the stored recipe of a run, and update the checksums of its checkpoints."""
    config = json.loads((run / run_folder.CONFIG).read_text())
    stored = config["recipe"]["values"]
    config["recipe"]["values"] = {name: value for name, value in stored.items() if name not in names}
    assert len(config["recipe"]["values"]) == len(stored) - len(names)
    (run / run_folder.CONFIG).write_text(json.dumps(config))
    for path in checkpoint.newest(run / run_folder.CHECKPOINTS):
        found = checkpoint.read(path)
        values = {name: value for name, value in found.state["recipe"].items() if name not in names}
        state = {name: value for name, value in found.state.items() if name != "format"} | {"recipe": values}
        checkpoint.write(run / run_folder.CHECKPOINTS, checkpoint.Checkpoint(found.model, found.optimizer, state))
