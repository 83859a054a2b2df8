"""Early release frees each window as early as possible, and its gradients equal the reference. float64."""

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from nets import CASES, Case, make_case
from oracle import (
    assert_same,
    expected_gradients,
    gradients_of,
    losses_of,
    relay_gradients,
    seed_each_module,
    smooth_loss,
    step_gradients,
)
from relaybackprop import AuxiliaryHead, LinearHead, Plan, Relay, RelayLoss, Window, cost
from relaybackprop.engine.early import EarlyRelease
from relaybackprop.errors import (
    BoundaryError,
    EarlyReleaseError,
    HeadError,
    LeakError,
    RelayError,
    WindowError,
)
from relaybackprop.loss import RelayOutput
from relaybackprop.planning.profile import FlopCounter
from test_exact_random import Example, build, for_random


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
    for _ in range(3):  # only the first step searches the graph
        assert_same(step_gradients(relay, *case.inputs), expected_gradients(relay, *case.inputs))


def test_negative_control_other_windows_give_other_gradients(case: Case) -> None:
    relay = Relay(case.model, case.plan, case.heads)
    seed_each_module(relay)
    got = step_gradients(relay, *case.inputs)
    with pytest.raises(AssertionError, match=r"relative error|expected no gradient"):
        assert_same(got, expected_gradients(relay, *case.inputs, plan=case.plan.multi_loss()))


