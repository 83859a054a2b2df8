"""The formats that people have: shards, Parquet, zip files, COCO's JSON, official layouts, splits by other names."""

import io
import json
import os
import pickle
import re
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip("simplejpeg", reason="needs the lab extra")

from relaylab.cli import main
from relaylab.data.memory import decoded_bytes
from relaylab.data.sources.index import IndexedImages
from relaylab.data.sources.listing import NoSplitError, SplitNeededError
from relaylab.data.sources.opening import open_source
from relaylab.data.sources.splits import split_of, split_of_file
from relaylab.errors import InputError
from relaylab.files import expanded
from test_sources import content, names, opened, tar, write

ROOT = Path(__file__).parents[1]
__all__ = ["opened"]  # a fixture

Open = Callable[..., IndexedImages]


def labelled(source: IndexedImages) -> list[tuple[str, bytes]]:
    """Each image's class and content."""
    return [(source.classes[label], source.read(number)) for number, label in enumerate(source.labels)]


def photo(value: int, size: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(file, "JPEG")
    return file.getvalue()


# Splits


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("train", "train"), ("Train", "train"), ("TRAINING", "train"), ("train2017", "train"), ("train_mini", "train"),
        ("training_set", "train"), ("val", "val"), ("valid", "val"), ("Validation", "val"), ("dev", "val"),
        ("val_256", "val"), ("val_large", "val"), ("val-64x64", "val"), ("Test", "test"), ("testing", "test"),
        ("train_station", None), ("valley", None), ("test tube", None), ("device", None), ("contest", None),
        ("pretrain", None), ("trains", None), ("", None),
    ],
)  # fmt: skip
def test_names_of_splits(folder: str, split: str | None) -> None:
    assert split_of(folder) == split


@pytest.mark.parametrize(
    ("file", "split"),
    [
        ("data/train-00000-of-00004.parquet", "train"), ("imagenet1k-validation-07.tar", "val"),
        ("default/test/0000.parquet", "test"), ("valid/train-0.tar", "train"), ("shard-000.tar", None),
        ("training_data/0.tar", "train"), ("contest-1.tar", None),
    ],
)  # fmt: skip
def test_splits_of_files(file: str, split: str | None) -> None:
    assert split_of_file(file) == split


@pytest.mark.parametrize("kind", ["tree", "tar", "zip"])
def test_splits_by_other_names(kind: str, tmp_path: Path, opened: Open) -> None:
    files = {
        "Training/arch/1.jpg": b"1",
        "Training/bus/2.jpg": b"2",
        "Valid/bus/3.jpg": b"3",
        "Valid/zoo/4.jpg": b"4",
    }
    path = stored(tmp_path, kind, files)
    train, val = opened(path, split="train"), opened(path, split="val")
    assert list(train.classes) == list(val.classes) == ["arch", "bus", "zoo"]
    assert labelled(val) == [("bus", b"3"), ("zoo", b"4")]
    assert train.notes == ("the split train is the folder Training",)
    with pytest.raises(SplitNeededError, match="has the splits train, val"):
        opened(path)
    with pytest.raises(NoSplitError, match="only train, val"):
        opened(path, split="test")


@pytest.mark.parametrize("kind", ["tree", "tar", "zip"])
def test_two_folders_of_one_split(kind: str, tmp_path: Path, opened: Open) -> None:
    files = {f"{split}/bus/{split}.jpg": b"1" for split in ("train", "val", "validation")}
    path = stored(tmp_path, kind, files)
    assert len(opened(path, split="train")) == 1
    with pytest.raises(InputError, match="several files or folders for the split val: val, validation; keep one"):
        opened(path, split="val")


def stored(folder: Path, kind: str, files: Mapping[str, bytes]) -> Path:
    """The files as a tree or in one archive."""
    if kind == "zip":
        return packed(folder / "data.zip", files)
    return write(folder / "data", files) if kind == "tree" else tar(folder / "data.tar", files)


