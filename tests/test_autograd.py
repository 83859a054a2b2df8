"""Uses of autograd beyond one forward and one backward pass. Each has a defined behaviour."""

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nets import CASES, make_case
from oracle import (
    assert_same,
    by_loss,
    expected_gradients,
    gradients_of,
    losses_of,
    relay_gradients,
    weighted_sum,
)
from relaybackprop import LinearHead, Plan, Relay, RelayLoss, Window
from relaybackprop.engine import forward
from relaybackprop.engine.junction import Junction
from relaybackprop.errors import BoundaryError, DoubleBackwardError, LeakError


def loss_of(relay: Relay, *inputs: Tensor, seed: int = 7) -> Tensor:
    torch.manual_seed(seed)
    return weighted_sum(losses_of(by_loss(relay(*inputs))), relay.plan)


def make_relay(name: str) -> tuple[Relay, tuple]:
    case = make_case(name)
    return Relay(case.model, case.plan, case.heads), case.inputs


def chain(count: int = 4, width: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count))).double()


OVERLAP = Plan(primary=Window(bottom="2"), auxiliary={"aux": Window(top="2")})


def chain_relay(plan: Plan = OVERLAP, count: int = 4) -> tuple[Relay, Tensor]:
    heads = {name: nn.Linear(3, 2).double() for name in plan.auxiliary}
    return Relay(chain(count), plan, heads), torch.randn(2, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_two_forwards_before_one_backward(name: str) -> None:
    relay, inputs = make_relay(name)
    expected = expected_gradients(relay, *inputs)
    for parameter, gradient in expected_gradients(relay, *inputs, seed=8).items():
        expected[parameter] += gradient
    first, second = loss_of(relay, *inputs, seed=7), loss_of(relay, *inputs, seed=8)
    (first + second).backward()
    assert_same(gradients_of(relay), expected)


@pytest.mark.parametrize("name", CASES)
def test_gradient_accumulation_over_two_backwards(name: str) -> None:
    relay, inputs = make_relay(name)
    expected = expected_gradients(relay, *inputs)
    loss_of(relay, *inputs).backward()
    loss_of(relay, *inputs).backward()
    assert_same(gradients_of(relay), {name: 2 * gradient for name, gradient in expected.items()})


@pytest.mark.parametrize("name", CASES)
def test_retain_graph_gives_the_same_gradients_again(name: str) -> None:
    relay, inputs = make_relay(name)
    expected = expected_gradients(relay, *inputs)
    loss = loss_of(relay, *inputs)
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same(gradients_of(relay), {name: 2 * gradient for name, gradient in expected.items()})


@pytest.mark.parametrize("name", CASES)
def test_separate_backward_passes_of_losses(name: str) -> None:
    relay, inputs = make_relay(name)
    expected = expected_gradients(relay, *inputs)
    torch.manual_seed(7)
    losses = losses_of(by_loss(relay(*inputs)))
    for loss, value in losses.items():
        (relay.plan.weights[loss] * value).backward(retain_graph=True)
    assert_same(gradients_of(relay), expected)


def test_interrupted_backward_does_not_affect_the_next() -> None:
    relay, inputs = make_relay("vgg")
    expected = expected_gradients(relay, *inputs)
    loss = loss_of(relay, *inputs)

    def fail(_gradient: Tensor) -> None:
        raise KeyboardInterrupt

    handle = relay.model.segment3[0].weight.register_hook(fail)  # after lanes are delivered and before they are used
    with pytest.raises(KeyboardInterrupt):
        loss.backward(retain_graph=True)
    handle.remove()
    relay.zero_grad()
    loss.backward()
    assert_same(gradients_of(relay), expected)


def test_create_graph_raises() -> None:
    relay, x = chain_relay()
    with pytest.raises(DoubleBackwardError, match=r"\(create_graph=True\).*Set create_graph=False"):
        torch.autograd.grad(loss_of(relay, x), relay.model[0][0].weight, create_graph=True)
    assert x.grad is None


def test_input_gradients_follow_the_windows() -> None:
    relay, x = chain_relay()
    x.requires_grad_()
    output = relay(x)
    (gradient,) = torch.autograd.grad(output.primary.sum(), x, allow_unused=True, retain_graph=True)
    assert gradient is None
    (gradient,) = torch.autograd.grad(output.auxiliary["aux"].sum(), x)
    right = torch.autograd.grad(relay.heads["aux"](relay.model[:3](x)).sum(), x)[0]
    torch.testing.assert_close(gradient, right, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_forward_without_backward_is_freed_immediately(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no reference cycle through the graph, as there would be if junctions referred to their own tensors."""
    relay, inputs = make_relay(name)
    made: list[weakref.ref[Junction]] = []
    crossed = forward.cross

    def cross(junction: Junction, *args: Any, **kwargs: Any) -> Any:
        made.append(weakref.ref(junction))
        return crossed(junction, *args, **kwargs)

    monkeypatch.setattr(forward, "cross", cross)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):  # the first pass also walks the graph
            output = relay(*inputs)
            assert len(made) >= 3
            assert all(junction() is not None for junction in made)
            del output
            assert all(junction() is None for junction in made)
            made.clear()
    finally:
        gc.enable()


def test_no_grad_forward_in_training_mode() -> None:
    relay, inputs = make_relay("vgg")
    with torch.no_grad():
        output = relay(*inputs)
    assert not output.primary.requires_grad
    assert output.auxiliary.keys() == relay.plan.auxiliary.keys()
    with torch.inference_mode():
        relay(*inputs)
    assert_same(relay_gradients(relay, *inputs), expected_gradients(relay, *inputs))


def test_no_grad_at_a_boundary_raises() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.low(x)
            return self.high(x)

    relay = Relay(Half(), Plan(auxiliary={"aux": Window(top="low")}), {"aux": nn.Linear(3, 2)})
    with pytest.raises(BoundaryError, match="gradients are not recorded at the output of low"):
        relay(torch.randn(2, 3))


@pytest.mark.parametrize("frozen", [["0"], ["0", "1"], ["2"], ["2", "3"], ["0", "1", "2"], ["3"]])
def test_frozen_layers(frozen: list[str]) -> None:
    relay, x = chain_relay()
    for name in frozen:
        relay.model.get_submodule(name).requires_grad_(False)
    got = relay_gradients(relay, x)
    assert not any(parameter.split(".")[1] in frozen for parameter in got if parameter.startswith("model."))
    assert_same(got, expected_gradients(relay, x))
    for name in frozen:  # then unfrozen, as in gradual unfreezing
        relay.model.get_submodule(name).requires_grad_(True)
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))


class InPlace(nn.Module):
    """A boundary at a convolution that is directly followed by an in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.conv1(x))
        x = torch.relu_(self.conv2(x))
        return self.conv3(x).mean(dim=(2, 3))


def test_in_place_relu_right_after_a_boundary() -> None:
    plan = Plan(primary=Window(after="conv1"), auxiliary={"aux": Window(top="conv2")})
    relay = Relay(InPlace(), plan, {"aux": LinearHead(2, 2)}).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    for _ in range(3):
        assert_same(relay_gradients(relay, x), expected_gradients(relay, x))
    with torch.no_grad():
        before_relu = relay.model.conv2(torch.relu(relay.model.conv1(x)))
    torch.testing.assert_close(relay(x).auxiliary["aux"], relay.heads["aux"](before_relu))


def test_trunk_may_start_modifying_in_place_later() -> None:
    model = InPlace()
    relay = Relay(model, Plan(auxiliary={"aux": Window(top="conv3")}), {"aux": LinearHead(2, 2)}).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))

    def in_place(x: Tensor) -> Tensor:
        return torch.relu_(model.conv3(model.conv2(model.conv1(x)))).mean(dim=(2, 3))

    model.forward = in_place  # type: ignore[method-assign]
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))


