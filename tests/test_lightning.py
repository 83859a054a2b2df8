"""Lightning's DDP with class-aware sampling: two processes give what one does, if Lightning keeps the sampler."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from oracle import assert_same
from relaylab.data.sampling import ClassAwareSampler

pytest.importorskip("lightning", reason="lightning is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

import lightning_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Lightning's, of what it calls
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By setting, each process's images and weights."""
    folder, root = tmp_path_factory.mktemp("two"), Path(__file__).parents[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    command = [*launcher, lightning_ranks.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)] for name in ("own", "replaced")}


def stream(draws: list[torch.Tensor]) -> torch.Tensor:
    """The processes' draws in turns, as the sampler deals them out."""
    return torch.stack(draws, dim=1).flatten()


def test_two_processes_see_the_stream_of_one(results: dict[str, list[dict[str, Any]]]) -> None:
    labels = lightning_ranks.LABELS
    sampler = ClassAwareSampler(labels, seed=0, num_samples=48 * lightning_ranks.EPOCHS)
    seen = stream([result["draws"] for result in results["own"]])
    assert seen.tolist() == list(sampler)
    assert set(labels[seen].bincount().tolist()) == {9, 10}  # of each class, though the classes have 1 to 10 images


def test_lightnings_own_sampler_changes_the_stream(results: dict[str, list[dict[str, Any]]]) -> None:
    """The negative control: without `use_distributed_sampler=False`, each process gets half of its half."""
    own, replaced = (stream([result["draws"] for result in results[name]]) for name in ("own", "replaced"))
    assert len(replaced) == len(own) / 2
    assert replaced.tolist() != own[: len(replaced)].tolist()


def test_two_processes_train_the_weights_of_one(results: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    alone = lightning_ranks.train(tmp_path, devices=1)["weights"]
    for result in results["own"]:
        assert_same(result["weights"], alone)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(results["replaced"][0]["weights"], alone)