def test_inspect_says_which_folder_is_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{split}/{name}/1.jpg": photo(90) for split in ("train", "val_256") for name in ("a1", "b1")}
    root = write(tmp_path / "data", files)
    assert main(["data", "inspect", str(root), "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "out")]) == 0
    assert "the split val is the folder val_256" in capsys.readouterr().out


# Zip files


def packed(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


TREE = {"bus/1.jpg": b"one " * 99, "bus/2.jpg": b"", "arch/sub/3.jpg": b"three", "arch/notes.md": b"", "9.txt": b""}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_file_is_a_tree(compression: int, tmp_path: Path, opened: Open) -> None:
    tree = opened(write(tmp_path / "data", TREE))
    files = dict(reversed(TREE.items()))
    zipped = opened(packed(tmp_path / "data.zip", files, compression))
    assert content(zipped) == content(tree)
    assert names(zipped) == names(tree)
    assert zipped.size(1) == len(TREE["bus/1.jpg"])
    assert content(pickle.loads(pickle.dumps(zipped))) == content(tree)
    assert zipped.ignored == {".md": 1, ".txt": 1}


def test_a_zip_file_in_pieces_and_with_names_of_classes(tmp_path: Path, opened: Open) -> None:
    one = packed(tmp_path / "1.zip", {"x1/1.jpg": b"1", "classes.txt": b"0 x1 Cat\n1 x2 Dog\n"})
    two = packed(tmp_path / "2.zip", {"x2\\2.jpg": b"2"})
    assert labelled(opened(one, two)) == [("Cat", b"1"), ("Dog", b"2")]


def test_a_zip_file_with_separators_of_windows(tmp_path: Path, opened: Open) -> None:
    path = packed(tmp_path / "data.zip", {r"train\bus\1.jpg": b"1", r"train\zoo\2.jpg": b"2", r"val\zoo\3.jpg": b"3"})
    source = opened(path, split="train")
    assert names(source) == ["train/bus/1.jpg", "train/zoo/2.jpg"]
    assert source.classes == ("bus", "zoo")


def patched(path: Path, at: bytes, offset: int, value: bytes, last: bool = True) -> Path:
    data = bytearray(path.read_bytes())
    start = (data.rindex(at) if last else data.index(at)) + offset
    data[start : start + len(value)] = value
    path.write_bytes(data)
    return path


CENTRAL, LOCAL = b"PK\x01\x02", b"PK\x03\x04"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot read data.zip as a zip file"),
        (lambda path: path.write_bytes(b"no zip"), "cannot read data.zip as a zip file"),
        (lambda path: patched(path, CENTRAL, 24, struct.pack("<I", 1 << 30)), "more than 200 times its size"),
        (lambda path: patched(path, CENTRAL, 8, b"\x01"), "is encrypted; unpack"),
        (lambda path: patched(path, CENTRAL, 10, b"\x0c"), "neither stored nor deflated"),
        (lambda path: patched(path, CENTRAL, 42, b"\0\0\0\0"), "damaged or cut short at bus/2.jpg|at bus/1.jpg"),
        (lambda path: patched(path, LOCAL, 0, b"xxxx", last=False), "damaged or cut short at bus/1.jpg"),
        (lambda path: packed(path, {"../1.jpg": b""}), "whose path leads out of it, ../1.jpg: refused"),
        (lambda path: packed(path, {r"..\1.jpg": b""}), "whose path leads out of it, ../1.jpg: refused"),
        (lambda path: packed(path, {r"C:\bus\1.jpg": b""}), "whose path leads out of it, C:/bus/1.jpg: refused"),
        (lambda path: packed(path, {r"c:1.jpg": b""}), "images but no class folders"),
        (
            lambda path: packed(path, {r"\\host\bus\1.jpg": b""}),
            "leads out of it, //host/bus/1.jpg: refused",
        ),
        (lambda path: packed(path, {"bus/1.md": b""}), "has no images"),
    ],
)
def test_invalid_zip_files_are_refused(
    change: Callable[[Path], object], message: str, tmp_path: Path, opened: Open
) -> None:
    path = packed(tmp_path / "data.zip", {"bus/1.jpg": b"1" * 50, "bus/2.jpg": b"2" * 50})
    change(path)
    with pytest.raises(InputError, match=message):
        opened(path)


def test_a_damaged_member_is_an_unreadable_image(tmp_path: Path, opened: Open) -> None:
    path = packed(tmp_path / "data.zip", {"bus/1.jpg": b"1" * 50, "bus/2.jpg": os.urandom(60)})
    source = opened(patched(path, CENTRAL, 24, b"\x3d"))  # 61 bytes
    assert source.read(0) == b"1" * 50
    with pytest.raises(OSError, match="damaged in the zip file"):
        source.read(1)


def test_a_link_in_a_zip_file(tmp_path: Path, opened: Open) -> None:
    link = zipfile.ZipInfo("bus/1.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match=r"bus/1.jpg is a link"):
        opened(tmp_path / "data.zip")


# WebDataset


def shard(*samples: tuple[str, object], form: str = "cls") -> dict[str, bytes]:
    """Members of a shard: an image and its label for each key."""
    label = (lambda value: f"{value}\n".encode()) if form == "cls" else (lambda v: json.dumps({"label": v}).encode())
    return {name: data for key, value in samples for name, data in _sample(key, label(value), form)}


def _sample(key: str, label: bytes, form: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.{form}", label), (f"{key}.JPG", f"image {key}".encode()), (f"{key}.txt", b"a caption")]


@pytest.mark.parametrize("form", ["cls", "json"])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_shards(form: str, end: str, tmp_path: Path, opened: Open) -> None:
    for number in range(3):
        samples = ((f"{number}/a", 2), (f"{number}/b.c"[:3], number % 2))
        tar(tmp_path / f"shard-{number:03}.tar{end}", shard(*samples, form=form), f"w:{end[1:]}")
    pattern = tmp_path / f"shard-{{000..002}}.tar{end}"
    source = opened(pattern)
    assert source.labels.tolist() == [2, 0, 2, 1, 2, 0]
    assert source.classes == ("class 0", "class 1", "class 2")
    assert source.identity.has_only_numbers
    assert [source.read(number) for number in (0, 3)] == [b"image 0/a", b"image 1/b"]
    assert content(pickle.loads(pickle.dumps(source))) == content(source)
    assert content(opened(tmp_path / f"shard-*.tar{end}")) == content(source)
    write(tmp_path, {"classnames.txt": "arch\nbus\ncinema\n"})
    named = opened(pattern)
    assert (named.classes, named.folders) == (("arch", "bus", "cinema"),) * 2


def test_shards_with_names_as_labels(tmp_path: Path, opened: Open) -> None:
    source = opened(tar(tmp_path / "a.tar", shard(("1", "zoo"), ("2", "bus"), ("3", "zoo"))))
    assert labelled(source) == [("zoo", b"image 1"), ("bus", b"image 2"), ("zoo", b"image 3")]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ((b"8" * 5000, b"a"), ("8" * 5000, "a")),
        ((b"8" * 5000, b"9" * 5000), ("8" * 5000, "9" * 5000)),
        ((b"--3", b"1-2"), ("--3", "1-2")),
        ((b"\xff", b"\xfe"), ("\\xfe", "\\xff")),
        ((b"\xef\xbb\xbf1", b"0"), ("class 0", "class 1")),
    ],
)
def test_shards_with_unusual_labels(
    labels: tuple[bytes, bytes], classes: tuple[str, ...], tmp_path: Path, opened: Open
) -> None:
    members = {"1.jpg": b"", "1.cls": labels[0], "2.jpg": b"", "2.cls": labels[1]}
    source = opened(tar(tmp_path / "a.tar", members))
    assert source.classes == classes
    assert sorted(source.labels.tolist()) == [0, 1]


def test_shards_with_several_labels(tmp_path: Path, opened: Open) -> None:
    source = opened(tar(tmp_path / "a.tar", shard(("1", [0, 2]), ("2", [1]), form="json")))
    assert source.targets is not None
    assert source.targets.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_long_numbers_beside_labels(tmp_path: Path, opened: Open) -> None:
    members = {"1.jpg": b"", "1.json": b'{"label": 1, "hash": ' + b"9" * 5000 + b"}", "2.jpg": b"", "2.cls": b"0"}
    assert opened(tar(tmp_path / "a.tar", members)).labels.tolist() == [1, 0]


def test_targets_that_do_not_fit_into_memory(tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tar(tmp_path / "a.tar", shard(*((str(number), [0, 99_999]) for number in range(40)), form="json"))
    source = opened(file)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=5_000_000))
    message = r"a.tar: 40 multi-label images and 100,000 classes need 0.00 GB; .* 0.01 GB .* numbers have gaps"
    with pytest.raises(InputError, match=message):
        open_source(file, cache=tmp_path / "other")
    write(tmp_path, {f"{number}.jpg": b"" for number in range(40)})
    columns = ",".join(f"class{number}" for number in range(60_000))
    lines = "".join(f"{number}.jpg{',1' * 60_000}\n" for number in range(40))
    write(tmp_path, {"list.csv": f"image,{columns}\n{lines}"})
    with pytest.raises(InputError, match=r"list.csv: 40 multi-label images and 60,000 classes need"):
        opened(tmp_path / "list.csv")
    wanted = [*source.classes, *(f"other {number}" for number in range(10_000))]
    with pytest.raises(InputError, match=r"a.tar: 40 multi-label images and 110,000 classes need"):
        open_source(source, classes=wanted)
    assert decoded_bytes(source, 8) == 40 * (8 * 8 * 3 + 4 * 100_000)


