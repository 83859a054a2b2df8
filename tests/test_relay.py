"""`Relay` as a drop-in: the plain model inside never changes, also after errors."""

import copy
import io
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import relaybackprop
from nets import CASES, make_case
from oracle import assert_same, expected_gradients, relay_gradients
from relaybackprop import AuxiliaryHead, LinearHead, Plan, Relay, RelayLoss, Window, reach
from relaybackprop.engine.pytree import map_tensors
from relaybackprop.loss import RelayOutput

PLAN = Plan(primary=Window(bottom="2"), auxiliary={"aux": Window(top="2")})


def make(name: str) -> tuple[Relay, tuple[Any, ...]]:
    case = make_case(name)
    return Relay(case.model, case.plan, case.heads), case.inputs


def traces(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return all attributes of a model's modules, including hooks and flags."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def same_traces(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> None:
    assert before.keys() == after.keys()
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys(), name
        for key, value in attributes.items():
            if key not in ("_buffers", "_parameters"):
                assert after[name][key] == value, (name, key)


@pytest.mark.parametrize("name", CASES)
def test_forward_leaves_no_hooks_or_flags_on_the_model(name: str) -> None:
    case = make_case(name)
    before = traces(case.model)
    keys = list(case.model.state_dict())
    relay = Relay(case.model, case.plan, case.heads)
    assert relay.model is case.model
    assert all(relay.heads[head] is module for head, module in case.heads.items())
    relay_gradients(relay, *case.inputs)
    same_traces(before, traces(case.model))
    assert list(case.model.state_dict()) == keys
    assert not isinstance(case.model(*case.inputs), RelayOutput)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_no_hooks_remain_after_an_exception(failing: int, kind: type[BaseException]) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    relay = Relay(model, PLAN, {"aux": nn.Linear(3, 3)})
    before = traces(model)

    def fail(*_: Any) -> None:
        raise kind("no")

    handle = model[failing].register_forward_hook(fail)
    with pytest.raises(kind):
        relay(torch.randn(2, 3))
    handle.remove()
    same_traces(before, traces(model))
    relay(torch.randn(2, 3))  # the next call works


def test_no_hooks_remain_after_wrong_input() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    before = traces(model)
    with pytest.raises(RuntimeError):
        Relay(model, PLAN, {"aux": nn.Linear(3, 3)})(torch.randn(2, 5))
    with pytest.raises(RuntimeError):
        Relay(model, PLAN, {"aux": nn.Linear(5, 3)})(torch.randn(2, 3))  # a head that fails
    same_traces(before, traces(model))


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_the_plain_model(name: str) -> None:
    relay, inputs = make(name)
    relay(*inputs)
    relay.eval()
    got, right = relay(*inputs), relay.model(*inputs)
    assert type(got) is type(right)
    torch.testing.assert_close(got, right, rtol=0, atol=0)


def test_evaluation_costs_what_the_plain_model_costs() -> None:
    """Heads do not run and there are no hooks: the calls are the same, plus one around them."""
    relay, inputs = make("vgg")
    relay.eval()
    calls: list[str] = []
    for name, module in relay.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: calls.append(name))
    relay(*inputs)
    assert calls[-1] == ""
    assert all(name.startswith("model") for name in calls[:-1])


def test_training_output_equals_the_plain_models() -> None:
    relay, inputs = make("vgg")
    torch.manual_seed(1)
    output = relay(*inputs)
    torch.manual_seed(1)
    assert torch.equal(output.primary, relay.model(*inputs))
    primary, auxiliary, weights = output
    assert weights == relay.plan.weights
    assert primary is output.primary
    assert list(auxiliary) == ["aux1", "aux2"]


def test_state_dicts_are_interchangeable_with_the_plain_model() -> None:
    relay, inputs = make("resnet")
    relay_gradients(relay, *inputs)
    plain = make_case("resnet", seed=5).model
    plain.load_state_dict(relay.model.state_dict())
    assert torch.equal(plain.eval()(*inputs), relay.eval()(*inputs))
    file = io.BytesIO()
    torch.save(relay.state_dict(), file)
    file.seek(0)
    other, _ = make("resnet")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(*inputs), relay(*inputs))


