"""Bad input: each error states the problem, the requirement and the remedy. The tests check the texts too."""

import ast
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relaybackprop
from oracle import assert_same, expected_gradients, relay_gradients, step_gradients
from relaybackprop import (
    AuxiliaryHead,
    LinearHead,
    Plan,
    Relay,
    RelayError,
    RelayLoss,
    Window,
    head_for,
    reach,
    suggest_plan,
)
from relaybackprop.errors import (
    AppliedTwiceError,
    BoundaryError,
    HeadError,
    LeakError,
    ModuleNameError,
    PlanError,
    WindowError,
)
from relaybackprop.loss import RelayOutput

AUX = {"aux": Window(top="1")}


def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))


def relay_of(plan: Plan, model: nn.Module | None = None) -> Relay:
    return Relay(model or net(), plan, {name: nn.Linear(3, 3) for name in plan.auxiliary})


def raises(kind: type[RelayError], *parts: str) -> Any:
    """Expect an error of this class whose text has these parts in this order."""
    assert len(parts) == 3, "problem, requirement, remedy"
    return pytest.raises(kind, match="(?s)" + ".*".join(re.escape(part) for part in parts))


BAD_WINDOWS = {
    "both": ({"bottom": "a", "after": "b"}, "both bottom='a' and after='b'", "one lower end", "drop the other"),
    "empty": (
        {"top": "a", "after": "a"},
        "after='a' is also the top",
        "at least one layer",
        "after a lower module",
    ),
    "no text": ({"top": 3}, "top=3 is not the name of a module", "model.named_modules()", "such as 'layer3.0'"),
    "empty text": (
        {"bottom": ""},
        "bottom='' is not the name of a module",
        "model.named_modules()",
        "such as 'layer3.0'",
    ),
    "zero": ({"weight": 0}, "weight=0", "positive and finite", "leave its window out"),
    "negative": ({"weight": -0.3}, "weight=-0.3", "positive and finite", "leave its window out"),
    "nan": ({"weight": float("nan")}, "weight=nan", "positive and finite", "leave its window out"),
    "infinite": ({"weight": float("inf")}, "weight=inf", "positive and finite", "leave its window out"),
    "huge": ({"weight": 10**400}, "weight=1000", "positive and finite", "leave its window out"),
    "text": ({"weight": "0.3"}, "weight='0.3'", "positive and finite", "leave its window out"),
    "truth": ({"weight": True}, "weight=True", "positive and finite", "leave its window out"),
}


@pytest.mark.parametrize("name", BAD_WINDOWS)
def test_invalid_windows(name: str) -> None:
    arguments, *parts = BAD_WINDOWS[name]
    with raises(PlanError, *parts):
        Window(**arguments)