class CalledTwice(nn.Module):
    """One layer runs below the boundary and again above it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = (nn.Linear(3, 3) for _ in range(4))
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.fc(torch.tanh(self.again(torch.tanh(self.c(x)))))


def test_layer_used_below_and_above_a_boundary() -> None:
    """The oracle is the same network with two copies of the layer: their gradients add up to the shared one's."""
    plan = Plan(primary=Window(bottom="c"), auxiliary={"aux": Window(top="c")})
    x = torch.randn(2, 3, dtype=torch.float64)
    relay = Relay(CalledTwice(), plan, {"aux": nn.Linear(3, 3)}).double()
    untied = copy.deepcopy(relay)
    untied.model.again = copy.deepcopy(untied.model.a)
    apart = relay_gradients(untied, x)
    assert apart["model.a.weight"].any()
    assert apart["model.again.weight"].any()
    for kind in ("weight", "bias"):
        apart[f"model.a.{kind}"] += apart.pop(f"model.again.{kind}")
    assert_same(relay_gradients(relay, x), apart)


def test_tied_weights() -> None:
    """An embedding tied to the classifier: the primary loss trains its upper use, the auxiliary loss its lower one."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.low, self.high = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, words: Tensor, top: Tensor | None = None) -> Tensor:
            x = self.high(torch.tanh(self.low(self.embed(words))))
            return nn.functional.linear(x, self.embed.weight if top is None else top)

    model = Tied().double()
    plan = Plan(primary=Window(bottom="high"), auxiliary={"aux": Window(top="high")})
    relay = Relay(model, plan, {"aux": nn.Linear(3, 2).double()})
    words = torch.tensor([1, 2, 5])
    got = relay_gradients(relay, words)["model.embed.weight"]

    upper = model.embed.weight.detach().clone().requires_grad_()
    primary = losses_of({"primary": model(words, upper)})["primary"]
    aux = losses_of({"aux": relay.heads["aux"](model.high(torch.tanh(model.low(model.embed(words)))))})["aux"]
    right = torch.autograd.grad(primary, upper)[0] + 0.3 * torch.autograd.grad(aux, model.embed.weight)[0]
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-15)


class UNet(nn.Module):
    """A skip connection from the first encoder to the last decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder1, self.encoder2, self.decoder2, self.decoder1 = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.encoder1(x))
        x = torch.tanh(self.decoder2(torch.tanh(self.encoder2(skip))))
        return self.decoder1(x + skip)


