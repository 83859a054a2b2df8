"""The method is exact: the engine against the reference, hand-written masks and finite differences. float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nets import CASES, Case, make_case
from oracle import (
    assert_same,
    by_loss,
    expected_gradients,
    gradients_of,
    losses_of,
    relay_gradients,
    weighted_sum,
)
from relaybackprop import Plan, Relay, Window
from relaybackprop.engine.junction import Junction
from relaybackprop.errors import LeakError
from relaybackprop.reference import reference_gradients


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


SCHEMES = {
    "relay": lambda plan: plan,
    "multi_loss": Plan.multi_loss,
    "isolated": Plan.isolated,
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_equal_the_reference(case: Case, scheme: str) -> None:
    relay = Relay(case.model, SCHEMES[scheme](case.plan), case.heads)
    if scheme == "isolated" and {"branch", "low"} & case.heads.keys():
        with pytest.raises(LeakError):  # a window cannot end inside a branch
            relay(*case.inputs)
        return
    # Twice: the first forward pass walks the graph, and later ones reuse its schedule.
    assert_same(relay_gradients(relay, *case.inputs), expected_gradients(relay, *case.inputs))
    assert_same(relay_gradients(relay, *case.inputs), expected_gradients(relay, *case.inputs))


def test_each_loss_alone_equals_the_reference(case: Case) -> None:
    relay = Relay(case.model, case.plan, case.heads)
    for name in case.plan.windows:
        relay.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        loss = losses_of(by_loss(relay(*case.inputs)))[name]
        (case.plan.weights[name] * loss).backward()
        got = gradients_of(relay)
        torch.manual_seed(7)
        alone = _reference_of_one_loss(relay, name, case)
        assert_same(got, alone)
        # The mask, written by hand: exactly these parameters, and no others, may have a gradient.
        for parameter, gradient in got.items():
            assert gradient.any() == parameter.startswith(case.reaches[name]), (name, parameter)


def _reference_of_one_loss(relay: Relay, loss: str, case: Case) -> dict[str, Tensor]:
    def only(outputs: dict[str, object]) -> dict[str, Tensor]:
        return {loss: losses_of(outputs)[loss]}

    return reference_gradients(relay.model, relay.plan, dict(relay.heads.items()), only, *case.inputs)


def test_negative_control_other_windows_give_other_gradients(case: Case) -> None:
    relay = Relay(case.model, case.plan, case.heads)
    got = relay_gradients(relay, *case.inputs)
    with pytest.raises(AssertionError, match=r"relative error|expected no gradient"):
        assert_same(got, expected_gradients(relay, *case.inputs, plan=case.plan.multi_loss()))


def test_negative_control_a_wrong_engine_fails(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows without ends: every junction propagates all incoming gradients."""
    whole_sum = Junction._sum_of

    def leaky(self: Junction, losses: frozenset[str], arrived: list, heads: dict) -> list:
        assert self.route is not None
        return whole_sum(self, self.route.incoming | losses, arrived, heads)

    monkeypatch.setattr(Junction, "_sum_of", leaky)
    relay = Relay(case.model, case.plan, case.heads)
    with pytest.raises(AssertionError, match=r"relative error|expected no gradient"):
        assert_same(relay_gradients(relay, *case.inputs), expected_gradients(relay, *case.inputs))


def test_negative_control_the_tolerance_is_tight(case: Case) -> None:
    relay = Relay(case.model, case.plan, case.heads)
    got = relay_gradients(relay, *case.inputs)
    name, largest = max(got.items(), key=lambda item: float(item[1].norm()))
    got[name] = largest * (1 + 1e-11)
    with pytest.raises(AssertionError, match=name):
        assert_same(got, expected_gradients(relay, *case.inputs))


def primary_gradients(case: Case, forward: Callable[..., Any]) -> dict[str, Tensor]:
    """Return the model's gradients by the primary loss alone, on the output of `forward`."""
    case.model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    losses_of({"primary": forward(*case.inputs)})["primary"].backward()
    return gradients_of(case.model)


def test_one_loss_over_the_whole_network_is_bitwise_plain_backprop(case: Case) -> None:
    relay = Relay(case.model, case.plan.standard())
    got = primary_gradients(case, lambda *inputs: relay(*inputs).primary)
    for name, right in primary_gradients(case, case.model).items():
        assert torch.equal(got[name], right), name


def test_one_loss_through_junctions_is_bitwise_plain_backprop() -> None:
    """With ends of windows, one loss alone is still plain backpropagation inside its window."""
    case = make_case("vgg")
    relay = Relay(case.model, case.plan, case.heads)
    got = primary_gradients(case, lambda *inputs: relay(*inputs).primary)
    inside = [name for name in got if f"model.{name}".startswith(case.reaches["primary"])]
    for name, right in primary_gradients(case, case.model).items():
        assert torch.equal(got[name], right if name in inside else torch.zeros_like(right)), name


def test_finite_differences_per_loss_and_parameter() -> None:
    """Central differences of each loss by each weight, masked by the plan, on a smooth network."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(5))).double()
    plan = Plan(
        primary=Window(bottom="2"), auxiliary={"a": Window(top="2", weight=0.7), "b": Window(top="3", after="0")}
    )
    heads = {"a": nn.Linear(3, 2).double(), "b": nn.Linear(3, 2).double()}
    reaches = {"primary": {"2", "3", "4"}, "a": {"0", "1", "2"}, "b": {"1", "2", "3"}}
    relay = Relay(model, plan, heads)
    x = torch.randn(2, 3, dtype=torch.float64)
    weighted_sum(losses_of(by_loss(relay(x))), plan).backward()
    step = 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = torch.zeros_like(parameter)
        flat = parameter.data.view(-1)
        for position in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                flat[position] += sign * step
                values.append(losses_of(by_loss(relay(x))))
                flat[position] -= sign * step
            for loss, segments in reaches.items():
                if name.split(".")[0] in segments:
                    slope = (values[0][loss] - values[1][loss]) / (2 * step)
                    expected.view(-1)[position] += plan.weights[loss] * slope.detach()
        # Truncation is of order step**2, rounding of order 1e-16 / step.
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-9)


def test_batch_statistics_are_updated_once_and_dropout_masks_are_shared() -> None:
    case = make_case("resnet")
    relay = Relay(case.model, case.plan, case.heads)
    relay_gradients(relay, *case.inputs)
    counts = {name: int(value) for name, value in case.model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts
    assert set(counts.values()) == {1}
