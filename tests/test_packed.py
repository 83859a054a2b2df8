"""Runs that share a GPU: the same trainings as `relaylab train`'s, whether steps are recorded or made one by one."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from experiments import __main__ as command
from experiments import packed, studies, testing, training
from experiments.studies import Arm
from experiments.training import NotChosenError, Place
from relaylab.errors import InputError
from relaylab.train import runs
from relaylab.train.records import read_metrics

PLATEAU = ("optimizer.schedule.kind=plateau", "optimizer.schedule.patience=2")
CHANGES = ("optimizer.segment_lr.aux=2", "optimizer.clip_norm=5", "images.held_out=3")


@pytest.fixture
def place(tiny_images: Path, tmp_path: Path) -> Place:
    return Place(size="tiny", out=tmp_path / "packed", data=(tiny_images,), precision="32")


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> dict[str, Arm]:
    relay = Arm(recipe=studies.A, scheme="relay", changes=CHANGES, rate=0.005, seeds=(0, 1))
    standard = Arm(recipe=studies.B, scheme="standard", rate=0.005)
    arms = {"model-a/relay": relay, "model-b/standard": standard}
    monkeypatch.setattr(training, "ARMS", arms)
    return arms


@pytest.fixture
def no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two draw their masks by different generators."""
    for kind in (nn.Dropout, packed.FilledDropout):
        monkeypatch.setattr(kind, "forward", lambda self, values: values)


def metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / runs.METRICS) if line["kind"] == kind]


def test_the_same_training_as_one_by_one(arms: dict[str, Arm], place: Place, no_dropout: None) -> None:
    groups = ["model-a", "model-b"]
    packed.train_packed(groups, place, 8)
    alone = dataclasses.replace(place, out=place.out.with_name("alone"))
    assert training.train_missing(groups, alone)
    for name, seed in training.keys_of(groups):
        ours, theirs = (training.run_of(name, seed, where) for where in (place, alone))
        for mine, other in zip(metrics(ours.folder, "val"), metrics(theirs.folder, "val"), strict=True):
            assert mine["step"] == other["step"]
            assert mine["loss"] == pytest.approx(other["loss"], rel=2e-5)
            assert mine["top1"] == other["top1"]
        last, other = metrics(ours.folder, "gradients")[-1], metrics(theirs.folder, "gradients")[-1]
        for layer, sizes in last["layers"].items():
            assert sizes["ratio"] == pytest.approx(other["layers"][layer]["ratio"], rel=1e-3), layer
        assert runs.recipe_of(ours.folder) == runs.recipe_of(theirs.folder)
    one, two = (metrics(training.run_of("model-a/relay", seed, place).folder, "val")[-1] for seed in (0, 1))
    assert one["loss"] != pytest.approx(two["loss"], rel=1e-4)  # so that the comparison above could have failed


def test_angles_and_sizes_are_written_down(arms: dict[str, Arm], place: Place) -> None:
    packed.train_packed(["model-a"], place, 8)
    run = training.run_of("model-a/relay", 0, place)
    assert run.result is not None
    looks = metrics(run.folder, "gradients")
    assert [look["step"] for look in looks] == [1, 2, 3, 4, 5, 6]
    assert all(-1 <= look["cosines"]["aux+primary"]["aux, primary"] <= 1 for look in looks[:-1])
    assert {"loss", "gradient_norm"} <= metrics(run.folder, "train")[0].keys()


