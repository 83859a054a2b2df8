"""What the lab has written is read with types; what others may have written in its folders is not followed."""

import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("msgspec", reason="needs the lab extra")

from relaylab.errors import InputError
from relaylab.files import atomic_write, write_text
from relaylab.outside.folders import is_our_own, open_for_writing, refuse_links, sweep
from relaylab.outside.reading import DamagedFileError, parse, read_bytes, read_json


@dataclass(frozen=True)
class Entry:
    kind: Literal["a", "b"]
    step: int
    shares: tuple[float, ...] = ()
    folder: Path | None = None
    groups: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])


GOOD = '{"kind": "a", "step": 3, "shares": [1, 0.5], "folder": "x/y", "groups": {"g": {"h": 1e-3}}, "later": null}'


def test_json_becomes_a_dataclass(tmp_path: Path) -> None:
    (tmp_path / "f").write_text(GOOD)
    found = read_json(tmp_path / "f", Entry)
    assert found == Entry("a", 3, (1.0, 0.5), Path("x/y"), {"g": {"h": 1e-3}})
    assert parse(b"[1, 2]", list[int], "x") == [1, 2]


DAMAGED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "it is empty"),
    "cut short": (GOOD[:-9], "line 1 column"),
    "other type": (GOOD.replace("3", '"3"', 1), "step: Expected int, got str"),
    "a fraction": (GOOD.replace("3", "3.5", 1), "step: Expected int, got float"),
    "no truth": (GOOD.replace("3", "true", 1), "step: Expected int, got bool"),
    "unknown choice": (GOOD.replace('"a"', '"c"'), "kind: Invalid enum value 'c'"),
    "nested type": (GOOD.replace("1e-3", "[]"), "Expected float, got array"),
    "left out": ('{"kind": "a"}', "missing required field step"),
    "no object": ("[1]", "Expected object, got array"),
    "not a number": (GOOD.replace("0.5", "NaN"), "NaN is not a JSON number"),
    "infinite": (GOOD.replace("0.5", "-Infinity"), "-Infinity is not a JSON number"),
    "too large": (GOOD.replace("0.5", "1e999"), "the number 1e999 is too large"),
    "5,000 digits": (GOOD.replace("3", "3" * 5000, 1), "an integer of 5000 digits"),
    "beyond doubles": (GOOD.replace("[1,", "[1" + "0" * 400 + ",", 1), "an integer of 401 digits"),
    "twice": (GOOD.replace('"later"', '"step"'), "the name 'step' occurs twice"),
    "twice, among many": ("{" + ",".join(f'"{n}":0' for n in (*range(100_000), 99_999)) + "}", "'99999' occurs twice"),
    "deep": ('{"later":' + "[" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000, "nested too deeply"),
    "not UTF-8": (GOOD.encode().replace(b"x/y", b"\xff"), "can't decode byte 0xff"),
    "a zero in a path": (GOOD.replace("x/y", "x\\u0000y"), "folder: "),
    "two values": (GOOD + GOOD, "Extra data"),
    "escapes": (GOOD.replace('"a"', '"\\u001b[31m"'), "'\\x1b[31m'"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_errors_name_the_place(kind: str, tmp_path: Path) -> None:
    content, said = DAMAGED[kind]
    file = tmp_path / "file.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DamagedFileError) as found:
        read_json(file, Entry)
    told = str(found.value)
    assert told.startswith(f"{file} is damaged, or was not written by relaylab: ")
    assert said in told
    assert told.isprintable()
    assert len(told) < len(str(file)) + 400


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, said in {
        tmp_path: "it is a folder",
        tmp_path / "fifo": "it is a FIFO",
        Path("/dev/zero"): "a FIFO, a socket or a device",
        tmp_path / "absent": "No such file",
    }.items():
        with pytest.raises(DamagedFileError, match=said):
            read_json(path, Entry)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedFileError, match=r"it has 1,099,511,627,776 bytes; the limit is"):
        read_json(tmp_path / "sparse", Entry)
    (tmp_path / "small").write_bytes(b"abc")
    assert read_bytes(tmp_path / "small", 3) == b"abc"
    with pytest.raises(OSError, match="the limit is 2"):
        read_bytes(tmp_path / "small", 2)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "link").symlink_to(victim)
    for mode in ("w", "a"):
        with pytest.raises(OSError, match="symbolic link"):
            open_for_writing(tmp_path / "link", mode)
    write_text(tmp_path / "link", "new")  # replaces the link, not its target
    assert victim.read_text() == "precious"
    with open_for_writing(tmp_path / "plain", "a") as file:
        file.write("x")
    assert (tmp_path / "plain").read_text() == "x"


def test_a_run_with_links_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-1").mkdir(parents=True)
    (run / "checkpoints" / "step-1" / "state.json").write_text("{}")
    refuse_links(run)
    for place in (".lock", "log.txt", "tensorboard", "checkpoints/step-2", "checkpoints/step-1/model.safetensors"):
        (run / place).symlink_to(tmp_path)
        with pytest.raises(InputError, match=f"{place} is a symbolic link"):
            refuse_links(run)
        (run / place).unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(InputError, match=r"metrics.jsonl is neither a file nor a folder"):
        refuse_links(run)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_users_umask_is_respected(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", "x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_a_full_disk_is_an_error_of_the_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    with pytest.raises(OSError, match="No space left on device") as found, atomic_write(tmp_path / "model") as _:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")
    assert found.value.filename == str(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_user_is_not_ours(tmp_path: Path) -> None:
    file = tmp_path / "index"
    assert not is_our_own(file)
    file.write_text("x")
    assert is_our_own(file)
    (tmp_path / "link").symlink_to(file)
    assert not is_our_own(tmp_path / "link")
    if os.geteuid() == 0:
        os.chown(file, 65534, 65534)
        assert not is_our_own(file)


def test_abandoned_files_are_swept(tmp_path: Path) -> None:
    for name, age in {".a.part": 5000, ".b.part": 10, "c": 5000}.items():
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    sweep(tmp_path, ".*.part", 1000, 1e9)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.part", "c"]
    sweep(tmp_path / "absent", "*", 0, 1e9)


def test_damaged_metrics_end_the_file_and_not_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from relaylab.train.records import read_metrics

    file = tmp_path / "metrics.jsonl"
    train = {"kind": "train", "step": 1, "loss": {"primary": 1.5}, "top1": 90.0, "top5": 50.0, "gradient_norm": None}
    val = {"kind": "val", "step": 2, "loss": 1.0, "top1": 90.0, "top5": 40.0, "seconds": 1.0}
    gradients = {"kind": "gradients", "step": 2, "layers": {"a": {"gradient": 1.0, "ratio": 1e-3}}, "segments": {}}
    good = [json.dumps(line).encode() for line in (train, val, gradients)]
    file.write_bytes(b"\n".join(good) + b"\n")
    assert [line["kind"] for line in read_metrics(file)] == ["train", "val", "gradients"]
    damaged = [
        b"\xff\xfe torn", b"{", b"[]", b"1", b"null", b"{}", b'{"kind": "val", "step": 3}', b"[" * 100_000,
        json.dumps({**val, "step": "2"}).encode(), json.dumps({**val, "top1": None}).encode(),
        json.dumps({**val, "step": -1}).encode(), json.dumps({**train, "loss": 1.0}).encode(),
        json.dumps({**val, "loss": float("nan")}).encode(), json.dumps({**gradients, "layers": []}).encode(),
    ]  # fmt: skip
    for line in damaged:
        file.write_bytes(b"\n".join([good[0], line, *good]) + b"\n")
        assert read_metrics(file) == [train], line
