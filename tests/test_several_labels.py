"""Multi-label images: targets, average precision, training, comparison, prediction, and errors."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from PIL import Image
from sklearn.metrics import average_precision_score

from relaylab import cli
from relaylab.data.datasets import ImageDataset, InMemoryDataset, OnDiskDataset
from relaylab.data.geometry import CropSpec
from relaylab.data.loader import evaluation_loader, training_loader
from relaylab.data.memory import decode_all
from relaylab.data.sampling import ShuffledSampler
from relaylab.data.sources.opening import open_source
from relaylab.errors import InputError
from relaylab.evaluate.testing import Scorer
from relaylab.models.file import read_model
from relaylab.report.comparison import open_runs
from relaylab.report.page import render_page
from relaylab.report.summary import summary, verdict_of
from relaylab.train import requests, run_folder, session
from relaylab.train.metrics import average_precision, deciding, guessed_precision_error
from relaylab.train.options import TrainOptions
from relaylab.train.records import read_metrics
from relaylab.train.validation import Validation
from test_train import assert_identical, final, go_on, lines_of, stop_after
from test_train_distributed import assert_close

CLASSES = ("red", "green", "blue")
NETWORK = ("network.num_classes=3", "network.width=4", "network.convs=1", "optimizer.batch_size=8")
LABELS = ("loss.function=binary", "images.sampling=shuffled")
SHORT = ("optimizer.iterations=12", "optimizer.evaluate_every=4")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 10x10 images, train.csv and val.csv. Bright channels are the labels; some images have none."""
    root, random = tmp_path_factory.mktemp("several"), np.random.default_rng(0)
    (root / "images").mkdir()
    for part, count in (("train", 64), ("val", 23)):
        lines = ["image,camera,red,green,blue"]
        for number in range(count):
            flags = random.random(3) < (0.5, 0.4, 0.3)
            pixels = random.normal(60 + 120 * flags, 20, (10, 10, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "images" / f"{part}{number}.png")
            lines.append(f"{part}{number},x,{','.join('01'[int(flag)] for flag in flags)}")
        (root / f"{part}.csv").write_text("\n".join(lines))
    return root


def config_of(root: Path, out: Path, *changes: str, **options: Any) -> TrainOptions:
    """Options of a run, with `changes` in place of those by default."""
    values = dict(text.split("=") for text in (*NETWORK, *LABELS, *SHORT, *changes))
    given: dict[str, Any] = {"log_every": 4, "diagnose_every": 0, "workers": 0, **options}
    given = {"val_data": (root / "images", root / "val.csv"), **given}
    return TrainOptions(
        recipe="digits",
        data=(root / "images", root / "train.csv"),
        out=out,
        changes=tuple(f"{name}={value}" for name, value in values.items()),
        **given,
    )


def train(root: Path, out: Path, *changes: str, **options: Any) -> session.Outcome:
    return session.train(requests.resolve(config_of(root, out, *changes, **options)))


def test_average_precision_by_hand() -> None:
    """Ranks 1 and 3 of 4 are positive: (1 / 1 + 2 / 3) / 2; a class without positives does not count."""
    scores = torch.tensor([[4.0, 1.0, 0.0], [3.0, 2.0, 5.0], [2.0, 3.0, 1.0], [1.0, 4.0, 1.0]])
    targets = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert average_precision(scores, targets) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert average_precision(-scores, targets) != pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)  # negative control
    assert np.isnan(average_precision(scores * torch.nan, targets))


def test_average_precision_is_scikit_learns() -> None:
    random = np.random.default_rng(0)
    scores, targets = random.normal(size=(200, 7)).round(1), random.random((200, 7)) < 0.2  # with ties
    expected = np.mean([average_precision_score(targets[:, i], scores[:, i]) for i in range(7)])
    assert average_precision(torch.from_numpy(scores), torch.from_numpy(targets)) == pytest.approx(expected)


def datasets(images: Path) -> tuple[ImageDataset, ImageDataset]:
    source = open_source([images / "images", images / "val.csv"])
    crop_spec = CropSpec(size=8, short_side=10)
    return InMemoryDataset(decode_all(source, crop_spec), crop_spec), OnDiskDataset(source, crop_spec, workers=0)


