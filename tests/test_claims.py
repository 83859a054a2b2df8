"""What a file claims is not believed: sizes, ratios, scans, nesting, pixels, the length of lines."""

import bz2
import gzip
import io
import json
import os
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("simplejpeg", reason="needs the lab extra")

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from relaylab.data import decode as decoding
from relaylab.data.decode import decode
from relaylab.data.faults import ImageFault
from relaylab.data.sources.archives import LARGEST_RECORD, tar_members
from relaylab.data.sources.class_names import (
    name_and_number,
    named_classes,
    read_categories,
    read_truth,
    synset_numbers,
)
from relaylab.data.sources.listing import Rows
from relaylab.data.sources.opening import open_source
from relaylab.errors import InputError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def timed(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def with_scans(side: int, more: int) -> bytes:
    data = encoded(Image.new("RGB", (side, side), (90, 90, 90)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * more + b"\xff\xd9"


def test_scans_of_a_progressive_jpeg_are_limited() -> None:
    assert decode(with_scans(64, 0)).shape == (64, 64, 3)
    assert decode(with_scans(64, 20)).shape == (64, 64, 3)
    with pytest.raises(ImageFault, match=r"scans of 4096 pixels; expected at most 100"):
        decode(with_scans(64, 300))
    bomb = with_scans(6000, 200)

    def refused() -> None:
        with pytest.raises(ImageFault, match="scans"):
            decode(bomb)

    assert timed(refused) < 0.5


def test_pixels_are_limited_by_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10_000)
    with pytest.raises(ImageFault, match="101 x 100 pixels; expected 1 to 10000"):
        decode(encoded(Image.new("L", (101, 100))))
    assert decode(encoded(Image.new("L", (100, 100)))).shape == (100, 100, 3)
    monkeypatch.setitem(decoding.MOST_PIXELS_OF, "WEBP", 100)
    with pytest.raises(ImageFault, match="11 x 10 pixels; expected 1 to 100"):
        decode(encoded(Image.new("RGB", (11, 10)), "WEBP"))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "I;16", "1", "LA", "CMYK"])
def test_large_images_are_converted_in_parts(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    if mode == "I;16":
        data = encoded(Image.fromarray(random.integers(0, 65536, (90, 70), dtype=np.uint16)))
    else:
        image = Image.fromarray(random.integers(0, 256, (90, 70, 3), dtype=np.uint8)).convert(mode)
        data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    whole = decode(data)
    monkeypatch.setattr(decoding, "LARGE", 100)
    monkeypatch.setattr(decoding, "ROWS_AT_ONCE", 7)
    np.testing.assert_array_equal(decode(data), whole)


def raw_header(kind: bytes, size: int, name: str = "x") -> bytes:
    header = tarfile.TarInfo(name)
    header.type, header.size = kind, size
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"X"])
def test_the_size_of_a_tar_record_is_not_believed(kind: bytes, tmp_path: Path) -> None:
    for size in (LARGEST_RECORD + 1, 10**10):
        with (tmp_path / "a.tar").open("wb") as file:
            file.write(raw_header(kind, size))
            file.truncate(512 + size + 1024)  # sparse
        with (tmp_path / "a.tar").open("rb") as file, pytest.raises(InputError, match="a name or header of"):
            list(tar_members(file, "a.tar", Rows()))


def test_many_records_in_a_row_are_refused(tmp_path: Path) -> None:
    block = raw_header(b"L", 4) + b"abc\0".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(block * 5000 + bytes(1024))
    with (tmp_path / "a.tar").open("rb") as file, pytest.raises(InputError, match="in a row"):
        list(tar_members(file, "a.tar", Rows()))


def test_long_names_are_still_read(tmp_path: Path) -> None:
    name = f"{'a' * 90}/{'b' * 90}/{'c' * 90}.png"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
            for number in range(20):
                archive.addfile(tarfile.TarInfo(f"{number}{name}"), io.BytesIO())
        with (tmp_path / "a.tar").open("rb") as file:
            assert [one.path for one in tar_members(file, "a.tar", Rows())] == [f"{n}{name}" for n in range(20)]


