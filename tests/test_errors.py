"""Bad input: each error says what was expected, what came, and what to do. The text is tested, not only the type."""

import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import relaybackprop
from relaybackprop import LinearHead, Plan, Relay, RelayError, RelayLoss, Window, head_for, reach, suggest_plan
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
    """The error of this kind whose text has these parts in this order."""
    assert len(parts) == 3, "expected, received, remedy"
    return pytest.raises(kind, match="(?s)" + ".*".join(re.escape(part) for part in parts))


BAD_WINDOWS = {
    "both": ({"bottom": "a", "after": "b"}, "one lower end", "both bottom='a' and after='b'", "drop the other"),
    "empty": (
        {"top": "a", "after": "a"},
        "at least one layer",
        "after='a', which is also the top",
        "after a lower module",
    ),
    "no text": ({"top": 3}, "top to be the name of a module", "top=3", "such as 'layer3.0'"),
    "empty text": ({"bottom": ""}, "bottom to be the name of a module", "bottom=''", "such as 'layer3.0'"),
    "zero": ({"weight": 0}, "positive and finite", "weight=0", "leave its window out"),
    "negative": ({"weight": -0.3}, "positive and finite", "weight=-0.3", "leave its window out"),
    "nan": ({"weight": float("nan")}, "positive and finite", "weight=nan", "leave its window out"),
    "infinite": ({"weight": float("inf")}, "positive and finite", "weight=inf", "leave its window out"),
    "huge": ({"weight": 10**400}, "positive and finite", "weight=1000", "leave its window out"),
    "text": ({"weight": "0.3"}, "positive and finite", "weight='0.3'", "leave its window out"),
    "truth": ({"weight": True}, "positive and finite", "weight=True", "leave its window out"),
}


@pytest.mark.parametrize("name", BAD_WINDOWS)
def test_windows(name: str) -> None:
    arguments, *parts = BAD_WINDOWS[name]
    with raises(PlanError, *parts):
        Window(**arguments)