def test_batches_carry_the_targets_of_their_images(images: Path) -> None:
    for dataset in datasets(images):
        sampler = ShuffledSampler(np.zeros(23, np.int64), seed=0)
        for batch in (next(iter(dataset.training(sampler, 9, 0))), next(iter(dataset.evaluation(9)))):
            assert (batch.labels.dtype, batch.labels.shape) == (torch.float32, (9, 3))
            bright = batch.images.float().mean(dim=(1, 2)) > 120
            assert torch.equal(batch.labels > 0, bright)
            assert torch.equal(batch.labels, torch.from_numpy(dataset.labels[batch.indices.numpy()]).float())
        subset = dataset.subset(np.array([4, 2]))
        assert np.array_equal(subset.labels, dataset.labels[[4, 2]])


def test_workers_send_targets(images: Path) -> None:
    source = open_source([images / "images", images / "val.csv"])
    crop_spec = CropSpec(size=8, short_side=10)
    here, there = (evaluation_loader(source, crop_spec, batch_size=12, workers=workers) for workers in (0, 1))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.labels, other.labels)


def test_an_unreadable_image_is_replaced_with_the_others_targets(images: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"")
    for number in range(2):
        (tmp_path / "images" / f"{number}.png").write_bytes((images / "images" / f"train{number}.png").read_bytes())
    (tmp_path / "list.csv").write_text("image,a,b\nbad,1,1\n0,0,1\n1,0,0\n")
    source = open_source([tmp_path / "images", tmp_path / "list.csv"])
    sampler = ShuffledSampler(np.zeros(3, np.int64), seed=0)
    batch = next(iter(training_loader(source, sampler, CropSpec(size=8, short_side=10), batch_size=3)))
    assert [fault.index for fault in batch.faults] == [0]
    assert source.targets is not None
    assert torch.equal(batch.labels, torch.from_numpy(source.targets[batch.indices.numpy()]).float())
    assert 0 not in batch.indices.tolist()
    (tmp_path / "only.csv").write_text("image,labels\nbad,a;b\n")
    only = open_source([tmp_path / "images", tmp_path / "only.csv"])
    loader = training_loader(only, ShuffledSampler([0], seed=0), CropSpec(size=8, short_side=10), batch_size=1)
    with pytest.raises(InputError, match=r"^\S*bad.png cannot be read"):
        next(iter(loader))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_scores_of_all_processes_come_in_the_images_order(ranks: int, images: Path) -> None:
    """Some processes have one image more than others, which are padded with the first image."""
    dataset, scores = datasets(images)[0], torch.arange(69.0).view(23, 3)
    shares = [[*range(rank, 23, ranks)] for rank in range(ranks)]
    every = torch.stack([scores[share + [0] * (len(shares[0]) - len(share))] for share in shares])
    for rank in range(ranks):
        fabric: Any = SimpleNamespace(world_size=ranks, global_rank=rank, all_gather=lambda _own: every)
        validation = Validation(dataset, torch.nn.Identity(), torch.nn.Identity(), fabric)  # pyright: ignore
        kept = [every[rank, :2], every[rank, 2:]]  # of two batches
        assert torch.equal(validation._gathered(kept), scores)  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(scope="module")
