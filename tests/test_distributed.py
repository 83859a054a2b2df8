"""Two processes over gloo: DDP in all its modes and FSDP2 give the mean of what the reference gives on each batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from oracle import assert_same, expected_gradients, seed_each_module

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor] | str]]:
    """By rank, each scenario's gradients. One pair of processes runs them all: starting one takes seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks.WORLD)
    ]
    try:
        logs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * ranks.WORLD, "\n".join(logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks.WORLD)]


def mean_over_ranks(
    name: str, seeds: tuple[int, ...], scheme: str = "relay", *, by_module: bool = False
) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for rank in range(ranks.WORLD):
        case = ranks.case_of(name, rank)
        relay = ranks.relay_of(case, scheme)
        if by_module:
            seed_each_module(relay)
        for seed in seeds:
            for parameter, gradient in expected_gradients(relay, *case.inputs, seed=seed).items():
                total[parameter] = total.get(parameter, 0) + gradient / ranks.WORLD
    return total


@pytest.mark.parametrize("name", ranks.NETS)
@pytest.mark.parametrize("scenario", ranks.SCENARIOS)
def test_gradients(scenario: str, name: str, results: list[dict[str, dict[str, Tensor] | str]]) -> None:
    two_parts = scenario in ("ddp no_sync", "step in two parts")
    expected = mean_over_ranks(name, (7, 8) if two_parts else (7,), by_module=scenario.startswith("step"))
    for result in results:
        got = result[f"{scenario} {name}"]
        assert not isinstance(got, str), got
        assert_same(got, expected)
    with pytest.raises(AssertionError):  # negative control: another plan's gradients, or one rank's alone, differ
        assert_same(got, mean_over_ranks(name, (7,), "multi_loss"))
    case = ranks.case_of(name, 0)
    with pytest.raises(AssertionError):
        assert_same(got, expected_gradients(ranks.relay_of(case), *case.inputs))
