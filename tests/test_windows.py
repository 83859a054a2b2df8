"""Windows with several ends, skipped modules, several outputs, and heads on one of several tensors. float64."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oracle import assert_same, expected_gradients, gradients_of, relay_gradients, smooth_loss, step_gradients
from relaybackprop import Plan, Relay, RelayLoss, Window, reach
from relaybackprop.errors import BoundaryError, EarlyReleaseError, HeadError, LeakError
from relaybackprop.loss import RelayOutput
from relaybackprop.reference import reference_gradients

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Mean(nn.Module):
    """A head that reads the first tensor of any value."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5)

    def forward(self, value: Any) -> Tensor:
        return self.fc(value if isinstance(value, Tensor) else value[0])


class SideInputs(nn.Module):
    """A U-Net of linear layers: skips from both encoder blocks, and a time embedding that every block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
        self.enc1, self.enc2, self.mid, self.dec2, self.dec1 = (nn.Linear(4, 4) for _ in range(5))
        self.out = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        time = self.time(x.cos())
        low = self.enc1(x) + time
        high = self.enc2(low.tanh()) * time
        x = self.dec2(torch.tanh(self.mid(high) + time) + high) + time
        return self.out(torch.tanh(self.dec1(x.tanh()) + low + time))


SIDES = {
    "all end": Plan(Window(after=("mid", "enc2", "enc1", "time")), {"aux": Window(top="mid")}),
    "overlap": Plan(Window(after=("enc2", "enc1", "time")), {"aux": Window(top="dec2", after=("enc1", "time"))}),
    "time passes": Plan(
        Window(after=("dec2", "enc1", "time")),
        {"low": Window(top="enc2"), "high": Window(top="dec2", after=("enc1", "time"))},
    ),
}


@pytest.mark.parametrize("name", SIDES)
def test_windows_with_several_ends(name: str) -> None:
    plan = SIDES[name]
    relay = Relay(SideInputs(), plan, {head: Mean() for head in plan.auxiliary}).double()
    for _ in range(2):
        assert_same(relay_gradients(relay, X), expected_gradients(relay, X))
    with pytest.raises(AssertionError):
        assert_same(relay_gradients(relay, X), expected_gradients(relay, X, plan=plan.multi_loss()))
    for loss in plan.windows:
        right = {p for p, g in only(relay, loss).items() if g.any()}
        assert reach(relay, X).losses[loss] == right, loss
    with pytest.raises(EarlyReleaseError, match="one end each"):
        step_gradients(relay, X)


def only(relay: Relay, loss: str) -> dict[str, Tensor]:
    """Return the reference gradients of one loss."""
    losses = lambda outputs: {loss: outputs[loss].tanh().sum()}  # noqa: E731
    return reference_gradients(relay.model, relay.plan, dict(relay.heads.items()), losses, X)


def test_missing_side_input_is_named() -> None:
    plan = Plan(Window(after=("mid", "enc2", "enc1")), {"aux": Window(top="mid")})
    with pytest.raises(
        LeakError,
        match=r"from time \(below\) to out.*output of mid and the output of enc2.*on all paths: "
        r"after=\('mid', 'enc2', 'enc1', 'time'\)\.$",
    ):
        Relay(SideInputs(), plan, {"aux": Mean()}).double()(X)


class Checkpointed(nn.Module):
    """A layer between two ends of a window, inside a checkpoint; the upper end and the layers above both read it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.low, self.shared, self.high, self.around = (nn.Linear(4, 4) for _ in range(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        shared = checkpoint(self.shared, self.low(x), use_reentrant=self.reentrant)
        return self.high(shared.tanh()).tanh() + self.around(shared.sin())  # pyright: ignore


@pytest.mark.parametrize("reentrant", [False, True])
def test_leak_inside_a_reentrant_checkpoint_is_found(reentrant: bool) -> None:
    relay = Relay(Checkpointed(reentrant), Plan(Window(after=("high", "low")))).double()
    with pytest.raises(LeakError, match=r"to around \(above\)"):
        relay(X)


def test_schemes_of_windows_with_several_ends() -> None:
    plan = SIDES["time passes"]
    assert plan.isolated().windows["primary"].after == ("dec2", "enc1", "time")
    assert plan.isolated().windows["high"].after == ("enc2", "time")
    assert str(plan).splitlines()[1].endswith("output of dec2 and output of enc1 and output of time")
    assert Window(after=("a",)) == Window(after="a") == Window(after=["a"])  # pyright: ignore


class Block(nn.Linear):
    """A residual block."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(super().forward(x))


class Dropped(nn.Module):
    """A list of blocks, some of which a training forward pass skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.layers = nn.ModuleList(Block(4, 4) for _ in range(6))
        self.out = nn.Linear(4, 5)
        self.skip: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            if number not in self.skip:
                x = layer(x)
        return self.out(x)


def drop_relay(plan: Plan) -> Relay:
    torch.manual_seed(1)
    return Relay(Dropped(), plan, {name: Mean() for name in plan.auxiliary}).double()


# The end of a window if its module is skipped: the input of the next module that runs.
MOVED = {
    (): "layers.2",
    (2,): "layers.3",
    (2, 3): "layers.4",
    (0, 2): "layers.3",
    (4,): "layers.2",
}


@pytest.mark.parametrize("skip", MOVED)
@pytest.mark.parametrize("engine", [relay_gradients, step_gradients])
def test_end_at_a_skipped_module_moves_to_the_next(skip: tuple[int, ...], engine: Callable[..., Any]) -> None:
    plan = Plan(Window(bottom="layers.2"), {"aux": Window(top="layers.4")})
    relay = drop_relay(plan)
    engine(relay, X)  # records the order of the boundaries
    relay.model.skip = set(skip)
    if 4 in skip:  # the head's module was skipped: its loss is left out
        assert relay(X).auxiliary == {}
        assert RelayLoss(lambda output, _: output.sum())(relay(X), None).isfinite()
        same = Plan(Window(bottom="layers.2"))
        heads = {}
    else:
        same = Plan(Window(bottom=MOVED[skip]), {"aux": Window(top="layers.4")})
        heads = dict(relay.heads.items())
    got = engine(relay, X)
    right = expected_gradients(Relay(relay.model, same, heads), X)
    right |= {name: torch.zeros_like(g) for name, g in got.items() if name not in right}
    assert_same(got, right)
    if skip and 2 in skip:
        wrong = expected_gradients(Relay(relay.model, Plan(auxiliary=same.auxiliary), heads), X)
        with pytest.raises(AssertionError):
            assert_same(got, wrong)


def test_skipped_last_modules_of_a_list() -> None:
    plan = Plan(Window(after="layers.4"), {"aux": Window(top="layers.5")})
    relay = drop_relay(plan)
    relay.model.skip = {4, 5}
    output = relay(X)
    assert output.auxiliary == {}
    output.primary.sum().backward()  # the window ends at the output of the list's owner, here the model
    assert all(parameter.grad is None for parameter in relay.parameters())


class Embedded(Dropped):
    """Every block also reads an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Linear(4, 4)

        class Reads(Block):
            def forward(self, x: Tensor, side: Tensor) -> Tensor:
                return super().forward(x + side)

        self.layers = nn.ModuleList(Reads(4, 4) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        side, x = torch.tanh(self.side(x)), self.stem(x)
        for number, layer in enumerate(self.layers):
            if number not in self.skip and number in (2, 3):
                x = layer(x, side)
            elif number not in self.skip:
                x = layer(x, torch.zeros(()))
        return self.out(x)


def test_side_inputs_of_the_next_module_are_inside_the_window() -> None:
    torch.manual_seed(0)
    relay = Relay(Embedded(), Plan(Window(after="layers.2"), {"aux": Window(top="layers.0")}), {"aux": Mean()}).double()
    relay.model.skip = {2}
    got = relay_gradients(relay, X)
    assert got["model.side.weight"].any(), "only layer 3 reads the embedding, and it is inside the window"
    plan = Plan(Window(after="layers.1"), {"aux": Window(top="layers.0")})
    assert_same(got, expected_gradients(Relay(relay.model, plan, dict(relay.heads.items())), X, plan=plan))


def test_layer_drop_at_random() -> None:
    """No step fails, and a skipped head has no output, with and without early release."""
    plan = Plan(
        Window(bottom="layers.2"), {"low": Window(top="layers.1"), "high": Window(top="layers.3", after="layers.1")}
    )
    relay, seen = drop_relay(plan), set[tuple[str, ...]]()
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        relay.model.skip = {n for n in range(1, 5) if torch.rand((), generator=random) < 0.2}
        output: RelayOutput = relay(X)
        seen.add(tuple(output.auxiliary))
        got = relay_gradients(relay, X)
        assert_same(step_gradients(relay, X), got)
    assert seen == {(), ("low",), ("high",), ("low", "high")}


def test_module_that_never_runs_raises_eventually() -> None:
    relay = drop_relay(Plan(Window(), {"aux": Window(top="layers.3")}))
    relay.model.skip = {3}
    for _ in range(31):
        relay(X)
    with pytest.raises(BoundaryError, match=r"never called '.*', 32 times in a row"):
        relay(X)


def test_order_of_skipped_boundaries_follows_their_modules() -> None:
    plan = Plan(Window(after="layers.3"), {"aux": Window(top="layers.4", bottom="layers.2", weight=1)})
    relay = drop_relay(plan)
    relay_gradients(relay, X)
    order = relay.order
    relay.model.skip = {2, 3, 4}
    relay_gradients(relay, X)
    assert relay.order == order


@pytest.mark.parametrize("engine", [relay_gradients, step_gradients])
def test_list_with_a_module_used_twice(engine: Callable[..., Any]) -> None:
    relay = drop_relay(Plan(Window(after="layers.5"), {"aux": Window(top="layers.5", bottom="layers.3")}))
    relay.model.layers[1] = relay.model.layers[0]
    assert_same(engine(relay, X), expected_gradients(relay, X))


class Around(Dropped):
    """A skip bypasses the end of a window, unless the module at the end is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        x = self.layers[0](first)
        if 2 not in self.skip:
            x = self.layers[2](self.layers[1](x)) + first.sin()
        return self.out(self.layers[4](self.layers[3](x)))


@pytest.mark.parametrize("engine", [relay_gradients, step_gradients])
def test_search_is_not_cached_if_a_module_was_skipped(engine: Callable[..., Any]) -> None:
    plan = Plan(Window(), {"aux": Window(top="layers.4", after="layers.2")})
    relay = Relay(Around(), plan, {"aux": Mean()}).double()
    relay.model.skip = {2}
    engine(relay, X)
    relay.model.skip = set()
    with pytest.raises((LeakError, EarlyReleaseError), match=r"bypasses the") as caught:
        engine(relay, X)
    assert "Backward" not in caught.value.remedy  # names of autograd's nodes are not names of modules


@pytest.mark.parametrize("engine", [relay_gradients, step_gradients])
def test_depths_do_not_depend_on_the_first_forward_pass(engine: Callable[..., Any]) -> None:
    relay = drop_relay(Plan(Window(bottom="layers.2"), {"aux": Window(top="layers.4")}))
    relay.model.skip = {4}
    engine(relay, X)
    relay.model.skip = set()
    engine(relay, X)
    assert relay.depths == {"primary": 5, "aux": 6}


class Pair(NamedTuple):
    logits: Tensor
    hidden: list[Tensor]


class ManyOutputs(nn.Module):
    """Returns hidden states beside the logits, an option in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Pair:
        x0 = torch.sin(self.stem(x))
        a = torch.tanh(self.a(x0))
        b = torch.tanh(self.b(a))
        return Pair(self.c(b), [x0, b])


MANY = Plan(Window(after="a"), {"aux": Window(top="b")})


@pytest.mark.parametrize("output", ["logits", lambda value: value.logits, lambda value: value[0]])
@pytest.mark.parametrize("engine", [relay_gradients, step_gradients])
def test_output_selects_what_the_primary_loss_reads(output: Any, engine: Callable[..., Any]) -> None:
    relay = Relay(ManyOutputs(), MANY, {"aux": Mean()}, output=output).double()

    class Plain(ManyOutputs):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x).logits

    plain = Plain().double()
    plain.load_state_dict(relay.model.state_dict())
    assert_same(engine(relay, X), expected_gradients(Relay(plain, MANY, dict(relay.heads.items())), X))
    assert torch.equal(relay.eval()(X), relay.model(X).logits)
    assert isinstance(relay.model(X), Pair)


def test_leak_through_an_unread_output_is_named() -> None:
    relay = Relay(ManyOutputs(), MANY, {"aux": Mean()}).double()
    with pytest.raises(LeakError, match=r"starts at \['hidden'\]\[0\] of the model's output.*output='logits'"):
        relay(X)
    with pytest.raises(HeadError, match=r"a Pair with items \['logits', 'hidden'\] does not have the item 'scores'"):
        Relay(ManyOutputs(), MANY, {"aux": Mean()}, output="scores").double()(X)


class Maps(nn.Module):
    """A block that returns two tensors from two branches, as HRNet's stages do."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.left(pair[0]), self.right(pair[1])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2 = Maps(), Maps()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stage2(self.stage1((x, x)))
        return self.fc(left + right)


def test_reach_follows_the_tensor_that_the_head_reads() -> None:
    relay = Relay(Branches(), Plan(Window(), {"aux": Window(top="stage2")}), {"aux": Mean()}).double()
    reached = reach(relay, X).losses["aux"]
    relay(X).auxiliary["aux"].sum().backward()
    assert reached == {name for name, p in relay.named_parameters() if p.grad is not None}
    assert "model.stage1.left.weight" in reached
    assert "model.stage1.right.weight" not in reached
    relay = Relay(Branches(), Plan(Window(after="stage1"), {"aux": Window(top="stage2")}), {"aux": Mean()}).double()
    assert_same(relay_gradients(relay, X), expected_gradients(relay, X))
    assert gradients_of(relay)
    assert smooth_loss(relay.plan) is not None
