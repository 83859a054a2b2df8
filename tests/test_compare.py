"""Comparisons: missing runs are trained concurrently, and failed runs are reported."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaylab import cli
from relaylab.commands import compare
from relaylab.train import failures, jobs, many, requests, run_folder
from relaylab.train.options import TrainOptions
from relaylab.train.records import read_metrics

SMALL = ("network.width=2", "network.convs=1", "optimizer.batch_size=8")
SHORT = (*SMALL, "optimizer.iterations=8", "optimizer.evaluate_every=4")
TIMES = ("images_per_s", "data_wait", "seconds")


def words_of(out: Path, *more: str, changes: tuple[str, ...] = SHORT) -> list[str]:
    return ["compare", "digits", "--out", str(out), *more, "--set", *changes]


def lines_of(run: Path) -> list[dict[str, object]]:
    lines = read_metrics(run / run_folder.METRICS)
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def times_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/[cm]*.*")}


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it has taken too long"
        time.sleep(0.02)


def test_what_is_missing_is_trained_and_the_spread_is_in_the_table(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "table3-model-a-relay", "--scale", "tiny", "--data", str(tiny_images), "--out", str(tmp_path)]
    words += ["--schemes", "standard,relay", "--set", "optimizer.iterations=4", "optimizer.evaluate_every=2"]
    assert cli.main([*words, "--seeds", "0"]) == 0
    assert "one seed" in capsys.readouterr().out
    done = times_of(tmp_path)
    assert len({path.parent for path in done}) == 2
    assert cli.main([*words, "--seeds", "0,1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was there has been trained again"
    table = capsys.readouterr().out
    assert "| Relay BP | 2 seeds |" in table
    assert (tmp_path / "comparison.md").read_text().count("±") == 3, "two errors and the note; no top-5 of five classes"
    assert len(json.loads((tmp_path / "comparison.json").read_text())["runs"]) == 4
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_two_at_once_stopped_and_resumed_give_the_bits_of_one_at_a_time(tmp_path: Path) -> None:
    changes = (*SMALL, "optimizer.iterations=500", "optimizer.evaluate_every=250")
    both, alone = tmp_path / "both", tmp_path / "alone"
    more = ("--schemes", "standard,relay", "--seeds", "0,1")
    process = subprocess.Popen(
        [sys.executable, "-m", "relaylab", *words_of(both, *more, "--jobs", "2", changes=changes)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    names = ("standard-s0", "relay-s0")
    wait_until(lambda: all((both / name / run_folder.METRICS).is_file() for name in names))
    wait_until(lambda: all((both / name / run_folder.METRICS).stat().st_size for name in names))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Run the same command again to resume the others." in out
    assert "Traceback" not in err
    assert all(any((both / name / run_folder.CHECKPOINTS).iterdir()) for name in names), "the step was saved"
    assert not (both / "relay-s1").exists(), "nothing was started after the signal"
    assert cli.main(words_of(both, *more, "--jobs", "2", changes=changes)) == 0
    assert cli.main(words_of(alone, *more, "--jobs", "1", changes=changes)) == 0
    for name in ("standard-s0", "relay-s0", "standard-s1", "relay-s1"):
        models = [(folder / name / run_folder.MODEL).read_bytes() for folder in (both, alone)]
        assert models[0] == models[1], name
        assert lines_of(both / name) == lines_of(alone / name)
    assert (alone / "relay-s0" / run_folder.MODEL).read_bytes() != (alone / "relay-s1" / run_folder.MODEL).read_bytes()


def test_a_run_that_diverges_is_a_result_and_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tmp_path, "--schemes", "standard,relay", "--seeds", "0,1")
    words.append("plan.auxiliary.aux.weight=1e38")  # standard BP does not use it
    seen: list[dict[Path, int]] = []
    for _ in range(2):
        assert cli.main(words) == 1
        captured = capsys.readouterr()
        (row,) = [line for line in captured.out.splitlines() if line.startswith("| Relay BP")]
        assert row.startswith("| Relay BP | 0 of 2 seeds; 2 diverged |  |  |")
        assert "Relay BP, seed 1: diverged after step 0: step 1: non-finite values in" in captured.err
        assert "would diverge again" in captured.err
        assert "| standard BP | 2 seeds |" in captured.out
        assert "Relay BP, seed 0: diverged" in (tmp_path / "comparison.md").read_text()
        told = json.loads((tmp_path / "comparison.json").read_text())
        assert [(each["scheme"], each["seed"], each["kind"], each["step"]) for each in told["failures"]] == [
            ("relay", 0, "diverged", 0), ("relay", 1, "diverged", 0),
        ]  # fmt: skip
        assert len(told["runs"]) == 2
        seen.append(times_of(tmp_path))
    assert seen[0] == seen[1], "something was trained again"


def test_runs_of_a_small_vgg_are_evaluated_and_other_folders_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(tmp_path / "runs", "--schemes", "standard,relay", "--seeds", "0")
    assert cli.main(words) == 0
    scores = str(tmp_path / "scores")
    evaluate = ["eval", str(tmp_path / "runs"), "--workers", "0", "--out", scores]
    capsys.readouterr()
    for more, message in [
        (["--protocol", "dense"], "relay-s0: Sequential has no dense form"),
        (["--against", "nope"], "--against nope: unknown network"),
    ]:
        assert cli.main([*evaluate, *more]) == 2
        assert message in capsys.readouterr().err
        assert not Path(scores).exists()
    assert cli.main([*evaluate, "--against", "standard-s0"]) == 0
    assert "standard-s0 (standard BP)" in capsys.readouterr().out
    assert cli.main([*words, "optimizer.momentum=0.5"]) == 2
    assert "choose a different --out, or remove that folder" in capsys.readouterr().err
    assert cli.main(["compare", "digits", "--out", scores]) == 2
    assert "is not empty and does not contain a comparison" in capsys.readouterr().err
    assert cli.main(["compare", "digts"]) == 2
    assert capsys.readouterr().err == "relaylab: unknown recipe 'digts'; nearest: digits\n"
    assert cli.main([*words_of(tmp_path / "new"), "network.architecture=smal_vgg"]) == 2
    assert "unknown architecture 'smal_vgg'; nearest: small_vgg" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert cli.main(["compare", "digits", "--set", "optimizer.lr=1", "--set", "optimizer.momentum=0"]) == 2
    assert "--set is given more than once: list all its values after a single --set" in capsys.readouterr().err


def test_a_run_that_was_killed_is_a_result_and_is_tried_again(tmp_path: Path) -> None:
    changes = (*SMALL, "optimizer.iterations=400", "optimizer.evaluate_every=400")
    words = words_of(tmp_path, "--schemes", "standard,relay", "--seeds", "0", "--jobs", "1", changes=changes)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(words)))
    thread.start()
    metrics = tmp_path / "standard-s0" / run_folder.METRICS
    wait_until(lambda: metrics.is_file() and metrics.stat().st_size)
    (process,) = multiprocessing.active_children()
    assert process.name == "standard-s0"
    os.kill(process.pid or 0, signal.SIGKILL)
    thread.join(timeout=60)
    assert codes == [1]
    failure = failures.read_failure(tmp_path / "standard-s0")
    assert failure is not None
    assert (failure.kind, failure.error) == ("failed", "its process was killed by SIGKILL")
    assert "| standard BP | 0 of 1 seed; 1 failed |" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "relay-s0" / run_folder.MODEL).is_file(), "the other run was not affected"
    assert cli.main(words) == 0
    assert failures.read_failure(tmp_path / "standard-s0") is None


def test_a_run_that_failed_before_it_began_is_tried_again(tmp_path: Path) -> None:
    """As after a kill during decoding: the folder has no configuration yet."""
    words = words_of(tmp_path, "--schemes", "standard", "--seeds", "0")
    folder = tmp_path / "standard-s0"
    folder.mkdir()
    for name in (run_folder.LOCK, run_folder.LOG):
        (folder / name).write_text("")
    (folder / run_folder.ENVIRONMENT).write_text('{"starts": []}')
    failures.write_failure(folder, failures.Failure("failed", 0, "its process was killed by SIGKILL"))
    assert cli.main(words) == 0
    assert (folder / run_folder.MODEL).is_file()
    assert failures.read_failure(folder) is None


def test_an_error_before_the_first_step_is_the_reason_that_is_reported(
    tmp_path: Path,
) -> None:
    job = jobs._Job("standard-s0", tmp_path / "standard-s0", FakeProcess(), FakePipe(), jobs._Report(0))  # pyright: ignore
    job.last = jobs._Report(0, end="failed", error="101 of 1000 images cannot be read")
    assert "101 of 1000" in jobs._settle(job, is_stopping=False)
    failure = failures.read_failure(tmp_path / "standard-s0")
    assert failure is not None
    assert failure.error == "101 of 1000 images cannot be read"


class FakeProcess:
    exitcode = 1

    def join(self) -> None:
        pass


class FakePipe:
    def close(self) -> None:
        pass


def test_what_would_stop_every_run_is_an_error_and_leaves_nothing(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "table3-model-a-relay", "--scale", "tiny", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--data", str(tiny_images), "--schemes", "standard,rely"]) == 2
    assert "nearest: relay" in capsys.readouterr().err
    assert cli.main([*words, "--data", str(tiny_images), "--set", "network.num_classes=7"]) == 2
    assert "has 5 classes, and the recipe's network 7" in capsys.readouterr().err
    assert cli.main([*words, "--data", str(tiny_images), "--devices", "2", "--jobs", "2"]) == 2
    assert "--jobs 2 with --devices 2" in capsys.readouterr().err
    tree = tmp_path / "images"
    subprocess.run(["cp", "-r", str(tiny_images), str(tree)], check=True)
    (tree / "val" / "class3" / "2.png").write_bytes(b"not an image")
    assert cli.main([*words, "--data", str(tree), "--jobs", "2"]) == 2
    assert "class3/2.png" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.*"))


def test_threads_depend_on_the_cores_and_on_the_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int | None, int]] = []

    def train_all(configs: dict[str, TrainOptions], *, jobs: int, threads: int | None, iterations: int) -> None:
        seen.append((jobs, threads, len(configs)))

    monkeypatch.setattr(jobs, "train_all", train_all)
    monkeypatch.setattr(many, "available_cores", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    for more in ((), ("--jobs", "1"), ("--seeds", "0"), ("--seeds", "0", "--schemes", "relay")):
        assert cli.main(words_of(tmp_path, *more)) == 130
    assert seen == [(8, 1, 9), (1, 1, 9), (3, 2, 3), (1, 8, 1)]


def test_lists_of_schemes_and_seeds() -> None:
    assert compare.listed_schemes("standard, multi-loss,relay") == (["standard", "multi_loss", "relay"], [])
    assert "nearest: relay" in compare.listed_schemes("rely")[1][0]
    assert compare.listed_seeds("0,2") == ([0, 2], [])
    assert compare.listed_seeds("0,0")[1]
    assert compare.listed_seeds("a")[1]
    assert compare.listed_seeds("")[1]


def test_a_comparisons_run_can_be_said_as_a_command() -> None:
    config = TrainOptions(
        recipe="table3-model-a-relay", scale="tiny", data=(Path("images"),), changes=SHORT, workers=0, devices=2,
        out=Path("out"), precision="bf16", compile=True,
    )  # fmt: skip
    assert cli.parse(requests.arguments_of(config))[1] == config


def test_windows_that_do_not_overlap_are_a_warning_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart = (*SHORT, "plan.primary.bottom=segment3", "plan.auxiliary.aux.top=segment2")
    assert cli.main(words_of(tmp_path, "--schemes", "standard,relay", "--seeds", "0,1", changes=apart)) == 0
    text = "warning: the windows of primary and aux do not overlap: this is not relay; lower plan.primary.bottom\n"
    assert capsys.readouterr().err.count(text) == 1
    assert text in (tmp_path / "relay-s1" / "log.txt").read_text()