def reference(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    train(images, out, keep=9)
    return out


def test_training_learns(images: Path, tmp_path: Path) -> None:
    outcome = train(images, tmp_path, "optimizer.iterations=160", "optimizer.evaluate_every=80")
    lines = read_metrics(tmp_path / run_folder.METRICS)
    losses = [line["loss"]["primary"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    counts = json.loads((tmp_path / run_folder.CONFIG).read_text())
    assert counts["images"] == {"train": 64, "val": 23}
    guess = guessed_precision_error(counts["counts"]["val"], 23)
    assert 40 < guess < 80
    assert outcome.last["map_error"] < 0.5 * guess
    assert outcome.last["map"] == pytest.approx(100 - outcome.last["map_error"])


def test_the_records_of_a_run(images: Path, reference: Path) -> None:
    lines = read_metrics(reference / run_folder.METRICS)
    kinds = {line["kind"]: line for line in lines}
    assert set(kinds["val"]) == {"kind", "step", "map_error", "map", "loss", "seconds"}
    assert not {"top1", "top5", "map"} & set(kinds["train"])
    assert deciding(kinds["val"]).title == "100 - mean average precision"
    assert (
        f"step 12: val. mean average precision {kinds['val']['map']:.2f} %" in (reference / run_folder.LOG).read_text()
    )
    model = read_model(reference / run_folder.MODEL)
    assert model.has_several_labels
    assert model.about.endswith(f"val. mean average precision {kinds['val']['map']:.2f} %")
    source = open_source([images / "images", images / "val.csv"], classes=CLASSES)
    batch = next(iter(evaluation_loader(source, CropSpec(size=8, short_side=10), batch_size=23)))
    scores = model.model()(Scorer(model).normalised(batch.images))
    assert source.targets is not None
    expected = 100 * average_precision_score(source.targets, scores.detach().numpy())
    assert kinds["val"]["map"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["plain", "from disk, mixed, averaged"])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    kind: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = () if kind == "plain" else ("augmentation.mixup=0.4", "augmentation.cutmix=1", "optimizer.ema_decay=0.9")
    options = {} if kind == "plain" else {"images": "disk"}
    whole = train(images, tmp_path / "whole", *changes, **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        train(images, tmp_path / "stopped", *changes, **options)
    resumed = go_on(tmp_path / "stopped")
    assert_identical(final(tmp_path / "stopped"), final(tmp_path / "whole"))
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "whole")
    assert (resumed.last, resumed.best) == (whole.last, whole.best)


@pytest.mark.parametrize("options", [{"early_release": True}, {"accumulate": 2}, {"images": "disk"}], ids=str)
def test_early_release_parts_and_images_on_disk_train_alike(
    options: dict[str, Any], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, input: input)
    outcomes = [train(images, tmp_path / "plain", keep=9), train(images, tmp_path / "other", **options)]
    assert outcomes[0].last["map"] == outcomes[1].last["map"]
    assert_close(final(tmp_path / "other"), final(tmp_path / "plain"))
    with pytest.raises(AssertionError):  # negative control
        assert_close(final(tmp_path / "plain", 8), final(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "loss.function=cross-entropy",
            r"loss.function is cross-entropy, .* train.csv are multi-label: --set loss.function=b",
        ),
        ("images.sampling=class-aware", r"images.sampling is class-aware, .*: --set images.sampling=shuffled"),
        ("loss.class_weights=balanced", r"loss.class_weights is balanced, .*: --set loss.class_weights=none"),
        ("images.long_tail=3", r"images.long_tail is 3.*: --set images.long_tail=none"),
        ("network.num_classes=4", r"train.csv has 3 classes, and the recipe's network 4"),
    ],
)
def test_what_needs_one_class_for_each_image_is_refused(
    change: str, message: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(images, tmp_path / "run", change)
    assert not (tmp_path / "run").exists()


def test_both_parts_have_several_labels_and_some_are_positive(images: Path, tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text("image,red,green,blue\nval0,1,0,0\nval1,0,1,0\nval2,0,0,1\n")
    val_data = (images / "images", tmp_path / "val.csv")
    with pytest.raises(InputError, match=r"images of train.csv are multi-label, those of val.csv single-label"):
        train(images, tmp_path / "run", val_data=val_data)
    (tmp_path / "val.csv").write_text("image,red,green,blue\nval0,0,0,0\n")
    with pytest.raises(InputError, match=r"val.csv: no validation image has a label"):
        train(images, tmp_path / "run", val_data=val_data)


def test_images_are_set_aside_from_all_alike(images: Path, tmp_path: Path) -> None:
    outcome = train(images, tmp_path / "run", "images.held_out=0.25", val_data=())
    about = json.loads((tmp_path / "run" / run_folder.CONFIG).read_text())
    assert about["images"] == {"train": 48, "val": 16}
    assert "map" in outcome.last


@pytest.fixture(scope="module")
def compared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of two schemes with tuned learning rates."""
    out = tmp_path_factory.mktemp("compared")
    data = ["--data", images / "images", images / "train.csv", "--val-data", images / "images", images / "val.csv"]
    words = ["compare", "digits", *data, "--set", *NETWORK, *LABELS, *SHORT, "--schemes=standard,relay", "--seeds=0,1"]
    words += ["--jobs=1", "--out", out / "it", "--tune", "optimizer.lr=0.02,0.05", "--tune-share=0.34"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relaylab.train.tuning.MOST_ADDED", 0)
        assert cli.main([*map(str, words), "--log-every=4"]) == 0
    return out / "it"


def test_a_comparison_speaks_of_average_precision(compared: Path) -> None:
    comparison = open_runs([compared])
    table = summary(comparison)
    measure = "100 - mean average precision, %"
    assert table.header[:4] == ("method", "runs", measure, "Relay BP minus this method, 100 - mAP")
    run = comparison.runs[0]
    positives = [count / 23 for count in run.counts["val"]]
    guess = 100 - 100 * sum(positives) / 3
    assert table.rows[-1][:3] == ("chance level", "", f"{guess:.2f}")
    assert comparison.errors()["standard"][0] == run.last["map_error"]
    said = verdict_of(comparison)
    basis = "95 % confidence intervals over 2 paired seeds (t)"
    assert f"Points are 100 - mean average precision, in per cent; {basis}; chance level {guess:.2f} %." in said
    results = json.loads((compared / "comparison.json").read_text())
    assert results["guessing"] == pytest.approx(guess)
    assert "BinaryCrossEntropy()" in (compared / "relay.py").read_text()
    subprocess.run([sys.executable, str(compared / "relay.py")], check=True, timeout=120)
    text = (compared / "comparison.md").read_text()
    page = render_page(comparison, images=True)
    for shown in (text, page):
        assert (
            "top-1" not in shown.partition("Results of the paper")[0].partition("Use it in your own training loop")[0]
        )
        assert "100 - mean average precision" in shown
    assert "23 validation images" in page
    assert "points of error)" not in page
    assert 'alt="Training images of the class red"' in page


def test_prediction_lists_the_classes_that_are_more_likely_than_not(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(images, tmp_path / "run", "optimizer.iterations=96", "optimizer.evaluate_every=96")
    capsys.readouterr()
    lines = (images / "val.csv").read_text().splitlines()[1:]
    flags = {line.split(",")[0]: line.split(",")[2:] for line in lines}
    chosen = {number: next(name for name, own in flags.items() if own.count("1") == number) for number in (0, 2)}
    paths = [str(images / "images" / f"{name}.png") for name in chosen.values()]
    words = ["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(tmp_path / "program")]
    assert cli.main(words) == 0
    capsys.readouterr()
    for model in (tmp_path / "run", *(tmp_path / "program").glob("*.onnx")):
        assert cli.main(["predict", str(model), *paths, "--format=json"]) == 0
        none, two = json.loads(capsys.readouterr().out)
        assert none["classes"] == []
        expected = {name for name, flag in zip(CLASSES, flags[chosen[2]], strict=True) if flag == "1"}
        assert {one["name"] for one in two["classes"]} == expected
        assert all(0.5 <= one["probability"] <= 1 for one in two["classes"])
    assert cli.main(["predict", str(tmp_path / "run"), *paths]) == 0
    _, _, none = capsys.readouterr().out.partition("no class has a probability of 50 % or more; the most likely:\n")
    likely = [line.split() for line in none.splitlines()[: len(CLASSES)]]
    assert {name for _, _, name in likely} == set(CLASSES)
    assert 50 > float(likely[0][0]) >= float(likely[-1][0])


def test_evaluation_and_probes_refuse_with_a_reason(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(reference)]) == 2
    assert "is a multi-label network, which `relaylab eval` does not support" in capsys.readouterr().err
    assert cli.main(["diagnose", "information", str(reference)]) == 2
    assert "multi-label images are not supported" in capsys.readouterr().err


def test_the_demo_refuses_with_a_reason(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = [str(images / "images"), str(images / "train.csv")]
    val = [str(images / "images"), str(images / "val.csv")]
    assert cli.main(["demo", "--data", *data, "--val-data", *val, "--out", str(tmp_path / "demo")]) == 2
    assert "the demo does not support multi-label images; use `relaylab recipes new`" in capsys.readouterr().err


def test_a_proposed_recipe_suits_several_labels(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(images / "images"), str(images / "train.csv")]
    words = ["recipes", "new", "torchvision:resnet18", *data, "--hold-out=0.25", "--size=32"]
    assert cli.main([*words, "--out", str(tmp_path / "mine.toml")]) == 0
    text = (tmp_path / "mine.toml").read_text()
    assert 'function = "binary"  # the images are multi-label' in text
    assert 'sampling = "shuffled"  # the images are multi-label' in text
    assert "48 training images, multi-label, 3 classes of" in capsys.readouterr().out
