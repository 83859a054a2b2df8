"""The experiments' runs: what they are, in which order, which learning rates they take, and that they go on."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from experiments import __main__ as command
from experiments import report, studies, tables, testing, training
from experiments.studies import ARMS, Arm
from experiments.training import NotChosenError, Place
from relaylab.data.sources.subset import long_tail
from relaylab.errors import InputError, NonFiniteLossError
from relaylab.report.verdict import difference_text, mean_text
from relaylab.train import runs, session
from relaylab.train.images import CHOICE_SEED
from relaylab.train.options import TrainConfig


@pytest.fixture
def place(tiny_images: Path, tmp_path: Path) -> Place:
    return Place(size="tiny", out=tmp_path / "runs", data=(tiny_images,), precision="32")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> dict[str, Arm]:
    return few_arms(monkeypatch)


def few_arms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Arm]:
    """Two rates to choose from, and one arm that takes the rate that was chosen."""
    relay = Arm(recipe=studies.A, scheme="relay", changes=("images.held_out=2",), seeds=(100,))
    arms = {
        "selection/relay-0.005": dataclasses.replace(relay, rate=0.005),
        "selection/relay-0.02": dataclasses.replace(relay, rate=0.02),
        "model-a/relay": Arm(recipe=studies.A, scheme="relay", seeds=(0, 1)),
    }
    monkeypatch.setattr(training, "ARMS", arms)
    monkeypatch.setattr(training, "RATES", (0.005, 0.02))
    return arms


@pytest.fixture(scope="module")
def trained(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the four runs of these arms, trained once; tests change a copy."""
    place = Place(size="tiny", out=tmp_path_factory.mktemp("trained"), data=(tiny_images,), precision="32")
    with pytest.MonkeyPatch.context() as patch:
        few_arms(patch)
        assert training.train_missing(["selection", "model-a"], place)
    return place.out


@pytest.mark.parametrize("size", ["32px", "64px"])
def test_every_run_is_a_recipe_that_can_be_trained(
    size: studies.Size, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "chosen_rate", lambda scheme, place: 0.01)
    place = Place(size=size, out=tmp_path, data=(tiny_images,))
    seen: set[tuple[str, int]] = set()
    for name, seed in training.keys_of(studies.GROUPS):
        run = training.run_of(name, seed, place)
        recipe = runs.understand(run.config).recipe
        assert recipe.scheme == ARMS[name].scheme
        assert recipe.optimizer.iterations == run.iterations
        assert recipe.optimizer.lr == (ARMS[name].rate or 0.01)
        assert (recipe.images.held_out is not None) == name.startswith("selection/")
        seen.add((name, seed))
    assert seen == {(name, seed) for name, arm in ARMS.items() for seed in arm.seeds}


def test_the_seeds_that_choose_rates_are_no_others() -> None:
    for name, arm in ARMS.items():
        assert (studies.SELECTION_SEED in arm.seeds) == name.startswith("selection/"), name


