"""Protocols, stored scores, error rates and ensembles; and the command on a tiny run."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from torchmetrics.functional.classification import multiclass_accuracy
from torchvision.transforms import functional as vision

from relaylab.cli import main
from relaylab.data.sources.opening import open_source
from relaylab.errors import InputError
from relaylab.evaluate.ensembles import combined, fit_weights, halves
from relaylab.evaluate.error_rates import confusion, difference, error_rates, interval, misses, per_class_errors
from relaylab.evaluate.protocols import View, average, cut, default_scales, views_of
from relaylab.evaluate.results import baseline
from relaylab.evaluate.scores import CHUNK, ImageList, ScoreFolder, check_alike, describe_images
from relaylab.evaluate.testing import Scorer
from relaylab.evaluate.trained import Trained
from relaylab.models import model_a
from relaylab.models.file import InputConfig, ModelFile, read_model, save_model
from relaylab.recipes.schema import NetworkConfig

MEAN = (100.0, 110.0, 120.0)


def tiny_model(*, crop: int = 32, resize: int = 36, mean_image: Tensor | None = None, **config: object) -> ModelFile:
    torch.manual_seed(0)
    network = NetworkConfig(architecture="model_a", num_classes=5, image_size=crop, width=4, pyramid=(2, 1))
    state = model_a(5, width=4, image_size=crop, pyramid=(2, 1)).state_dict()
    given = InputConfig(resize=resize, crop=crop, mean=MEAN, **config)  # pyright: ignore[reportArgumentType]
    return ModelFile(network=network, classes=tuple("abcde"), input=given, state=state, mean_image=mean_image, about="")


def images_of(count: int, classes: int = 4, fingerprint: str = "f") -> ImageList:
    labels = torch.arange(count) % classes
    names = tuple(f"{i}.jpg" for i in range(count))
    return ImageList("made up", fingerprint, tuple(map(str, range(classes))), labels, names)


def test_default_scales_are_the_papers_in_proportion() -> None:
    assert default_scales(InputConfig(mean=MEAN)) == [224, 256, 320, 384, 448]
    assert default_scales(InputConfig(mean=MEAN, crop=64, resize=72)) == [64, 72, 90, 108, 126]
    with pytest.raises(InputError, match="scale 200: expected at least 224 pixels"):
        views_of("dense", InputConfig(mean=MEAN), [200])
    with pytest.raises(InputError, match="unknown protocol"):
        views_of("sparse", InputConfig(mean=MEAN))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(80, 100), (100, 80), (64, 64)])
def test_what_passes_look_at_is_what_torchvision_cuts(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    config = InputConfig(mean=MEAN, crop=32, resize=36)
    image = vision.to_pil_image(pixels)
    resized = vision.resize(image, [36])  # pyright: ignore[reportArgumentType]
    expected = [np.asarray(each) for each in vision.five_crop(resized, [32])]  # pyright: ignore
    ours = cut(pixels, View("ten-crop"), config).numpy()
    for crop, other in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(crop, other)
    single = cut(pixels, View("single-crop"), config).numpy()
    assert np.abs(single[0].astype(int) - expected[4].astype(int)).max() <= 2
    whole = cut(pixels, View("dense", 50), config).numpy()
    np.testing.assert_array_equal(whole[0], np.asarray(vision.resize(image, [50])))  # pyright: ignore
    square = cut(pixels, View("dense", 50), InputConfig(mean=MEAN, crop=32, resize=36, how="both sides"))
    assert square.shape == (1, 50, 50, 3)


def test_scores_are_mean_probabilities_over_crops_and_mirror_images() -> None:
    model = tiny_model(std=(50.0, 60.0, 70.0))
    scorer, plain = Scorer(model), model.model()
    images = torch.randint(0, 256, (3, 5, 32, 32, 3), dtype=torch.uint8)
    x = (images.permute(0, 1, 4, 2, 3).float() - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(
        [50.0, 60.0, 70.0]
    ).view(3, 1, 1)
    with torch.no_grad():
        both = torch.stack([plain(view.flatten(0, 1)) for view in (x, x.flip(4))]).softmax(2).unflatten(1, (3, 5))
    assert_close(scorer(View("ten-crop"), images).exp(), both.mean(dim=(0, 2)), rtol=1e-4, atol=1e-5)
    first = images[:, :1]
    assert_close(scorer(View("single-crop"), first).exp(), both[0, :, 0], rtol=1e-4, atol=1e-5)
    assert_close(scorer(View("dense", 32, flip=True), first).exp(), both[:, :, 0].mean(0), rtol=1e-4, atol=1e-5)


def test_channels_and_mean_images_are_those_of_the_network() -> None:
    mean_image = torch.rand(32, 32, 3) * 200
    images = torch.randint(0, 256, (2, 1, 32, 32, 3), dtype=torch.uint8)
    swapped = tiny_model(mean_image=mean_image, channels="BGR")
    straight = tiny_model(mean_image=mean_image)
    ours = Scorer(swapped)(View("single-crop"), images.flip(4))
    assert_close(ours, Scorer(straight)(View("single-crop"), images))
    assert not torch.allclose(ours, Scorer(tiny_model())(View("single-crop"), images))


def test_figures_on_scores_that_can_be_counted_by_hand() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0], [0, 3, 2, 1], [3, 2, 1, 0], [0, 1, 2, 3]])
    labels = torch.tensor([0, 0, 1, 3])
    found = error_rates(scores, labels)
    assert found.top1.value == 50
    assert found.top5.value == 0, "of four classes the five likeliest are all"
    assert found.mean_per_class == pytest.approx((50 + 100 + 0) / 3)
    per_class = per_class_errors(scores, labels)
    np.testing.assert_array_equal(per_class, [50, 100, np.nan, 0])
    assert confusion(scores, labels).tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(misses(scores, labels, 2), [0, 100, 0, 0])
    with pytest.raises(InputError, match="are NaN"):
        error_rates(scores * float("nan"), labels)
    with pytest.raises(InputError, match="unlabelled images have no error"):
        error_rates(scores, labels - 1)
    with pytest.raises(InputError, match="3 rows of scores for 4 images"):
        error_rates(scores[:3], labels)


def test_error_rates_are_torchmetrics_where_no_scores_are_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(500, 12, generator=generator)
    labels = torch.randint(0, 12, (500,), generator=generator)
    found = error_rates(scores, labels)
    for ours, top, mean in [
        (found.top1.value, 1, "micro"),
        (found.top5.value, 5, "micro"),
        (found.mean_per_class, 1, "macro"),
    ]:
        theirs = multiclass_accuracy(scores, labels, 12, average=mean, top_k=top)  # pyright: ignore
        assert ours == pytest.approx(100 * (1 - float(theirs)), abs=1e-3)
    equal = torch.zeros(3, 4)
    assert misses(equal, torch.tensor([0, 1, 3]), 2).tolist() == [0, 0, 100], "of equal ones the lower class"


def test_intervals_are_those_of_drawing_images_again() -> None:
    random = np.random.default_rng(0)
    values = random.choice([0.0, 100.0], 400, p=[0.7, 0.3])
    ours = interval(values)
    means = np.array([values[random.integers(0, 400, 400)].mean() for _ in range(10_000)])
    assert ours.value == values.mean()
    assert ours.low == pytest.approx(np.quantile(means, 0.025), abs=0.3)
    assert ours.high == pytest.approx(np.quantile(means, 0.975), abs=0.3)


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    random = np.random.default_rng(0)
    base = random.choice([0.0, 100.0], 1000)
    better = np.where(random.random(1000) < 0.1, 0.0, base)
    paired = difference([better], [base])
    shuffled = difference([random.permutation(better)], [base])
    assert paired.high < 0 < paired.high - paired.low < 0.7 * (shuffled.high - shuffled.low)
    assert difference([base], [base]).high == 0
    two = difference([better, base], [base, base])
    assert two.value == pytest.approx(paired.value / 2)
    with pytest.raises(InputError, match="same images"):
        difference([better], [base[1:]])


def test_ensembles() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 50, 4).log_softmax(2)
    assert_close(combined([a, b], "average").exp(), (a.exp() + b.exp()) / 2)
    product = (a.exp() * b.exp()).sqrt()
    assert_close(combined([a, b], "product").exp(), product / product.sum(dim=1, keepdim=True))
    assert_close(combined([a, b], "learnt-weights", torch.tensor([0.25, 0.75])).exp(), a.exp() / 4 + 3 * b.exp() / 4)
    with pytest.raises(InputError, match="fit them first"):
        combined([a, b], "learnt-weights")
    with pytest.raises(InputError, match="same images"):
        combined([a, b[:3]], "average")


def test_learnt_weights_find_the_member_that_knows() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (400,))
    knows = (3.0 * torch.nn.functional.one_hot(labels, 4) + torch.randn(400, 4)).log_softmax(1)
    guesses = torch.randn(400, 4).log_softmax(1)
    weights = fit_weights([guesses, knows], labels)
    assert weights[1] > 0.95
    assert_close(weights.sum(), torch.tensor(1.0))
    best = [
        float(combined([guesses, knows], "learnt-weights", torch.tensor([1 - w, w]))[range(400), labels].mean())
        for w in (0.5, float(weights[1]))
    ]
    assert best[1] > best[0]


def test_halves_are_apart_and_alike() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 2])
    first, second = halves(labels)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(7))
    assert labels[first].bincount().tolist() == [2, 2, 1]


def test_scores_come_back_and_nothing_else_does(tmp_path: Path) -> None:
    images = images_of(CHUNK + 10)
    folder = ScoreFolder(tmp_path, images)
    folder.add("net", {"sha256": "s"})
    scores = torch.randn(len(images), 4).log_softmax(1)
    with pytest.raises(InputError, match="no complete dense scores of net"):
        folder.protocol("net", "dense")
    for number, chunk in enumerate(folder.chunks):
        folder.write("net", "dense-32", number, scores[list(chunk)])
    again = ScoreFolder(tmp_path)
    assert again.images.names == images.names
    assert_close(again.read("net", "dense-32"), scores, rtol=1e-3, atol=1e-3)
    assert_close(again.protocol("net", "dense"), again.read("net", "dense-32"))
    assert again.protocols("net") == ["dense"]
    with pytest.raises(InputError, match=r"no complete single-crop scores of net \(there are dense\)"):
        again.protocol("net", "single-crop")
    for number, chunk in enumerate(folder.chunks):
        folder.write("net", "dense-32-flip", number, scores[list(chunk)].roll(1, dims=1))
    assert folder.views_of("net", "dense") == ("dense-32-flip",), "with mirror images in place of without"
    with pytest.raises(InputError, match=r"are NaN, first of 0\.jpg"):
        folder.write("net", "dense-36", 0, scores[:CHUNK] * float("nan"))
    with pytest.raises(InputError, match="different weights"):
        folder.add("net", {"sha256": "another"})
    with pytest.raises(InputError, match="choose a different folder with --out"):
        ScoreFolder(tmp_path, images_of(CHUNK + 10, fingerprint="g"))
    with pytest.raises(InputError, match="has no scores"):
        ScoreFolder(tmp_path / "nothing")


def test_damaged_and_foreign_chunks_are_refused(tmp_path: Path) -> None:
    folder = ScoreFolder(tmp_path, images_of(20))
    folder.add("net", {"sha256": "s"})
    folder.write("net", "single-crop", 0, torch.zeros(20, 4).log_softmax(1))
    file = tmp_path / "scores" / "net" / "single-crop" / "000000.safetensors"
    content, whole = load_file(file), file.read_bytes()
    header = {"model": "s", "images": "f", "pass": "single-crop"}
    save_file(content, file, header)
    folder.read("net", "single-crop")
    for changed, tensors, message in [
        ({"model": "t"}, content, "a different network"),
        ({"images": "g"}, content, "different images"),
        ({}, {"log_probabilities": torch.zeros(20, 5).half()}, "does not have scores of shape"),
        ({}, {"log_probabilities": torch.full((20, 4), float("nan")).half()}, "has NaN scores"),
    ]:
        save_file(tensors, file, header | changed)
        with pytest.raises(InputError, match=message):
            folder.read("net", "single-crop")
    file.write_bytes(whole[:-5])
    with pytest.raises(InputError, match="is not a valid safetensors file"):
        folder.read("net", "single-crop")


def test_images_that_were_written_over_are_noticed(tmp_path: Path, tiny_images: Path) -> None:
    shutil.copytree(tiny_images / "val", tmp_path / "val")
    ScoreFolder(tmp_path / "scores", describe_images(open_source(tmp_path / "val")))
    shutil.copytree(tmp_path / "val", tmp_path / "copy")
    ScoreFolder(tmp_path / "scores", describe_images(open_source(tmp_path / "copy")))  # the same images elsewhere
    path = next(path for path in (tmp_path / "val").rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError, match="file sizes of images have changed since"):
        ScoreFolder(tmp_path / "scores", describe_images(open_source(tmp_path / "val")))


def test_other_images_or_classes_do_not_stand_in_one_table(tmp_path: Path) -> None:
    folders = [
        ScoreFolder(tmp_path / name, images)
        for name, images in [
            ("a", images_of(20)),
            ("b", images_of(20)),
            ("c", images_of(20, fingerprint="g")),
            ("d", images_of(20, classes=3, fingerprint="h")),
        ]
    ]
    check_alike(folders[:2])
    with pytest.raises(InputError, match="different images"):
        check_alike([folders[0], folders[2]])
    with pytest.raises(InputError, match="different classes"):
        check_alike([folders[0], folders[3]])


def test_recipes_name_their_scales() -> None:
    about = {"values": {"evaluation.protocol": "dense", "evaluation.scales": [299, 342]}}
    assert Trained("x", Path("x"), None, about).scales == (299, 342)
    about["values"]["evaluation.protocol"] = "single crop"
    assert Trained("x", Path("x"), None, about).scales == ()
    assert Trained("x", Path("x"), None, {}).scales == ()


def test_average_of_probabilities() -> None:
    rows = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]).log()
    assert_close(average(rows, 1).exp(), torch.tensor([[0.375, 0.625]]))


@pytest.fixture(scope="module")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Path:
    """Two trained networks with the same classes."""
    folder = tmp_path_factory.mktemp("runs")
    for scheme in ("standard", "relay"):
        options = ["--scale", "tiny", "--data", str(tiny_images), "--set", f"scheme={scheme}", "--workers", "0"]
        options += ["--images", "disk"]  # as evaluation reads them; resized in memory, pixels differ by rounding
        assert main(["train", "table3-model-a-relay", *options, "--out", str(folder / scheme)]) == 0
    return folder


def test_the_command_tests_runs(tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores"
    command = ["eval", str(tiny_runs), "--out", str(out), "--workers", "0"]
    protocols = ["--protocol", "single-crop,ten-crop,dense", "--scales", "32,48", "--flip"]
    assert main([*command, *protocols, "--ensemble", "average,learnt-weights"]) == 0
    table = capsys.readouterr().out
    figures = json.loads((out / "evaluation.json").read_text())
    assert [entry["protocol"] for entry in figures["errors"]] == ["single-crop", "ten-crop", "dense"] * 2
    assert len(figures["ensembles"]) == 6
    assert "| relay | dense 32-flip, 48-flip |" in table
    assert "top-1" in table
    assert "top-5" not in table, "of five classes it is always zero"
    assert "top5" in figures["errors"][0], "the file does not change"
    seen = json.loads((tiny_runs / "relay" / "metrics.jsonl").read_text().splitlines()[-1])
    ours = next(e for e in figures["errors"] if e["network"] == "relay" and e["protocol"] == "single-crop")
    assert seen["kind"] == "val"
    assert ours["top1"]["value"] == pytest.approx(seen["top1"], abs=0.01), "as at the end of training"
    chunks = sorted(out.rglob("000000.safetensors"))
    times = [chunk.stat().st_mtime_ns for chunk in chunks]
    chunks[0].unlink()
    assert main([*command, *protocols]) == 0
    assert [chunk.stat().st_mtime_ns for chunk in chunks[1:]] == times[1:], "what was there is not computed again"
    assert chunks[0].exists()
    assert len(json.loads((out / "evaluation.json").read_text())["ensembles"]) == 6, "earlier ensembles stay"


def test_networks_are_compared_with_standard_bp_or_the_one_named(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", str(tiny_runs), "--out", str(tmp_path / "scores"), "--workers", "0"]

    def compared(*more: str) -> dict[str, str]:
        assert main([*command, *more]) == 0
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        column = rows[0].index("baseline")
        return {row[0]: (row[column] if len(row) > column else "") for row in rows[2:]}

    assert compared() == {"relay": "standard (standard BP)", "standard": ""}
    assert compared("--against", "relay") == {"relay": "", "standard": "relay (Relay BP)"}
    assert main([*command, "--against", "relai"]) == 2
    assert "--against relai: unknown network; nearest: relay" in capsys.readouterr().err


def test_the_baseline_is_standard_bp_of_the_same_seed() -> None:
    def about(scheme: str, seed: int) -> dict[str, object]:
        return {"values": {"scheme": scheme}, "seed": seed}

    networks = {f"{scheme}-{seed}": about(scheme, seed) for scheme in ("relay", "standard") for seed in (0, 1)}
    assert [baseline(name, networks) for name in networks] == ["standard-0", "standard-1"] * 2
    assert baseline("relay-0", {"relay-0": about("relay", 0), "standard-1": about("standard", 1)}) == "standard-1"
    assert baseline("b", {"a": {}, "b": {}}) == "a"


def test_a_run_is_exported_by_its_folder(tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", "--format", "safetensors", "--out", str(tmp_path / "exported")]
    assert main([*command, str(tiny_runs / "relay")]) == 0
    original, exported = (
        read_model(path)
        for path in (tiny_runs / "relay" / "model.safetensors", tmp_path / "exported" / "model.safetensors")
    )
    assert_close(dict(exported.state), dict(original.state), rtol=0, atol=0)
    assert main(["export", str(tiny_runs), "--out", str(tmp_path / "two")]) == 2
    assert "contains 2 networks: pass one of its runs" in capsys.readouterr().err


def test_an_interrupted_evaluation_goes_on(tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "scores"
    command = ["eval", str(tiny_runs), "--out", str(out), "--workers", "0"]
    written = ScoreFolder.write

    def write_and_stop(self: ScoreFolder, *args: object) -> None:
        written(self, *args)  # pyright: ignore[reportArgumentType]
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(ScoreFolder, "write", write_and_stop)
        assert main(command) == 130
    assert len(list(out.rglob("000000.safetensors"))) == 1
    assert main(command) == 0
    assert len(list(out.rglob("000000.safetensors"))) == 2


def test_test_images_need_no_labels(tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "test").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40, 40), (80 * number, 90, 30)).save(tmp_path / "data" / "test" / f"{number}.png")
    command = ["eval", str(tiny_runs / "relay"), "--data", str(tmp_path / "data"), "--split", "test", "--workers", "0"]
    assert main([*command, "--protocol", "dense", "--out", str(tmp_path / "scores")]) == 0
    assert "Next: relaylab submit" in capsys.readouterr().out
    listed = tmp_path / "list.txt"
    listed.write_text("test/2.png\ntest/0.png\ntest/1.png\n")
    out = tmp_path / "submission.txt"
    assert main(["submit", str(tmp_path / "scores"), "--list", str(listed), "--out", str(out)]) == 0
    assert [line.split()[0] for line in out.read_text().splitlines()] == ["test/2.png", "test/0.png", "test/1.png"]


def test_the_command_refuses_what_it_cannot_do(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    save_model(other, tiny_model())
    empty = tmp_path / "empty"
    empty.mkdir()
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((tiny_runs / "relay" / "config.json").read_text())
    relay = str(tiny_runs / "relay")
    for arguments, message in [
        ([], "no runs given"),
        (["nowhere"], "no such file or folder"),
        ([str(empty)], "is not a run: expected a folder with config.json, or a model file"),
        ([str(unfinished)], "is unfinished; to complete it: relaylab train --resume"),
        ([relay, relay], "more than once"),
        ([relay, str(other)], "different classes"),
        ([str(other)], "--data is required"),
        ([relay, "--protocol", "dens"], "unknown protocol 'dens'; nearest: dense"),
        ([relay, "--ensemble", "product"], "at least two networks"),
        ([relay, "--scales", "224"], "--scales and --flip require the dense protocol"),
        ([relay, "--protocol", "dense", "--scales", "big"], "expected sizes in pixels"),
        ([relay, "--protocol", "dense", "--scales", "16"], "scale 16: expected at least 32 pixels"),
        ([relay, "--batch-size", "0"], "--batch-size must be at least 1"),
    ]:
        assert main(["eval", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
