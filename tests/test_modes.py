"""Autocast, gradient scaling, checkpointing, channels_last and compilation: exact gradients, and the expected cost."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from nets import CASES, make_case
from oracle import (
    assert_same,
    by_loss,
    expected_gradients,
    gradients_of,
    losses_of,
    relay_gradients,
    step_gradients,
    weighted_sum,
)
from relaybackprop import LinearHead, Plan, Relay, RelayLoss, Window
from relaybackprop.errors import BoundaryError, CompiledOverlapError, EarlyReleaseError, TransformError


class Segment(nn.Sequential):
    """A chain with its own forward, since some versions of the compiler skip those of torch.nn's containers."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


def conv_net(depth: int = 6, width: int = 4) -> nn.Sequential:
    layers = [Segment(nn.Conv2d(width if n else 3, width, 3, padding=1), nn.Tanh()) for n in range(depth)]
    return nn.Sequential(*layers, Segment(nn.Flatten(), nn.Linear(width * 16, 5)))


OVERLAP = Plan(primary=Window(bottom="2"), auxiliary={"aux": Window(top="3")})
X = torch.randn(2, 3, 4, 4)


def conv_relay(plan: Plan = OVERLAP, **kwargs: int) -> Relay:
    return Relay(conv_net(**kwargs), plan, {name: LinearHead(4, 5) for name in plan.auxiliary})


def test_bf16_autocast() -> None:
    """In bf16 the reference rounds its sums elsewhere, so the tolerance is that of bf16; the masks are exact."""
    relay = conv_relay()
    with torch.autocast("cpu", torch.bfloat16):
        loss = weighted_sum(losses_of(by_loss(relay(X))), relay.plan)
    loss.backward()
    got = gradients_of(relay)
    with torch.autocast("cpu", torch.bfloat16):
        expected = expected_gradients(relay, X)
    assert_same(got, expected, tolerance=2e-2)  # bf16 has 8 bits: 2**-8 is 4e-3, a few roundings deep
    assert all(gradient.dtype == torch.float32 for gradient in got.values())
    with pytest.raises(AssertionError):  # negative control: the tolerance distinguishes the windows
        assert_same(got, expected_gradients(relay, X, plan=relay.plan.multi_loss()), tolerance=2e-2)


def test_bf16_autocast_of_one_loss_is_bitwise_equal() -> None:
    """A sum of one term is not rounded, so one loss alone is exact in bf16, too."""
    relay = conv_relay()
    for loss in relay.plan.windows:
        relay.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = by_loss(relay(X))[loss]
        losses_of({loss: output})[loss].backward()
        got = gradients_of(relay)
        relay.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            plain = relay.model(X) if loss == "primary" else relay.heads[loss](relay.model[:4](X))
        losses_of({loss: plain})[loss].backward()
        for name, right in gradients_of(relay).items():
            inside = loss == "aux" or not name.startswith(("model.0.", "model.1."))
            assert torch.equal(got[name], right if inside else torch.zeros_like(right)), name


def test_autocast_with_tied_weights_is_no_leak() -> None:
    """Autocast casts a weight once and shares the cast between uses below and above a window's end."""
    model = conv_net()
    model[4][0] = model[1][0]
    relay = Relay(model, OVERLAP, {"aux": LinearHead(4, 5)})
    with torch.autocast("cpu", torch.bfloat16):
        weighted_sum(losses_of(by_loss(relay(X))), relay.plan).backward()
    assert gradients_of(relay)["model.1.0.weight"].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 with a GradScaler needs a GPU")