def test_leak_error_names_both_modules() -> None:
    plan = Plan(primary=Window(bottom="decoder2"), auxiliary={"aux": Window(top="decoder2")})
    relay = Relay(UNet(), plan, {"aux": nn.Linear(3, 3)})
    with pytest.raises(
        LeakError,
        match=r"from encoder1 \(below\) to decoder1 \(above\) bypasses .*'primary'.*input of decoder2.*"
        r"on both: after=\('encoder2', 'encoder1'\)\.$",
    ):
        relay(torch.randn(2, 3))


class Opaque:
    """A value whose tensors cannot be found."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Hides(nn.Module):
    """Returns its result in an object of an unknown type, beside a tensor or alone."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.beside = beside

    def forward(self, x: Tensor) -> Any:
        x = self.fc(x)
        return (torch.tanh(x), Opaque(x)) if self.beside else Opaque(x)


class Finds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, value: Any) -> Tensor:
        return self.fc(value[0] + value[1].x if isinstance(value, tuple) else value.x)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("plan", ["head", "end", "output"])
def test_hidden_tensors_raise(plan: str, beside: bool) -> None:
    plans = {
        "head": Plan(auxiliary={"aux": Window(top="1")}),
        "end": Plan(primary=Window(after="1")),
        "output": Plan(primary=Window(bottom="1")),
    }
    model = nn.Sequential(nn.Linear(3, 3), Hides(beside), Finds())
    if plan == "output":
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Hides(beside=False))
    relay = Relay(model, plans[plan], {name: Finds() for name in plans[plan].auxiliary})
    kind, text = (
        (LeakError, "bypasses the end|nothing else") if beside and plan != "output" else (BoundaryError, "Opaque")
    )
    with pytest.raises(kind, match=text):
        relay(torch.randn(2, 3))


def test_head_above_a_skip_without_a_window_end_inside() -> None:
    plan = Plan(auxiliary={"aux": Window(top="decoder2"), "high": Window(top="decoder1", bottom="decoder1")})
    relay = Relay(UNet(), plan, {name: nn.Linear(3, 3) for name in plan.auxiliary}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))