def test_copies_are_independent_and_exact() -> None:
    relay, inputs = make("vgg")
    relay(*inputs)
    twin = copy.deepcopy(relay)
    assert_same(relay_gradients(twin, *inputs), expected_gradients(relay, *inputs))
    assert all(parameter.grad is None for parameter in relay.parameters())


def test_two_plans_on_one_model_are_independent() -> None:
    case = make_case("vgg")
    relays = [Relay(case.model, plan, case.heads) for plan in (case.plan, case.plan.multi_loss())]
    for relay in (*relays, *relays):
        assert_same(relay_gradients(relay, *case.inputs), expected_gradients(relay, *case.inputs))


@dataclass(frozen=True)
class Record:
    """A dataclass output, as in transformers."""

    hidden: Tensor
    extra: tuple[Tensor, list[Tensor]]
    name: str = "text"


class Pair(NamedTuple):
    a: Tensor
    b: dict[str, Any]


class Cases:
    """Values with two floating-point tensors and an item that is not a tensor."""

    @staticmethod
    def tuples(x: Tensor, y: Tensor) -> Any:
        return x, (y, 3)

    @staticmethod
    def lists(x: Tensor, y: Tensor) -> Any:
        return [x, [y, None]]

    @staticmethod
    def dicts(x: Tensor, y: Tensor) -> Any:
        return {"x": x, "deep": {"y": y, "mask": torch.ones(2, dtype=torch.bool)}}

    @staticmethod
    def ordered(x: Tensor, y: Tensor) -> Any:
        return OrderedDict(x=x, y=y)

    @staticmethod
    def dataclasses(x: Tensor, y: Tensor) -> Any:
        return Record(x, (y, [x]))

    @staticmethod
    def named_tuples(x: Tensor, y: Tensor) -> Any:
        return Pair(x, {"y": y})


class Makes(nn.Module):
    def __init__(self, structure: Any) -> None:
        super().__init__()
        self.x, self.y = nn.Linear(3, 3), nn.Linear(3, 3)
        self.structure = structure

    def forward(self, z: Tensor) -> Any:
        return self.structure(self.x(z), self.y(z))


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, value: Any) -> Tensor:
        tensors: list[Tensor] = []
        map_tensors(lambda tensor: tensors.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        return self.fc(torch.tanh(torch.stack([(n + 1) * tensor for n, tensor in enumerate(floats)]).sum(0)))


@pytest.mark.parametrize("structure", [name for name in vars(Cases) if not name.startswith("_")])
@pytest.mark.parametrize("end", [{"after": "0"}, {"bottom": "1"}])
def test_structured_values_cross_boundaries(structure: str, end: dict[str, str]) -> None:
    seen: list[Any] = []
    model = nn.Sequential(Makes(getattr(Cases, structure)), Takes(), nn.Linear(3, 3))
    model[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    plan = Plan(primary=Window(**end), auxiliary={"aux": Window(top="0"), "high": Window(top="1")})
    relay = Relay(model, plan, {"aux": Takes(), "high": nn.Linear(3, 3)}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))
    plain = model[0](x)
    assert all(type(value) is type(plain) for value in seen)


def test_keyword_arguments_cross_a_lower_boundary() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
            return torch.tanh(self.fc(x) + shift)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.side, self.inner = nn.Linear(3, 3), nn.Linear(3, 3), Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.tanh(self.stem(x)), shift=self.side(x))

    plan = Plan(primary=Window(bottom="inner"), auxiliary={"aux": Window(top="inner")})
    relay = Relay(Outer(), plan, {"aux": nn.Linear(3, 3)}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    got = relay_gradients(relay, x)
    assert_same(got, expected_gradients(relay, x))
    assert got["model.side.weight"].any()  # by the auxiliary loss alone


def test_bottom_at_the_first_module_is_the_whole_network() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    relay = Relay(model, Plan(primary=Window(bottom="0"))).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x, plan=Plan()))