@pytest.mark.parametrize(("suffix", "pack"), [("bz2", bz2.compress), ("gz", gzip.compress)])
def test_a_compressed_bomb_is_refused_and_leaves_nothing(
    suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    tar = tmp_path / f"a.tar.{suffix}"
    tar.write_bytes(pack(bytes(100_000_000)))
    with pytest.raises(InputError, match="unpacks to more than 200 times its size"):
        open_source(tar, cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_unpacked_copies_of_files_without_images_are_removed(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar.gz"
    tar.write_bytes(gzip.compress(os.urandom(5000)))
    with pytest.raises(InputError, match="as a tar file"):
        open_source(tar, cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


HARD = (
    "1 airfield a" + " " * 60_000 + "b",
    " " * 60_000 + "1 a b",
    "n01440764 " + " a" * 60_000,
    "a" + " ," * 60_000 + "x",
    "a" * 60_000 + "1" * 60_000,
    "1" * 60_000,
)


@pytest.mark.parametrize("line", HARD, ids=range(len(HARD)))
def test_long_lines_take_linear_time(line: str, tmp_path: Path) -> None:
    file = tmp_path / "categories.txt"
    file.write_text(line)

    def read() -> None:
        named_classes(line)
        name_and_number(line)
        for reader in (read_categories, read_truth):
            with pytest.raises(InputError) as found:
                reader(file)
            assert len(str(found.value)) < 1000

    assert timed(read) < 0.5


def test_lists_that_are_not_files_or_have_endless_lines_are_refused(tmp_path: Path) -> None:
    for name in ("list.txt", "list.csv", "data.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(InputError, match="FIFO"):
            open_source(tmp_path / name, cache=tmp_path / "cache")
        (tmp_path / name).unlink()
    for name in ("list.txt", "list.csv"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(8 << 30)
        with pytest.raises(InputError):
            open_source(tmp_path / name, cache=tmp_path / "cache")
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError):
            open_source(tmp_path / name, cache=tmp_path / "cache")


def test_names_are_read_as_before() -> None:
    text = "4 004_market /m/market/outdoor\n n01440764  tench, Tinca tinca \n\nx y z\n5 alone\n"
    assert named_classes(text) == {"004_market": "market/outdoor", "n01440764": "tench, Tinca tinca"}
    assert name_and_number("/a/air field 12") == ("/a/air field", "12")
    assert name_and_number("air,3 ") == ("air", "3")
    for line in ("a", "a3", "3", " 3", "a 1234567", "", ", 3"):
        assert name_and_number(line) == ("", ""), line


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def nested_cells(count: int) -> bytes:
    """A meta.mat whose one variable is a cell in a cell in a cell."""
    shape = element(5, struct.pack("<2i", 1, 1))
    body = element(6, struct.pack("<II", 6, 0)) + shape + element(1, b"") + element(9, struct.pack("<d", 1.0))
    inner = element(14, body)
    size, heads = len(inner), list[bytes]()
    for number in range(count):
        name = element(1, b"synsets" if number == count - 1 else b"")
        head = element(6, struct.pack("<II", 1, 0)) + shape + name
        heads.append(struct.pack("<II", 14, len(head) + size) + head)
        size += len(heads[-1])
    start = b"MATLAB 5.0 MAT-file".ljust(116) + bytes(8) + struct.pack("<H", 0x0100) + b"IM"
    return start + b"".join(reversed(heads)) + inner


def test_a_meta_mat_that_crashes_its_reader_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "meta.mat"
    for content in (nested_cells(100_000), nested_cells(3), b"", b"MATLAB", os.urandom(500)):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"meta\.mat is not the meta\.mat of ImageNet's 2012 development kit"):
            synset_numbers(file)


def test_images_that_are_not_files_or_too_large_are_image_faults(tmp_path: Path) -> None:
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "data" / name)
    source = open_source(tmp_path / "data", cache=tmp_path / "cache")
    (tmp_path / "data/a/0.png").unlink()
    os.mkfifo(tmp_path / "data/a/0.png")
    with (tmp_path / "data/a/1.png").open("wb") as file:
        file.truncate(60 << 30)
    with pytest.raises(OSError, match="FIFO"):
        source.read(0)
    with pytest.raises(OSError, match="the limit is 536,870,912"):
        source.read(1)
    assert source.read(2)


def test_a_cache_with_one_flipped_bit_is_made_anew(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/1.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "data" / name)
        for path in (tmp_path / "data" / name, (tmp_path / "data" / name).parent, tmp_path / "data"):
            os.utime(path, (1e9, 1e9))
    source = open_source(tmp_path / "data", cache=tmp_path / "cache")
    right = source.labels.tolist(), list(source.classes)
    (index,) = (tmp_path / "cache/index").iterdir()
    good = index.read_bytes()
    for place in (*range(8, len(good), 97), len(good) - 1):
        damaged = bytearray(good)
        damaged[place] ^= 1
        index.write_bytes(damaged)
        again = open_source(tmp_path / "data", cache=tmp_path / "cache")
        assert (again.labels.tolist(), list(again.classes)) == right
        again.close()


def test_a_model_file_with_one_flipped_bit_or_odd_numbers_is_refused(tmp_path: Path) -> None:
    from relaylab.models.file import HASH, KEY, read_model
    from test_evaluate import save_model, tiny_model

    file = tmp_path / "m.safetensors"
    save_model(file, tiny_model())
    good, tensors = file.read_bytes(), load_file(file)
    size = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + size])["__metadata__"]
    for place in (size // 2, 8 + size + 4, len(good) - 1):
        damaged = bytearray(good)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(InputError):
            read_model(file)
    first = next(iter(tensors))
    bare = {KEY: header[KEY]}
    for value, said in {float("nan"): "are not finite", float("inf"): "are not finite"}.items():
        save_file(tensors | {first: torch.full_like(tensors[first], value)}, file, bare)
        with pytest.raises(InputError, match=said):
            read_model(file).model()
    save_file(tensors | {first: tensors[first].to(torch.complex64)}, file, bare)
    with pytest.raises(InputError, match="a different type for"):
        read_model(file).model()
    save_file(tensors | {first: tensors[first] * 2}, file, bare | {HASH: header[HASH]})
    with pytest.raises(InputError, match="does not match the hash in its header"):
        read_model(file)

    def edited(**changes: object) -> str:
        return json.dumps(json.loads(header[KEY]) | changes)

    network, config = (json.loads(header[KEY])[name] for name in ("network", "input"))
    for text, said in {
        edited(network={**network, "architecture": {}}): "architecture: Expected str",
        edited(network={**network, "width": 2**63}): "width is 9223372036854775808",
        edited(input={**config, "resize": 10**400}): "an integer of 401 digits",
        edited(input={**config, "crop": 10**5, "resize": 10**5}): "crop <= resize <= 16384",
        edited(input={**config, "mean": [1, 2]}): "mean: Expected array of length 3",
        edited(classes=["\x1b"] * 4): "4 class names",
        edited(has_mean_image="yes"): "has_mean_image: Expected bool",
        "[" * 100_000: "nested too deeply",
        edited()[:-1] + ', "about": "x"}': "'about' occurs twice",
    }.items():
        save_file(tensors, file, {KEY: text})
        with pytest.raises(InputError, match=said):
            read_model(file).model()


def test_impossible_scores_are_refused(tmp_path: Path) -> None:
    from relaylab.evaluate.scores import ScoreFolder
    from test_evaluate import images_of

    folder = ScoreFolder(tmp_path, images_of(20))
    folder.add("net", {"sha256": "s"})
    good = torch.randn(20, 4).log_softmax(1)
    folder.write("net", "single-crop", 0, good)
    file = tmp_path / "scores/net/single-crop/000000.safetensors"
    header = {"model": "s", "images": "f", "pass": "single-crop"}
    for scores in (good.abs(), good * 3, good.float(), good.half() * 0, good.to(torch.complex64), good.long()):
        scores = scores.half() if scores.dtype == torch.float32 and scores is not good else scores
        save_file({"log_probabilities": scores}, file, header)
        with pytest.raises(InputError, match="does not contain log-probabilities: delete it and evaluate again"):
            folder.read("net", "single-crop")
    labels = tmp_path / "labels.safetensors"
    for changed in (torch.arange(20.0), torch.full((20,), 4), torch.full((20,), -2), torch.zeros(20, 1).long()):
        save_file({"labels": changed}, labels, {"title": "t", "fingerprint": "f", "classes": json.dumps(list("abcd"))})
        with pytest.raises(InputError):
            ScoreFolder(tmp_path)


def test_a_description_of_another_type_is_refused(tmp_path: Path) -> None:
    from relaylab.evaluate.scores import ScoreFolder
    from test_evaluate import images_of

    folder = ScoreFolder(tmp_path, images_of(20))
    folder.add("net", {"sha256": "s"})
    for text in ("{", "[]", "{}", '{"sha256": 1}', '{"sha256": "s", "values": []}', "NaN", ""):
        (tmp_path / "scores/net/model.json").write_text(text)
        with pytest.raises(InputError, match=r"model\.json is damaged"):
            folder.about("net")


def test_a_png_of_one_huge_chunk_is_read_or_refused() -> None:
    data = encoded(Image.new("RGB", (5, 5)))
    text = zlib.compress(bytes(80_000_000))
    chunk = struct.pack(">I", len(text) + 3) + b"zTXtk\0\0" + text
    bomb = data[:33] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + data[33:]
    assert decode(bomb).shape == (5, 5, 3)
