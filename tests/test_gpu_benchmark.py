"""The GPU benchmark in miniature: every entry has a result or a reason, and one failure does not stop the others."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from benchmarks import memory
from benchmarks.gpu import __main__ as benchmark
from benchmarks.gpu import compiled, largest, steps
from benchmarks.gpu.session import FILE, LOG, NO_TIME, Result, Session, WrongGradientsError
from benchmarks.gpu.settings import TINY
from benchmarks.measure import Step
from benchmarks.networks import Workload

STEPS_OF = steps.steps_of
Found = dict[tuple[str, str], Result]


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return a_session(tmp_path)


def a_session(tmp_path: Path, minutes: float = 8) -> Session:
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    return Session(folder=tmp_path / "out", scratch=tmp_path / "scratch", device="cpu", minutes=minutes, about={})


def stored(folder: Path) -> Found:
    results = json.loads((folder / FILE).read_text())["results"]
    return {(result["entry"], result["name"]): Result(metrics=result.pop("figures"), **result) for result in results}


def with_faults(workload: Workload) -> dict[str, Step]:
    """Relay runs out of memory, and two backward passes compute multi-loss gradients."""

    def relay() -> None:
        raise torch.OutOfMemoryError("no memory is left")

    every = STEPS_OF(workload)
    # Operations are counted on the meta device, where no contender fails.
    return every if workload.images.is_meta else every | {"relay": relay, "two_backward": every["multi_loss"]}


def test_failed_contender_is_recorded_and_the_others_continue(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "steps_of", with_faults)
    steps.measure_network(session, TINY, "model_b", TINY.networks["model_b"])
    found = {name.partition("/")[2]: result for (_, name), result in stored(session.folder).items()}
    assert found.keys() == set(steps.CONTENDERS)
    assert found["relay"].status == "out of memory"
    assert "no memory is left" in found["relay"].reason
    assert found["two_backward"].status == "wrong gradients"
    assert "two_backward: the gradient of model.segment1" in found["two_backward"].reason
    others = [result for name, result in found.items() if name not in ("relay", "two_backward")]
    assert {result.status for result in others} == {"measured"}
    assert all(result.metrics["images_per_s"] > 0 and result.metrics["peak_mb"] > 0 for result in others)
    early = found["early_release"].metrics
    assert early["flops_over_multi_loss"] == pytest.approx(early["bound_over_multi_loss"])


def test_unbuildable_network_is_the_reason_for_each_contender(session: Session) -> None:
    def build(pixels: int, batch: int, width: int, device: str) -> Workload:
        if device == "meta":
            return TINY.networks["model_b"](pixels, batch, width, device)
        raise torch.OutOfMemoryError("too large")

    steps.measure_network(session, TINY, "huge", build)
    found = stored(session.folder)
    assert found["A1", "huge"].status == "out of memory"
    assert {found["A1", f"huge/{name}"].reason for name in steps.CONTENDERS} == {"no network: see huge"}


def test_wrong_gradients_of_a_deep_network_are_recorded(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = memory.contenders

    def swapped(workload: memory.Workload) -> dict[str, Step]:
        every = contenders(workload)
        return every | {"early_release": every["multi_loss"]}

    monkeypatch.setattr(memory, "contenders", swapped)
    settings = replace(TINY, deep={"small_vit": TINY.deep["small_vit"]})
    largest.measure(session, settings)
    found = stored(session.folder)
    assert found["A2", "small_vit_2"].status == found["A2", "small_vit_4"].status == "wrong gradients"
    assert found["A2", "small_vit/early_release_4"].reason == "no network: see small_vit_4"


@pytest.mark.parametrize(("limit", "guess"), [(700, 1.0), (700, 1.5), (700, 0.6), (17, 1.0), (5000, 1.0)])
def test_search_finds_the_largest_batch(limit: int, guess: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image takes a byte. Above the small batches, memory is `guess` times the predicted one."""
    asked: list[int] = []

    def peak(step: Callable[[], object]) -> int:
        count = step()
        assert isinstance(count, int)
        asked.append(count)
        if count > 16 and count > limit:
            raise torch.OutOfMemoryError
        return count

    monkeypatch.setattr(largest, "peak_bytes", peak)
    found = largest.search(lambda count: lambda: count, int(limit * guess), (8, 16), 2048, lambda: True)
    expected = min(limit, int(limit * guess), 2048)
    assert found.images == found.peak <= expected
    assert found.images >= expected / 1.06
    assert (found.too_large is None) == (expected == 2048)
    assert len(asked) <= 2 + largest.TRIES