def test_primary_loss_path_may_bypass_a_head() -> None:
    """A path bypasses a head's junction to a window's end, so the lane starts at the model's output."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.low, self.branch, self.join = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.low(torch.tanh(self.stem(x))))
            return self.join(torch.tanh(self.branch(x)) + x)

    plan = Plan(primary=Window(), auxiliary={"aux": Window(top="branch", after="low"), "deep": Window(top="branch")})
    relay = Relay(Around(), plan, {name: nn.Linear(3, 3) for name in plan.auxiliary}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))


def test_custom_loss_on_inner_activations() -> None:
    """A loss on inner activations outside the plan propagates with the sum that it joins."""
    relay, x = chain_relay()
    kept: list[Tensor] = []
    handle = relay.model[3].register_forward_hook(lambda _m, _a, out: kept.append(out))
    expected = expected_gradients(relay, x)
    kept.clear()
    loss = loss_of(relay, x)
    (loss + 0.1 * kept[0].square().sum()).backward()
    handle.remove()
    got = gradients_of(relay)
    for name, right in expected.items():
        inside = name.startswith(("model.2.", "model.3."))  # the primary window, whose sum includes the term
        assert torch.allclose(got[name], right, rtol=1e-12, atol=0) != inside, name


def linears(count: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(count))).double()


def test_in_place_head_does_not_affect_the_trunk() -> None:
    plan = Plan(Window(bottom="2"), {"a": Window(top="3", bottom="2"), "b": Window(top="3")})
    heads = {"a": nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), "b": nn.Linear(3, 3)}
    relay = Relay(linears(4), plan, heads).double()  # the top is the model's output, which the head must not modify
    x = torch.randn(2, 3, dtype=torch.float64)
    for _ in range(3):
        assert_same(relay_gradients(relay, x), expected_gradients(relay, x))
        output = relay(x)
        torch.testing.assert_close(output.primary, relay.model(x))
        torch.testing.assert_close(output.auxiliary["b"], heads["b"](relay.model(x)))


def test_in_place_heads() -> None:
    relay = Relay(linears(3), Plan(auxiliary={"aux": Window(top="1")}), {"aux": nn.Sequential(nn.ReLU())}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    for inplace in (False, True):
        relay.heads["aux"][0].inplace = inplace
        assert torch.equal(relay(x).primary, relay.model(x))
        assert_same(relay_gradients(relay, x), expected_gradients(relay, x))


class Aliased(nn.Module):
    """Memory at a boundary that is modified in place through another tensor."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))
        self.same = nn.Identity()
        self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
        self.two = Two(overlapping=how == "two names in one boundary")
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "source changed":
            inside = self.same(h)
            return self.c(self.b(torch.relu_(h)) + inside)
        if self.how == "both changed":
            inside = self.same(h)
            h.mul_(2)
            return self.c(self.b(inside.mul_(3)))
        if self.how == "source read":
            return self.c(self.block(h) + h)
        u, v = self.two(h)
        u.mul_(2)
        return self.c(self.b(u) + v)


class Two(nn.Module):
    """Returns two tensors of the same memory, or of two halves of it."""

    def __init__(self, overlapping: bool) -> None:
        super().__init__()
        self.overlapping = overlapping

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.overlapping:
            return h, h[:, :3]
        both = torch.cat([h, h.sin()], dim=1)
        return both[:, :3], both[:, 3:]


ALIASED = {
    "source changed": Plan(auxiliary={"aux": Window(top="same")}),
    "both changed": Plan(auxiliary={"aux": Window(top="b", after="same")}),
    "source read": Plan(auxiliary={"aux": Window(top="block", bottom="block")}),
    "two names in one boundary": Plan(auxiliary={"aux": Window(top="two")}),
}


class First(nn.Module):
    def forward(self, value: Any) -> Tensor:
        return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("how", ALIASED)
def test_in_place_change_through_an_alias_raises(how: str) -> None:
    relay = Relay(Aliased(how), ALIASED[how], {"aux": First()}).double()
    with pytest.raises(BoundaryError, match=r"modified in place through another tensor.*inplace=False"):
        relay(torch.randn(2, 3, dtype=torch.float64))


def test_in_place_change_through_an_alias_raises_in_early_release() -> None:
    plan = Plan(Window(after="two"), {"aux": Window(top="two")})
    relay = Relay(Aliased("two names in one boundary"), plan, {"aux": First()}).double()
    with pytest.raises(BoundaryError, match=r"modified in place through another tensor.*inplace=False"):
        relay.forward_backward(
            torch.randn(2, 3, dtype=torch.float64), target=None, loss=RelayLoss(lambda output, _: output.sum())
        )
    assert relay.model.b.weight.grad is None, "the window above the cut was run backward"


