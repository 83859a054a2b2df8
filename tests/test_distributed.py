"""Several processes over gloo: DDP, FSDP2 and early release give the mean of the references. float64."""

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from oracle import assert_same, expected_gradients, seed_each_module

Results = list[dict[str, dict[str, Tensor] | str]]

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch is built without gloo")


def run(world: int, folder: Path) -> Results:
    """By rank, each scenario's gradients. One set of processes runs them all: starting one takes seconds."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, ranks.__file__, str(rank), str(world), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        logs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run(4, tmp_path_factory.mktemp("four"))


def mean_over_ranks(
    name: str,
    seeds: tuple[int, ...],
    members: range,
    scheme: str = "relay",
    *,
    by_module: bool,
    frozen: Collection[int] = (),
) -> dict[str, Tensor]:
    """The mean over ranks of the references' sums over seeds."""
    every: list[dict[str, Tensor]] = []
    for rank in members:
        case = ranks.case_of(name, rank)
        relay = ranks.relay_of(case, scheme)
        for number, parameter in enumerate(relay.parameters()):
            parameter.requires_grad_(number not in frozen)
        if by_module:
            seed_each_module(relay)
        parts = [expected_gradients(relay, *case.inputs, seed=seed) for seed in seeds]
        every.append({parameter: len(parts) * mean for parameter, mean in ranks.mean_of(parts).items()})
    return ranks.mean_of(every)


def assert_all_same(results: Results, scenario: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check a scenario's gradients in all processes, and return those of the last one."""
    got = None
    for result in results:
        got = result[scenario]
        assert not isinstance(got, str), got
        assert_same(got, expected)
    assert isinstance(got, dict)
    return got


def check(results: Results, scenario: str, name: str) -> None:
    by_module, members = scenario.startswith("step"), range(len(results))
    seeds = (7, 8) if scenario == "ddp no_sync" or "two parts" in scenario else (7,)
    expected = mean_over_ranks(name, seeds, members, by_module=by_module)
    got = assert_all_same(results, f"{scenario} {name}", expected)
    with pytest.raises(AssertionError):  # negative controls: another plan's gradients, or one rank's alone, differ
        assert_same(got, mean_over_ranks(name, seeds, members, "multi_loss", by_module=by_module))
    with pytest.raises(AssertionError):
        assert_same(got, mean_over_ranks(name, seeds, range(1), by_module=by_module))


@pytest.mark.parametrize("name", ranks.NETS)
@pytest.mark.parametrize("scenario", ranks.SCENARIOS)
def test_gradients(scenario: str, name: str, two: Results) -> None:
    check(two, scenario, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ranks.NETS)
@pytest.mark.parametrize("scenario", ranks.FOUR)
def test_gradients_of_four(scenario: str, name: str, four: Results) -> None:
    check(four, scenario, name)


@pytest.mark.slow
def test_gradients_are_averaged_over_a_group(four: Results) -> None:
    for first in (0, 2):
        expected = mean_over_ranks("vgg", (7,), range(first, first + 2), by_module=True)
        assert_all_same(four[first : first + 2], "pairs vgg", expected)
        with pytest.raises(AssertionError):
            assert_all_same(four[2 - first : 4 - first], "pairs vgg", expected)


@pytest.mark.parametrize("name", ranks.NETS)
def test_frozen_layers(name: str, two: Results) -> None:
    expected = mean_over_ranks(name, (7,), range(2), by_module=True, frozen=ranks.FROZEN[-1])
    assert_all_same(two, f"frozen {name}", expected)


@pytest.mark.parametrize("step", range(len(ranks.UNEVEN)))
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_wrong_forecasts_leave_gradients_exact(world: int, step: int, request: pytest.FixtureRequest) -> None:
    """Processes use layers more often, less often or not at all; a weight is shared between two windows."""
    results: Results = request.getfixturevalue("two" if world == 2 else "four")
    got = assert_all_same(results, f"uneven {step}", ranks.expected_uneven(step, range(world)))
    with pytest.raises(AssertionError):
        assert_same(got, ranks.expected_uneven(step, range(1)))


def test_negative_control_late_gradients_matter(two: Results) -> None:
    with pytest.raises(AssertionError, match=r"model\.lower\.weight"):
        assert_all_same(two, "forgetful", ranks.expected_uneven(1, range(2)))


@pytest.mark.parametrize("key", ranks.OPTIMIZERS)
def test_optimizers(key: str, two: Results) -> None:
    options = ranks.OPTIMIZERS[key]
    got = assert_all_same(two, f"AdamW {key} vgg", ranks.expected_optimized("vgg", range(2), **options))
    with pytest.raises(AssertionError):
        assert_same(got, ranks.expected_optimized("vgg", range(1), **options))


@pytest.mark.parametrize("name", ["refused transformer", "refused fsdp2 resnet"])
def test_a_refused_step_is_named_and_leaves_the_next_one_exact(name: str, two: Results) -> None:
    assert_all_same(two, name, mean_over_ranks(name.split()[-1], (7,), range(2), by_module=True))
