"""End-to-end training of recipes: exact resume, run folders, invalid input, comparisons. Tiny, on the CPU."""

import json
import re
import shutil
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from safetensors.torch import load_file

from relaybackprop import RelayLoss
from relaylab import cli
from relaylab.errors import InputError
from relaylab.models.file import read_model
from relaylab.train import loop, requests, run_folder, session
from relaylab.train.options import TrainOptions
from relaylab.train.records import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = ("optimizer.iterations=12", "optimizer.evaluate_every=4")
TIMES = ("images_per_s", "data_wait", "seconds")


def config_of(tree: Path, **options: Any) -> TrainOptions:
    changes = (*(() if options.pop("short", False) else STEPS), *options.pop("changes", ()))
    given = {"recipe": "table3-model-a-relay", "log_every": 5, "diagnose_every": 3, "workers": 0, **options}
    return TrainOptions(scale="tiny", data=(tree,), changes=changes, **given)


def train(tree: Path, out: Path, **options: Any) -> session.Outcome:
    return session.train(requests.resolve(config_of(tree, out=out, **options)))


def go_on(out: Path, **options: Any) -> session.Outcome:
    return session.train(requests.resolve(TrainOptions(resume=str(out), **options)))


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Request a stop at that step, as Ctrl-C would."""
    original = loop.Trainer.step

    def step(self: loop.Trainer) -> bool:
        stopping = original(self)
        return stopping or self.progress.step == steps

    monkeypatch.setattr(loop.Trainer, "step", step)


def final(out: Path, step: int = 12) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    folder = out / run_folder.CHECKPOINTS / f"step-{step:08d}"
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer")}
    return {f"{name}/{key}": tensor for name, tensors in files.items() for key, tensor in tensors.items()}


def assert_identical(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert that tensors are bitwise identical."""
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ, {different[0]} first"


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in read_metrics(out / run_folder.METRICS)
    ]