def test_negative_control_a_missing_lane_fails(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses do not propagate through segments that they share with later losses."""

    def nothing(self: EarlyRelease, number: int, losses: frozenset[str]) -> None:
        self._segments[number - 1].lanes[losses] = [None] * len(self._segments[number - 1].sources)

    monkeypatch.setattr(EarlyRelease, "_send", nothing)
    relay = Relay(case.model, case.plan, case.heads)
    seed_each_module(relay)
    with pytest.raises(AssertionError, match=r"relative error|expected no gradient"):
        assert_same(step_gradients(relay, *case.inputs), expected_gradients(relay, *case.inputs))


COUNTS = Counter[str]()


def goes_around(example: Example) -> bool:
    """Whether a skip bypasses the end of any window. Early release does not support this, even without a leak."""
    for loss, window in example.plan.windows.items():
        end = example.ends[loss]
        lowest, highest_source = (end + 1, end - 1) if window.bottom else (end, end - 2)
        if window.ends and any(
            source <= highest_source and lowest <= target
            for target, sources in example.skips.items()
            for source in sources
        ):
            return True
    return False


def check_random_network(example: Example) -> None:
    relay, x = build(example)
    seed_each_module(relay)
    if any(example.leaks(loss) for loss in example.plan.windows):
        COUNTS["leak"] += 1
        with pytest.raises((LeakError, EarlyReleaseError)):
            step_gradients(relay, x)
        return
    if goes_around(example):
        COUNTS["around"] += 1
        try:
            got = step_gradients(relay, x)
        except EarlyReleaseError:
            COUNTS["refused"] += 1
            return
        assert_same(got, expected_gradients(relay, x))
        return
    COUNTS["exact"] += 1
    for _ in range(2):
        assert_same(step_gradients(relay, x), expected_gradients(relay, x))


# A skip bypasses the end of the auxiliary window to a block above its head: not a leak, but the cut is bypassed.
AROUND = Example(
    kinds=["plain"] * 5,
    skips={4: {0}},
    plan=Plan(auxiliary={"aux1": Window(top="blocks.2", after="blocks.1")}),
    tops={"primary": 5, "aux1": 2},
    ends={"primary": 0, "aux1": 2},
    seed=0,
)


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_random_networks(count: int) -> None:
    COUNTS.clear()
    for_random(check_random_network, count)
    check_random_network(AROUND)
    assert COUNTS["exact"] >= count // 2, COUNTS
    assert COUNTS["leak"] >= count // 20, COUNTS
    assert COUNTS["refused"] >= 1, COUNTS


def conv_net(depth: int = 6, width: int = 4) -> nn.Sequential:
    blocks = [nn.Sequential(nn.Conv2d(width if n else 3, width, 3, padding=1), nn.Tanh()) for n in range(depth)]
    return nn.Sequential(*blocks, nn.Sequential(nn.Flatten(), nn.Linear(width * 16, 5)))


THREE = Plan(
    primary=Window(bottom="4"), auxiliary={"low": Window(top="2"), "high": Window(top="4", bottom="2", weight=0.5)}
)
X, LABELS = torch.randn(2, 3, 4, 4), torch.tensor([0, 3])


def conv_relay(plan: Plan = THREE, model: nn.Module | None = None) -> Relay:
    return Relay(model or conv_net(), plan, {name: LinearHead(4, 5) for name in plan.auxiliary})


class Alive:
    """Counts the bytes that autograd saves for backward passes, while they are alive."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0

    def keep(self, tensor: Tensor) -> Any:
        class Held:
            value = tensor

        held = Held()
        self.now += tensor.nbytes
        self.most = max(self.most, self.now)
        weakref.finalize(held, self.drop, tensor.nbytes)
        return held

    def drop(self, size: int) -> None:
        self.now -= size

    def measure(self, step: Callable[[], object]) -> int:
        self.most = 0
        with saved_tensors_hooks(self.keep, lambda held: held.value):
            step()
        assert self.now == 0, "saved tensors remain after the step"
        return self.most


@pytest.mark.parametrize("depth", [8, 16, 32])
def test_peak_is_that_of_the_largest_window(depth: int) -> None:
    """A head after every fourth of equal layers, and windows of eight: at any depth, eight layers are saved."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(depth)), nn.Linear(32, 5))
    tops = range(7, depth - 1, 4)
    windows = {f"aux{top}": Window(top=f"{top}", bottom=f"{top - 7}") for top in tops}
    plan = Plan(Window(bottom=f"{depth - 8}"), windows)
    relay = Relay(model, plan, {name: nn.Linear(32, 5) for name in windows})
    x, alive, loss = torch.randn(64, 32), Alive(), smooth_loss(plan)

    def ordinary() -> None:
        loss(relay(x), None).backward()

    def early() -> None:
        relay.forward_backward(x, target=None, loss=loss)

    for step in (ordinary, early):
        step()  # the first step searches the graph
    relay.zero_grad()
    everything, window = alive.measure(ordinary), alive.measure(early)
    layer = 64 * 32 * 4 + 64 * 32 * 4 + 32 * 32 * 4  # a layer saves its input and output, and its weight
    assert everything >= depth * layer
    assert window <= 8 * layer + 4 * layer, (window / layer, everything / layer)


@pytest.mark.parametrize("earlier_steps", [0, 1])
def test_lower_layers_are_freed_before_the_upper_ones_run(earlier_steps: int) -> None:
    relay = conv_relay(THREE)
    loss = RelayLoss(nn.CrossEntropyLoss())
    for _ in range(earlier_steps):
        relay.forward_backward(X, target=LABELS, loss=loss)
    kept: dict[str, list[weakref.ref[Tensor]]] = {}
    seen: dict[str, int] = {}
    for name in ("0", "1", "2", "3", "4", "5"):

        def note(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
            kept[name] = [weakref.ref(output)]
            for lower, references in kept.items():
                seen[f"{lower} at {name}"] = sum(reference() is not None for reference in references)

        relay.model.get_submodule(name)[1].register_forward_hook(note)
    relay.forward_backward(X, target=LABELS, loss=loss)
    assert seen["0 at 2"] == seen["1 at 2"] == 1  # those of its own window, before its head
    # One layer higher, both are freed, but the first step keeps the tensor at the cut until the window above is freed.
    assert (seen["0 at 3"], seen["1 at 3"]) == (0, 0 if earlier_steps else 1)
    assert seen["2 at 4"] == seen["3 at 4"] == 1
    assert (seen["1 at 5"], seen["2 at 5"], seen["3 at 5"]) == (0, 0, 0 if earlier_steps else 1)


@pytest.mark.parametrize("name", ["vgg", "resnet", "transformer"])
def test_operations_are_the_minimum(name: str) -> None:
    case = make_case(name)
    relay = Relay(case.model, case.plan, case.heads)
    loss = smooth_loss(case.plan)
    relay.forward_backward(*case.inputs, target=None, loss=loss)
    with FlopCounter() as counter:
        relay.forward_backward(*case.inputs, target=None, loss=loss)
    counted = cost(case.model, case.plan, case.inputs, case.heads)
    assert counter.total == counted.lower_bound < counted.totals["relay"].flops


@pytest.mark.parametrize("name", CASES)
def test_parameter_hooks_fire_once_with_the_final_gradient(name: str) -> None:
    case = make_case(name)
    relay = Relay(case.model, case.plan, case.heads)
    seed_each_module(relay)
    fired: dict[str, list[Tensor]] = {}
    for parameter_name, parameter in relay.named_parameters():

        def note(parameter: Tensor, name: str = parameter_name) -> None:
            assert parameter.grad is not None
            fired.setdefault(name, []).append(parameter.grad.clone())

        parameter.register_post_accumulate_grad_hook(note)
    got = step_gradients(relay, *case.inputs)
    assert {len(gradients) for gradients in fired.values()} == {1}
    for parameter_name, gradients in fired.items():
        assert torch.equal(gradients[0], got[parameter_name])


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
@pytest.mark.parametrize("name", CASES)
def test_optimizers_in_the_backward_pass(name: str, options: dict[str, bool]) -> None:
    """Hooks that update each weight by AdamW as soon as its gradient is final, and free the gradient."""
    case = make_case(name)
    relay = Relay(case.model, case.plan, case.heads)
    usual = copy.deepcopy(relay)
    for module in (relay, usual):
        seed_each_module(module)
    start = {name: parameter.detach().clone() for name, parameter in relay.named_parameters()}
    # The gradient of the keys' bias is zero but for rounding, which AdamW's usual eps of 1e-8 would amplify.
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2, eps=1e-4, **options) for p in relay.parameters()}

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in relay.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    together = torch.optim.AdamW(usual.parameters(), lr=1e-2, eps=1e-4, **options)
    for _ in range(3):
        step_gradients(relay, *case.inputs)
        relay_gradients(usual, *case.inputs)
        together.step()
    assert all(parameter.grad is None for parameter in relay.parameters())
    expected = {name: parameter.detach() for name, parameter in usual.named_parameters()}
    assert_same({name: parameter.detach() for name, parameter in relay.named_parameters()}, expected)
    with pytest.raises(AssertionError):  # negative control
        assert_same(start, expected)


def test_step_returns_what_an_ordinary_pass_returns() -> None:
    relay = conv_relay()
    loss = RelayLoss(nn.CrossEntropyLoss())
    result = relay.forward_backward(X, target=LABELS, loss=loss)
    output = relay(X)
    assert isinstance(result.output, RelayOutput)
    torch.testing.assert_close(result.output.primary, output.primary.detach())
    for name, scores in output.auxiliary.items():
        torch.testing.assert_close(result.output.auxiliary[name], scores.detach())
        torch.testing.assert_close(result.terms[name], loss.terms(output, LABELS)[name].detach())
    assert list(result.terms) == list(relay.plan.windows)
    torch.testing.assert_close(result.loss, loss(output, LABELS).detach())
    assert not result.loss.requires_grad
    assert not result.output.primary.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_step_sets_order_and_depths_like_an_ordinary_pass(name: str) -> None:
    case = make_case(name)
    stepped, usual = (Relay(case.model, case.plan, case.heads) for _ in range(2))
    for frozen in ([], [next(iter(case.model.parameters()))]):
        for parameter in frozen:
            parameter.requires_grad_(False)
        step_gradients(stepped, *case.inputs)
        relay_gradients(usual, *case.inputs)
        assert (stepped.depths, stepped.order) == (usual.depths, usual.order)
        step_gradients(stepped, *case.inputs)
        assert stepped.depths == usual.depths


def test_batch_statistics_are_updated_once() -> None:
    case = make_case("resnet")
    relay = Relay(case.model, case.plan, case.heads)
    step_gradients(relay, *case.inputs)
    counts = {int(value) for name, value in case.model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {1}


def test_accumulation_with_a_scale() -> None:
    relay = conv_relay().double()
    parts = [torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3)]
    for x in parts:
        relay.forward_backward(x, target=None, loss=smooth_loss(relay.plan), scale=lambda loss: loss / 3)
    got = gradients_of(relay)
    relay.zero_grad()
    expected: dict[str, Tensor] = {}
    for x in parts:
        for name, gradient in expected_gradients(relay, x).items():
            expected[name] = expected.get(name, 0) + gradient / 3
    assert_same(got, expected)


def test_alternating_steps_and_ordinary_passes() -> None:
    case = make_case("vgg")
    relay = Relay(case.model, case.plan, case.heads)
    seed_each_module(relay)
    expected = expected_gradients(relay, *case.inputs)
    for _ in range(2):
        assert_same(relay_gradients(relay, *case.inputs), expected)
        assert_same(step_gradients(relay, *case.inputs), expected)


def test_bf16_autocast() -> None:
    """As in an ordinary pass: the tolerance is that of bf16, and the masks are exact."""
    relay = conv_relay()
    with torch.autocast("cpu", torch.bfloat16):
        got = step_gradients(relay, X)
        expected = expected_gradients(relay, X)
    assert_same(got, expected, tolerance=2e-2)
    assert all(gradient.dtype == torch.float32 for gradient in got.values())
    with pytest.raises(AssertionError):  # negative control: the tolerance distinguishes the windows
        assert_same(got, expected_gradients(relay, X, plan=relay.plan.multi_loss()), tolerance=2e-2)


def test_backward_passes_run_outside_autocast() -> None:
    seen: list[bool] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore
            seen.append(torch.is_autocast_enabled("cpu"))
            return gradient

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Watch.apply(x)  # pyright: ignore

    model = nn.Sequential(nn.Linear(4, 4), Watched(), nn.Linear(4, 4), Watched(), nn.Linear(4, 4), nn.Linear(4, 4))
    relay = Relay(model, Plan(Window(bottom="2"), {"aux": Window(top="3")}), {"aux": nn.Linear(4, 4)})
    with torch.autocast("cpu", torch.bfloat16):
        step_gradients(relay, torch.randn(2, 4))
    assert seen == [False, False, False]  # twice in the overlap


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 with a GradScaler needs a GPU")
def test_fp16_with_grad_scaler() -> None:
    relay = conv_relay().cuda()
    loss = RelayLoss(nn.CrossEntropyLoss())
    optimizer, scaler = torch.optim.SGD(relay.parameters(), lr=0.1), torch.amp.GradScaler("cuda", init_scale=2.0**8)
    with torch.autocast("cuda", torch.float16):
        relay.forward_backward(X.cuda(), target=LABELS.cuda(), loss=loss, scale=scaler.scale)
    scaler.unscale_(optimizer)
    got = gradients_of(relay)
    relay.zero_grad()
    relay.forward_backward(X.cuda(), target=LABELS.cuda(), loss=loss)
    assert_same(got, gradients_of(relay), tolerance=2e-2)


class Checkpointed(nn.Sequential):
    """Recomputes each block in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def test_checkpointing_inside_windows() -> None:
    model = nn.Sequential(*(Checkpointed(*conv_net(2, 3)[:2]) for _ in range(5)), nn.Flatten())
    plan = Plan(Window(bottom="3"), {"low": Window(top="1"), "high": Window(top="3", bottom="1")})
    relay = Relay(model, plan, {name: LinearHead(3, 5) for name in plan.auxiliary}).double()
    for _ in range(2):
        assert_same(step_gradients(relay, X.double()), expected_gradients(relay, X.double()))


@pytest.mark.parametrize("frozen", [["0", "1"], ["2", "3"], ["4", "5", "6"], ["0", "1", "2", "3", "4"]])
def test_frozen_and_unfrozen_layers(frozen: list[str]) -> None:
    relay = conv_relay().double()
    for thawed in (False, True):
        for name in frozen:
            relay.model.get_submodule(name).requires_grad_(thawed)
        assert_same(step_gradients(relay, X.double()), expected_gradients(relay, X.double()))


def test_input_gradients() -> None:
    relay = conv_relay().double()
    x = X.double().requires_grad_()
    step_gradients(relay, x)
    got = x.grad
    x.grad = None
    loss = losses_of({"low": relay(x).auxiliary["low"]})["low"]  # the only loss that reaches the input
    (relay.plan.weights["low"] * loss).backward()
    assert got is not None
    assert x.grad is not None
    torch.testing.assert_close(got, x.grad, rtol=1e-12, atol=0)


def test_in_place_layers_after_boundaries_and_in_heads() -> None:
    blocks = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(6)]
    plan = Plan(Window(bottom="3"), {"low": Window(top="1"), "high": Window(top="3", after="0")})
    heads = {name: nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.Linear(4, 3)) for name in plan.auxiliary}
    relay = Relay(nn.Sequential(nn.Linear(4, 4), *blocks), plan, heads).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    for _ in range(3):
        assert_same(step_gradients(relay, x), expected_gradients(relay, x))