def test_a_folder_of_shards_with_splits(tmp_path: Path, opened: Open) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for split, label in (("train", 1), ("validation", 0)):
        tar(root / f"food-{split}-00.tar", shard((f"{split}1", label), (f"{split}2", 1)))
    assert opened(root, split="train").labels.tolist() == [1, 1]
    assert opened(root, split="val").labels.tolist() == [0, 1]
    with pytest.raises(SplitNeededError, match="train, val"):
        opened(root)
    tar(root / "food-train-01.tar", shard(("late", 0)))
    assert opened(root, split="train").labels.tolist() == [1, 1, 0]
    assert opened(root / "food-train-00.tar").labels.tolist() == [1, 1]


LONG = b'{"id": 1, "label": ' + b"9" * 5000 + b"}"
NO_LABELS = "a.tar has images but no class folders, and no label in its first .json files"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"", "1.cls": b"0", "1.png": b""}, "several images with one key: 1.jpg and 1.png"),
        ({"1.jpg": b"", "1.cls": b"0", "2.jpg": b"", "2.cls": b""}, "2.cls is ''; expected a class index or name"),
        ({"1.jpg": b"", "1.cls": b"0", "2.jpg": b""}, "1 of 2 images have no label, such as 2.jpg"),
        ({"1.jpg": b"", "2.jpg": b"", "1.cls": b"0", "2.cls": b"1"}, "the labels of 1, 2 are not next to their images"),
        ({"1.cls": b"0", "2.cls": b"1", "2.jpg": b"", "1.jpg": b""}, "the labels of 1 are not next to their images"),
        ({"1.jpg": b"", "1.cls": b"-3"}, "has the label -3; expected 0 .. 999999"),
        ({"1.jpg": b"", "1.cls": b"5000000000"}, "has the label 5000000000; expected 0 .. 999999"),
        ({"1.jpg": b"", "1.cls": b"0", "1/1.jpg": b"", "1/1.cls": b"0", "1.JPG": b""}, "label"),
        ({"1.jpg": b"", "1.json": LONG}, "1.json has a label of 5,000 digits; expected 0 .. 999999"),
        ({"1.jpg": b"", "1.json": b'{"labels": [1, -' + b"8" * 5000 + b"]}"}, "1.json has a label of 5,000 digits"),
        ({"1.jpg": b"", "1.json": b"{" + LONG}, f"{NO_LABELS}: expected CLASS/IMAGE"),
        ({"1.jpg": b"", "1.json": b'{"label": 1.5}'}, f"{NO_LABELS}: expected CLASS/IMAGE"),
        ({"1.jpg": b"", "1.json": b"[" * 100_000}, NO_LABELS),
        ({"1.jpg": b""}, "has images but no class folders: expected CLASS/IMAGE"),
    ],
)
def test_invalid_shards_are_refused(members: dict[str, bytes], message: str, tmp_path: Path, opened: Open) -> None:
    with pytest.raises(InputError, match=message):
        opened(tar(tmp_path / "a.tar", members))