def test_relay_loss() -> None:
    torch.manual_seed(0)
    output = RelayOutput(torch.randn(4, 3), {"aux": torch.randn(4, 3)}, {"primary": 1.0, "aux": 0.5})
    labels = torch.tensor([0, 1, 2, 0])
    ce = nn.functional.cross_entropy
    right = ce(output.primary, labels) + 0.5 * ce(output.auxiliary["aux"], labels)
    for criterion in (nn.CrossEntropyLoss(), ce, {"primary": ce, "aux": nn.CrossEntropyLoss()}):
        torch.testing.assert_close(RelayLoss(criterion)(output, labels), right)
    # Evaluation mode: the plain output has the primary loss only.
    assert torch.equal(RelayLoss(ce)(output.primary, labels), ce(output.primary, labels))
    terms = RelayLoss({"primary": ce, "aux": nn.functional.nll_loss}).terms(output, labels)
    assert list(terms) == ["primary", "aux"]
    torch.testing.assert_close(terms["aux"], -output.auxiliary["aux"][range(4), labels].mean())


def test_class_weights_of_criteria_are_part_of_the_module() -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
    for given in (criterion, {"primary": criterion, "aux": criterion}):
        loss = RelayLoss(given).double()
        assert next(loss.buffers()).dtype == torch.float64


@pytest.mark.parametrize("size", [1, 3, 4, 14, 17])
def test_heads(size: int) -> None:
    head = AuxiliaryHead(6, 5)
    assert head(torch.randn(2, 6, size, size + 1)).shape == (2, 5)
    assert [name for name, _ in head.named_buffers()] == []
    counts = {name: p.numel() for name, p in head.named_parameters() if name.endswith("weight")}
    assert counts == {"conv.weight": 6 * 128, "fc1.weight": 128 * 16 * 1024, "fc2.weight": 1024 * 5}
    assert head.dropout.p == 0.7
    assert LinearHead(6, 5)(torch.randn(2, 6, size, size)).shape == (2, 5)
    normed = AuxiliaryHead(6, 5, batch_norm=True)
    assert normed(torch.randn(2, 6, size, size)).shape == (2, 5)
    assert [type(module) for module in normed.modules() if isinstance(module, nn.BatchNorm2d)] == [nn.BatchNorm2d]


def test_reach_table() -> None:
    case = make_case("vgg")
    relay = Relay(case.model, case.plan, case.heads)
    relay.eval()
    state = {name: value.clone() for name, value in relay.state_dict().items()}
    rng = torch.get_rng_state()
    report = reach(relay, *case.inputs)
    assert not relay.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in relay.state_dict().items())
    assert all(parameter.grad is None for parameter in relay.parameters())
    for loss, prefixes in case.reaches.items():
        right = {name for name, _ in relay.named_parameters() if name.startswith(prefixes)}
        assert report.losses[loss] == right, loss
    table = str(report).splitlines()
    assert table[0].split() == ["parameters", "elements", "primary", "aux1", "aux2"]
    assert table[1].split()[:3] == ["model.segment1.0.weight", "...", "model.segment2.2.bias"]
    assert table[1].split()[-3:] == [".", "x", "."]


def test_reach_preserves_batch_statistics() -> None:
    case = make_case("resnet")
    relay = Relay(case.model, case.plan, case.heads)
    before = {name: value.clone() for name, value in relay.named_buffers()}
    reach(relay, *case.inputs)
    assert before
    assert all(torch.equal(value, before[name]) for name, value in relay.named_buffers())
    assert relay.training


class Materialises(torch.autograd.Function):
    """A function that materialises missing gradients as zeros, the default of autograd functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def test_reach_ignores_zero_gradients_and_supports_complex_outputs() -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Materialises.apply(super().forward(x))

    class Complex(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.complex(x, x)

    relay = Relay(nn.Sequential(Layer(3, 3), Layer(3, 3), Complex()), Plan(Window(bottom="1")))
    assert reach(relay, torch.randn(2, 3)).losses["primary"] == {"model.1.weight", "model.1.bias"}


def test_public_names() -> None:
    assert relaybackprop.__all__ == [
        "AuxiliaryHead", "LinearHead", "Plan", "Relay", "RelayError", "RelayLoss", "TokenHead", "Window", "cost",
        "head_for", "reach", "suggest_plan",
    ]  # fmt: skip
    assert all(getattr(relaybackprop, name).__doc__ for name in relaybackprop.__all__)