@pytest.mark.parametrize("names", [["output of 0", "input of 1"], ["output of 0"], ["input of 1"]])
def test_consecutive_boundaries_before_an_in_place_layer(names: list[str]) -> None:
    """The in-place change above the upper boundary also affects the lower one, and no other layer reads it."""
    plan = Plan(
        Window(bottom="1") if "input of 1" in names else Window(),
        {"aux": Window(top="2"), **({"low": Window(top="0")} if "output of 0" in names else {})},
    )
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Linear(3, 3))
    relay = Relay(model, plan, {name: nn.Linear(3, 3) for name in plan.auxiliary}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    for _ in range(3):
        assert_same(relay_gradients(relay, x), expected_gradients(relay, x))


def test_in_place_change_of_one_chunk_of_a_storage() -> None:
    class Sum(nn.Module):
        def forward(self, value: tuple[Tensor, Tensor]) -> Tensor:
            return value[0] + 2 * value[1]

    plan = Plan(Window(after="two"), {"aux": Window(top="two")})

    class Halves(Aliased):
        def forward(self, x: Tensor) -> Tensor:
            u, v = self.two(self.a(x))
            u.mul_(2)
            return self.c(self.b(u) + v)

    relay = Relay(Halves("two halves"), plan, {"aux": Sum()}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))


def test_modules_may_write_into_input_containers() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, state: dict[str, Tensor]) -> None:
            state["h"] = self.fc(state["h"])

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Writes(), Writes()

        def forward(self, x: Tensor) -> Tensor:
            state = {"h": x}
            self.a(state)
            self.b(state)
            return state["h"]

    model = Stateful().double()
    x = torch.randn(2, 3, dtype=torch.float64)
    relay = Relay(model, Plan(Window(bottom="a")))
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x, plan=Plan()))
    with torch.no_grad():
        assert torch.equal(Relay(model, Plan(Window(bottom="b")))(x).primary, model(x))


def test_assigning_a_new_plan() -> None:
    first = Plan(Window(bottom="2"), {"a": Window(top="4", bottom="1")})
    second = Plan(Window(bottom="1"), {"a": Window(top="4", bottom="2")})
    relay = Relay(linears(6), first, {"a": nn.Linear(3, 3)}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    for plan in (first, second, first):
        relay.plan = plan
        assert_same(relay_gradients(relay, x), expected_gradients(relay, x, plan=plan))


def test_inference_mode_before_training() -> None:
    """Inference tensors do not have version counters."""
    plan = Plan(auxiliary={"aux": Window(top="0")})
    relay = Relay(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)), plan, {"aux": nn.Identity()})
    x = torch.randn(2, 3)
    for context in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.enable_grad, torch.enable_grad):
        with context():
            assert torch.equal(relay(x).auxiliary["aux"], relay.model[0](x))


def test_depths_follow_frozen_layers() -> None:
    relay, x = chain_relay(Plan())
    depths = []
    for trainable in (True, False, True):
        relay.model[0].requires_grad_(trainable)
        relay(x)
        depths.append(relay.depths["primary"])
    assert depths == [4, 3, 4]
    for number in range(3 * 64):  # the cache is bounded when layers are frozen at random
        for bit in range(8):
            list(relay.model.parameters())[bit].requires_grad_(bool(number >> bit & 1))
        relay(x)
    assert len(relay._schedules) <= 64


def test_separate_backward_passes_of_outputs() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linears(2), linears(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    relay = Relay(Towers(), Plan(Window(bottom="a.1"), {"aux": Window(top="b.0")}), {"aux": nn.Linear(3, 3).double()})
    first, second = relay(torch.randn(2, 3, dtype=torch.float64)).primary
    first.sum().backward()
    second.sum().backward()
    assert relay.model.a[0].weight.grad is None
    assert relay.model.b[0].weight.grad.any()


def test_concurrent_evaluation_in_another_thread() -> None:
    relay, x = chain_relay()
    seen: list[Tensor] = []

    def evaluate(*_: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(relay.model(x)))
        handle.remove()
        thread.start()
        thread.join()

    handle = relay.model[0].register_forward_hook(evaluate)
    output = relay(x)
    assert torch.equal(seen[0], output.primary)