def test_unpacked_copies_of_refused_shards_are_removed(tmp_path: Path) -> None:
    file, cache = tmp_path / "train-00.tar.gz", tmp_path / "cache"
    open_source(tar(file, shard(("1", 0), ("2", 1)), "w:gz"), split="train", cache=cache)
    assert len(list((cache / "tars").iterdir())) == 1
    members = {"1.jpg": b"", "1.cls": b"0", "2.jpg": b"", "2.cls": b"-3"}
    with pytest.raises(InputError, match="has the label -3"):
        open_source(tar(file, members, "w:gz"), split="train", cache=cache)
    assert list((cache / "tars").iterdir()) == []


def test_class_names_that_equal_labels(tmp_path: Path, opened: Open) -> None:
    write(tmp_path, {"labels.txt": "crane\ncrane\n0\n"})
    source = opened(tar(tmp_path / "a.tar", shard(("1", 2), ("2", 0))))
    assert (source.folders, source.classes) == (("0", "1", "2"), ("crane (0)", "crane (1)", "0"))
    assert source.labels.tolist() == [2, 0]


def test_too_few_class_names_are_refused(tmp_path: Path, opened: Open) -> None:
    write(tmp_path, {"labels.txt": "arch\nbus\n"})
    with pytest.raises(InputError, match=r"has the label 2; expected 0 .. 1"):
        opened(tar(tmp_path / "a.tar", shard(("1", 2))))


def test_a_tar_of_class_folders_with_other_json_is_not_a_shard(tmp_path: Path, opened: Open) -> None:
    files = {"bus/1.jpg": b"1", "bus/1.json": b'{"width": 3}', "zoo/2.jpg": b"2", "zoo/2.json": b"["}
    assert labelled(opened(tar(tmp_path / "a.tar", files))) == [("bus", b"1"), ("zoo", b"2")]


def test_shards_that_webdataset_writes(tmp_path: Path, opened: Open) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"{tmp_path}/train-%06d.tar", maxcount=2, verbose=0) as sink:
        for number in range(5):
            sink.write({"__key__": f"sample{number:04}", "jpg": photo(40 * number), "cls": number % 2})
    source = opened(tmp_path, split="train")
    assert len(list(tmp_path.glob("*.tar"))) == 3
    assert content(source) == [(number % 2, photo(40 * number)) for number in range(5)]


def test_braces_and_patterns(tmp_path: Path) -> None:
    write(tmp_path, {"a-1.tar": "", "a-2.tar": "", "{x}.tar": ""})
    assert [path.name for path in expanded([tmp_path / "a-{8..11}.tar"])] == [f"a-{n}.tar" for n in (8, 9, 10, 11)]
    assert [path.name for path in expanded([tmp_path / "{b,c}-{00..01}"])] == ["b-00", "b-01", "c-00", "c-01"]
    assert expanded([tmp_path / "a-*.tar"]) == [tmp_path / "a-1.tar", tmp_path / "a-2.tar"]
    assert expanded([tmp_path / "{x}.tar", tmp_path / "?.zip"]) == [tmp_path / "{x}.tar", tmp_path / "?.zip"]
    with pytest.raises(InputError, match=r"\{0..999999999\} in .*: expected 1 to 100,000 numbers"):
        expanded([tmp_path / "{0..999999999}"])
    for pattern in ("{0..99999}-{0..99999}", "{a,b}" * 40):
        with pytest.raises(InputError, match=r"more than 100,000 paths"):
            expanded([tmp_path / pattern])


def test_a_missing_shard_is_named(tmp_path: Path, opened: Open, capsys: pytest.CaptureFixture[str]) -> None:
    tar(tmp_path / "a-0.tar", shard(("1", 0)))
    with pytest.raises(InputError, match=r"no such file or folder: .*a-1.tar"):
        opened(tmp_path / "a-{0..1}.tar")
    assert main(["data", "inspect", str(tmp_path / "a-{0..1}.tar")]) == 2
    assert "a-1.tar" in capsys.readouterr().err