def test_fp16_with_grad_scaler() -> None:
    relay = conv_relay().cuda()
    criterion = RelayLoss(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(relay.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    x, labels = X.cuda(), torch.tensor([0, 3], device="cuda")
    with torch.autocast("cuda", torch.float16):
        loss = criterion(relay(x), labels)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    got = gradients_of(relay)
    relay.zero_grad()
    criterion(relay(x), labels).backward()
    assert_same(got, gradients_of(relay), tolerance=2e-2)
    scaler.step(optimizer)


class Checkpointed(nn.Module):
    """A chain that recomputes every block in the backward pass."""

    def __init__(self, blocks: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.reentrant = reentrant
        self.runs = Counter[int]()

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            if self.training:
                x = checkpoint(self.run, block, number, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        return x

    def run(self, block: nn.Module, number: int, x: Tensor) -> Tensor:
        self.runs[number] += 1
        return block(x)


def under(plan: Plan, parent: str) -> Plan:
    """The same plan for the same modules one level deeper."""

    def move(window: Window) -> Window:
        names = {role: getattr(window, role) for role in ("top", "bottom", "after")}
        return Window(**{role: name and f"{parent}.{name}" for role, name in names.items()}, weight=window.weight)

    return Plan(move(plan.primary), {name: move(window) for name, window in plan.auxiliary.items()})


def test_non_reentrant_checkpointing_of_every_block() -> None:
    """Boundaries inside checkpointed parts: the recomputation must not run heads or junctions again."""
    plan = under(OVERLAP, "blocks")
    model = Checkpointed(conv_net(), reentrant=False)
    relay = Relay(model, plan, {"aux": LinearHead(4, 5)}).double()
    x = X.double().requires_grad_()
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))


def test_a_step_with_non_reentrant_checkpointing_of_every_block() -> None:
    """Heads run inside checkpointed parts, and recomputation runs during the forward pass."""
    model = Checkpointed(conv_net(), reentrant=False)
    plan = under(OVERLAP, "blocks")
    relay = Relay(model, plan, {"aux": LinearHead(4, 5)}).double()
    x = X.double().requires_grad_()
    expected = expected_gradients(relay, x)
    for _ in range(2):
        model.runs.clear()
        assert_same(step_gradients(relay, x), expected)
        assert model.runs[0] == model.runs[5] == 2, "once forward, once recomputed"
        assert model.runs[2] == model.runs[3] == 3, "recomputed for each gradient in the overlap"


def test_reentrant_checkpointing_around_a_boundary_raises() -> None:
    relay = Relay(Checkpointed(conv_net(), reentrant=True), under(OVERLAP, "blocks"), {"aux": LinearHead(4, 5)})
    with pytest.raises(BoundaryError, match=r"reentrant checkpoint:.*use_reentrant=False"):
        relay(X.clone().requires_grad_())


def test_reentrant_checkpointing_between_boundaries_works() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Linear(3, 3) for _ in range(5))

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(torch.tanh(self.a(x)))
            x = checkpoint(lambda x: torch.tanh(self.c(x)), x, use_reentrant=True)
            return self.e(torch.tanh(self.d(x)))

    plan = Plan(primary=Window(after="a"), auxiliary={"aux": Window(top="b")})
    relay = Relay(Between(), plan, {"aux": nn.Linear(3, 3)}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    got = relay_gradients(relay, x)
    plain = copy.deepcopy(relay)
    plain.model.forward = lambda x, m=plain.model: m.e(torch.tanh(m.d(torch.tanh(m.c(m.b(torch.tanh(m.a(x))))))))
    assert_same(got, relay_gradients(plain, x))


class ReentrantAbove(nn.Module):
    """A chain whose last layer is checkpointed, above all boundaries."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        *lower, last = self.layers
        for layer in lower:
            x = torch.tanh(layer(x))
        return checkpoint(last, x, use_reentrant=self.reentrant)


def test_early_release_with_reentrant_checkpointing_raises() -> None:
    """An ordinary pass is exact with reentrant checkpointing, and early release with the non-reentrant one."""
    plan = Plan(primary=Window(bottom="layers.1"), auxiliary={"aux": Window(top="layers.2")})
    relay = Relay(ReentrantAbove(reentrant=True), plan, {"aux": nn.Linear(3, 3)}).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(EarlyReleaseError, match=r"(?s)a reentrant checkpoint above the .*use_reentrant=False"):
        step_gradients(relay, x)
    got = relay_gradients(relay, x)
    relay.model.reentrant = False
    expected = expected_gradients(relay, x)
    assert_same(got, expected)
    assert_same(step_gradients(relay, x), expected)


scripts = pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, but not all versions warn


@scripts
def test_jit_compiled_boundaries_raise() -> None:
    """Calls of scripted modules run no hooks, so a boundary there would be silently ignored."""
    heads = {"aux": LinearHead(4, 5)}
    with pytest.raises(
        TransformError, match=r"(?s)'[23]'.* must be an ordinary nn.Module, .*script relay.model afterwards"
    ):
        Relay(torch.jit.script(conv_net()), OVERLAP, heads)
    model = conv_net()
    model[3] = torch.jit.script(model[3])
    with pytest.raises(TransformError, match=r"'3', a boundary of the plan, is a torch.jit.ScriptModule"):
        Relay(model, OVERLAP, heads)


@scripts
def test_a_scripted_module_between_boundaries_works() -> None:
    relay = Relay(conv_net(depth=7), Plan(Window(bottom="2"), {"aux": Window(top="4")}), {"aux": LinearHead(4, 5)})
    relay = relay.double()
    expected = expected_gradients(relay, X.double())
    relay.model[3] = torch.jit.script(relay.model[3])
    assert_same(relay_gradients(relay, X.double()), expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_torch_func_transforms_raise(transform: Any) -> None:
    """Transforms raise in training. In evaluation mode there are no windows, and they work as without a relay."""
    relay = conv_relay().double()
    parameters = {name: parameter.detach() for name, parameter in relay.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        output = torch.func.functional_call(relay, parameters, (X.double(),))
        return sum(losses_of(by_loss(output) if relay.training else {"primary": output}).values())

    with pytest.raises(
        TransformError, match=r"a training forward pass of Relay runs inside a torch.func.*backward\(\)"
    ):
        transform(loss)(parameters)
    relay.eval()
    assert transform(loss)(parameters)["model.0.0.weight"].any()


def test_transform_around_a_boundary_raises() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.func.vmap(self.a)(x))

    relay = Relay(Mapped(), Plan(auxiliary={"aux": Window(top="a")}), {"aux": nn.Linear(3, 3)})
    with pytest.raises(TransformError, match=r"the output of a runs inside a torch.func transform"):
        relay(torch.randn(2, 3))


def test_channels_last() -> None:
    relay = conv_relay().double().to(memory_format=torch.channels_last)
    x = X.double().to(memory_format=torch.channels_last)
    layouts: list[bool] = []
    relay.model[4].register_forward_pre_hook(
        lambda _m, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    relay.heads["aux"].register_forward_pre_hook(
        lambda _m, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    for _ in range(2):
        assert_same(relay_gradients(relay, x), expected_gradients(relay, x))
    assert layouts
    assert all(layouts)


class CountBackward(TorchDispatchMode):
    """Counts input-gradient and weight-gradient passes of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = self.weights = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            needs_input, needs_weight, _ = args[-1]
            self.inputs += needs_input
            self.weights += needs_weight
        return func(*args, **(kwargs or {}))


COSTS = {
    # Six convolutions, 0 to 5. Every one has one weight-gradient pass; the first needs no input gradient.
    "overlap of 2, 3": (OVERLAP, 5 + 2),
    "no overlap": (OVERLAP.isolated(), 5),  # including the gradient of block 3's output, which is dropped
    "multi-loss": (OVERLAP.multi_loss(), 5),
    "three losses on 2": (
        Plan(Window(bottom="2"), {"a": Window(top="2"), "b": Window(top="3", bottom="1")}),
        # 5: 1 pass; 4: 1; 3 carries primary + b, b continues: 2; 2 carries primary + a + b, then a + b, then a: 3;
        # 1 carries a + b, then a: 2; 0 needs none.
        1 + 1 + 2 + 3 + 2,
    ),
    "three losses, two of them to the first layer": (
        Plan(Window(bottom="2"), {"a": Window(top="2"), "b": Window(top="3")}),
        # 2 carries primary + a + b, and a + b together in one lane
        1 + 1 + 2 + 2 + 1,
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_is_w_plus_g_times_d(name: str) -> None:
    """One weight-gradient pass everywhere, and one input-gradient pass for each distinct sum: no pass too many."""
    plan, inputs = COSTS[name]
    relay = conv_relay(plan)
    loss = weighted_sum(losses_of(by_loss(relay(X))), plan)
    with CountBackward() as count:
        loss.backward()
    assert (count.weights, count.inputs) == (6, inputs)


def test_parameter_hooks_fire_once() -> None:
    case = make_case("resnet")
    relay = Relay(case.model, case.plan, case.heads)
    fired = Counter[str]()
    for name, parameter in relay.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _p, name=name: fired.update([name]))
    relay_gradients(relay, *case.inputs)
    assert set(fired.values()) == {1}
    assert fired.keys() == dict(relay.named_parameters()).keys()


@pytest.mark.parametrize("name", CASES)
def test_user_hooks_see_the_same_values(name: str) -> None:
    """The user's own forward hooks work together with the boundaries."""
    case = make_case(name)
    relay = Relay(case.model, case.plan, case.heads)
    seen = Counter[str]()
    for module_name, module in case.model.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, n=module_name: seen.update([n]))
    assert_same(relay_gradients(relay, *case.inputs), expected_gradients(relay, *case.inputs))
    assert seen


def compiled(relay: Relay, names: list[str], in_place: bool) -> None:
    for name in names:
        module = relay.model.get_submodule(name)
        if in_place:
            module.compile(backend="aot_eager")
        else:
            relay.model.set_submodule(name, torch.compile(module, backend="aot_eager"))


# The compiler reads .grad of intermediate tensors while tracing, and warns about it.
compiles = pytest.mark.filterwarnings("default")


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@compiles
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("names", [["0", "1"], ["4", "5", "6"], ["0", "1", "4", "5", "6"]])
def test_compiled_segments_outside_the_overlap(names: list[str], in_place: bool) -> None:
    relay = conv_relay().double()
    x = X.double()
    expected = expected_gradients(relay, x)
    keys = [name.replace("_orig_mod.", "") for name in expected]
    compiled(relay, names, in_place)
    for _ in range(3):
        got = {name.replace("_orig_mod.", ""): gradient for name, gradient in relay_gradients(relay, x).items()}
        assert_same(got, expected)
        got = {name.replace("_orig_mod.", ""): gradient for name, gradient in step_gradients(relay, x).items()}
        assert_same(got, expected)
    assert list(got) == keys


@compiles
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_overlap_raises_before_backward(in_place: bool) -> None:
    relay = conv_relay()
    relay(X)
    compiled(relay, ["3"], in_place)  # after an eager forward pass: compiled code is searched for in every pass
    with pytest.raises(CompiledOverlapError, match=r"not supported below the output of 3.*outside the overlap"):
        relay(X)
    with pytest.raises(CompiledOverlapError, match=r"not supported above the input of 2.*outside the overlap"):
        step_gradients(relay, X)
    relay = conv_relay(OVERLAP.multi_loss())  # no overlap, no lanes: compile as you like
    compiled(relay, ["2", "3"], in_place)
    assert_same(
        {n.replace("_orig_mod.", ""): g for n, g in relay_gradients(relay.double(), X.double()).items()},
        {n.replace("_orig_mod.", ""): g for n, g in expected_gradients(relay, X.double()).items()},
    )


@compiles
@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_overlap_raises_with_a_warm_compiler_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artefacts on disk, compiled with donated buffers by plain training, must not slip in and be silently wrong."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    relay = conv_relay(OVERLAP.multi_loss())
    relay.model[3].compile()  # inductor, whose cache is on disk
    weighted_sum(losses_of(by_loss(relay(X))), relay.plan).backward()
    assert any(tmp_path.iterdir()), "the cache is elsewhere"
    torch._dynamo.reset()
    again = conv_relay()
    again.model[3].compile()
    with torch._functorch.config.patch(donated_buffer=False), pytest.raises(CompiledOverlapError):
        again(X)


@compiles
@pytest.mark.usefixtures("_fresh_compiler")
def test_boundaries_inside_compiled_code_raise() -> None:
    model = conv_net()
    model[3].compile(backend="aot_eager")
    plan = Plan(auxiliary={"aux": Window(top="3.0")})
    with pytest.raises(CompiledOverlapError, match=r"boundary '3.0' is inside '3', which is compiled as one"):
        Relay(model, plan, {"aux": LinearHead(4, 5)})
    relay = conv_relay()
    relay.model.compile(backend="aot_eager")
    with pytest.raises(CompiledOverlapError, match="'the whole model', which is compiled as one"):
        relay(X)


@compiles
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_relay_raises_in_training_and_works_in_evaluation() -> None:
    relay = conv_relay()
    right = relay.eval()(X)
    whole = torch.compile(relay, backend="aot_eager")
    torch.testing.assert_close(whole(X), right)
    relay.train()
    with pytest.raises(CompiledOverlapError, match=r"traces through a training forward pass of Relay"):
        whole(X)


@compiles
@pytest.mark.usefixtures("_fresh_compiler")
def test_tracing_through_a_boundary_raises() -> None:
    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.compile(lambda x: self.b(torch.tanh(self.a(x))), backend="aot_eager")(x)

    relay = Relay(Traced(), Plan(auxiliary={"aux": Window(top="a")}), {"aux": nn.Linear(3, 3)})
    with pytest.raises(CompiledOverlapError, match=r"traces through the output of a: it must run eagerly"):
        relay(torch.randn(2, 3))
