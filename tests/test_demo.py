"""The demo: equal initial weights, the packaged digits, overrides for the user's images, and the report."""

import io
import json
import tarfile
from collections import Counter
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from PIL import Image
from sklearn.datasets import load_digits

from relaylab import cli
from relaylab.commands.demo import DemoOptions, stored_side, suited
from relaylab.data.decode import decode
from relaylab.data.sources.digits import digits_tar
from relaylab.data.sources.opening import open_source
from relaylab.models.building import build_relay
from relaylab.models.small import small_vgg
from relaylab.recipes import find_recipe
from relaylab.recipes.changes import with_changes
from relaylab.recipes.schema import Recipe
from relaylab.train import requests, run_folder, session
from relaylab.train.options import TrainOptions
from relaylab.train.records import read_metrics

SCHEMES = ("standard", "multi_loss", "relay")
TINY = ("network.width=2", "network.convs=1")


def recipe_of(name: str, *changes: str) -> Recipe:
    recipe, problems = with_changes(find_recipe(name), changes)
    assert not problems
    return recipe


def scenes(root: Path, sizes: dict[str, int], side: int = 36) -> Path:
    """Square noise images of different brightness."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, (name, count) in enumerate(sizes.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count if split == "train" else 3):
                noise = random.integers(0, 100 + 50 * number, (side, side, 3), np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    return root


def test_the_digits_are_a_tar_file_like_any_other(tmp_path: Path) -> None:
    path = digits_tar(tmp_path / "one")
    assert path.read_bytes() == digits_tar(tmp_path / "other").read_bytes()
    before = path.stat().st_mtime_ns
    assert digits_tar(tmp_path / "one").stat().st_mtime_ns == before, "it is written once"
    pixels, labels = load_digits(return_X_y=True)
    seen: list[int] = []
    for split, count in (("train", 1000), ("val", 797)):
        source = open_source(path, split=split)
        assert len(source) == count
        assert source.classes == tuple("0123456789")
        share = Counter(np.asarray(source.labels).tolist())
        assert max(share.values()) - min(share.values()) <= 10, "the split is stratified"
        for number in range(0, count, 50):
            index = int(Path(source.name(number)).stem)
            seen.append(index)
            assert labels[index] == source.labels[number]
            image = decode(source.read(number))
            assert image.shape == (10, 10, 3)
            assert not image[0].any(), "the margin is background"
            assert image[1:-1, 1:-1, 0].tolist() == np.round(pixels[index].reshape(8, 8) * 255 / 16).tolist()
    assert len(set(seen)) == len(seen)


def test_all_schemes_start_from_the_same_weights() -> None:
    def built(scheme: str, seed: int) -> Any:
        torch.manual_seed(seed)
        return build_relay(recipe_of("digits", *TINY, f"scheme={scheme}"))

    relays = {scheme: built(scheme, 3) for scheme in SCHEMES}
    networks = [relay.model.state_dict() for relay in relays.values()]
    for network in networks[1:]:
        torch.testing.assert_close(network, networks[0], rtol=0, atol=0)
    heads = [relays[scheme].heads.state_dict() for scheme in ("multi_loss", "relay")]
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=0)
    assert len(relays["standard"].heads) == 0
    other = built("relay", 4).model.state_dict()
    assert any(not torch.equal(other[name], value) for name, value in networks[0].items())


def test_all_schemes_see_the_same_batches_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {scheme: [] for scheme in SCHEMES}

    def watched(recipe: Recipe) -> Any:
        relay, scheme = build_relay(recipe), recipe.scheme
        dropout = relay.model.get_submodule("classifier.dropout1")
        relay.model.register_forward_pre_hook(lambda _, inputs: seen[scheme].append(inputs[0].clone()))
        dropout.register_forward_hook(lambda _, inputs, output: seen[scheme].append((output == 0) & (inputs[0] != 0)))
        return relay

    monkeypatch.setattr(session, "build_relay", watched)
    for scheme in SCHEMES:
        changes = (*TINY, "optimizer.iterations=4", "optimizer.evaluate_every=4", "optimizer.lr=1e-9")
        config = TrainOptions(recipe="digits", changes=(*changes, f"scheme={scheme}"), out=tmp_path / scheme)
        session.train(requests.resolve(config))
    for scheme in ("multi_loss", "relay"):
        assert len(seen[scheme]) == len(seen["standard"]) > 8
        images = list(zip(seen[scheme][::2], seen["standard"][::2], strict=True))
        assert all(torch.equal(ours, theirs) for ours, theirs in images)
    # Weights hardly change at this rate, so masks can be compared where units are active.
    masks = [seen[scheme][7] for scheme in SCHEMES]  # of the last training step
    assert masks[0].any()
    assert torch.equal(masks[2], masks[1])
    assert torch.equal(masks[2], masks[0])


@pytest.mark.parametrize(("size", "segments"), [(8, 3), (28, 4), (32, 5), (64, 5)])
def test_the_network_has_as_many_segments_as_the_images_allow(size: int, segments: int) -> None:
    network = small_vgg(7, width=4, convs=1, image_size=size)
    names = [name for name, _ in network.named_children()]
    assert names == [*(f"segment{i + 1}" for i in range(segments)), "classifier"]
    assert network(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("size", "side"), [(64, 72), (32, 36), (28, 32), (224, 256), (8, 8)])
def test_stored_images_are_larger_than_crops_as_in_the_paper(size: int, side: int) -> None:
    assert stored_side(size) == side


def test_the_recipe_is_suited_to_images_and_network(tmp_path: Path) -> None:
    assert suited("digits", DemoOptions()) == ()
    assert suited("digits", DemoOptions(epochs=2)) == ("optimizer.iterations=62",)
    tree = scenes(tmp_path, {"bus": 20, "quay": 20, "zoo": 23})
    given = ("network.image_size=28", "optimizer.batch_size=8", "images.long_tail=5")
    changes = suited("photos", DemoOptions(data=(tree,), epochs=3, changes=given))
    recipe = recipe_of("photos", *changes)
    assert (recipe.network.num_classes, recipe.images.short_side, recipe.evaluation.scales) == (3, 32, (32,))
    assert (recipe.plan.primary.bottom, recipe.plan.auxiliary["aux"].top) == ("segment3", "segment3")
    thinned = round(23 + 23 / 5**0.5 + 23 / 5)
    assert recipe.optimizer.evaluate_every == thinned // 8
    assert recipe.optimizer.iterations == 3 * (thinned // 8)
    assert recipe.augmentation.flip
    own = suited("photos", DemoOptions(data=(tree,), changes=("optimizer.iterations=5",)))
    assert [change for change in own if "iterations" in change] == ["optimizer.iterations=5"], "the user's value stays"
    relay = build_relay(recipe)
    relay(torch.zeros(2, 3, 28, 28))
    assert relay.depths == {"primary": 2 * 2 + 3, "aux": 3 * 2}  # convolutions and fc layers


def test_the_terminal_ends_with_table_verdict_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, out = scenes(tmp_path / "data", {"bus": 12, "zoo": 20}), tmp_path / "out"
    words = ["demo", "--data", str(tree), "--out", str(out), "--epochs", "1", "--seeds", "0,1", "--set", *TINY]
    assert cli.main([*words, "network.image_size=32", "optimizer.batch_size=8"]) == 0
    captured = capsys.readouterr()
    printed, verdict, paths = captured.out.split("\n\n")
    table, (results_path, page) = printed.splitlines(), paths.splitlines()
    methods = ["| standard BP", "| multi-loss", "| Relay BP", "| chance level"]
    assert [line.split(" | ")[0] for line in table[2:]] == methods
    assert results_path == f"Results: {(out / 'comparison.md').resolve()}"
    sentences = verdict.splitlines()
    pairs = ["Relay BP vs standard BP", "Relay BP vs multi-loss", "Multi-loss vs standard BP"]
    assert [line.split(": no verdict; all runs are at chance level")[0] for line in sentences[:3]] == pairs
    assert all(line.endswith(".") for line in sentences)
    assert page == f"Report:  {(out / 'report.html').resolve()}"
    assert "6 of 6: " in captured.err
    html = (out / "report.html").read_text()
    assert "<script" not in html
    results = json.loads((out / "comparison.json").read_text())["runs"]
    top1 = [run["validations"][-1]["top1"] for run in results if run["scheme"] == "relay"]
    mean = f"{sum(top1) / 2:.2f}"
    assert f"| Relay BP | 2 seeds | {mean}" in "\n".join(table)
    assert mean in html


def test_the_demo_of_the_digits_names_and_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["demo", "--out", str(out), "--epochs", "1", "--seeds", "0", "--schemes", "standard,relay"]
    assert cli.main([*words, "--set", "network.width=2", "network.convs=1", "optimizer.batch_size=250"]) == 0
    html = (out / "report.html").read_text()
    assert "scikit-learn's handwritten digits" in unescape(html)
    assert "digits-1.tar</em>" not in html
    assert html.count("data:image/png") >= 10, "a strip of each class"
    assert "Relay BP" in capsys.readouterr().out


def test_decoding_once_and_as_needed_train_to_the_same_figures(tmp_path: Path) -> None:
    """Crops of square images of the stored size are the same in both cases."""
    tree = scenes(tmp_path / "data", {"bus": 12, "zoo": 20})
    changes = (*TINY, "network.image_size=32", "images.short_side=36", "network.num_classes=2")
    changes += ("optimizer.iterations=8", "optimizer.evaluate_every=4", "optimizer.batch_size=8")
    lines: list[list[dict[str, Any]]] = []
    for images in ("memory", "disk"):
        config = TrainOptions(
            recipe="photos", data=(tree,), changes=changes, images=images, workers=1, out=tmp_path / images, log_every=4
        )
        session.train(requests.resolve(config))
        found = read_metrics(tmp_path / images / run_folder.METRICS)
        times = ("images_per_s", "data_wait", "seconds")
        lines.append([{name: value for name, value in line.items() if name not in times} for line in found])
    assert lines[0] == lines[1]
    assert len(lines[0]) == 4


def test_data_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (9, 9, 9)).save(file, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in [f"{split}/{name}/1.png" for split in ("train", "val") for name in ("blue", "red")]:
            member = tarfile.TarInfo(name)
            member.size = len(file.getvalue())
            archive.addfile(member, io.BytesIO(file.getvalue()))
    paths = [str(tmp_path / "a.tar"), str(tmp_path / "." / "a.tar")]
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--data", *paths]) == 2
    assert "more than once" in capsys.readouterr().err


def test_data_without_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["demo", "--data"], ["demo", "--data", "--seeds", "1"], ["demo", "--data", ""]):
        assert cli.main(arguments) == 2
        assert "--data has no value" in capsys.readouterr().err


def test_a_run_of_the_digits_outlives_their_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAYLAB_CACHE", str(tmp_path / "cache"))
    changes = (*TINY, "optimizer.iterations=2", "optimizer.evaluate_every=1")
    session.train(requests.resolve(TrainOptions(recipe="digits", changes=changes, out=tmp_path / "run")))
    digits_tar().unlink()
    request = requests.resolve(TrainOptions(resume=str(tmp_path / "run")))
    assert request.options.data == (digits_tar(),)
    assert request.options.data[0].exists()
