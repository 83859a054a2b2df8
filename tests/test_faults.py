"""Faults during training: nothing is lost beyond the last checkpoint, and nothing changes silently.

The reference is always the uninterrupted run: all tensors bit by bit, and the metrics without their timings.
"""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

import fault_runs
from relaybackprop import RelayLoss
from relaylab.errors import LabError, NonFiniteLossError
from relaylab.train import checkpoint, loop, requests, run_folder, session
from relaylab.train.options import TrainOptions
from relaylab.train.validation import Validation
from test_train import assert_identical, final, go_on, lines_of, stop_after, train

LONG = 120.0  # seconds that a child may take on a busy machine


def words(tree: Path, out: Path, iterations: int = 12, every: int = 4, *more: str) -> list[str]:
    """Return the command line equivalent to `test_train.train`."""
    given = ["train", "table3-model-a-relay", "--scale", "tiny", "--data", str(tree), "--out", str(out)]
    given += ["--workers", "0", "--log-every", "5", "--diagnose-every", "3", "--accelerator", "cpu", "--resume", "auto"]
    return [*given, *more, "--set", f"optimizer.iterations={iterations}", f"optimizer.evaluate_every={every}"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., BaseProcess]]:
    """Start training processes that end with the test."""
    children: list[BaseProcess] = []

    def begin(arguments: list[str], most_bytes: int | None = None) -> BaseProcess:
        children.append(fault_runs.start(tmp_path / "log", arguments, most_bytes))
        return children[-1]

    yield begin
    for child in children:
        child.kill()
        child.join()


def wait_for(child: BaseProcess) -> int:
    child.join(LONG)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


def newest_step(out: Path) -> int:
    path = next(checkpoint.newest(out / run_folder.CHECKPOINTS), None)
    return 0 if path is None else checkpoint.step_of(path) or 0


