"""`relaylab data`: what it says of a data set, and what it finds wrong."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision", reason="needs the lab extra")

from PIL import Image

from relaylab import cli
from relaylab.data import scan
from relaylab.data.scan import kind, spread


def encoded(kind: str = "JPEG", size: tuple[int, int] = (60, 40), mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)).convert(mode).save(
        file, kind, **options
    )
    return file.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "train/bus/1.jpg": encoded(),
        "train/bus/2.jpg": encoded(size=(40, 90)),
        "train/bus/3.jpg": encoded()[:700],
        "train/zoo/1.png": encoded("PNG"),
        "train/zoo/2.jpg": encoded(progressive=True),
        "train/zoo/notes.md": b"no image",
        "train/zoo/@eaDir/1.png/THUMB.jpg": encoded(),
        "train/#recycle/1.jpg": encoded(),
        "train/quay/1.jpg": b"",
        "val/bus/1.jpg": encoded(),
        "val/zoo/1.gif": encoded("GIF", mode="P"),
        "val/quay/1.jpg": encoded(mode="L"),
    }
    for name, content in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    return tmp_path / "data"


def test_inspect_describes_the_data(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["data", "inspect", str(tree), "--out", str(out), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "data, train: 6 images in 3 classes" in said
    assert "data, val: 3 images in 3 classes" in said
    assert "1 (quay) to 3 (bus)" in said
    assert "shorter side        40 pixels\n" in said
    assert "1 .md" in said
    assert "skipped folders     " in said
    assert {"@eaDir", "#recycle"} == set(said.partition("skipped folders     ")[2].splitlines()[0].split(", "))
    assert "JPEG RGB, progressive" in said
    facts = json.loads((out / "train" / "summary.json").read_text())
    assert facts["classes"] == [["bus", 3], ["quay", 1], ["zoo", 2]]
    assert facts["kinds"] == {"JPEG RGB": 2, "PNG RGB": 1, "JPEG RGB, progressive": 1}
    assert facts["width"] == {"least": 40, "median": 60, "most": 60}
    assert facts["height"] == {"least": 40, "median": 40, "most": 90}
    assert len(facts["unreadable"]) == 2
    assert (out / "train" / "balance.svg").read_text().lstrip().startswith("<?xml")
    assert json.loads((out / "val" / "summary.json").read_text())["kinds"] == {
        "JPEG RGB": 1,
        "JPEG L": 1,
        "GIF P": 1,
    }


def test_check_lists_bad_images_and_fails(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = encoded()
    scan = data.index(b"\xff\xda")
    (tree / "train" / "zoo" / "4.jpg").write_bytes(data[:scan] + bytes(4) + data[scan:])
    out = tmp_path / "out"
    assert cli.main(["data", "check", str(tree), "--split", "train", "--out", str(out), "--workers", "0"]) == 1
    lines = [line.split("\t") for line in (out / "train" / "bad-images.txt").read_text().splitlines()]
    found = {(line[0], Path(line[1]).relative_to(tree).as_posix()) for line in lines}
    assert found == {
        ("unreadable", "train/bus/3.jpg"),
        ("unreadable", "train/quay/1.jpg"),
        ("damaged", "train/zoo/4.jpg"),
    }
    assert all(line[2] for line in lines)
    assert "the file is empty" in capsys.readouterr().out


def test_check_of_good_images(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(["data", "check", str(tree), "--split", "val", "--out", str(out), "--workers", "0"]) == 0
    assert (out / "val" / "bad-images.txt").read_text() == ""


def test_results_before_ctrl_c_are_kept(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = scan.ScanResults.add

    def interrupted(self: scan.ScanResults, other: scan.ScanResults) -> None:
        if self.examined:
            raise KeyboardInterrupt
        add(self, other)

    monkeypatch.setattr(scan, "BATCH", 4)
    monkeypatch.setattr(scan.ScanResults, "add", interrupted)
    out = tmp_path / "out"
    assert cli.main(["data", "check", str(tree), "--split", "train", "--out", str(out), "--workers", "0"]) == 130
    facts = json.loads((out / "train" / "summary.json").read_text())
    assert facts["examined"] == 4
    assert len(facts["unreadable"]) == 2


def test_workers_find_the_same(tree: Path, tmp_path: Path) -> None:
    for i in range(150):
        (tree / "train" / "bus" / f"x{i}.jpg").write_bytes(encoded(size=(20 + i, 30)) if i % 50 else b"x")
    facts = []
    for workers in ("0", "2"):
        out = tmp_path / workers
        cli.main(["data", "check", str(tree), "--split", "train", "--out", str(out), "--workers", workers])
        facts.append(json.loads((out / "train" / "summary.json").read_text()))
    assert facts[0] == facts[1]
    assert len(facts[0]["unreadable"]) == 5


def test_a_test_list_has_no_balance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for name in ("b", "a"):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(encoded())
    (tmp_path / "test.txt").write_text("b.jpg\na.jpg\n")
    out = tmp_path / "out"
    paths = [str(tmp_path / "test.txt"), str(tmp_path / "images")]
    assert cli.main(["data", "inspect", *paths, "--out", str(out), "--workers", "0"]) == 0
    assert "unlabelled          2" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"summary.json", "bad-images.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect"], "no images given"),
        (["inspect", "nowhere"], "no such file or folder: nowhere"),
        (["inspect", "{tree}", "--split", "test"], "has no test folder, only train, val"),
        (["inspect", "{tree}", "--workers", "-1"], "--workers must be at least 0"),
        (["inspect", "{tree}", "--sample", "0"], "--sample must be at least 1"),
        (["check", "{tree}/train/bus/1.jpg"], "1.jpg"),
        (["check", "{tree}", "{tree}"], "more than once|twice"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(tree=tree) for argument in arguments]
    assert cli.main(["data", *given, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_the_spread_of_a_sample() -> None:
    assert spread(10, None).tolist() == list(range(10))
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(3, 5).tolist() == [0, 1, 2]


def test_kinds() -> None:
    assert kind(encoded(mode="CMYK")) == "JPEG CMYK"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert kind(file.getvalue()) == "GIF P, animated"


def test_real_scenes(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    paths = [str(shared_data / "mnist_ci4000.tar.xz")]
    assert cli.main(["data", "check", *paths, "--out", str(out), "--workers", "0"]) == 0
    assert "train: 3,000 images in 10 classes" in capsys.readouterr().out
    assert json.loads((out / "val" / "summary.json").read_text())["kinds"] == {"PNG L": 1000}


def test_commands_of_one_second_write_to_folders_of_their_own(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("relaylab.commands.data.timestamp", lambda: "20261129T100000Z")
    for command in ("inspect", "check"):
        assert cli.main(["data", command, str(tiny_images)]) == 0
    folders = sorted(path.name for path in (tmp_path / "runs" / "data").iterdir())
    assert folders == ["20261129T100000Z", "20261129T100000Z-2"]