def test_rates_are_chosen_by_images_set_aside_and_runs_go_on(
    few: dict[str, Arm], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(NotChosenError):
        training.run_of("model-a/relay", 0, place)
    assert training.train_missing(["selection"], place)
    results = {rate: training.run_of(f"selection/relay-{rate}", 100, place).result for rate in (0.005, 0.02)}
    errors = {rate: result.last["top1"] for rate, result in results.items() if result is not None}
    assert training.chosen_rate("relay", place) == min(errors, key=lambda rate: errors[rate])
    assert training.train_missing(["selection", "model-a"], place)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert told == [
        "run 1 of 2: selection/relay-0.005, seed 100",
        "run 2 of 2: selection/relay-0.02, seed 100",
        "run 3 of 4: model-a/relay, seed 0",
        "run 4 of 4: model-a/relay, seed 1",
    ]
    recipe = runs.recipe_of(place.out / "model-a" / "relay-s1")
    assert recipe.optimizer.lr == training.chosen_rate("relay", place)
    assert recipe.images.held_out is None


def test_a_run_that_fails_is_a_result_and_is_not_repeated(
    few: dict[str, Arm], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, tried = session.train, list[str]()

    def train(request: runs.Request) -> Any:
        tried.append(str(request.config.out))
        if "0.02" in tried[-1]:
            (place.out / "selection" / "relay-0.02-s100").mkdir(parents=True)
            raise NonFiniteLossError("the loss is nan in step 3")
        return original(request)

    monkeypatch.setattr(session, "train", train)
    assert training.train_missing(["selection"], place)
    assert training.train_missing(["selection"], place)
    assert len(tried) == 2
    assert training.run_of("selection/relay-0.02", 100, place).failed
    assert training.chosen_rate("relay", place) == 0.005


def test_two_processes_do_not_train_the_same(
    few: dict[str, Arm], place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.out.mkdir()
    with training.claimed(("selection/relay-0.005", 100), place) as mine:
        assert mine
        with training.claimed(("selection/relay-0.005", 100), place) as also:
            assert not also
        assert training.train_missing(["selection"], place)
    assert "0.005" not in capsys.readouterr().out


def test_the_command_line(
    few: dict[str, Arm], place: Place, tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--size", "tiny", "--precision", "32", "--out", str(place.out), "--data"]
    assert command.main([*words, str(tiny_images), "--only", "selection"]) == 0
    assert command.main([*words, str(tiny_images / "none"), "--only", "model-a"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_tables_and_pictures_of_what_is_there(
    few: dict[str, Arm], place: Place, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="train first"):
        report.write_report(place, tmp_path)
    shutil.copytree(trained, place.out)
    words = ["--size", "tiny", "--precision", "32", "--out", str(place.out)]
    assert command.main(words) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert command.main([*words, "--report", str(tmp_path / "results")]) == 0
    untested = (tmp_path / "results" / "evidence-tiny.json").read_text()
    assert json.loads(untested)["runs"][0]["tested"] is None
    assert command.main([*words, "--report", str(tmp_path / "results"), "--data", str(place.data[0])]) == 0
    written = {path.name for path in (tmp_path / "results").iterdir()}
    pictures = {f"evidence-tiny-{name}.svg" for name in ("rates", "errors", "curves", "gradients", "angles")}
    assert written == {"evidence-tiny.md", "evidence-tiny.json", *pictures}
    found = json.loads((tmp_path / "results" / "evidence-tiny.json").read_text())["runs"]
    assert [(each["arm"], each["seed"]) for each in found] == [
        ("selection/relay-0.005", 100),
        ("selection/relay-0.02", 100),
        ("model-a/relay", 0),
        ("model-a/relay", 1),
    ]
    for each in found:
        assert each["top1"] == list(each["curve"].values())[-1]
        if each["arm"] == "model-a/relay":
            assert each["tested"]["val"] == pytest.approx(each["top1"])
            assert sum(each["tested"]["by_class"]) / 5 == pytest.approx(each["top1"])
        assert 0 <= each["tested"]["dead"] < 1
        assert (each["ended"], each["device"]) == (True, "cpu")
    assert "standard BP |  |  | not run yet" in (tmp_path / "results" / "evidence-tiny.md").read_text()


@pytest.mark.slow
def test_a_run_that_was_broken_off_is_compared_as_far_as_it_came(
    few: dict[str, Arm], place: Place, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, place.out)
    study = studies.STUDIES["model-a"]
    assert tables.common_table(study, training.begun_runs(place)) is None
    run = training.run_of("model-a/relay", 1, place)
    (run.folder / runs.MODEL).unlink()
    lines = (run.folder / runs.METRICS).read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 3]
    (run.folder / runs.METRICS).write_text("".join(kept))
    begun = training.begun_runs(place)
    assert [each.result is None for each in begun] == [False, False, False, True]
    table = tables.common_table(study, begun)
    assert table is not None
    assert "after 3 of 6 iterations" in table.title
    row = dict(zip(table.header, dict(zip(study.arms, table.rows, strict=True))["Relay BP"], strict=True))
    at_3 = [tables.finding_of(each).curve[3] for each in begun if each.arm == "model-a/relay"]
    assert row["top-1 error"] == mean_text(at_3)
    assert row["seeds"] == "0, 1"
    report.write_report(place, tmp_path / "results")
    found = json.loads((tmp_path / "results" / "evidence-tiny.json").read_text())["runs"]
    assert [each["ended"] for each in found] == [True, True, True, False]
    assert not any(each.collapsed for each in map(tables.finding_from, found[3:])), "it may yet learn"


@pytest.mark.slow
def test_a_run_that_failed_is_in_the_tables(few: dict[str, Arm], place: Place, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, place.out)
    run = training.run_of("model-a/relay", 1, place)
    (run.folder / runs.MODEL).unlink()
    (run.folder / training.FAILED).write_text("the loss is nan\n")
    text = report.write_report(place, tmp_path)
    assert "Failed, since losses or gradients were not finite: Relay BP, seed 1." in text
    assert "broken off" not in text
    values = json.loads((tmp_path / "evidence-tiny.json").read_text())
    assert values["failed"] == [{"arm": "model-a/relay", "seed": 1}]
    assert [(each["arm"], each["seed"]) for each in values["runs"]][-1] == ("model-a/relay", 0)


def test_a_study_that_only_repeats_others_is_left_out() -> None:
    assert tables.shown_studies({"model-a/standard", "model-a/relay"}) == ["model-a"]
    assert tables.shown_studies({"model-a/relay", "overlap/2-stages"}) == ["model-a", "overlap"]


def finding(arm: str, seed: int, top1: float) -> tables.Finding:
    more: dict[str, Any] = {"rate": 0.01, "top5": top1 / 2, "loss": 4.0, "curve": {1: top1}, "tested": None}
    end: dict[str, Any] = {"ended": True, "device": "cpu"}
    return tables.Finding(arm=arm, seed=seed, top1=top1, **more, images_per_s=500.0, gflops=0.2, **end)


def test_differences_are_paired_and_collapsed_runs_are_named() -> None:
    study = tables.Study(title="A", arms={"standard BP": "a", "Relay BP": "b", "other": "c"}, against=("standard BP",))
    found = [finding("a", seed, top1) for seed, top1 in enumerate((90.0, 91.0, 99.0))]
    found += [finding("b", seed, top1) for seed, top1 in enumerate((88.0, 90.0, 89.0))]
    table = tables.table_of(study, found)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["Relay BP"]["top-1 minus standard BP"] == difference_text([-2.0, -1.0, -10.0])
    assert rows["Relay BP"]["top-1 error"] == "89.00 ± 1.00"
    assert rows["other"]["top-1 error"] == "not run yet"
    assert table.notes == (
        "Collapsed: standard BP, seed 2.",
        f"Relay BP minus standard BP without them, top-1: {difference_text([-2.0, -1.0])}.",
    )
    assert tables.table_of(study, [], {("a", 0)}).rows[0][3] == "failed"
    elsewhere = [*found[1:], dataclasses.replace(found[0], device="one GPU")]
    assert "Trained on another device (one GPU): standard BP, seed 0." in tables.table_of(study, elsewhere).notes
    only = dataclasses.replace(study, seeds=(0,))
    assert tables.table_of(only, found).rows[1][2] == "0"
    assert not tables.table_of(only, found).notes


def test_errors_by_how_many_training_images_a_class_has() -> None:
    labels = np.repeat(np.arange(6), studies.PER_CLASS)
    sizes = np.bincount(labels[long_tail(labels, ratio=50, seed=CHOICE_SEED)])
    errors = {"shuffled": 90 - sizes / 10, "class-aware": np.full(6, 50.0)}
    found = [
        dataclasses.replace(finding(f"tail-50/{kind}", 0, 60), tested=testing.Tested(0, 0, tuple(own), 0))
        for kind, own in errors.items()
    ]
    table = tables.tail_table(50, found)
    largest = np.sort(sizes)[::-1]
    expected = [f"{90 - pair.mean() / 10:.2f}" for pair in np.split(largest, 3)]
    assert table.rows == (("shuffled", *expected), ("class-aware", "50.00", "50.00", "50.00"))
    assert not tables.tail_table(7.5, found).rows


def test_studies_are_of_arms_that_there_are() -> None:
    for name, study in studies.STUDIES.items():
        assert set(study.arms.values()) <= ARMS.keys(), name
        assert set(study.against) <= study.arms.keys(), name
        for arm in study.arms.values():
            assert study.seeds is None or set(study.seeds) <= set(ARMS[arm].seeds), (name, arm)
    named = {arm for study in studies.STUDIES.values() for arm in study.arms.values()}
    assert named == ARMS.keys(), "a run that no table shows"


def test_images_set_aside_take_the_place_of_the_validation_images(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    original = session.assemble

    def assemble(fabric: Any, request: Any, images: Any, *rest: Any) -> Any:
        seen["train"], seen["val"] = images.train, images.val
        return original(fabric, request, images, *rest)

    monkeypatch.setattr(session, "assemble", assemble)
    for name, changes in (("aside", ("images.held_out=3",)), ("tail", ("images.long_tail=4", "images.held_out=2"))):
        config = TrainConfig(
            recipe=studies.A,
            scale="tiny",
            data=(tiny_images,),
            out=tmp_path / name,
            changes=("scheme=isolated", *changes),
        )
        assert session.train(runs.understand(config)).finished
        train, val = (sorted(seen[part].labels.tolist()) for part in ("train", "val"))
        if name == "aside":
            assert train == sorted([*range(5)] * 9)
            assert val == sorted([*range(5)] * 3)
        else:
            assert sorted((train.count(label) for label in range(5)), reverse=True) == [10, 7, 5, 4, 2]
            assert val == sorted([*range(5)] * 2)
    with pytest.raises(InputError, match="would leave none"):
        session.train(runs.understand(dataclasses.replace(config, out=tmp_path / "x", changes=("images.held_out=12",))))


def test_channels_that_are_never_positive_are_counted_as_dead() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 2), nn.ReLU())
    with torch.no_grad():
        for layer in (network[0], network[3]):
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            layer.weight.zero_()
        network[0].bias.copy_(torch.tensor([1.0, -1, -1, 1]))  # pyright: ignore
        network[3].bias.copy_(torch.tensor([-1.0, 1]))  # pyright: ignore
    with testing._watched(network) as alive:
        for _ in range(2):
            network(torch.rand(3, 1, 1, 1))
    assert torch.cat(list(alive.values())).tolist() == [True, False, False, True, False, True]
    assert not any(module._forward_hooks for module in network.modules())