# Parquet


def parquet(path: Path, labels: list[Any], names: list[str] | None = None, compression: str = "snappy") -> Path:
    """A file as `datasets` writes it: encoded images and labels, features in the schema's metadata."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": f"image {path.stem} {n} ".encode() * 50, "path": f"{n}.jpg"} for n in range(len(labels))]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=3, compression=compression)
    return path


def test_parquet_files(tmp_path: Path, opened: Open) -> None:
    names = ["zoo", "arch", "bus"]
    for split, count in (("train", 2), ("validation", 1)):
        for number in range(count):
            parquet(tmp_path / "set" / "data" / f"{split}-{number:05}-of-{count:05}.parquet", [2, 0, 2, 1], names)
    train = opened(tmp_path / "set", split="train")
    assert train.classes == train.folders == tuple(names)
    assert train.labels.tolist() == [2, 0, 2, 1] * 2
    assert train.read(5) == b"image train-00001-of-00002 1 " * 50
    assert train.name(5).endswith("set/data/train-00001-of-00002.parquet/1/1.jpg")
    assert train.notes == ("images by image, labels by label",)
    assert content(pickle.loads(pickle.dumps(train))) == content(train)
    val = opened(tmp_path / "set", split="val", classes=["arch", "bus", "zoo"])
    assert labelled(val)[:2] == [("bus", val.read(0)), ("zoo", val.read(1))]
    assert content(opened(tmp_path / "set" / "data" / "train-*.parquet")) == content(train)
    with pytest.raises(SplitNeededError, match="train, val"):
        opened(tmp_path / "set")


def test_parquet_images_are_copied_once(tmp_path: Path, opened: Open) -> None:
    path = parquet(tmp_path / "a.parquet", [0, 1])
    opened(path)
    (copy,) = (tmp_path / "cache" / "parquet").iterdir()
    written = copy.stat().st_ino
    opened(path, classes=["class 0", "class 1"])
    assert copy.stat().st_ino == written
    later = parquet(path, [1, 0, 1])
    assert opened(later).labels.tolist() == [1, 0, 1]
    assert len(list((tmp_path / "cache" / "parquet").iterdir())) == 1, "that of the old file is removed"


@pytest.mark.parametrize("kind", ["link", "owner"])
def test_a_parquet_copy_of_another_user_is_not_used(kind: str, tmp_path: Path, opened: Open) -> None:
    path = parquet(tmp_path / "a.parquet", [0, 1])
    expected = content(opened(path))
    (copy,) = (tmp_path / "cache" / "parquet").iterdir()
    planted = tmp_path / "planted"
    planted.write_bytes(b"x" * copy.stat().st_size)
    copy.unlink()
    if kind == "link":
        copy.symlink_to(planted)
    elif os.geteuid() == 0:
        planted.rename(copy)
        os.chown(copy, 65534, 65534)
    else:
        pytest.skip("needs root")
    assert content(opened(path, classes=["class 0", "class 1"])) == expected


def test_parquet_without_compression_is_read_in_place(tmp_path: Path, opened: Open) -> None:
    plain = opened(parquet(tmp_path / "plain" / "a.parquet", [0, 1, 1, 0, 2, 1, 0], compression="none"))
    assert not (tmp_path / "cache" / "parquet").exists()
    assert content(plain) == content(opened(parquet(tmp_path / "snappy" / "a.parquet", [0, 1, 1, 0, 2, 1, 0])))


def test_repeated_images_in_a_dictionary(tmp_path: Path, opened: Open) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [b"one " * 9, b"two " * 9, b"one " * 9]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0]}), tmp_path / "a.parquet", compression="none")
    assert content(opened(tmp_path / "a.parquet")) == list(zip([0, 1, 0], images, strict=True))


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([1, 0, 1], ("class 0", "class 1"), [1, 0, 1]),
        (["b", "a", "b"], ("a", "b"), [1, 0, 1]),
        (["10", "9", "10"], ("9", "10"), [1, 0, 1]),
        ([-1, -1, -1], (), [-1, -1, -1]),
    ],
)
def test_labels_in_parquet(
    labels: list[Any], classes: tuple[str, ...], expected: list[int], tmp_path: Path, opened: Open
) -> None:
    source = opened(parquet(tmp_path / "a.parquet", labels))
    assert (tuple(source.classes), source.labels.tolist()) == (classes, expected)


def test_several_labels_in_parquet(tmp_path: Path, opened: Open) -> None:
    source = opened(parquet(tmp_path / "a.parquet", [[0, 2], [1], []]))
    assert source.targets is not None
    assert source.targets.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_invalid_parquet_files_are_refused(tmp_path: Path, opened: Open) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cases: dict[str, tuple[dict[str, list[Any]], str]] = {
        "none": ({"text": ["a"]}, r"no column of encoded images; .* Columns: text \(string\)"),
        "two": ({"left": [b"1"], "right": [b"2"]}, "several image columns, left, right"),
        "null": ({"image": [b"1", None]}, "row 1 has no image bytes"),
        "float": ({"image": [b"1"], "label": [0.5]}, r"column label holds 0.5; expected class indices or names"),
        "some": ({"image": [b"1", b"2"], "label": [None, 3]}, "1 of 2 images have no label"),
    }
    for name, (columns, message) in cases.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(columns), path)
        with pytest.raises(InputError, match=message):
            opened(path)
    whole = parquet(tmp_path / "whole.parquet", [0, 1])
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"cannot read cut.parquet as a Parquet file"):
        opened(tmp_path / "cut.parquet")
    other = parquet(tmp_path / "other.parquet", [0, 1], ["a", "b"])
    with pytest.raises(InputError, match=r"other.parquet: its columns or classes differ from those of whole.parquet"):
        opened(whole, other)


def test_any_damage_to_parquet_is_an_input_error_or_harmless(tmp_path: Path, opened: Open) -> None:
    data = parquet(tmp_path / "whole.parquet", [0, 1, 2, 1]).read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "a.parquet"
    for _ in range(40):
        changed = bytearray(data)
        for place in random.integers(len(data), size=3):
            changed[place] = random.integers(256)
        path.write_bytes(changed)
        try:
            content(opened(path))
        except InputError:
            pass


def test_without_pyarrow(tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path, {"a.parquet": b"PAR1"}) / "a.parquet"
    with pytest.raises(InputError, match=r"pip install 'relaybackprop\[lab,parquet\]'"):
        opened(path)


@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_parquet_that_datasets_writes(tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets, pa = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["zoo", "arch"])})
    images = [Image.fromarray(np.full((8, 8, 3), 30 * number, np.uint8)) for number in range(7)]
    encoded = features.encode_batch({"image": images, "label": [0, 1, 0, 1, 0, 0, 1]})
    table = datasets.table.InMemoryTable(pa.table(encoded, schema=features.arrow_schema))
    made = datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="1")
    made.to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    source = opened(tmp_path, split="train")
    assert (source.classes, source.labels.tolist()) == (("zoo", "arch"), [0, 1, 0, 1, 0, 0, 1])
    with Image.open(io.BytesIO(source.read(3))) as image:
        assert image.getpixel((4, 4)) == (90, 90, 90)


# Layouts


PLACES = {
    "places365_train_standard.txt": "/a/airfield/1.jpg 0\n/z/zoo/2.jpg 1\n",
    "places365_val.txt": "v1.jpg 1\nv2.jpg 0\n",
    "places365_test.txt": "t1.jpg\n",
    "categories_places365.txt": "/a/airfield 0\n/z/zoo 1\n",
    "data_large_standard/a/airfield/1.jpg": "train 1",
    "data_large_standard/z/zoo/2.jpg": "train 2",
    "val_large/v1.jpg": "val 1",
    "val_large/v2.jpg": "val 2",
    "test_large/t1.jpg": "test 1",
}


def test_places365_as_it_comes(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "places", PLACES)
    assert labelled(opened(root, split="train")) == [("airfield", b"train 1"), ("zoo", b"train 2")]
    assert labelled(opened(root, split="val")) == [("zoo", b"val 1"), ("airfield", b"val 2")]
    assert content(opened(root, split="test")) == [(-1, b"test 1")]
    with pytest.raises(SplitNeededError, match="train, val, test"):
        opened(root)
    write(root, {"val_256/v1.jpg": "small"})
    with pytest.raises(
        InputError, match="several files or folders for the split val: val_large, val_256; keep one of them, or"
    ):
        opened(root, split="val")


def test_places365_without_its_images(tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "places", {name: text for name, text in PLACES.items() if name.endswith(".txt")})
    with pytest.raises(InputError, match=r"has places365_val.txt but none of the folders val_large, val_256"):
        opened(root, split="val")


def test_tiny_imagenet_as_it_comes(tmp_path: Path, opened: Open) -> None:
    files = {
        "train/n01443537/images/n01443537_0.JPEG": "fish",
        "train/n02123045/images/n02123045_0.JPEG": "cat",
        "val/images/val_0.JPEG": "val cat",
        "val/images/val_1.JPEG": "val fish",
        "val/val_annotations.txt": "val_0.JPEG\tn02123045\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n",
        "test/images/test_0.JPEG": "test",
        "words.txt": "n01443537\tgoldfish, Carassius auratus\nn02123045\ttabby, tabby cat\nn00001740\tentity\n",
    }
    root = write(tmp_path / "tiny", files)
    train = opened(root, split="train")
    val = opened(root, split="val", classes=train.identity)
    assert train.folders == val.folders == ("n01443537", "n02123045")
    assert val.classes == ("goldfish, Carassius auratus", "tabby, tabby cat")
    assert content(train) == [(0, b"fish"), (1, b"cat")]
    assert content(val) == [(1, b"val cat"), (0, b"val fish")]
    assert content(opened(root, split="test")) == [(-1, b"test")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1.jpg\tbus\n2.jpg\n", "line 2: '2.jpg'; expected NAME, a tab and a class"),
        ("1.jpg\tbus\n3.jpg\tzoo\n", r"1 of the 2 images of list.txt are not in .*: 3.jpg"),
        ("1.jpg\tbus\n1.jpg\tzoo\n", "has 1.jpg more than once"),
        ("1.jpg\tbus\n../2.jpg\tzoo\n", "line 2: ../2.jpg leads out"),
    ],
)
def test_invalid_lists_with_tabs_are_refused(lines: str, message: str, tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"1.jpg": "1", "2.jpg": "2"})
    with pytest.raises(InputError, match=message):
        opened(write(tmp_path, {"list.txt": lines}) / "list.txt", root)


def coco(
    prefix: str = "",
    *,
    annotations: list[tuple[int, int]] | None = None,
    categories: list[dict[str, Any]] | None = None,
) -> str:
    pairs = [(11, 7), (12, 3)] if annotations is None else annotations
    return json.dumps(
        {
            "info": {"year": 2021},
            "images": [{"id": id, "file_name": f"{prefix}{id}.jpg", "width": 3} for id in (11, 12)],
            "annotations": [{"id": n, "image_id": image, "category_id": own} for n, (image, own) in enumerate(pairs)],
            "categories": categories or [{"id": 7, "name": "Zoo"}, {"id": 3, "name": "Arch", "supercategory": "x"}],
        }
    )


def test_inaturalist_as_it_comes(tmp_path: Path, opened: Open) -> None:
    files = {
        "train_val2017/a/11.jpg": "11",
        "train_val2017/a/12.jpg": "12",
        "train2017.json": coco("train_val2017/a/"),
        "val2017.json": coco("train_val2017/a/", annotations=[(11, 3), (12, 3)]),
        "test2017.json": coco("train_val2017/a/", annotations=[]),
    }
    root = write(tmp_path / "inat", files)
    train, val = opened(root, split="train"), opened(root, split="val")
    assert train.classes == val.classes == ("Arch", "Zoo")
    assert labelled(train) == [("Zoo", b"11"), ("Arch", b"12")]
    assert val.labels.tolist() == [0, 0]
    assert opened(root, split="test").labels.tolist() == [-1, -1]


def test_inaturalist_2021_with_its_small_training_set(tmp_path: Path, opened: Open) -> None:
    own = [{"id": n, "name": f"Name {n}", "image_dir_name": f"0000{n}_Animalia"} for n in (3, 7)]
    files = {
        "train_mini/00003_Animalia/11.jpg": "11",
        "train_mini/00003_Animalia/12.jpg": "12",
        "train_mini.json": coco("train_mini/00003_Animalia/", categories=own),
        "train.json": coco("train/00003_Animalia/", categories=own),
        "val.json": coco("val/", categories=own),
    }
    root = write(tmp_path / "inat", files)
    train = opened(root, split="train")
    assert train.folders == ("00003_Animalia", "00007_Animalia")
    assert train.classes == ("Name 3", "Name 7")
    write(root, {"train/00003_Animalia/11.jpg": "", "train/00003_Animalia/12.jpg": ""})
    with pytest.raises(InputError, match=r"for the split train: train.json, train_mini.json; keep one"):
        opened(root, split="train")
    assert content(opened(root / "train_mini.json", root)) == content(train)


def test_coco_with_several_categories(tmp_path: Path, opened: Open) -> None:
    text = coco(annotations=[(11, 7), (11, 3), (11, 7), (12, 3)])
    root = write(
        tmp_path / "coco", {"annotations/instances_val2017.json": text, "val2017/11.jpg": "", "val2017/12.jpg": ""}
    )
    source = opened(root, split="val")
    assert source.targets is not None
    assert (source.classes, source.targets.tolist()) == (("Arch", "Zoo"), [[1, 1], [1, 0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"is not in COCO.s format \(images, annotations, categories\)"),
        ('{"images": [{"id": 1}]}', "is not in COCO.s format"),
        ('{"images": []}', "no images in"),
        (coco(annotations=[(11, 5)]), "an annotation with the unknown category 5"),
        (coco(annotations=[(11, 3)]), "1 of 2 images have no label, such as 12.jpg"),
        (coco("../"), "leads out of"),
        (coco("x/"), r"2 of the 2 images of a.json are not in .*: x/11.jpg, x/12.jpg"),
    ],
)
def test_invalid_json_is_refused(text: str, message: str, tmp_path: Path, opened: Open) -> None:
    root = write(tmp_path / "data", {"11.jpg": "", "12.jpg": ""})
    with pytest.raises(InputError, match=message):
        opened(write(tmp_path, {"a.json": text}) / "a.json", root)


# Nothing readable


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/1.heic", "a/2.HEIC"], r"it has 2 .heic. For HEIC and camera raw files: convert them to JPEG"),
        (["a/1.mp4"], "For videos: extract frames"),
        (["a/1.dcm", "b/2.dcm", "notes.txt"], "For DICOM files: convert them to PNG"),
        (["x.tar", "y.tar"], "it has 2 .tar. For tar or zip files: give these files instead of the folder"),
        (["x.npy", "y.h5"], r"write a Source \(docs/how-to/data.md"),
        (["a/list.csv"], "For lists: also give the list, if it contains"),
        (["a/README"], "it has 1 without extension"),
        (["a/.hidden"], "it has no files"),
    ],
)
def test_the_error_for_a_folder_without_images_lists_its_files(
    files: list[str], message: str, tmp_path: Path, opened: Open
) -> None:
    root = write(tmp_path / "data", dict.fromkeys(files, "x"))
    with pytest.raises(InputError, match=f"no images in data: expected CLASS/IMAGE.*{message}"):
        opened(root)


# Sources of one's own


@pytest.fixture(scope="module")
def own_source() -> Any:
    """The class of docs/how-to/data.md."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "data.md").read_text(), re.DOTALL)
    code = next(block for block in blocks if "class ArrayImages" in block)
    assert len(code.splitlines()) <= 42
    module = types.ModuleType("array_images")
    exec(code, module.__dict__)
    sys.modules[module.__name__] = module  # for pickle
    return module.__dict__["ArrayImages"]