def wait_until(reached: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not reached():
        assert time.monotonic() - began < LONG, "it never got there"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def reference(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "run"
    train(tiny_images, out, keep=9)
    return out


@pytest.fixture
def halfway(reference: Path, tmp_path: Path) -> Path:
    """A run that was interrupted after its second checkpoint."""
    run = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(run / run_folder.CHECKPOINTS / "step-00000012")
    (run / run_folder.MODEL).unlink()
    return run


def assert_as_reference(out: Path, reference: Path) -> None:
    assert_identical(final(out), final(reference))
    assert lines_of(out) == lines_of(reference)


@pytest.mark.parametrize(
    ("kills", "iterations"), [(3, 40), pytest.param(30, 400, marks=[pytest.mark.faults, pytest.mark.timeout(1200)])]
)
def test_kill_9_at_random_moments(
    kills: int, iterations: int, tiny_images: Path, tmp_path: Path, start: Callable[..., BaseProcess]
) -> None:
    """With a checkpoint after each step, about half of the kills occur during a save."""
    again = words(tiny_images, tmp_path / "run", iterations, 20, "--save-every", "1", "--keep", "3")
    plain = words(tiny_images, tmp_path / "reference", iterations, 20)
    assert wait_for(start(plain)) == 0
    began = time.monotonic()
    first = start(again)
    wait_until(lambda: newest_step(tmp_path / "run") >= 2)
    startup = time.monotonic() - began
    first.kill()
    first.join()
    moments, steps, cut_saves = random.Random(7), [newest_step(tmp_path / "run")], 0
    for _ in range(kills - 1):
        child = start(again)
        child.join(startup * moments.uniform(0.5, 3.0))
        assert child.exitcode is None, "it was over before it could be killed: give it more iterations"
        child.kill()
        child.join()
        folder = tmp_path / "run" / run_folder.CHECKPOINTS
        cut_saves += any(folder.glob(".unfinished-*"))
        for path in checkpoint.newest(folder):
            checkpoint.check(path)  # a checkpoint under its final name is complete
        steps.append(newest_step(tmp_path / "run"))
    assert wait_for(start(again)) == 0
    assert steps == sorted(steps)
    print(f"{kills} kills after steps {steps}, {cut_saves} of them within a save")
    if kills > 10:
        assert cut_saves > 0, "no kill has hit a save"
        assert len(set(steps)) > kills // 3, "the kills all came before the first step"
    assert_identical(final(tmp_path / "run", iterations), final(tmp_path / "reference", iterations))
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "reference")
    with pytest.raises(AssertionError):
        assert_identical(final(tmp_path / "run", iterations), final(tmp_path / "run", iterations - 1))


def test_a_full_disk(halfway: Path, reference: Path, tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    """The operating system refuses the write: a real error of the library that writes tensors."""
    half = (halfway / run_folder.CHECKPOINTS / "step-00000008" / checkpoint.MODEL).stat().st_size // 2
    child = start(["train", "--resume", str(halfway)], half)
    assert wait_for(child) == 1
    told = (tmp_path / "log").read_text()
    assert "cannot write the checkpoint" in told
    assert "step-00000012" in told
    assert [path.name for path in sorted((halfway / run_folder.CHECKPOINTS).iterdir())] == [
        "step-00000004",
        "step-00000008",
    ]
    go_on(halfway)
    assert_as_reference(halfway, reference)


@pytest.mark.parametrize("place", ["model", "optimizer", "state", "sums", "to disk", "rename"])
def test_a_save_that_fails_at_any_of_its_steps(
    place: str, halfway: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls = 0

    def failing(original: Callable[..., Any], at: int) -> Callable[..., Any]:
        def fail(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise full
            return original(*args, **kwargs)

        return fail

    with monkeypatch.context() as patch:
        if place in ("model", "optimizer"):
            patch.setattr(checkpoint, "save_file", failing(checkpoint.save_file, 1 if place == "model" else 2))
        elif place == "to disk":
            patch.setattr(checkpoint, "_to_disk", failing(checkpoint._to_disk, 3))
        elif place == "rename":
            patch.setattr(Path, "rename", failing(Path.rename, 1))
        else:
            original, name = Path.write_text, {"state": checkpoint.STATE, "sums": checkpoint.SUMS}[place]

            def write(self: Path, *args: Any, **kwargs: Any) -> int:
                if self.name == name:
                    original(self, "cut o")
                    raise full
                return original(self, *args, **kwargs)

            patch.setattr(Path, "write_text", write)
        with pytest.raises(checkpoint.SaveError, match=r"step-00000012: No space left on device .* MB free"):
            go_on(halfway)
    assert (
        checkpoint.newest_valid(halfway / run_folder.CHECKPOINTS) == halfway / run_folder.CHECKPOINTS / "step-00000008"
    )
    assert not list((halfway / run_folder.CHECKPOINTS).glob(".*")), "the half-written files are gone: they take space"
    go_on(halfway)
    assert_as_reference(halfway, reference)


def test_metrics_that_cannot_be_written(halfway: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from relaylab.train.records import Records

    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Records, "write", write)
        with pytest.raises(LabError, match=r"No space left on device; step-00000008 is saved: relaylab train --resume"):
            go_on(halfway)
    go_on(halfway)
    assert_as_reference(halfway, reference)


class Evil:
    """A pickle in place of a model file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def with_new_sums(path: Path) -> None:
    names = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE)
    sums = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    (path / checkpoint.SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 16
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def other_state(path: Path, **values: Any) -> None:
    state = json.loads((path / checkpoint.STATE).read_text())
    (path / checkpoint.STATE).write_text(json.dumps(state | values))
    with_new_sums(path)


def foreign_state(path: Path) -> None:
    (path / checkpoint.STATE).write_text("[1, 2]")
    with_new_sums(path)


def pickled(path: Path) -> None:
    (path / checkpoint.MODEL).write_bytes(pickle.dumps(Evil(path.parents[1] / "executed")))
    with_new_sums(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "model flipped": lambda path: flip(path / checkpoint.MODEL),
    "optimizer flipped": lambda path: flip(path / checkpoint.OPTIMIZER),
    "state flipped": lambda path: flip(path / checkpoint.STATE),
    "model truncated": lambda path: truncate(path / checkpoint.MODEL),
    "state truncated": lambda path: truncate(path / checkpoint.STATE),
    "file missing": lambda path: (path / checkpoint.OPTIMIZER).unlink(),
    "no sums": lambda path: (path / checkpoint.SUMS).unlink(),
    "sums are garbage": lambda path: (path / checkpoint.SUMS).write_bytes(b"\xff\xfe\n  \n"),
    "empty folder": lambda path: [file.unlink() for file in path.iterdir()],
    "of another step": lambda path: other_state(path, step=6),
    "of another format": lambda path: other_state(path, format="other 2"),
    "state is no mapping": foreign_state,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    damage: str, halfway: Path, reference: Path
) -> None:
    DAMAGE[damage](halfway / run_folder.CHECKPOINTS / "step-00000008")
    go_on(halfway)
    told = (halfway / run_folder.LOG).read_text()
    assert "step-00000008" in told
    assert "trying the previous checkpoint" in told
    assert "resuming from step 4" in told
    assert_as_reference(halfway, reference)


def test_a_damaged_checkpoint_that_is_named_is_an_error(halfway: Path) -> None:
    path = halfway / run_folder.CHECKPOINTS / "step-00000008"
    flip(path / checkpoint.MODEL)
    with pytest.raises(LabError, match=r"model.safetensors is damaged or modified"):
        go_on(path)


def test_only_damaged_checkpoints_are_an_error(halfway: Path) -> None:
    for path in checkpoint.newest(halfway / run_folder.CHECKPOINTS):
        flip(path / checkpoint.OPTIMIZER)
    with pytest.raises(LabError, match=r"all checkpoints in .* are damaged: start a new run"):
        go_on(halfway)


def test_nothing_is_unpickled(halfway: Path) -> None:
    path = halfway / run_folder.CHECKPOINTS / "step-00000008"
    pickled(path)
    with pytest.raises(LabError, match=r"step-00000008 cannot be read"):
        go_on(path)
    assert not (halfway / "executed").exists()
    pickle.loads((path / checkpoint.MODEL).read_bytes())  # negative control: it would have been noticed
    assert (halfway / "executed").exists()


def test_a_checkpoint_of_another_network_is_refused(halfway: Path, tiny_images: Path, tmp_path: Path) -> None:
    changes = ("network.width=8",)
    train(tiny_images, tmp_path / "wide", changes=changes)
    wide = tmp_path / "wide" / run_folder.CHECKPOINTS / "step-00000012"
    shutil.copytree(wide, halfway / run_folder.CHECKPOINTS / wide.name)
    with pytest.raises(LabError, match=r"does not match the recipe table3-model-a-relay"):
        go_on(halfway)


def test_a_workers_death_costs_nothing(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_images, tmp_path / "whole", images="disk", workers=0)
    original = loop.Trainer.step

    def step(self: loop.Trainer) -> bool:
        if self.progress.step in (2, 4):  # before all batches have been made
            psutil.Process().children()[-1].kill()
        return original(self)

    monkeypatch.setattr(loop.Trainer, "step", step)
    train(tiny_images, tmp_path / "run", images="disk", workers=2)
    assert_as_reference(tmp_path / "run", tmp_path / "whole")
    assert "restarting the workers" in (tmp_path / "run" / run_folder.LOG).read_text()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_one_of_two_processes_dies_and_all_start_again(tiny_images: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "relaylab"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    more = ("--devices", "2", "--save-every", "3")
    plain = words(tiny_images, tmp_path / "whole", 24, 12, *more)
    subprocess.run([*launcher, *plain], env=environment, capture_output=True, check=True, timeout=LONG)
    # Neither --out nor --resume: the restarted processes must find the run.
    given = words(tiny_images, tmp_path / "run", 24, 12, *more)
    for option in ("--out", "--resume"):
        del given[given.index(option) : given.index(option) + 2]
    run = subprocess.Popen([*launcher, *given], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    out = tmp_path
    try:
        wait_until(lambda: any((tmp_path / "runs").glob("*/*")))
        (out,) = (tmp_path / "runs").glob("*/*")
        wait_until(lambda: newest_step(out) >= 6)
        ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("LOCAL_RANK") == "1"]
        ranks[0].kill()
        told = run.communicate(timeout=LONG)[1]
        assert run.returncode == 0, told
        assert "resuming from step" in told
    finally:
        if run.poll() is None:
            for process in (*psutil.Process(run.pid).children(recursive=True), run):
                process.kill()
            run.wait()
    assert len(list((tmp_path / "runs").glob("*/*"))) == 1
    assert_identical(final(out, 24), final(tmp_path / "whole", 24))
    assert lines_of(out) == lines_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")
def test_an_error_that_would_come_again_is_not_tried_again(tiny_images: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    given = [*words(tiny_images, tmp_path / "run", 12, 2), "optimizer.lr=1e30"]
    given[2:2] = ["--devices", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "relaylab", *given], env=environment, capture_output=True, text=True, timeout=LONG
    )
    assert run.returncode == 1, run.stderr
    assert run.stderr.count("non-finite values in the loss primary") == 1, run.stderr
    assert len(json.loads((tmp_path / "run" / run_folder.ENVIRONMENT).read_text())["starts"]) == 1


def test_a_loss_that_is_not_a_number_stops_before_the_update(
    halfway: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = RelayLoss.terms, 0

    def terms(self: RelayLoss, output: Any, target: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        found = original(self, output, target)
        return found | {"aux": found["aux"] * float("nan")} if calls == 2 else found

    seen: list[dict[str, Tensor]] = []
    step = loop.Trainer.step

    def watched(self: loop.Trainer) -> bool:
        before = {name: tensor.clone() for name, tensor in self.relay.state_dict().items()}
        try:
            return step(self)
        except NonFiniteLossError:
            seen.extend([before, dict(self.relay.state_dict())])
            raise

    with monkeypatch.context() as patch:
        patch.setattr(RelayLoss, "terms", terms)
        patch.setattr(loop.Trainer, "step", watched)
        with pytest.raises(
            NonFiniteLossError,
            match=r"step 10: non-finite values in the loss aux and the gradients of segment aux, aux\+primary",
        ):
            go_on(halfway)
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0]), "a weight has changed"
    assert newest_step(halfway) == 8
    go_on(halfway)
    assert_as_reference(halfway, reference)


def test_a_gradient_that_is_not_finite_is_found_with_its_segment(
    halfway: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Trainer.backward

    def backward(self: loop.Trainer, *args: Any) -> Any:
        found = original(self, *args)
        self.relay.get_parameter("model.segment5.conv2.weight").grad[0] = float("inf")
        return found

    monkeypatch.setattr(loop.Trainer, "backward", backward)
    with pytest.raises(
        NonFiniteLossError,
        match=r"step 9: non-finite values in the gradients of segment primary \(from model.segment5.conv2.weight on\)",
    ):
        go_on(halfway)
    assert newest_step(halfway) == 8


def test_a_rate_that_is_too_high_is_an_exit_code_and_a_line(
    tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from relaylab import cli

    arguments = words(tiny_images, tmp_path / "run")
    assert cli.main([*arguments, "optimizer.lr=1e30"]) == 1
    told = capsys.readouterr().err
    assert "non-finite values in the loss primary" in told
    assert "try a smaller optimizer.lr" in told


@pytest.fixture(scope="module")
def longer(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 80 iterations in its own process, like those compared with it."""
    folder = tmp_path_factory.mktemp("longer")
    assert wait_for(fault_runs.start(folder / "log", words(tiny_images, folder / "run", 80, 20))) == 0
    return folder / "run"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_it_and_says_how_to_go_on(
    number: signal.Signals, longer: Path, tiny_images: Path, tmp_path: Path, start: Callable[..., BaseProcess]
) -> None:
    out = tmp_path / "run"
    child = start(words(tiny_images, out, 80, 20))
    wait_until(lambda: newest_step(out) >= 20)
    assert child.pid is not None
    os.kill(child.pid, number)
    assert wait_for(child) == 130
    told = (tmp_path / "log").read_text()
    assert f"stopped by {number.name} after step {newest_step(out)}, which is saved" in told
    assert f"relaylab train --resume {out}" in told
    assert wait_for(start(["train", "--resume", str(out)])) == 0
    assert_identical(final(out, 80), final(longer, 80))
    assert lines_of(out) == lines_of(longer)


def test_two_processes_on_one_run(halfway: Path, tmp_path: Path, start: Callable[..., BaseProcess]) -> None:
    with run_folder.locked(halfway):
        assert wait_for(start(["train", "--resume", str(halfway)])) == 2
    assert "another process is training the run in" in (tmp_path / "log").read_text()
    assert wait_for(start(["train", "--resume", str(halfway)])) == 0, "the lock goes with the process"


def test_a_stop_while_a_validation_is_due_does_not_skip_it(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Path
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        train(tiny_images, tmp_path / "run")
    state = checkpoint.read_state(tmp_path / "run" / run_folder.CHECKPOINTS / "step-00000008")
    assert state["validated"] == 4
    session.train(requests.resolve(TrainOptions(resume=str(tmp_path / "run"))))
    assert_as_reference(tmp_path / "run", reference)


def test_a_validation_loss_that_is_not_finite_ends_the_run(halfway: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Validation.__call__

    def lost(self: Validation, *args: Any) -> dict[str, float]:
        return original(self, *args) | {"loss": float("nan")}

    monkeypatch.setattr(Validation, "__call__", lost)
    with pytest.raises(NonFiniteLossError, match="step 8: the validation loss is nan; try a smaller"):
        go_on(halfway)
    assert newest_step(halfway) == 8