SHORT = ("optimizer.iterations=6", "optimizer.evaluate_every=3", "optimizer.batch_size=2")
TABLE6: dict[str, Any] = {"recipe": "table6-resnet50-relay", "short": True, "changes": (*SHORT, "network.width=8")}
CROPS = ("augmentation.crop=resized", "augmentation.padding=3", "augmentation.policy=randaugment")
AUGMENTED = (*CROPS, "augmentation.erasing=0.5", "augmentation.mixup=0.4", "augmentation.cutmix=1")
ALL = (
    "augmentation.policy=trivialaugment", "augmentation.erasing=0.5", "augmentation.mixup=0.4", "augmentation.cutmix=1",
    "optimizer.algorithm=adamw", "optimizer.layer_decay=0.75", "optimizer.decay_norms_and_biases=false",
    "optimizer.ema_decay=0.9", "optimizer.schedule.kind=plateau", "optimizer.schedule.patience=1",
    "optimizer.warmup=2", "loss.class_weights=square-root", "loss.label_smoothing=0.1",
)  # fmt: skip
# Dropout in one network, batch normalisation in the other; the rest are ways to train.
KINDS: dict[str, dict[str, Any]] = {
    "dropout": {},
    "batch norm": TABLE6,
    "multi-loss": {"changes": ("scheme=multi_loss",)},
    "plateau": {"changes": ("optimizer.schedule.kind=plateau", "optimizer.schedule.patience=1")},
    "parts": {"accumulate": 2},
    "fp16": {"precision": "fp16"},
    "bf16, clipped": {"precision": "bf16", "changes": ("optimizer.clip_norm=0.5", "optimizer.warmup=6")},
    "early release": {"early_release": True, "accumulate": 2},
    "early release, batch norm": {**TABLE6, "early_release": True},
    "early release, fp16": {"early_release": True, "precision": "fp16"},
    "no momentum": {"changes": ("optimizer.momentum=0",)},
    "augmentation": {"changes": AUGMENTED},
    "all at once": {"changes": ALL, "early_release": True, "precision": "bf16"},
    "augmentation, early release": {"changes": AUGMENTED, "early_release": True, "accumulate": 2, "precision": "bf16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    kind: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, momentum, buffers and metrics are bitwise those of the uninterrupted run."""
    options, (steps, end, other) = KINDS[kind], (4, 6, 3) if "short" in KINDS[kind] else (6, 12, 8)
    whole = train(tiny_images, tmp_path / "whole", keep=9, **options)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        stopped = train(tiny_images, tmp_path / "stopped", **options)
    assert (stopped.finished, stopped.step) == (False, steps)
    torch.rand(7)  # advance the generators
    resumed = go_on(tmp_path / "stopped")
    assert resumed.finished
    assert_identical(final(tmp_path / "stopped", end), final(tmp_path / "whole", end))
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "whole")
    assert (resumed.last, resumed.best) == (whole.last, whole.best)
    with pytest.raises(AssertionError):
        assert_identical(final(tmp_path / "whole", end), final(tmp_path / "whole", other))  # negative control


@pytest.fixture(scope="module")
def reference(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    train(tiny_images, out, keep=9)
    return out


def test_a_finished_run_keeps_its_last_and_its_best_checkpoint(tiny_images: Path, tmp_path: Path) -> None:
    outcome = train(tiny_images, tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / run_folder.CHECKPOINTS).iterdir())
    assert kept == sorted({"step-00000012", f"step-{int(outcome.best['step']):08d}"})


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 11])
def test_it_may_be_stopped_anywhere(
    steps: int, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Path
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        train(tiny_images, tmp_path / "run", keep=9)
    go_on(tmp_path / "run")
    assert_identical(final(tmp_path / "run"), final(reference))
    assert lines_of(tmp_path / "run") == lines_of(reference)


def test_neither_looks_at_gradients_nor_lines_nor_checkpoints_change_the_training(
    tiny_images: Path, tmp_path: Path, reference: Path
) -> None:
    train(tiny_images, tmp_path / "run", diagnose_every=0, log_every=100, save_every=1)
    assert_identical(final(tmp_path / "run"), final(reference))
    train(tiny_images, tmp_path / "other", seed=1)
    with pytest.raises(AssertionError):
        assert_identical(final(tmp_path / "other"), final(reference))


def test_the_checkpoint_with_the_least_error_is_kept(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relaylab.train.validation import Validation

    errors = iter([50.0, 20.0, 60.0, 70.0, 80.0, 90.0])
    monkeypatch.setattr(Validation, "__call__", lambda *_: {"top1": next(errors), "top5": 0.0, "loss": 1.0})
    outcome = train(tiny_images, tmp_path / "run", short=True, save_every=5, keep=2, changes=(
        "optimizer.iterations=12", "optimizer.evaluate_every=2"))  # fmt: skip
    steps = sorted(path.name for path in (tmp_path / "run" / run_folder.CHECKPOINTS).iterdir())
    assert steps == ["step-00000004", "step-00000010", "step-00000012"]
    assert (outcome.best["step"], outcome.best["top1"], outcome.last["top1"]) == (4, 20.0, 90.0)


def test_a_step_that_overflows_in_fp16_is_left_out_and_scaled_down(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Trainer.backward

    def backward(self: loop.Trainer, *arguments: Any) -> Any:
        found = original(self, *arguments)
        if self.progress.step == 2:  # where it also would look at the gradients
            next(self.relay.parameters()).grad[0] = float("inf")
        return found

    monkeypatch.setattr(loop.Trainer, "backward", backward)
    outcome = train(tiny_images, tmp_path / "run", precision="fp16", log_every=3)
    assert outcome.finished
    lines = read_metrics(tmp_path / "run" / run_folder.METRICS)
    assert [line["step"] for line in lines if line["kind"] == "gradients"] == [6, 9, 12]
    state = json.loads((tmp_path / "run" / run_folder.CHECKPOINTS / "step-00000012" / "state.json").read_text())
    assert state["scaler"]["scale"] < 65536


@pytest.mark.parametrize("changes", [(), AUGMENTED], ids=["the paper's", "augmentation"])
def test_from_disk_the_number_of_workers_may_change(
    changes: tuple[str, ...], tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_images, tmp_path / "whole", images="disk", workers=0, changes=changes)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(tiny_images, tmp_path / "run", images="disk", workers=2, changes=changes)
    go_on(tmp_path / "run", workers=1)
    assert_identical(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


@pytest.mark.parametrize("change", AUGMENTED)
def test_all_augmentation_changes_the_training(
    change: str, tiny_images: Path, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change alone; the evaluation of the initial network, before any update, is the same."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train(tiny_images, tmp_path / "run", changes=(change,), diagnose_every=0)
        train(tiny_images, tmp_path / "plain", diagnose_every=0)
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_identical(final(tmp_path / "run", 1), final(tmp_path / "plain", 1))


def test_mixed_images_are_trained_on_soft_targets_and_counted_by_their_own_labels(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, labels = list[torch.Tensor](), list[torch.Tensor]()

    def noting(scores: torch.Tensor, own: torch.Tensor) -> dict[str, torch.Tensor]:
        labels.append(own)
        return top_errors(scores, own)

    def term(self: RelayLoss, name: str, output: Any, target: torch.Tensor) -> torch.Tensor:
        targets.append(target)
        return original(self, name, output, target)

    original, top_errors = RelayLoss.term, loop.top_errors
    monkeypatch.setattr(loop, "top_errors", noting)
    monkeypatch.setattr(RelayLoss, "term", term)
    train(tiny_images, tmp_path / "run", changes=("augmentation.mixup=1", "loss.label_smoothing=0.1"))
    assert all(target.shape == (4, 5) for target in targets)
    torch.testing.assert_close(torch.cat(targets).sum(1), torch.ones(4 * len(targets)))
    assert any(((target > 0.1) & (target < 0.9)).any() for target in targets)
    assert all(own.dtype == torch.int64 for own in labels)
    assert len(targets) == 2 * len(labels) == 24
    by_loss = torch.stack(targets[::2]), torch.stack(targets[1::2])
    assert torch.equal(*by_loss)  # both losses have the same targets
    shares = torch.stack([target.gather(1, own[:, None]) for target, own in zip(targets[::2], labels, strict=True)])
    assert (shares > 0).all()


def test_a_run_goes_on_from_an_older_checkpoint_that_is_named(tmp_path: Path, reference: Path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    outcome = go_on(tmp_path / "run" / run_folder.CHECKPOINTS / "step-00000004")
    assert outcome.finished
    assert_identical(final(tmp_path / "run"), final(reference))
    assert lines_of(tmp_path / "run") == lines_of(reference)


def test_auto_takes_the_newest_run_of_these_options_or_begins(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        first = session.train(requests.resolve(config_of(tiny_images, resume="auto")))
        other = session.train(requests.resolve(config_of(tiny_images, resume="auto", seed=1)))
    assert first.folder != other.folder
    assert first.folder.parent == Path("runs") / "table3-model-a-relay-tiny"
    assert requests.resolve(config_of(tiny_images, resume="auto", seed=2)).folder is None
    assert requests.resolve(config_of(tiny_images, resume="auto", precision="bf16")).folder is None
    changed = config_of(tiny_images, resume="auto", changes=("optimizer.lr=0.5",))
    assert requests.resolve(changed).folder is None
    again = session.train(requests.resolve(config_of(tiny_images, resume="auto")))
    assert (again.folder, again.finished) == (first.folder, True)
    assert_identical(final(first.folder), final(reference))
    before = sorted(path.stat().st_mtime_ns for path in first.folder.glob("checkpoints/*/*"))
    assert session.train(requests.resolve(config_of(tiny_images, resume="auto"))).finished, "nothing is left to do"
    assert sorted(path.stat().st_mtime_ns for path in first.folder.glob("checkpoints/*/*")) == before


def test_what_a_run_leaves_behind(tiny_images: Path, reference: Path) -> None:
    config = json.loads((reference / run_folder.CONFIG).read_text())
    assert config["recipe"]["values"]["optimizer.iterations"] == 12
    assert config["recipe"]["sources"]["optimizer.iterations"] == "the command line"
    assert config["options"]["data"] == [str(tiny_images)]
    assert config["options"]["images"] == "memory"
    assert config["classes"] == [f"class{label}" for label in range(5)]
    assert config["counts"] == {"train": [12] * 5, "val": [4] * 5}
    (start,) = json.loads((reference / run_folder.ENVIRONMENT).read_text())["starts"]
    assert start["versions"]["torch"] == torch.__version__.partition("+")[0] or start["versions"]["torch"]
    assert start["processes"] == 1
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12}( with local changes)?", start["commit"])
    lines = read_metrics(reference / run_folder.METRICS)
    assert [(line["kind"], line["step"]) for line in lines if line["kind"] != "gradients"] == [
        ("val", 4), ("train", 5), ("val", 8), ("train", 10), ("val", 12),
    ]  # fmt: skip
    looks = [line for line in lines if line["kind"] == "gradients"]
    assert [line["step"] for line in looks] == [3, 6, 9, 12]
    assert -1 <= looks[0]["cosines"]["aux+primary"]["aux, primary"] <= 1
    assert set(looks[0]["segments"]) == {"aux", "aux+primary", "primary", "head aux"}
    assert len(looks[0]["layers"]) == 22 + 3, "the weight layers of model A and of its head"
    train_line = next(line for line in lines if line["kind"] == "train")
    assert set(train_line["loss"]) == {"primary", "aux"}
    assert 0 <= train_line["data_wait"] < 1
    seconds = [line["seconds"] for line in lines if line["kind"] == "val"]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert (reference / run_folder.LOG).read_text().count("val. error") == 3
    assert list((reference / run_folder.TENSORBOARD).glob("events.out.*"))


def test_the_model_file_holds_the_network_as_it_was_validated(
    tiny_images: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = read_model(reference / run_folder.MODEL)
    trained = {key: t for key, t in final(reference).items() if key.startswith("model/model.")}
    assert {f"model/model.{key}" for key in model.state} == set(trained)
    assert all(torch.equal(tensor, trained[f"model/model.{key}"]) for key, tensor in model.state.items())
    assert "step 12" in model.about
    assert cli.main(["predict", str(reference / run_folder.MODEL), str(tiny_images / "val" / "class1" / "0.png")]) == 0
    assert "class" in capsys.readouterr().out


def test_a_segments_factor_scales_its_learning_rate_alone(tiny_images: Path, tmp_path: Path) -> None:
    """With a factor of 0, a segment does not change, and everything else does."""
    train(tiny_images, tmp_path / "run", changes=("optimizer.segment_lr.aux=0",))
    torch.manual_seed(0)
    start = requests.resolve(config_of(tiny_images)).recipe
    from relaylab.models.building import build_relay
    from relaylab.train.segments import segments_of

    torch.manual_seed(0)
    begun, found = build_relay(start).state_dict(), segments_of(start)
    ended = final(tmp_path / "run")
    for name, segment in found.of.items():
        assert torch.equal(begun[name], ended[f"model/{name}"]) == (segment == "aux"), (name, segment)


def test_training_learns(tiny_images: Path, tmp_path: Path) -> None:
    """Five colours, 60 updates; chance level is 80 %."""
    changes = ("optimizer.iterations=60", "optimizer.evaluate_every=60", "optimizer.batch_size=10", "scheme=relay")
    changes += ("network.width=8", "plan.auxiliary.aux.head=linear")
    outcome = train(tiny_images, tmp_path / "run", recipe="table1-vgg13-imagenet", short=True, changes=changes)
    assert outcome.last["top1"] <= 50, outcome.last


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_all_that_is_wrong_with_the_options_is_told_at_once(
    tiny_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--set", "optimizer.lr=nan", "optimizer.moment=1", "--accumulate", "3", "--keep", "0", "--seed", "-1"]
    wrong += ["--devices", "0", "--val-data", "nowhere"]
    assert run("train", "table3-model-a-relay", "--scale", "tiny", "--data", tiny_images, *wrong) == 2
    told = capsys.readouterr().err
    assert told.startswith("relaylab: 5 problems:")
    for part in (
        "--keep must be at least 1",
        "--seed must",
        "optimizer.moment; nearest: optimizer.momentum",
        "--devices must be at least 1",
        "nowhere",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "a recipe is required"),
        (("table3-model-a-rely",), "nearest: table3-model-a-relay"),
        (
            ("table4-model-a-relay",),
            "trained by table3-model-a-relay: train table3-model-a-relay",
        ),
        (("table3-model-a-relay", "--set", "optimizer.lr=inf"), "expected a finite number, above 0"),
        (("table3-model-a-relay", "--set", "optimizer.segment_lr.auxiliary=2"), "there are aux, aux+primary, primary"),
        (("table3-model-a-relay", "--set", "network.num_classes=7"), "has 5 classes, and the recipe's network 7"),
        (("table3-model-a-relay", "--batch-norm", "synchronised"), "requires GPUs"),
        (("table3-model-a-relay", "--strategy", "fsdp"), "several devices"),
        (("table3-model-a-relay", "--accelerator", "cuda"), "no GPU"),
        (("table3-model-a-relay", "--devices", "3"), "must be divisible by devices x accumulate (3 x 1)"),
        (
            ("table3-model-a-relay", "--accumulate", "4", "--set", "augmentation.cutmix=1"),
            "optimizer.batch_size 4 leaves one image per micro-batch: use at least 2 x devices x accumulate",
        ),
        (
            ("table6-inception-v3-relay", "--accumulate", "4"),
            "with one image per micro-batch, model.Mixed_7a.branch3x3_2.bn would normalise a single value",
        ),
        (("table3-model-a-relay", "--resume", "nowhere"), "no such run or checkpoint"),
        (("table3-model-a-relay", "--resume", "."), "expected the folder of a run"),
    ],
)
def test_bad_input_is_explained_before_the_first_step(
    arguments: tuple[str, ...],
    said: str,
    tiny_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop.Trainer, "step", lambda *_: pytest.fail("a step was made"))
    assert run("train", *arguments, "--scale", "tiny", "--data", tiny_images) == 2
    assert said in capsys.readouterr().err
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not left, "nothing is left behind of a run that never began"


def test_missing_images_and_missing_space_are_told_before_the_first_step(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "table3-model-a-relay") == 2
    assert "--data is required" in capsys.readouterr().err
    assert run("train", "table3-model-a-relay", "--data", tmp_path / "nowhere") == 2
    assert "no such file or folder" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(loop.Trainer, "step", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(InputError, match=r"checkpoints need .* MB free: free some space"):
        train(tiny_images, tmp_path / "run")
    monkeypatch.undo()
    assert train(tiny_images, tmp_path / "run", resume="auto").finished, "the folder can be used again"


def test_an_unreadable_validation_image_is_found_before_the_first_step(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = shutil.copytree(tiny_images, tmp_path / "images")
    (tree / "val" / "class3" / "2.png").write_bytes(b"no image")
    monkeypatch.setattr(loop.Trainer, "step", lambda *_: pytest.fail("a step was made"))
    for images in ("memory", "disk"):
        with pytest.raises(InputError, match=r"unreadable image .*class3/2.png"):
            train(tree, tmp_path / images, images=images)


def test_a_loss_that_reaches_nothing_of_a_layer_leaves_it_alone_and_says_so(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The primary window ends above the auxiliary head: the layers between them are in no window."""
    changes = ("plan.primary.bottom=segment5", "plan.auxiliary.aux.top=segment3")
    train(tiny_images, tmp_path / "run", changes=changes)
    assert (
        "warning: the windows of primary and aux do not overlap (segment4 is between them and is not trained): "
        "this is not relay; lower plan.primary.bottom\n"
    ) in capsys.readouterr().err
    train(tiny_images, tmp_path / "high", changes=("plan.auxiliary.aux.bottom=segment2",))
    assert "warning: no loss reaches model.segment1." in capsys.readouterr().err


def test_a_run_is_never_overwritten(tiny_images: Path, tmp_path: Path, reference: Path) -> None:
    with pytest.raises(InputError, match=r"already contains a run; resume it with --resume"):
        train(tiny_images, reference)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        train(tiny_images, tmp_path)


def test_what_a_run_is_cannot_change_when_it_goes_on(tiny_images: Path, tmp_path: Path, reference: Path) -> None:
    with pytest.raises(InputError, match=r"has seed 0, not 3: this option cannot change when a run resumes"):
        go_on(reference, seed=3)
    with pytest.raises(InputError, match="has seed 0, not 3: choose a different --out"):
        train(tiny_images, reference, seed=3, resume="auto")
    shutil.copytree(reference, tmp_path / "run")
    stored = json.loads((tmp_path / "run" / run_folder.CONFIG).read_text())
    stored["recipe"]["values"]["optimizer.momentum"] = 0.5
    (tmp_path / "run" / run_folder.CONFIG).write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"optimizer.momentum was 0.5 and is 0.9"):
        go_on(tmp_path / "run")
    (tmp_path / "run" / run_folder.CONFIG).write_text("{")
    with pytest.raises(InputError, match=r"config.json is damaged"):
        go_on(tmp_path / "run")


def test_other_images_than_before_are_refused(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(tiny_images, tmp_path / "run")
    other = shutil.copytree(tiny_images, tmp_path / "images")
    (other / "train" / "class0" / "0.png").unlink()
    with pytest.raises(InputError, match=r"the sampler's state has images 60; this sampler has 59"):
        go_on(tmp_path / "run", data=(other,))


PAGE = ROOT / "docs" / "how-to" / "train.md"


def test_the_training_page_names_what_a_run_leaves_behind() -> None:
    text = PAGE.read_text()
    for name in (
        run_folder.CONFIG,
        run_folder.ENVIRONMENT,
        run_folder.METRICS,
        run_folder.LOG,
        run_folder.CHECKPOINTS,
        run_folder.TENSORBOARD,
        run_folder.MODEL,
    ):
        assert f"    {name}" in text, name


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=str)
def test_early_release_trains_to_the_same_parameters(
    options: dict[str, Any], tiny_images: Path, tmp_path: Path
) -> None:
    """Within 1e-5 of the largest value, in single precision, over six updates; heads draw no dropout here."""
    changes = ("plan.auxiliary.aux.head=linear", *SHORT)
    ends: dict[str, dict[str, torch.Tensor]] = {}
    for name, more in {
        "usual": {},
        "early": {"early_release": True},
        "multi-loss": {"changes": (*changes, "scheme=multi_loss")},
    }.items():
        train(tiny_images, tmp_path / name, **{"changes": changes, "short": True, **options, **more})
        ends[name] = final(tmp_path / name, 6)

    def furthest(one: str, other: str) -> float:
        pairs = [(ends[one][name], tensor) for name, tensor in ends[other].items() if tensor.is_floating_point()]
        return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)

    assert furthest("early", "usual") <= 1e-5
    assert furthest("multi-loss", "usual") > 1e-3  # negative control
    assert lines_of(tmp_path / "early")[-1].keys() == lines_of(tmp_path / "usual")[-1].keys()


def test_early_release_needs_whole_parameters(tiny_images: Path) -> None:
    with pytest.raises(InputError, match=r"--early-release does not support --strategy fsdp"):
        requests.resolve(config_of(tiny_images, early_release=True, strategy="fsdp", devices=2))


def test_early_release_needs_windows_with_one_end(tiny_images: Path) -> None:
    several = ("plan.primary.bottom=none", "plan.primary.after=one, two")
    with pytest.raises(InputError, match=r"--early-release does not support plan.primary.after=one, two: .*without it"):
        requests.resolve(config_of(tiny_images, early_release=True, changes=several))
    requests.resolve(config_of(tiny_images, early_release=True, changes=(*several, "scheme=standard")))


@pytest.mark.filterwarnings("default")  # the compiler reads .grad of intermediate tensors, and warns itself of that
def test_compiled_layers_outside_of_overlaps_train_to_the_same_parameters(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within 1e-5 of the largest value, in single precision, over four updates. Without code generation: it is slow."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    changes = ("optimizer.iterations=4", "optimizer.evaluate_every=4")
    train(tiny_images, tmp_path / "eager", short=True, changes=changes)
    torch._dynamo.reset()
    train(tiny_images, tmp_path / "compiled", short=True, changes=changes, compile=True)
    torch._dynamo.reset()
    told = re.search(r"compiled: (.*)", capsys.readouterr().err)
    assert told is not None
    assert told[1].split(", ") == [*(f"model.segment{n}" for n in (1, 2, 3, 5)), "model.classifier", "heads.aux"]
    eager, compiled = final(tmp_path / "eager", 4), final(tmp_path / "compiled", 4)
    for name, tensor in eager.items():
        assert (compiled[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name
    looks = [line for line in read_metrics(tmp_path / "compiled" / run_folder.METRICS) if line["kind"] == "gradients"]
    assert "cosines" not in looks[0], "angles need the graph twice"