BAD_PLANS = {
    "primary top": ({"primary": Window(top="a")}, "without `top`", "top='a'", "Leave `top` out"),
    "no top": ({"auxiliary": {"aux": Window(bottom="a")}}, "`top` for the auxiliary loss 'aux'", "bottom='a'", "Name"),
    "no window": ({"auxiliary": {"aux": "layer3"}}, "a Window for the loss 'aux'", "str 'layer3'", "Write Window("),
    "primary no window": ({"primary": "fc"}, "a Window for the loss 'primary'", "str 'fc'", "Write Window("),
    "no mapping": ({"auxiliary": [Window(top="a")]}, "a mapping from names", "list", "auxiliary={'aux'"),
    "dot": ({"auxiliary": {"a.b": Window(top="a")}}, "text without a dot", "'a.b'", "Rename"),
    "primary name": ({"auxiliary": {"primary": Window(top="a")}}, "not 'primary'", "'primary'", "Rename"),
    "method name": ({"auxiliary": {"items": Window(top="a")}}, "nn.ModuleDict", "'items'", "Rename"),
    "number": ({"auxiliary": {1: Window(top="a")}}, "text without a dot", "1", "Rename"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_plans(name: str) -> None:
    arguments, *parts = BAD_PLANS[name]
    with raises(PlanError, *parts):
        Plan(**arguments)


def test_unknown_module_lists_the_nearest_names() -> None:
    with raises(ModuleNameError, "name of a module", "'layer3.O', which ResNet does not have", "layer3.0"):
        models = pytest.importorskip("torchvision.models")
        relay_of(Plan(primary=Window(bottom="layer3.O")), models.resnet18())
    with raises(ModuleNameError, "name of a module", "'weight', which Linear", "print(model) shows the names"):
        relay_of(Plan(primary=Window(bottom="weight")), nn.Linear(2, 2))


def test_top_below_bottom() -> None:
    relay = relay_of(Plan(auxiliary={"aux": Window(top="1", bottom="3")}))
    with raises(WindowError, "window of 'aux' to have its top above", "output of 1, which", "Swap them"):
        relay(torch.randn(2, 3))


def test_heads_and_windows_must_agree() -> None:
    with raises(HeadError, "['aux']", "without a head: ['aux']; without a window: none", "agree"):
        Relay(net(), Plan(auxiliary=AUX))
    with raises(HeadError, "['aux']", "without a head: none; without a window: ['other']", "agree"):
        Relay(net(), Plan(auxiliary=AUX), {"aux": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    with raises(HeadError, "none", "without a window: ['aux']", "agree"):
        Relay(net(), Plan(auxiliary=AUX).standard(), {"aux": nn.Linear(3, 3)})
    with raises(HeadError, "'aux' as an nn.Module", "function", "Wrap"):
        Relay(net(), Plan(auxiliary=AUX), {"aux": lambda x: x})  # type: ignore[dict-item]


def test_criteria_and_windows_must_agree() -> None:
    relay, loss = relay_of(Plan(auxiliary=AUX)), RelayLoss({"primary": nn.MSELoss()})
    for call in (
        lambda: loss(relay(torch.randn(2, 3)), torch.ones(2, 3)),
        lambda: relay.forward_backward(torch.randn(2, 3), target=torch.ones(2, 3), loss=loss),
    ):
        with raises(HeadError, "['primary', 'aux']", "criteria for ['primary']", "single criterion"):
            call()


def test_spellings_before_0_2_name_the_new_ones() -> None:
    relay = relay_of(Plan(auxiliary=AUX))
    with raises(PlanError, "no plan", "a MSELoss and a Plan", "carries the plan's weights"):
        RelayLoss(nn.MSELoss(), relay.plan)
    with raises(PlanError, "no plan", "a MSELoss and a Plan", "carries the plan's weights"):
        RelayLoss(nn.MSELoss(), plan=relay.plan)
    with raises(PlanError, "Window(after=...)", "above='0'", "`after` replaces `above`"):
        Window(above="0")
    with raises(PlanError, "forward_backward", "relay.step", "Rename it"):
        relay.step(torch.randn(2, 3), target=None, loss=RelayLoss(nn.MSELoss()))


def test_head_output_must_fit_the_target() -> None:
    labels = torch.tensor([0, 4])
    output = RelayOutput(torch.randn(2, 5), {"aux": torch.randn(2, 3)}, {"primary": 1.0, "aux": 0.3})
    with raises(HeadError, "'aux' to have an output of the shape of the model's, (2, 5)", "(2, 3)", "as many classes"):
        RelayLoss(nn.CrossEntropyLoss())(output, labels)
    criteria = {"primary": nn.CrossEntropyLoss(), "aux": nn.CrossEntropyLoss()}
    with raises(HeadError, "with this target ((2,))", "(2, 3), for which the criterion raised: Target 4", "classes"):
        RelayLoss(criteria)(output, labels)


def test_errors_of_the_machine_are_handed_through() -> None:
    def fails(_output: Tensor, _target: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        RelayLoss({"primary": nn.functional.mse_loss, "aux": fails})(
            RelayOutput(torch.ones(1), {"aux": torch.ones(1)}, {"primary": 1.0, "aux": 0.3}), torch.ones(1)
        )


def test_arguments_in_the_wrong_order() -> None:
    plan = Plan(auxiliary=AUX)
    with raises(PlanError, "a model and a plan", "a Plan and a Sequential", "Relay(model, plan"):
        Relay(plan, net())  # type: ignore[arg-type]
    with raises(PlanError, "a criterion, or a mapping", "a Plan and a MSELoss", "RelayLoss(nn.CrossEntropyLoss()"):
        RelayLoss(plan, nn.MSELoss())  # type: ignore[arg-type]
    with raises(PlanError, "an instance or a function", "the class MSELoss", "Call the class"):
        RelayLoss(nn.MSELoss)
    with raises(HeadError, "heads by name", "a Linear", "heads={'aux'"):
        Relay(net(), plan, nn.Linear(3, 3))  # type: ignore[arg-type]
    with raises(PlanError, "a Relay", "a Sequential", "reach(Relay("):
        reach(net(), torch.randn(2, 3))  # type: ignore[arg-type]


def test_a_head_that_fails_is_named() -> None:
    relay = Relay(net(), Plan(auxiliary=AUX), {"aux": nn.Linear(7, 3)})
    with pytest.raises(RuntimeError) as caught:
        relay(torch.randn(2, 3))
    assert caught.value.__notes__ == ["in the head 'aux', which read (2, 3), the output of 1"]


def test_plan_applied_twice() -> None:
    relay = relay_of(Plan(auxiliary=AUX))
    for model in (relay, nn.Sequential(relay, nn.Linear(3, 3))):
        with raises(AppliedTwiceError, "a plain model", "a Relay", "relay.model"):
            relay_of(Plan(), model)


class Odd(nn.Module):
    """One layer never runs, one runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.twice, self.once = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(self.twice(x)))


def test_module_never_run_or_run_twice() -> None:
    with raises(BoundaryError, "to run 'never'", "never called it", "nn.ModuleList"):
        relay_of(Plan(auxiliary={"aux": Window(top="never")}), Odd())(torch.randn(2, 3))
    with raises(BoundaryError, "output of twice once", "a second time", "runs once"):
        relay_of(Plan(auxiliary={"aux": Window(top="twice")}), Odd())(torch.randn(2, 3))
    with raises(BoundaryError, "input of twice once", "a second time", "runs once"):
        relay_of(Plan(primary=Window(bottom="twice")), Odd())(torch.randn(2, 3))
    relay_of(Plan(auxiliary={"aux": Window(top="once")}), Odd())(torch.randn(2, 3))  # inside a window it may


def test_leak_around_a_residual_branch() -> None:
    models = pytest.importorskip("torchvision.models")
    plan = Plan(primary=Window(bottom="layer3.1.conv2"), auxiliary={"aux": Window(top="layer3.1")})
    relay = Relay(models.resnet18(num_classes=3), plan, {"aux": LinearHead(256, 3)})
    with raises(LeakError, "'primary' to cross the end of its window, the input of layer3.1.conv2", "(above)", "block"):
        relay(torch.randn(2, 3, 32, 32))


def test_errors_survive_pickling_and_are_builtin_kinds() -> None:
    error = pickle.loads(pickle.dumps(HeadError("one", "two", "Three.")))
    assert str(error) == "expected one; received two. Three."
    assert (error.expected, error.received, error.remedy) == ("one", "two", "Three.")
    assert issubclass(PlanError, ValueError)
    assert issubclass(LeakError, RuntimeError)
    assert all(issubclass(kind, RelayError) for kind in (PlanError, LeakError, HeadError))


def test_mistakes_of_new_users_are_named() -> None:
    plan, x = Plan(auxiliary=AUX), torch.randn(2, 3)
    suggestion = suggest_plan(nn.Sequential(*(nn.Linear(3, 3) for _ in range(8))), x)
    with raises(PlanError, "a model and a plan", "a Sequential and a Suggestion", "suggestion.plan"):
        Relay(net(), suggestion)  # type: ignore[arg-type]
    with raises(PlanError, "a plan", "a Suggestion", "suggestion.plan"):
        head_for(net(), suggestion, x, 3)  # type: ignore[arg-type]
    for name in ("DenseHead", "RelayStep"):
        with pytest.raises(ImportError, match=rf"{name} is in relaybackprop\.\w+.* since 0\.2"):
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


def test_a_relay_around_distributed_data_parallel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parallel(nn.Module):
        """Stands for DistributedDataParallel, which asks for a process group."""

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Parallel)
    with raises(PlanError, "a plain model", "heads", "Wrap the relay instead"):
        Relay(Parallel(), Plan())