def test_what_is_done_is_not_done_again_and_what_was_broken_off_begins_anew(
    arms: dict[str, Arm], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed.train_packed(["model-a"], place, 1)
    first, second = (training.run_of("model-a/relay", seed, place) for seed in (0, 1))
    (second.folder / training.TESTED).unlink()
    before = (first.folder / runs.METRICS).read_bytes(), (second.folder / runs.METRICS).read_bytes()
    trained: list[training.Run] = []
    original = packed._train
    monkeypatch.setattr(packed, "_train", lambda own, task: trained.extend(e.run for e in own) or original(own, task))
    packed.train_packed(["model-a"], place, 4)
    assert trained == [second]
    assert before == ((first.folder / runs.METRICS).read_bytes(), (second.folder / runs.METRICS).read_bytes())


def test_what_was_begun_one_by_one_is_not_thrown_away(arms: dict[str, Arm], place: Place) -> None:
    folder = training.run_of("model-b/standard", 0, place).folder
    kept = folder / runs.CHECKPOINTS / "step-00000002"
    kept.mkdir(parents=True)
    with pytest.raises(InputError, match=r"standard-s0 was begun without --at-once: end it without, or remove"):
        packed.train_packed(["model-b"], place, 4)
    assert kept.exists()
    with training.claimed(("model-b/standard", 0), place) as mine:  # somebody trains it now
        assert mine
        packed.train_packed(["model-b"], place, 4)
    assert kept.exists()


def test_what_another_process_has_just_finished_is_not_done_again(
    arms: dict[str, Arm], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = packed._missing
    before = [original(["model-b"], place)]
    packed.train_packed(["model-b"], place, 4)
    monkeypatch.setattr(packed, "_missing", lambda *given: before.pop() if before else original(*given))
    monkeypatch.setattr(packed, "_train", lambda own, task: pytest.fail("trained again"))
    packed.train_packed(["model-b"], place, 4)
    assert not before


@pytest.mark.parametrize("rate", [1e2, 1e4, 1e15, 1e30])
def test_a_loss_that_is_not_finite_is_a_result(rate: float, arms: dict[str, Arm], place: Place) -> None:
    arms["model-b/standard"] = dataclasses.replace(arms["model-b/standard"], rate=rate)
    packed.train_packed(["model-b", "model-a"], place, 4)
    run = training.run_of("model-b/standard", 0, place)
    assert run.failed
    assert run.result is None
    assert training.run_of("model-a/relay", 1, place).result is not None, "the others of the wave go on"
    packed.train_packed(["model-b"], place, 4)  # and is not repeated


@pytest.mark.parametrize(
    "recipe", ["table6-resnet50-relay", pytest.param("table6-inception-v3-relay", marks=pytest.mark.slow)]
)
def test_networks_with_batch_normalisation(
    recipe: str, arms: dict[str, Arm], place: Place, no_dropout: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms["model-a/relay"] = Arm(recipe=recipe, scheme="relay", rate=0.005)
    monkeypatch.setitem(studies.ITERATIONS, "tiny", 2)
    place = dataclasses.replace(place, precision="bf16")
    packed.train_packed(["model-a"], place, 1)
    alone = dataclasses.replace(place, out=place.out.with_name("alone"))
    assert training.train_missing(["model-a"], alone)
    ours, theirs = (training.run_of("model-a/relay", 0, where) for where in (place, alone))
    tested = testing.tested(ours)
    assert tested is not None
    assert (tested.dead is None) == (recipe == "table6-inception-v3-relay")
    for mine, other in zip(metrics(ours.folder, "gradients"), metrics(theirs.folder, "gradients"), strict=True):
        assert "cosines" not in mine
        for layer, sizes in mine["layers"].items():
            assert sizes["gradient"] == pytest.approx(other["layers"][layer]["gradient"], rel=1e-3), layer


def test_what_recorded_steps_cannot_do(arms: dict[str, Arm], place: Place) -> None:
    shelf = packed.Shelf(torch.device("cpu"), training.run_of("model-a/relay", 0, place).config)
    wrong = {("optimizer.segment_lr.nowhere=2",): "no such segment", PLATEAU: "another schedule"}
    for changes, message in wrong.items():
        arms["model-a/relay"] = dataclasses.replace(arms["model-a/relay"], changes=changes)
        with pytest.raises(InputError, match=message):
            packed.PackedRun(training.run_of("model-a/relay", 0, place), shelf)


def test_a_run_that_another_process_trains_is_left_alone(arms: dict[str, Arm], place: Place) -> None:
    with training.claimed(("model-a/relay", 0), place) as mine:
        assert mine
        packed.train_packed(["model-a"], place, 4)
    assert not training.run_of("model-a/relay", 0, place).folder.exists()
    assert training.run_of("model-a/relay", 1, place).result is not None


def test_rates_that_nobody_has_chosen(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "ARMS", {"model-a/relay": Arm(recipe=studies.A, scheme="relay")} | training.ARMS)
    with pytest.raises(NotChosenError):
        packed.train_packed(["model-a"], place, 4)


def test_the_command_line(arms: dict[str, Arm], place: Place) -> None:
    words = ["--size", "tiny", "--precision", "32", "--out", str(place.out), "--at-once", "2", "--data"]
    assert command.main([*words, str(place.data[0]), "--only", "model-b"]) == 0
    assert training.run_of("model-b/standard", 0, place).result is not None


def test_the_command_line_says_what_is_wrong(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--size", "tiny", "--out", str(place.out), "--only", "model-a", "--data", str(place.data[0])]
    for number, code, message in ((-1, 2, "expected at least 1"), (2, 2, "train the group selection first")):
        assert command.main([*words, "--at-once", str(number)]) == code
        assert message in capsys.readouterr().err
    errors = {torch.OutOfMemoryError: (1, "take fewer runs"), KeyboardInterrupt: (130, "say the same again")}
    for error, (code, message) in errors.items():

        def fails(*_args: object, error: type[BaseException] = error) -> None:
            raise error

        monkeypatch.setattr(command, "train_packed", fails)
        assert command.main([*words, "--at-once", "2"]) == code
        assert message in capsys.readouterr().err


def test_dropout_drops_its_share() -> None:
    layer = packed.FilledDropout(0.7, torch.Generator())
    one = layer(torch.ones(100, 100))
    assert one.mean().item() == pytest.approx(1, abs=0.06)
    assert (one == 0).float().mean().item() == pytest.approx(0.7, abs=0.03)
    assert torch.equal(one, layer(torch.ones(100, 100))), "until it is filled anew"
    layer.fill()
    assert not torch.equal(one, layer(torch.ones(100, 100)))
    assert torch.equal(layer.eval()(torch.ones(3)), torch.ones(3))


def test_all_schemes_of_a_seed_drop_the_same(arms: dict[str, Arm], place: Place) -> None:
    shelf = packed.Shelf(torch.device("cpu"), training.run_of("model-a/relay", 0, place).config)

    def masks(scheme: str, seed: int) -> list[list[Tensor]]:
        arms["model-a/relay"] = dataclasses.replace(arms["model-a/relay"], scheme=scheme, changes=())
        run = packed.PackedRun(training.run_of("model-a/relay", seed, place), shelf)
        run.record()
        steps: list[list[Tensor]] = []
        for _ in range(2):
            run.replay()
            steps.append([dropout.numbers.clone() for dropout in run.dropouts if dropout.numbers is not None])
        return steps

    relay, standard, other = masks("relay", 0), masks("standard", 0), masks("relay", 1)
    for ours, theirs in zip(relay, standard, strict=True):
        assert (len(ours), len(theirs)) == (3, 2)
        assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(relay[0][0], relay[1][0])
    assert not torch.equal(relay[0][0], relay[0][1])
    assert not torch.equal(relay[0][0], other[0][0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_recorded_steps_are_the_steps(
    precision: str, arms: dict[str, Arm], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(name: str) -> list[list[dict[str, Any]]]:
        there = dataclasses.replace(place, out=place.out.with_name(name), precision=precision)
        packed.train_packed(["model-a", "model-b"], there, 3)
        folders = [training.run_of(*key, there).folder for key in training.keys_of(["model-a", "model-b"])]
        return [metrics(folder, "train") for folder in folders]

    recorded = trained("recorded")
    record = packed.PackedRun.record

    def unrecorded(self: packed.PackedRun) -> None:
        record(self)
        self.graph = None
        self.reset()

    monkeypatch.setattr(packed.PackedRun, "record", unrecorded)
    for ours, theirs in zip(recorded, trained("made"), strict=True):
        for line, other in zip(ours, theirs, strict=True):
            for loss, value in line["loss"].items():
                assert value == pytest.approx(other["loss"][loss], rel=1e-4 if precision == "32" else 1e-2)
