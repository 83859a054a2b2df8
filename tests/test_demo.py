"""The demo in miniature: fair starts, determinism, data from folders and tars, a report that says what was measured."""

import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision", reason="needs the lab extra")

from PIL import Image

from relaylab import cli, demo, demo_data, demo_report
from relaylab.data.faults import TooManyFaultsError
from relaylab.errors import NonFiniteLossError
from relaylab.options import DemoConfig
from relaylab.progress import Silent

MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist_ci4000.tar.xz"
TINY = DemoConfig(epochs=1, train_per_class=4, width=4, convs=1, seeds=2)


@pytest.fixture(scope="module")
def tiny_config() -> DemoConfig:
    return TINY.resolved()


@pytest.fixture(scope="module")
def digits(tiny_config: DemoConfig) -> demo_data.ImageSet:
    return demo_data.load(tiny_config)


def png(colour: tuple[int, int, int], size: tuple[int, int] = (12, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("train/red/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def report_of(folder: Path, *options: str) -> dict:
    assert cli.main(["demo", "--out", str(folder), *options]) == 0
    return json.loads((folder / "figures.json").read_text())


TINY_OPTIONS = "--epochs 1 --train-per-class 4 --width 4 --convs 1".split()


def test_the_report_says_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = report_of(tmp_path / "report", *TINY_OPTIONS, "--seeds", "2")
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == f"Report: {(tmp_path / 'report' / 'report.html').resolve()}"
    assert "val. error" in captured.err
    html = (tmp_path / "report" / "report.html").read_text()
    markdown = (tmp_path / "report" / "report.md").read_text()
    for scheme, title in demo.SCHEMES.items():
        cells = [demo_report.cell(figures, scheme, error) for error in demo_report.ERRORS]
        row = re.search(rf'<tr class="{scheme}">(.*?)</tr>', html, re.DOTALL)
        assert row is not None
        assert re.findall(r"<td>(.*?)<span", row[1]) == cells
        assert re.search(rf"\| {re.escape(title)} \| {re.escape(cells[0])} \u00b1 ", markdown)
        of_runs = [run["epochs"][-1]["top1"] for run in figures["runs"] if run["scheme"] == scheme]
        assert len(of_runs) == 2
        assert float(cells[0].split()[0]) == pytest.approx(sum(of_runs) / 2, abs=0.006)
    assert "50.72 (0.19)" in html
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.md", "figures.json"}


def test_the_page_stands_alone(tmp_path: Path) -> None:
    report_of(tmp_path / "report", *TINY_OPTIONS, "--seeds", "1")
    html = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in html
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", html)
    assert "url(" not in html
    assert all("alt=" in image for image in re.findall(r"<img [^>]*>", html))
    assert "With one seed and 797 validation images" in html


def test_all_schemes_start_from_the_same_weights(digits: demo_data.ImageSet, tiny_config: DemoConfig) -> None:
    relays = {scheme: demo.build(scheme, digits, tiny_config, seed=3) for scheme in demo.SCHEMES}
    networks = [relay.model.state_dict() for relay in relays.values()]
    for network in networks[1:]:
        torch.testing.assert_close(network, networks[0], rtol=0, atol=0)
    heads = [relays[scheme].heads.state_dict() for scheme in ("multi_loss", "relay")]
    torch.testing.assert_close(heads[0], heads[1], rtol=0, atol=0)
    assert len(relays["standard"].heads) == 0
    other = demo.build("relay", digits, tiny_config, seed=4).model.state_dict()
    assert any(not torch.equal(other[name], value) for name, value in networks[0].items())


def test_all_schemes_see_the_same_batches_and_masks(
    digits: demo_data.ImageSet, tiny_config: DemoConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {scheme: [] for scheme in demo.SCHEMES}
    build = demo.build

    def watched(scheme: str, *arguments: object) -> object:
        relay = build(scheme, *arguments)  # pyright: ignore[reportArgumentType]
        classifier = relay.model.get_submodule("classifier")
        relay.model.register_forward_pre_hook(lambda _, inputs: seen[scheme].append(inputs[0].clone()))
        classifier.get_submodule("dropout1").register_forward_hook(
            lambda _, inputs, output: seen[scheme].append((output == 0) & (inputs[0] != 0))
        )
        # A head with dropout of its own must not shift the masks of the network.
        if relay.heads:
            relay.heads["aux"] = torch.nn.Sequential(torch.nn.Dropout(0.5), relay.heads["aux"])
        return relay

    monkeypatch.setattr(demo, "build", watched)
    for scheme in demo.SCHEMES:
        demo.train(scheme, digits, dataclasses.replace(tiny_config, lr=1e-9), seed=0, task=Silent())
    for scheme in ("multi_loss", "relay"):
        assert len(seen[scheme]) == len(seen["standard"]) > 4
        images = list(zip(seen[scheme][::2], seen["standard"][::2], strict=True))
        assert all(torch.equal(ours, theirs) for ours, theirs in images)
    # Weights move by next to nothing at this rate, so masks can be compared where units are active.
    assert torch.equal(seen["relay"][-1], seen["multi_loss"][-1])
    assert torch.equal(seen["relay"][-1], seen["standard"][-1])


def test_runs_are_deterministic_and_leave_the_global_generator_alone(
    digits: demo_data.ImageSet, tiny_config: DemoConfig
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    runs = [dataclasses.asdict(demo.train("relay", digits, tiny_config, 1, Silent())) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    for run in runs:
        run.pop("seconds")
    assert runs[0] == runs[1]


def test_windows_are_those_of_the_papers_table_2(digits: demo_data.ImageSet, tiny_config: DemoConfig) -> None:
    plan = demo.build("relay", digits, tiny_config, 0).plan
    assert (plan.auxiliary["aux"].top, plan.auxiliary["aux"].bottom) == ("segment2", None)
    assert plan.primary.bottom == "segment2"
    run = demo.train("relay", digits, tiny_config, 0, Silent())
    assert run.depths == {"primary": 5, "aux": 2}  # one convolution per segment, three fc layers
    below, above = run.gradients["start"]["segment1.conv1"], run.gradients["start"]["segment3.conv1"]
    standard = demo.train("standard", digits, tiny_config, 0, Silent()).gradients["start"]
    assert above == standard["segment3.conv1"]
    assert below["gradient"] != standard["segment1.conv1"]["gradient"]


def test_a_loss_that_is_not_finite_stops_before_the_update(digits: demo_data.ImageSet, tiny_config: DemoConfig) -> None:
    config = dataclasses.replace(tiny_config, lr=10.0, epochs=100)
    with pytest.raises(NonFiniteLossError, match=r"Relay BP, seed 2, step \d+"):
        demo.train("relay", digits, config, 2, Silent())


def test_a_folder_tree(tmp_path: Path) -> None:
    colours = {"red": (250, 0, 0), "blue": (0, 0, 250)}
    for split in ("train", "val"):
        for name, colour in colours.items():
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                (folder / f"{i}.png").write_bytes(png(colour, (20, 10 + i)))
            (folder / "notes.txt").write_text("no image")
    data = demo_data.load(DemoConfig(data=(tmp_path / "tree",), size=8, train_per_class=2).resolved())
    assert data.classes == ("blue", "red")
    assert data.train.decoded.images.shape == (4, 8, 8, 3)
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    assert data.val.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.val.decoded.images[data.val.labels == 1].float().mean(dim=(0, 1, 2)).tolist() == [250, 0, 0]
    tree = str(tmp_path / "tree")
    figures = report_of(tmp_path / "report", "--data", tree, "--size", "8", *TINY_OPTIONS)
    assert figures["data"]["flip"]
    assert demo_report.cell(figures, "relay", "top5") == "-"  # two classes have no top-5 error


def scenes(root: Path, sizes: dict[str, int], side: int = 36) -> Path:
    """Square photographs of noise, more or less bright."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, (name, count) in enumerate(sizes.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count if split == "train" else 3):
                noise = random.integers(0, 100 + 50 * number, (side, side, 3), np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    return root


SCENE_OPTIONS = ("--size", "32", "--epochs", "2", "--batch-size", "8", "--width", "4", "--convs", "1")


def test_a_long_tail_and_class_aware_sampling(tmp_path: Path) -> None:
    root = scenes(tmp_path / "data", {"bus": 24, "quay": 24, "zoo": 24})
    options = ["--data", str(root), *SCENE_OPTIONS, "--long-tail", "6"]
    figures = report_of(tmp_path / "aware", *options)
    draws = figures["data"]["epoch_draws"]
    assert sorted(draws["shuffled"]) == [4, 10, 24]
    assert figures["data"]["train_images"] == 38
    assert sorted(draws["class-aware"]) == [12, 13, 13]
    kept = (tmp_path / "aware" / "training-images.txt").read_text().splitlines()
    assert len(set(kept)) == 38
    assert all(Path(name).is_file() for name in kept)
    html = (tmp_path / "aware" / "report.html").read_text()
    assert "thinned out" in html
    assert "class-aware" in html
    shuffled = report_of(tmp_path / "shuffled", *options, "--sampling", "shuffled")
    assert list(shuffled["data"]["epoch_draws"]) == ["shuffled"]
    assert (tmp_path / "shuffled" / "training-images.txt").read_text().splitlines() == kept
    assert shuffled["runs"][0]["epochs"] != figures["runs"][0]["epochs"]


def test_unreadable_training_images_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = scenes(tmp_path / "data", {"bus": 12, "zoo": 20})
    (root / "train" / "zoo" / "3.png").write_bytes(b"")
    config = DemoConfig(data=(root,), size=32, workers=0).resolved()
    data = demo_data.load(config)
    assert np.bincount(data.train.labels).tolist() == [12, 19]
    assert "zoo/3.png: the file is empty" in caplog.text
    for number in range(4, 15):
        (root / "train" / "zoo" / f"{number}.png").write_bytes(b"")
    with pytest.raises(TooManyFaultsError, match="12 unreadable images, 10 allowed"):
        demo_data.load(config)


def test_images_that_do_not_fit_into_memory_are_decoded_as_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = scenes(tmp_path / "data", {"bus": 12, "zoo": 20})
    config = DemoConfig(data=(root,), size=32, epochs=2, batch_size=8, width=4, convs=1, workers=1).resolved()
    runs = []
    for share, kind in ((0.5, demo_data.InMemory), (0.0, demo_data.OnDisk)):
        monkeypatch.setattr(demo_data, "MEMORY_SHARE", share)
        data = demo_data.load(config)
        assert isinstance(data.train, kind)
        run = dataclasses.asdict(demo.train("relay", data, config, 0, Silent()))
        run.pop("seconds")
        runs.append(run)
    assert runs[0] == runs[1], "square images give the same crops either way"


def test_tar_files_in_several_parts(tmp_path: Path) -> None:
    names = b"0 00_blue /b/blue_sky\n1 01_red /r/red_car\n"
    paths = (
        write_tar(tmp_path / "train1.tar.xz", {"classes.txt": names, "train/01_red/a.png": png((250, 0, 0))}),
        write_tar(tmp_path / "train2.tar.xz", {"train/00_blue/a.png": png((0, 0, 250)), "other/x.txt": b"junk"}),
        write_tar(tmp_path / "val.tar", {f"val/{name}/a.png": png((9, 9, 9)) for name in ("00_blue", "01_red")}),
    )
    data = demo_data.load(DemoConfig(data=paths, size=8).resolved())
    assert data.classes == ("blue_sky", "red_car")
    assert data.train.labels.tolist() == [0, 1]
    assert data.train.decoded.images[:, 0, 0].tolist() == [[0, 0, 250], [250, 0, 0]]
    assert len(data.val.labels) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train1.tar.xz", "train2.tar.xz", "val.tar"]


@pytest.mark.skipif(not MNIST.exists(), reason="the MNIST subset is not beside this checkout (../shared/data)")
def test_real_data_from_a_tar() -> None:
    config = DemoConfig(data=(MNIST,), size=28, no_flip=True, train_per_class=5, classes=3).resolved()
    data = demo_data.load(config)
    assert data.train.decoded.images.shape == (15, 32, 32, 3)
    assert data.classes == ("0", "1", "2")
    assert len(data.val.labels) == 300
    assert np.bincount(data.val.labels).tolist() == [100, 100, 100]


@pytest.mark.parametrize(("size", "side"), [(64, 72), (32, 36), (28, 32), (224, 256), (8, 8)])
def test_stored_images_are_larger_than_crops_as_in_the_paper(size: int, side: int) -> None:
    assert demo_data.stored_side(size) == side


@pytest.mark.parametrize(("size", "segments"), [(8, 3), (28, 4), (32, 5), (64, 5)])
def test_the_network_has_as_many_segments_as_the_images_allow(size: int, segments: int) -> None:
    config = dataclasses.replace(TINY.resolved(), size=size)
    network = demo.build_network(3, 7, config)
    assert [name for name, _ in network.named_children()] == [
        *(f"segment{i + 1}" for i in range(segments)),
        "classifier",
    ]
    assert network(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_data_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = {f"{split}/{name}/1.png": png((9, 9, 9)) for split in ("train", "val") for name in ("blue", "red")}
    tar = write_tar(tmp_path / "a.tar.xz", images)
    options = ["demo", "--out", str(tmp_path / "out"), "--data"]
    assert cli.main([*options, str(tar), str(tmp_path / "." / "a.tar.xz")]) == 2
    assert "more than once" in capsys.readouterr().err
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name in [*images, "train/red/1.png"]:
            member = tarfile.TarInfo(name)
            member.size = len(images[name])
            archive.addfile(member, io.BytesIO(images[name]))
    assert cli.main([*options, str(tmp_path / "b.tar")]) == 2
    assert "train/red/1.png more than once" in capsys.readouterr().err


def test_data_without_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["demo", "--data"], ["demo", "--data", "--seeds", "1"], ["demo", "--data", ""]):
        assert cli.main(arguments) == 2
        assert "--data needs a folder or tar files" in capsys.readouterr().err
