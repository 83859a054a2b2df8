"""Recipes as TOML files: the round trip, what is wrong with a file, and runs that keep their recipe."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("lightning_fabric")

from relaylab import cli
from relaylab.errors import InputError
from relaylab.recipes import RECIPES, find_recipe
from relaylab.recipes.changes import located, with_changes
from relaylab.recipes.files import read_recipe, to_toml
from relaylab.recipes.scales import SCALES, at_scale
from relaylab.recipes.schema import Recipe, Scale
from relaylab.train import loop, requests, session
from relaylab.train.options import TrainOptions


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def written(recipe: Recipe, path: Path) -> Path:
    path.write_text(to_toml(recipe, {"": ("a note = with a sign", ""), "plan.primary": ("why",)}))
    return path


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_the_same_after_a_round_trip(name: str, scale: Scale, tmp_path: Path) -> None:
    recipe = at_scale(RECIPES[name], scale)
    again = read_recipe(written(recipe, tmp_path / "recipe.toml"))
    assert list(again.fields()) == list(recipe.fields())
    parts = ("name", "row", "network", "plan", "scheme", "images", "optimizer", "evaluation", "reported", "trained_as")
    assert [getattr(again, part) for part in parts] == [getattr(recipe, part) for part in parts]


def test_options_and_factors_keep_their_types_and_names(tmp_path: Path) -> None:
    texts = ["network.options.depths=2,2", "network.options.act=gelu # not", "network.options.rate=0.5"]
    texts += ["network.options.fast=true", "optimizer.segment_lr.head aux=2", "optimizer.segment_lr.aux+primary=0.5"]
    recipe, problems = with_changes(find_recipe("photos"), texts)
    assert not problems
    assert recipe.network.options == {"depths": (2, 2), "act": "gelu # not", "rate": 0.5, "fast": True}
    again = read_recipe(written(recipe, tmp_path / "recipe.toml"))
    assert again.network == recipe.network
    assert list(again.fields()) == list(recipe.fields())


def test_the_comment_is_the_source_and_the_file_where_there_is_none(tmp_path: Path) -> None:
    text = to_toml(find_recipe("digits")).replace("# ours: for a small network and few iterations", "# a try # two")
    text = text.replace("# ours: for a CPU", "").replace("[evaluation]", "[evaluation]  # by hand")
    text = text.replace("  # ours: the size of the images", "").replace("momentum = 0.9 ", "# momentum = 0.9")
    (tmp_path / "mine.toml").write_text(text)
    recipe = find_recipe(str(tmp_path / "mine.toml"))
    assert recipe.source_of("optimizer.lr") == "a try # two"
    assert recipe.source_of("optimizer.batch_size") == "mine.toml"
    assert recipe.source_of("evaluation.scales") == "by hand"
    assert recipe.source_of("optimizer.momentum") == "the recipe's default"


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    text = to_toml(find_recipe("digits")).replace('"small_vgg"', '"nets/net.py:small"')
    text = text.replace("[network]\n", '[network]\npretrained = "weights.pt"\n')
    (tmp_path / "mine.toml").write_text(text)
    network = read_recipe(tmp_path / "mine.toml").network
    assert network.architecture == f"{tmp_path.resolve()}/nets/net.py:small"
    assert network.pretrained == f"{tmp_path.resolve()}/weights.pt"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("width = 32", "widht = 32", "mine.toml: 1 problem:\n  no value network.widht; nearest: network.width"),
        ("[optimizer]", "[optimiser]", "no value optimiser; nearest: optimizer"),
        ("lr = 0.02", 'lr = "fast"', "optimizer.lr=fast: expected a number"),
        ("iterations = 930", "iterations = 9.5", "optimizer.iterations=9.5: expected an integer"),
        ("lr = 0.02", "", "optimizer also requires optimizer.lr"),
        ("lr = 0.02", "lr = {least = 3}", "optimizer.lr is a table: expected a single value"),
        ("flip = false", "flip = 1979-05-27", "augmentation.flip=1979-05-27: expected true or false"),
        ('kind = "steps"', 'kind = "stairs"', "optimizer.schedule.kind=stairs: expected one of plateau, steps, decay"),
        (
            'bottom = "segment2"',
            'above = "segment2"',
            "no value plan.primary.above: it has been renamed to plan.primary.after",
        ),
        ("lr = 0.02", "lr = = 0.02", r"mine.toml: Invalid value \(at line \d+, column \d+\)"),
        ('scheme = "relay"', 'scheme = "realy"', "scheme=realy: expected one of standard"),
    ],
)
def test_errors_in_a_file_name_the_value(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = to_toml(find_recipe("digits"))
    assert text.count(old) == 1
    (tmp_path / "mine.toml").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message):
        find_recipe(str(tmp_path / "mine.toml"))


def test_missing_files_and_scales_of_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such recipe file: nowhere.toml"):
        find_recipe("nowhere.toml")
    with pytest.raises(InputError, match=r"--scale tiny: .*mine.toml defines its own sizes"):
        find_recipe(str(written(find_recipe("digits"), tmp_path / "mine.toml")), "tiny")


def test_the_old_name_of_after_is_also_recognised_on_the_command_line() -> None:
    _, problems = with_changes(find_recipe("digits"), ["plan.primary.above=segment1"])
    assert problems == ["no value plan.primary.above: it has been renamed to plan.primary.after"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(at_scale(find_recipe("table3-model-a-relay"), "tiny"), tmp_path / "mine.toml")


def test_commands_take_a_file(
    file: Path, tmp_path: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "show", "mine.toml") == 0
    assert "the tiny scale" in capsys.readouterr().out
    assert run("cost", "mine.toml") == 0
    assert "model_a, 32 px" in capsys.readouterr().out
    assert run("draw", "mine.toml", "--out", "drawn") == 0
    assert run("train", "mine.toml", "--data", tiny_images, "--accelerator", "cpu", "--workers", "0") == 0
    (config,) = tmp_path.glob("runs/mine/*-s0/config.json")
    assert json.loads(config.read_text())["options"]["recipe"] == str(file)


@pytest.mark.parametrize(
    "command", [("eval",), ("export",), ("report",), ("diagnose", "information"), ("figure", "2")], ids=" ".join
)
def test_commands_for_runs_say_that_a_recipe_file_is_not_one(
    command: tuple[str, ...], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command, file) == 2
    error = capsys.readouterr().err
    assert f"{file} is a recipe file" in error
    assert f"relaylab train {file} --data IMAGES" in error


def test_a_run_keeps_its_recipe_when_the_file_changes(
    file: Path, tmp_path: Path, tiny_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shared = {"data": (tiny_images,), "accelerator": "cpu", "workers": 0, "out": folder}
    config = TrainOptions(recipe=str(file), changes=("optimizer.iterations=4",), **shared)

    class Stopped(Exception):
        pass

    def stop(trainer: loop.Trainer) -> None:
        if trainer.progress.step == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        step = loop.Trainer.step
        patch.setattr(loop.Trainer, "step", lambda self, *given: (stop(self), step(self, *given))[1])
        with pytest.raises(Stopped):
            session.train(requests.resolve(config))
    before = requests.recipe_of(folder)
    file.write_text(file.read_text().replace("lr = 0.01", "lr = 0.5"))
    with pytest.raises(InputError, match=r"optimizer.lr was 0.01 and is 0.5"):
        requests.resolve(TrainOptions(recipe=str(file), changes=config.changes, resume="auto", **shared))
    file.unlink()
    assert requests.recipe_of(folder) == before
    request = requests.resolve(TrainOptions(resume=str(folder)))
    assert (request.recipe.optimizer.lr, request.recipe.optimizer.iterations) == (0.01, 4)
    outcome = session.train(request)
    whole = session.train(requests.resolve(TrainOptions(recipe="table3-model-a-relay", scale="tiny", **{
        **shared, "out": tmp_path / "whole", "changes": config.changes,
    })))  # fmt: skip
    assert outcome.finished
    assert [outcome.last[name] for name in ("top1", "loss")] == [whole.last[name] for name in ("top1", "loss")]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("network.architecture", "nets/net.py:small", "/here/nets/net.py:small"),
        ("network.architecture", "/there/net.py:small", "/there/net.py:small"),
        ("network.architecture", "package.module:small", "package.module:small"),
        ("network.architecture", "timm:resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        ("network.architecture", "package.module", "package.module"),
        ("network.pretrained", "weights:1.pt", "/here/weights:1.pt"),
        ("network.pretrained", "none", "none"),
        ("optimizer.lr", "0.1", "0.1"),
    ],
)
def test_only_values_that_name_files_get_absolute_paths(key: str, value: str, expected: str) -> None:
    assert located(key, value, Path("/here")) == expected