def test_head_may_start_modifying_in_place_later() -> None:
    class Head(nn.Linear):
        in_place = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2) if self.in_place else 2 * x)

    relay = Relay(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))),
        Plan(Window(bottom="2"), {"a": Window(top="2")}),
        {"a": Head(4, 4)},
    ).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = expected_gradients(relay, x)
    for Head.in_place in (False, True, False, True):
        assert_same(step_gradients(relay, x), expected)
        assert_same(relay_gradients(relay, x), expected)


def test_a_head_may_run_modules_of_the_model() -> None:
    """A classifier that all losses share, and that can be a window's end or a head."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)), nn.Linear(4, 3))
    plan = Plan(Window(bottom="4"), {"aux": Window(top="2")})
    relay = Relay(model, plan, {"aux": model[4]}).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    got = step_gradients(relay, x)
    assert_same(got, relay_gradients(relay, x))


def test_interrupted_step_does_not_affect_the_next() -> None:
    relay = conv_relay().double()

    def fail(*_args: Any) -> None:
        raise ZeroDivisionError

    handle = relay.model.get_submodule("5").register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        step_gradients(relay, X.double())
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in relay.model.modules())
    assert_same(step_gradients(relay, X.double()), expected_gradients(relay, X.double()))


def test_invalid_calls_raise() -> None:
    relay = conv_relay()
    loss = RelayLoss(nn.CrossEntropyLoss())
    with pytest.raises(EarlyReleaseError, match=r"evaluation mode"):
        relay.eval().forward_backward(X, target=LABELS, loss=loss)
    relay.train()
    with torch.no_grad(), pytest.raises(EarlyReleaseError, match=r"no_grad"):
        relay.forward_backward(X, target=LABELS, loss=loss)
    with pytest.raises(HeadError, match=r"RelayLoss"):
        relay.forward_backward(X, target=LABELS, loss=nn.CrossEntropyLoss())  # pyright: ignore
    with pytest.raises(HeadError, match=r"the criterion of 'low' rejects"):
        relay.forward_backward(X, target=torch.tensor([0, 9]), loss=loss)
    every = RelayLoss(nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(EarlyReleaseError, match=r"the loss 'low' returns the shape \(2,\).*a scalar.*reduction='mean'"):
        relay.forward_backward(X, target=LABELS, loss=every)
    with pytest.raises(EarlyReleaseError, match=r"the loss 'low' returns a float: it must return a scalar"):
        relay.forward_backward(X, target=LABELS, loss=RelayLoss(lambda output, target: 1.0))  # pyright: ignore
    one = RelayLoss(lambda output, target: nn.functional.cross_entropy(output, target, reduction="none").mean())
    assert torch.isfinite(relay.forward_backward(X, target=LABELS, loss=one).loss)
    relay.model[0][0].weight.full_tensor = lambda: None  # an attribute of DTensors
    with pytest.raises(EarlyReleaseError, match=r"is a DTensor that was not sharded by fully_shard"):
        relay.forward_backward(X, target=LABELS, loss=loss)
    upside_down = Plan(Window(), {"aux": Window(top="1", bottom="3")})
    with pytest.raises(WindowError, match=r"reaches the .* before the "):
        conv_relay(upside_down).forward_backward(X, target=LABELS, loss=RelayLoss(nn.CrossEntropyLoss()))


def test_boundary_runs_twice_or_never() -> None:
    model = conv_net()
    model[3] = model[2]
    relay = Relay(model, THREE, {name: LinearHead(4, 5) for name in THREE.auxiliary})
    with pytest.raises(BoundaryError, match=r"second time"):
        relay.forward_backward(X, target=LABELS, loss=RelayLoss(nn.CrossEntropyLoss()))
    plan = Plan(Window(bottom="6.0"), {"aux": Window(top="2")})
    model = conv_net()
    model[6].forward = lambda x: model[6][1](x.flatten(1))  # type: ignore[method-assign]  # bypasses 6.0
    with pytest.raises(BoundaryError, match=r"never called"):
        Relay(model, plan, {"aux": LinearHead(4, 5)}).forward_backward(
            X, target=LABELS, loss=RelayLoss(nn.CrossEntropyLoss())
        )


class Around(nn.Module):
    """Four layers and a skip from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0](x)
        return self.layers[3](self.layers[2](self.layers[1](first).tanh()).tanh()) + first