def test_network_that_does_not_fit_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "peak_bytes", lambda step: 100)
    with pytest.raises(torch.OutOfMemoryError, match="16 images require"):
        largest.search(lambda count: lambda: count, 50, (8, 16), 2048, lambda: True)


def test_compiled_gradients_are_compared() -> None:
    """Two fake contenders: one computes the same gradients in another order, the other one other gradients."""
    workload = steps.channels_last(TINY.networks["model_b"](112, 2, 2, "cpu"))
    every = STEPS_OF(workload)
    compiled.check(workload, {"relay": every["relay"], "relay_compiled": every["two_backward"]}, "relay_compiled")
    with pytest.raises(WrongGradientsError, match=r"relay_compiled: gradients differ from the eager float32 ones"):
        compiled.check(workload, {"relay": every["relay"], "relay_compiled": every["multi_loss"]}, "relay_compiled")


def test_hanging_child_process_is_terminated(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    (session.scratch / "hanging.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(session.scratch))
    began = time.monotonic()
    code, output = session.run(["hanging"], limit_s=5)
    assert code is None
    assert output == "begun"
    assert time.monotonic() - began < 60
    assert "$ python -m hanging\nbegun\nexit code: None" in (session.folder / LOG).read_text()


def test_no_entry_starts_after_the_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--out", str(tmp_path), "--tiny", "--minutes", "0"])
    found = stored(tmp_path)
    assert {entry for entry, _ in found} == {"A1", "A2", "A3", "A1c", "A4", "B1", "B2"}
    assert {result.status for result in found.values()} == {"not run"}
    own = {result.reason for result in found.values() if not result.reason.startswith("no network: see")}
    assert own == {NO_TIME}
    printed = capsys.readouterr().out
    assert "| A1 | resnet50/relay | not run |" in printed
    assert "command: python -m benchmarks.gpu --out DIR --minutes 0 --tiny" in printed


def test_invalid_arguments_exit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "--minutes nan": "expected a finite number",
        "--cifar nowhere": "the file or folder does not exist",
        "--only A9": "invalid choice",
    }
    for option, text in wrong.items():
        with pytest.raises(SystemExit):
            benchmark.main(["--out", str(tmp_path / "new"), "--tiny", *option.split()])
        assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_tiny_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--out", str(tmp_path)])
    assert "PyTorch does not find a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("time_ratio", "text"), [(1.09, "met: "), (1.2, "MISSED: ")])
def test_targets_are_reported(time_ratio: float, text: str) -> None:
    metrics = {"time_over_multi_loss": time_ratio, "flops_over_multi_loss": 1.08}
    result = Result(entry="A1", name="model_a/relay", status="measured", metrics=metrics)
    assert benchmark.verdict(result).startswith(text)
    assert benchmark.verdict(replace(result, name="model_a/standard")) == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "entries", "count"),
    [
        ("A1 A2", {"A1", "A2"}, 4 * len(steps.CONTENDERS) + 2 * 4),
        ("A3 A1c A4", {"A3", "A1c", "A4"}, 2 + 2 + 1),
        ("B", {"B1", "B2"}, 2),
    ],
)
def test_all_entries_in_miniature(only: str, entries: set[str], count: int, tmp_path: Path) -> None:
    benchmark.main(["--out", str(tmp_path), "--tiny", "--minutes", "30", "--only", *only.split()])
    found = stored(tmp_path)
    assert {entry for entry, _ in found} == entries
    assert {(key, result.reason) for key, result in found.items() if result.status != "measured"} == set()
    assert all(result.metrics for result in found.values())
    assert len(found) == count
    if "B" in only:
        assert found["B2", "model-a"].metrics["top-1 error of Relay BP"] >= 20
    assert sys.executable not in (tmp_path / FILE).read_text()