def arrays(folder: Path, labels: list[int], own_source: Any, classes: list[str]) -> Any:
    """Images of which the labels can be seen: dark for cats, light for dogs."""
    folder.mkdir()
    values = [60 + 120 * (classes[label] == "dog") for label in labels]
    images = np.random.default_rng(0).normal(np.array(values)[:, None, None, None], 20, (len(labels), 10, 10, 3))
    np.save(folder / "images.npy", images.clip(0, 255).astype(np.uint8))
    np.save(folder / "labels.npy", labels)
    return own_source(folder, classes)


def test_a_source_of_ones_own(tmp_path: Path, own_source: Any) -> None:
    source = arrays(tmp_path / "a", [0, 1, 1], own_source, ["cat", "dog"])
    assert open_source(source) is source
    again = pickle.loads(pickle.dumps(source))
    assert (again.read(2), again.fingerprint) == (source.read(2), source.fingerprint)
    with Image.open(io.BytesIO(source.read(1))) as image:
        assert np.array_equal(np.asarray(image), np.load(tmp_path / "a" / "images.npy")[1])
    other = open_source(source, classes=["dog", "bird", "cat"])
    assert (other.labels.tolist(), list(other.classes)) == ([2, 0, 0], ["dog", "bird", "cat"])
    assert other.read(1) == source.read(1)
    assert other.fingerprint != source.fingerprint
    with pytest.raises(InputError, match="unexpected classes: cat"):
        open_source(source, classes=["dog", "bird"])


