"""`Relay.step` frees each window as early as it can, and its gradients are the reference's all the same. float64."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from nets import CASES, Case, make_case
from oracle import assert_same, expected_gradients, gradients_of, losses_of, relay_gradients
from relaybackprop import AuxiliaryHead, LinearHead, Plan, Relay, RelayLoss, RelayOutput, Window, cost
from relaybackprop.cost import FlopCounter
from relaybackprop.errors import (
    BoundaryError,
    CompiledOverlapError,
    HeadError,
    LeakError,
    RelayError,
    StepError,
    WindowError,
)
from relaybackprop.release import Release
from test_exact_random import Example, build, examples


def seed_each_module(relay: Relay) -> None:
    """Let chance depend on the module alone: heads run earlier in a step than in an ordinary forward pass."""
    for number, module in enumerate(relay.modules()):

        def seed(_module: nn.Module, _args: Any, number: int = number) -> None:
            torch.manual_seed(number)

        module.register_forward_pre_hook(seed)


def smooth_loss(plan: Plan) -> RelayLoss:
    def of_one(output: Any, _target: Any) -> Tensor:
        return losses_of({"any": output})["any"]

    return RelayLoss(dict.fromkeys(plan.windows, of_one), plan)


def step_gradients(relay: Relay, *inputs: Any) -> dict[str, Tensor]:
    relay.zero_grad(set_to_none=True)
    relay.step(*inputs, target=None, loss=smooth_loss(relay.plan))
    return gradients_of(relay)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


SCHEMES: dict[str, Callable[[Plan], Plan]] = {
    "relay": lambda plan: plan,
    "multi_loss": Plan.multi_loss,
    "isolated": Plan.isolated,
    "standard": Plan.standard,
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_equal_the_reference(case: Case, scheme: str) -> None:
    plan = SCHEMES[scheme](case.plan)
    relay = Relay(case.model, plan, {name: case.heads[name] for name in plan.auxiliary})
    seed_each_module(relay)
    if scheme == "isolated" and {"branch", "low"} & case.heads.keys():
        with pytest.raises(LeakError):  # a window cannot end inside a branch
            step_gradients(relay, *case.inputs)
        return
    for _ in range(3):  # the first step copies what heads read and searches the graph, later ones do not
        assert_same(step_gradients(relay, *case.inputs), expected_gradients(relay, *case.inputs))


def test_negative_control_other_windows_are_told_apart(case: Case) -> None:
    relay = Relay(case.model, case.plan, case.heads)
    seed_each_module(relay)
    got = step_gradients(relay, *case.inputs)
    with pytest.raises(AssertionError, match=r"relative error|expected no gradient"):
        assert_same(got, expected_gradients(relay, *case.inputs, plan=case.plan.multi_loss()))


def test_negative_control_a_lane_too_few_is_found_out(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that do not get through what they share with losses to come."""

    def nothing(self: Release, number: int, losses: frozenset[str]) -> None:
        self._pieces[number - 1].lanes[losses] = [None] * len(self._pieces[number - 1].sources)

    monkeypatch.setattr(Release, "_send", nothing)
    relay = Relay(case.model, case.plan, case.heads)
    seed_each_module(relay)
    with pytest.raises(AssertionError, match=r"relative error|expected no gradient"):
        assert_same(step_gradients(relay, *case.inputs), expected_gradients(relay, *case.inputs))


COUNTS = Counter[str]()


def goes_around(example: Example) -> bool:
    """Whether a skip leads around the end of any window, which a step cannot have even where no leak is."""
    for loss, window in example.plan.windows.items():
        end = example.ends[loss]
        lowest, highest_source = (end + 1, end - 1) if window.bottom else (end, end - 2)
        if window.lower is not None and any(
            source <= highest_source and lowest <= target
            for target, sources in example.skips.items()
            for source in sources
        ):
            return True
    return False


@given(examples())
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def check_random_network(example: Example) -> None:
    relay, x = build(example)
    seed_each_module(relay)
    if any(example.leaks(loss) for loss in example.plan.windows):
        COUNTS["leak"] += 1
        with pytest.raises((LeakError, StepError)):
            step_gradients(relay, x)
        return
    if goes_around(example):
        COUNTS["around"] += 1
        try:
            got = step_gradients(relay, x)
        except StepError:
            COUNTS["refused"] += 1
            return
        assert_same(got, expected_gradients(relay, x))
        return
    COUNTS["exact"] += 1
    for _ in range(2):
        assert_same(step_gradients(relay, x), expected_gradients(relay, x))


def test_random_networks() -> None:
    check_random_network()
    assert COUNTS["exact"] >= 200, COUNTS
    assert COUNTS["leak"] >= 10, COUNTS
    assert COUNTS["refused"] >= 1, COUNTS