def test_bypassing_paths_are_named() -> None:
    x = torch.randn(2, 4)
    plan = Plan(Window(bottom="layers.2"), {"aux": Window(top="layers.2")})
    relay = Relay(Around(), plan, {"aux": nn.Linear(4, 4)})
    with pytest.raises(LeakError, match=r"from layers\.0 \(below\).*'primary'"):
        relay.forward_backward(x, target=None, loss=smooth_loss(plan))
    # Not a leak, since the primary window reaches the first layer, but its path bypasses the end of the other window.
    plan = Plan(Window(), {"aux": Window(top="layers.2", bottom="layers.2")})
    relay = Relay(Around(), plan, {"aux": nn.Linear(4, 4)})
    relay_gradients(relay, x)
    with pytest.raises(EarlyReleaseError, match=r"path to layers\.0 bypasses the"):
        relay.forward_backward(x, target=None, loss=smooth_loss(plan))


class Towers(nn.Module):
    """Two parallel towers, the second runs after the first; a head may read the first."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.top = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x).tanh()
        return self.top(left + self.right(x).tanh())


@pytest.mark.parametrize(
    "plan",
    [
        # The end in the right tower does not cut the left one: the primary loss propagates below the left end.
        Plan(Window(bottom="right"), {"low": Window(top="left"), "high": Window(top="top", after="left")}),
        Plan(Window(after="right"), {"low": Window(top="left"), "high": Window(top="top", after="left")}),
        # The lower loss has freed the left tower when the primary loss reaches it.
        Plan(Window(bottom="right"), {"low": Window(top="left")}),
        Plan(Window(after="right"), {"low": Window(top="left")}),
    ],
)
def test_parallel_towers_raise(plan: Plan) -> None:
    """One backward pass is exact here. Early release was not, and did not detect the bypassing path."""
    torch.manual_seed(0)
    relay = Relay(Towers(), plan, {name: nn.Linear(4, 4) for name in plan.auxiliary}).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))
    for _ in range(2):
        with pytest.raises(EarlyReleaseError, match=r"a path to .* bypasses the"):
            step_gradients(relay, x)


def test_head_that_reads_more_than_its_boundary_raises() -> None:
    model = conv_net()
    stolen: list[Tensor] = []
    model[0].register_forward_hook(lambda _module, _args, output: stolen.append(output))

    class Thief(LinearHead):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features + stolen.pop())

    plan = Plan(Window(bottom="4"), {"aux": Window(top="4")})
    with pytest.raises(LeakError, match=r"nothing else of the model"):
        Relay(model, plan, {"aux": Thief(4, 5)}).forward_backward(X, target=LABELS, loss=smooth_loss(plan))


def test_errors_are_relay_errors() -> None:
    assert issubclass(EarlyReleaseError, RelayError)
    assert issubclass(EarlyReleaseError, RuntimeError)


def test_the_papers_head_learns_in_a_step() -> None:
    """Dropout in a head uses the default generator, so a step is repeatable."""
    model = conv_net()
    relay = Relay(model, THREE, {name: AuxiliaryHead(4, 5) for name in THREE.auxiliary})
    runs: list[dict[str, Tensor]] = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(step_gradients(relay, X))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