BAD_PLANS = {
    "primary top": ({"primary": Window(top="a")}, "top='a'", "must not have a `top`", "Leave `top` out"),
    "no top": (
        {"auxiliary": {"aux": Window(bottom="a")}},
        "'aux' has no `top`",
        "the head reads",
        "Pass 'aux': Window(top='layer3.0')",
    ),
    "no window": (
        {"auxiliary": {"aux": "layer3"}},
        "the loss 'aux' has the str 'layer3'",
        "requires a Window",
        "Write Window(",
    ),
    "primary no window": (
        {"primary": "fc"},
        "the loss 'primary' has the str 'fc'",
        "requires a Window",
        "Write Window(",
    ),
    "no mapping": ({"auxiliary": [Window(top="a")]}, "auxiliary is a list", "a mapping from names", "auxiliary={'aux'"),
    "dot": ({"auxiliary": {"a.b": Window(top="a")}}, "'a.b'", "text without a dot", "Rename"),
    "primary name": (
        {"auxiliary": {"primary": Window(top="a")}},
        "'primary' is not a valid name",
        "not 'primary'",
        "Rename",
    ),
    "method name": ({"auxiliary": {"items": Window(top="a")}}, "'items'", "nn.ModuleDict", "Rename"),
    "number": ({"auxiliary": {1: Window(top="a")}}, "1 is not", "text without a dot", "Rename"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_invalid_plans(name: str) -> None:
    arguments, *parts = BAD_PLANS[name]
    with raises(PlanError, *parts):
        Plan(**arguments)


def test_unknown_module_lists_the_nearest_names() -> None:
    with raises(ModuleNameError, "ResNet has no module 'layer3.O'", "model.named_modules()", "layer3.0"):
        models = pytest.importorskip("torchvision.models")
        relay_of(Plan(primary=Window(bottom="layer3.O")), models.resnet18())
    with raises(
        ModuleNameError, "Linear has no module 'weight'", "model.named_modules()", "print(model) shows the names"
    ):
        relay_of(Plan(primary=Window(bottom="weight")), nn.Linear(2, 2))


def test_top_below_bottom() -> None:
    relay = relay_of(Plan(auxiliary={"aux": Window(top="1", bottom="3")}))
    with raises(
        WindowError, "window of 'aux' is inverted", "reaches the output of 1 before the input of 3", "Swap them"
    ):
        relay(torch.randn(2, 3))


def test_heads_and_windows_must_agree() -> None:
    with raises(HeadError, "without a head: ['aux']; without a window: none", "['aux']", "agree"):
        Relay(net(), Plan(auxiliary=AUX))
    with raises(HeadError, "without a head: none; without a window: ['other']", "['aux']", "agree"):
        Relay(net(), Plan(auxiliary=AUX), {"aux": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    with raises(HeadError, "without a window: ['aux']", "none", "agree"):
        Relay(net(), Plan(auxiliary=AUX).standard(), {"aux": nn.Linear(3, 3)})
    with raises(HeadError, "'aux' is a function", "an nn.Module", "Wrap"):
        Relay(net(), Plan(auxiliary=AUX), {"aux": lambda x: x})  # type: ignore[dict-item]


def test_criteria_and_windows_must_agree() -> None:
    relay, loss = relay_of(Plan(auxiliary=AUX)), RelayLoss({"primary": nn.MSELoss()})
    for call in (
        lambda: loss(relay(torch.randn(2, 3)), torch.ones(2, 3)),
        lambda: relay.forward_backward(torch.randn(2, 3), target=torch.ones(2, 3), loss=loss),
    ):
        with raises(HeadError, "criteria for ['primary']", "['primary', 'aux']", "single criterion"):
            call()


def test_names_from_before_0_2_raise_with_the_new_name() -> None:
    relay = relay_of(Plan(auxiliary=AUX))
    with raises(PlanError, "a MSELoss and a Plan", "carries the plan's weights", "Write RelayLoss("):
        RelayLoss(nn.MSELoss(), relay.plan)
    with raises(PlanError, "a MSELoss and a Plan", "carries the plan's weights", "Write RelayLoss("):
        RelayLoss(nn.MSELoss(), plan=relay.plan)
    with raises(PlanError, "above='0'", "`after` replaces it", "Rename the argument"):
        Window(above="0")
    with raises(PlanError, "relay.step", "forward_backward", "Rename the call"):
        relay.step(torch.randn(2, 3), target=None, loss=RelayLoss(nn.MSELoss()))


def test_head_output_must_fit_the_target() -> None:
    labels = torch.tensor([0, 4])
    output = RelayOutput(torch.randn(2, 5), {"aux": torch.randn(2, 3)}, {"primary": 1.0, "aux": 0.3})
    with raises(
        HeadError, "'aux' returns the shape (2, 3)", "the shape of the model's output, (2, 5)", "as many classes"
    ):
        RelayLoss(nn.CrossEntropyLoss())(output, labels)
    criteria = {"primary": nn.CrossEntropyLoss(), "aux": nn.CrossEntropyLoss()}
    with raises(HeadError, "output (2, 3) with the target (2,) (Target 4", "must fit", "classes"):
        RelayLoss(criteria)(output, labels)


def test_out_of_memory_is_not_wrapped() -> None:
    def fails(_output: Tensor, _target: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        RelayLoss({"primary": nn.functional.mse_loss, "aux": fails})(
            RelayOutput(torch.ones(1), {"aux": torch.ones(1)}, {"primary": 1.0, "aux": 0.3}), torch.ones(1)
        )


def test_arguments_in_the_wrong_order() -> None:
    plan = Plan(auxiliary=AUX)
    with raises(PlanError, "a Plan and a Sequential", "a model and a plan", "Relay(model, plan"):
        Relay(plan, net())  # type: ignore[arg-type]
    with raises(PlanError, "a Plan and a MSELoss", "one criterion, or a mapping", "RelayLoss(nn.CrossEntropyLoss()"):
        RelayLoss(plan, nn.MSELoss())  # type: ignore[arg-type]
    with raises(PlanError, "the class MSELoss", "an instance or a function", "Call the class: MSELoss()"):
        RelayLoss(nn.MSELoss)
    with raises(HeadError, "heads is a Linear", "a mapping from names", "heads={'aux'"):
        Relay(net(), plan, nn.Linear(3, 3))  # type: ignore[arg-type]
    with raises(PlanError, "a Sequential", "a Relay", "reach(Relay("):
        reach(net(), torch.randn(2, 3))  # type: ignore[arg-type]


def test_errors_in_a_head_name_the_head() -> None:
    relay = Relay(net(), Plan(auxiliary=AUX), {"aux": nn.Linear(7, 3)})
    with pytest.raises(RuntimeError) as caught:
        relay(torch.randn(2, 3))
    assert caught.value.__notes__ == ["Raised by the head 'aux', which read (2, 3), the output of 1."]


class Conv(nn.Sequential):
    """Two convolutions with 32 channels and a classifier."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 4),
        )


def test_head_for_the_wrong_channels_names_its_loss_and_boundary() -> None:
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    relay = Relay(Conv(), Plan(auxiliary={"aux": Window(top="2")}), {"aux": LinearHead(64, 4)})
    for call in (
        lambda: relay(x),
        lambda: relay.forward_backward(x, target=labels, loss=RelayLoss(nn.CrossEntropyLoss())),
    ):
        with raises(
            HeadError,
            "in the head of the auxiliary loss 'aux', on the output of 2, LinearHead does not read a tensor of shape "
            "(2, 32, 4, 4)",
            "it reads (N, 64) or (N, 64, H, W)",
            "Build the head for the channels of its input. If channels are first, LinearHead(32, ...) reads 32 "
            "channels. head_for(model, plan, example, classes) chooses a head.",
        ):
            call()
    for head, shape, remedy in (
        (LinearHead(64, 4), (2, 32), "input. LinearHead(32, ...) reads 32 channels."),
        (LinearHead(64, 4, layout="channels_first"), (2, 32, 9), "input. LinearHead(32, ...) reads 32 channels."),
        (LinearHead(64, 4, layout="channels_last"), (2, 9, 32), "input. LinearHead(32, ...) reads 32 channels."),
        # A head for other channels would not read these either.
        (LinearHead(64, 4), (64,), "The input has 64 channels in neither layout"),
        (AuxiliaryHead(64, 4), (2, 32), "The input has 64 channels in neither layout"),
    ):
        with raises(HeadError, f"Head does not read a tensor of shape {shape}", "64", remedy):
            head(torch.randn(shape))


def test_relay_output_in_place_of_the_models_output() -> None:
    output = relay_of(Plan(auxiliary=AUX))(torch.randn(2, 3))
    with pytest.raises(
        AttributeError,
        match=r"^'RelayOutput' object has no attribute 'argmax'\. In training mode .* use output\.primary .* "
        r"relay\.eval\(\) first$",
    ):
        output.argmax(1)
    assert not hasattr(output, "shape")
    with pytest.raises(AttributeError, match=r"^'RelayOutput' object has no attribute '_private'$"):
        _ = output._private
    copied = pickle.loads(pickle.dumps(output))
    assert torch.equal(copied.losses["aux"], output.auxiliary["aux"])
    assert copied.weights == output.weights


def test_a_shape_is_not_an_example() -> None:
    model, requirement = Conv(), "it must be a batch: a tensor, a tuple of arguments"
    for shape, remedy in (((3, 32, 32), "Pass torch.empty(2, 3, 32, 32)."), ([4, 3, 8, 8], "torch.empty(4, 3, 8, 8).")):
        with raises(PlanError, f"the example input is {tuple(shape)}, a shape", requirement, remedy):
            suggest_plan(model, shape)
    with raises(PlanError, "the example input is (3, 32, 32), a shape", requirement, "torch.empty(2, 3, 32, 32)"):
        head_for(model, Plan(auxiliary={"aux": Window(top="2")}), (3, 32, 32), 4)
    with pytest.raises(PlanError, match=r"the model raised"):
        suggest_plan(model, (torch.randn(2, 3), 3))

    class Samples(nn.Sequential):
        def forward(self, batch: int) -> Tensor:  # type: ignore[override]
            return super().forward(torch.ones(batch, 3))

    assert suggest_plan(Samples(*(nn.Linear(3, 3) for _ in range(8))), (2,)).depths


def test_plan_applied_twice() -> None:
    relay = relay_of(Plan(auxiliary=AUX))
    for model in (relay, nn.Sequential(relay, nn.Linear(3, 3))):
        with raises(AppliedTwiceError, "contains, a Relay", "a plain model", "relay.model"):
            relay_of(Plan(), model)


def test_relay_in_a_head() -> None:
    inner = relay_of(Plan(auxiliary=AUX))
    for head in (inner, nn.Sequential(nn.Linear(3, 3), inner)):
        with raises(AppliedTwiceError, "the head 'aux' is, or contains, a Relay", "a plain module", "relay.model"):
            Relay(nn.Sequential(*(nn.Linear(3, 3) for _ in range(8))), Plan(auxiliary=AUX), {"aux": head})


class Odd(nn.Module):
    """A model with a layer that never runs and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.twice, self.once = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(self.twice(x)))


def test_boundary_module_never_runs_or_runs_twice() -> None:
    with raises(BoundaryError, "never called 'never'", "must run", "nn.ModuleList"):
        relay_of(Plan(auxiliary={"aux": Window(top="never")}), Odd())(torch.randn(2, 3))
    with raises(BoundaryError, "output of twice a second time", "once per forward pass", "runs once"):
        relay_of(Plan(auxiliary={"aux": Window(top="twice")}), Odd())(torch.randn(2, 3))
    with raises(BoundaryError, "input of twice a second time", "once per forward pass", "runs once"):
        relay_of(Plan(primary=Window(bottom="twice")), Odd())(torch.randn(2, 3))
    relay_of(Plan(auxiliary={"aux": Window(top="once")}), Odd())(
        torch.randn(2, 3)
    )  # inside a window a module may run twice


def test_leak_around_a_residual_branch() -> None:
    models = pytest.importorskip("torchvision.models")
    plan = Plan(primary=Window(bottom="layer3.1.conv2"), auxiliary={"aux": Window(top="layer3.1")})
    relay = Relay(models.resnet18(num_classes=3), plan, {"aux": LinearHead(256, 3)})
    with raises(
        LeakError, "(above) bypasses the end of the window of 'primary'", "the input of layer3.1.conv2", "block"
    ):
        relay(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("bottom", "skip", "upper", "main"),
    [
        ("layer2.0.conv2", "layer1", "layer2.0.downsample.0", "layer2.0.bn1"),
        ("layer2.1.conv2", "layer2.0", "layer2.1", "layer2.1.bn1"),
        ("layer3.1.bn2", "layer3.0", "layer3.1", "layer3.1.conv2"),
        ("layer2.1.conv1", "layer2.0", "layer2.1", None),  # the path splits at this very input
    ],
)
def test_the_remedy_of_a_leak_is_accepted(bottom: str, skip: str, upper: str, main: str | None) -> None:
    """The shared, in-place activations of these blocks run twice, so windows cannot end at them."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model, x = models.resnet18(num_classes=3).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plan = Plan(primary=Window(bottom=bottom), auxiliary={"aux": Window(top="layer3")})
    heads = {"aux": LinearHead(256, 3).double()}
    ends = (skip,) if main is None else (main, skip)
    for early in (False, True):
        # With the auxiliary loss, whose window has no end, early release raises its own error first.
        relay = Relay(model, Plan(plan.primary)) if early else Relay(model, plan, heads)
        with raises(LeakError, f"from {skip} (below) to {upper} (above)", f"the input of {bottom}", "after=") as caught:
            step_gradients(relay, x) if early else relay_gradients(relay, x)
        remedy = re.search(r"after=(\(.+\)|'[^']+')(.*)\.$", caught.value.remedy)
        assert remedy is not None
        assert remedy[2] == (", with an ordinary backward pass" if early and main else "")
        after = ast.literal_eval(remedy[1])
        assert Window(after=after) == Window(after=ends)
        accepted = Relay(model, Plan(Window(after=after), plan.auxiliary), heads)
        gradients = relay_gradients(accepted, x)
        assert_same(gradients, expected_gradients(accepted, x))
        assert_same(gradients, expected_gradients(accepted, x, plan=plan))  # the window that was asked for


class Dense(nn.Module):
    """Each layer reads the outputs of all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.layers:
            values.append(layer(torch.stack(values).sum(0)))
        return values[-1]


def test_the_remedy_of_a_leak_lists_a_few_ends_at_most() -> None:
    for bottom, proposed in (("layers.3", True), ("layers.7", False)):
        with raises(LeakError, "(below)", f"the input of {bottom}", "the whole block") as caught:
            relay_of(Plan(primary=Window(bottom=bottom)), Dense())(torch.randn(2, 3))
        assert ("on all paths: after=(" in caught.value.remedy) == proposed


def test_the_remedy_of_a_leak_proposes_modules_only() -> None:
    class Bare(nn.Module):
        """A layer without a module below a skip."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.weight
            return self.b(self.a(x)) + x

    for window, remedy in ((Window(bottom="b"), "block"), (Window(bottom="a"), "block"), (Window(after="a"), "block")):
        with raises(LeakError, "a path from MulBackward0", "the ", f"the whole {remedy}.") as caught:
            relay_of(Plan(primary=window), Bare())(torch.randn(2, 3))
        assert "after" not in caught.value.remedy


def test_errors_can_be_pickled_and_derive_from_builtins() -> None:
    error = pickle.loads(pickle.dumps(HeadError("one", "two", "Three.")))
    assert str(error) == "one: two. Three."
    assert (error.problem, error.requirement, error.remedy) == ("one", "two", "Three.")
    assert issubclass(PlanError, ValueError)
    assert issubclass(LeakError, RuntimeError)
    assert all(issubclass(kind, RelayError) for kind in (PlanError, LeakError, HeadError))


def test_common_mistakes_have_specific_messages() -> None:
    plan, x = Plan(auxiliary=AUX), torch.randn(2, 3)
    suggestion = suggest_plan(nn.Sequential(*(nn.Linear(3, 3) for _ in range(8))), x)
    with raises(PlanError, "a Sequential and a Suggestion", "a model and a plan", "suggestion.plan"):
        Relay(net(), suggestion)  # type: ignore[arg-type]
    with raises(PlanError, "a Suggestion", "a plan", "suggestion.plan"):
        head_for(net(), suggestion, x, 3)  # type: ignore[arg-type]
    for name in ("DenseHead", "RelayStep"):
        with pytest.raises(ImportError, match=rf"{name} moved to relaybackprop\.\w+.* in 0\.2"):
            exec(f"from relaybackprop import {name}")
    with pytest.raises(AttributeError, match="no attribute 'Relays'"):
        _ = relaybackprop.Relays  # pyright: ignore

    class Logits(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x, "hidden": x}

    relay = Relay(nn.Sequential(*net(), Logits()), plan, {"aux": nn.Linear(3, 3)})
    with pytest.raises(TypeError) as caught:
        RelayLoss(nn.CrossEntropyLoss())(relay(x), torch.tensor([0, 1]))
    assert "a dict with items ['logits', 'hidden']" in caught.value.__notes__[0]


def test_relay_around_distributed_data_parallel_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parallel(nn.Module):
        """Replaces DistributedDataParallel, which requires a process group."""

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Parallel)
    with raises(PlanError, "is a DistributedDataParallel", "gradients of heads", "Wrap the relay instead"):
        Relay(Parallel(), Plan())
