"""Two processes under torchrun: the result of a single process with the same global batch, and exact resume."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

import train_ranks
from relaylab.options import given_options
from relaylab.train import requests, run_folder, session
from relaylab.train.options import TrainOptions
from test_train import assert_identical, final, lines_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo"),
]
TOLERANCE = 2e-5  # of the largest value of a tensor, in single precision: sums in another order, over six updates


@pytest.fixture(scope="module")
def two(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of all scenarios, made by a single launch of two processes, which takes seconds."""
    folder = tmp_path_factory.mktemp("two")
    train_ranks.write_lists(tiny_images)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, train_ranks.__file__, str(tiny_images), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (got[name].double() - tensor.double()).abs().max().item()
        assert difference <= TOLERANCE * tensor.abs().max().item(), (name, difference)


NAMES = [name for name in train_ranks.SCENARIOS if not name.startswith("dropout") and name != "mixing"]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_one_processs_parameters(
    name: str, two: Path, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, input: input)
    options = {"strategy": "ddp", "accumulate": 1, "early_release": False}
    session.train(requests.resolve(train_ranks.config_of(name, tiny_images, tmp_path / "one", **options)))
    assert_close(final(two / name, 6), final(tmp_path / "one", 6))
    with pytest.raises(AssertionError):  # negative controls: one step less, and other images
        assert_close(final(two / name, 3), final(tmp_path / "one", 6))
    other = train_ranks.config_of(name, tiny_images, tmp_path / "other", **options, seed=1)
    session.train(requests.resolve(other))
    with pytest.raises(AssertionError):
        assert_close(final(two / name, 6), final(tmp_path / "other", 6))
    for one, both in zip(lines_of(tmp_path / "one"), lines_of(two / name), strict=True):
        if one["kind"] == "val":
            losses = one.keys() & {"loss", "ema_loss"}
            assert {key: both[key] for key in both.keys() - losses} == {key: one[key] for key in one.keys() - losses}
            for loss in losses:
                assert both[loss] == pytest.approx(one[loss], rel=TOLERANCE)


@pytest.mark.parametrize("name", train_ranks.STOPPED)
def test_two_processes_go_on_exactly_after_a_stop(name: str, two: Path) -> None:
    assert_identical(final(two / f"{name}, stopped", 6), final(two / name, 6))
    assert lines_of(two / f"{name}, stopped") == lines_of(two / name)
    with pytest.raises(AssertionError):
        assert_identical(final(two / name, 3), final(two / name, 6))


def test_two_processes_may_become_one(two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sharded parameters are unsharded in a checkpoint."""
    shutil.copytree(two / "fsdp", tmp_path / "run")
    path = tmp_path / "run" / run_folder.CHECKPOINTS / "step-00000003"
    words = ["train", "--resume", str(path), "--strategy", "ddp", "--devices=1"]
    request = requests.resolve(TrainOptions(resume=str(path)), {*given_options(TrainOptions, words), "recipe"})
    assert request.options.devices == 1
    outcome = session.train(request)
    assert outcome.finished
    assert "the number of processes changed from 2 to 1, so the order of summation" in capsys.readouterr().err