def test_a_source_is_loaded_by_workers(tmp_path: Path, own_source: Any) -> None:
    from relaylab.data.geometry import CropSpec
    from relaylab.data.loader import evaluation_loader

    source = arrays(tmp_path / "a", [0, 1, 1, 0], own_source, ["cat", "dog"])
    batches = list(evaluation_loader(source, CropSpec(size=8, short_side=10), batch_size=2, workers=1))
    assert [batch.labels.tolist() for batch in batches] == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 1]}, r"labels are list; expected an array of int16 or int32, \(3,\)"),
        ({"labels": np.array([0, 1])}, r"labels are int64 \(2,\)"),
        ({"labels": np.array([0, 1, 2], np.int16)}, r"labels 0 .. 2; expected labels -1 .. 1 for 2 classes"),
        ({"split": "train"}, "is a Source: split, root and categories are for paths"),
    ],
)
def test_invalid_sources_are_refused(change: dict[str, Any], message: str, tmp_path: Path, own_source: Any) -> None:
    source = arrays(tmp_path / "a", [0, 1, 1], own_source, ["cat", "dog"])
    source.labels = change.pop("labels", source.labels)
    with pytest.raises(InputError, match=message):
        open_source(source, **change)


def test_an_object_that_is_not_a_source_is_refused() -> None:
    class Half:
        labels = np.zeros(1, np.int16)

        def read(self, index: int) -> bytes:
            return b""

    with pytest.raises(InputError, match="Half is not a Source: it lacks title, classes, fingerprint, name, __len__"):
        open_source(Half())  # pyright: ignore[reportArgumentType]


def test_training_on_sources_and_resuming(tmp_path: Path, own_source: Any) -> None:
    from relaylab.train import requests, session
    from relaylab.train.options import TrainOptions

    train = arrays(tmp_path / "train", [0, 1] * 20, own_source, ["cat", "dog"])
    val = arrays(tmp_path / "val", [0, 1, 1, 1] * 3, own_source, ["dog", "cat"])
    options: dict[str, Any] = {"diagnose_every": 0, "workers": 0, "out": tmp_path / "run"}
    changes = (
        "network.num_classes=2",
        "optimizer.iterations=20",
        "optimizer.evaluate_every=10",
        "augmentation.flip=false",
    )
    config = TrainOptions(recipe="digits", changes=changes, **options)
    outcome = session.train(requests.resolve(config, images=(train, val)))
    assert outcome.finished
    assert outcome.last["top1"] < 50
    resumed = session.train(requests.resolve(TrainOptions(resume=str(tmp_path / "run")), images=(train, val)))
    assert resumed.last == outcome.last
    with pytest.raises(InputError, match="given both as sources and as paths"):
        requests.resolve(TrainOptions(recipe="digits", data=(tmp_path,)), images=(train, val))
