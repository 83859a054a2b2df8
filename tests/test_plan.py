"""Plans: defaults, the four schemes, printing, JSON. Properties by hypothesis; invalid plans are in test_errors.py."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from relaybackprop import Plan, Relay, Window
from relaybackprop.errors import PlanError, WindowError
from relaybackprop.plan import PRIMARY

PAPER = Plan(primary=Window(bottom="layer3.0"), auxiliary={"aux": Window(top="layer3.3")})
FIGURE2 = Plan(
    primary=Window(bottom="segment4"),
    auxiliary={"loss1": Window(top="segment3"), "loss2": Window(top="segment4", bottom="segment3")},
)


def test_default_weights() -> None:
    assert PAPER.weights == {"primary": 1.0, "aux": 0.3}
    assert Plan(Window(weight=2), {"aux": Window(top="a", weight=0.1)}).weights == {"primary": 2, "aux": 0.1}
    assert PAPER == Plan(Window(bottom="layer3.0", weight=1.0), {"aux": Window(top="layer3.3", weight=0.3)}), (
        "equal plans compare equal however they were written"
    )
    a, b = Window(top="a"), Window(top="b")
    assert hash(Plan(auxiliary={"a": a, "b": b})) == hash(Plan(auxiliary={"b": b, "a": a})), (
        "equal plans must have equal hashes"
    )
    assert hash(PAPER) == hash(copy.deepcopy(PAPER))


def test_plan_is_frozen() -> None:
    with pytest.raises(AttributeError):
        PAPER.primary = Window()  # type: ignore[misc]
    with pytest.raises(TypeError):
        PAPER.auxiliary["other"] = Window(top="a")  # type: ignore[index]


def test_schemes() -> None:
    assert PAPER.standard() == Plan()
    assert PAPER.multi_loss() == Plan(auxiliary={"aux": Window(top="layer3.3")})
    assert PAPER.isolated() == Plan(Window(after="layer3.3"), {"aux": Window(top="layer3.3")})
    assert FIGURE2.isolated() == Plan(
        Window(after="segment4"),
        {"loss1": Window(top="segment3"), "loss2": Window(top="segment4", after="segment3")},
    )
    twins = Plan(Window(bottom="c"), {"x": Window(top="a"), "y": Window(top="b"), "z": Window(top="b", bottom="b")})
    assert twins.isolated() == Plan(
        Window(after="b"), {"x": Window(top="a"), "y": Window(top="b", after="a"), "z": Window(top="b", after="a")}
    )
    assert Plan().isolated() == Plan()


def test_isolated_windows_follow_the_order_of_the_forward_pass() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    plan = Plan(auxiliary={"high": Window(top="2"), "low": Window(top="0")})
    relay = Relay(model, plan, {"high": nn.Linear(2, 2), "low": nn.Linear(2, 2)})
    relay(torch.randn(1, 2))
    assert plan.isolated(relay.order).windows == {
        "primary": Window(after="2", weight=1.0),
        "high": Window(top="2", after="0", weight=0.3),
        "low": Window(top="0", weight=0.3),
    }


def test_str_is_a_table() -> None:
    assert str(FIGURE2).splitlines() == [
        "loss     weight  from                down to",
        "primary  1       the model's output  input of segment4",
        "loss1    0.3     output of segment3  the first layer",
        "loss2    0.3     output of segment4  input of segment3",
    ]


def test_depth_in_weight_layers_is_the_papers_n() -> None:
    """The paper's Figure 2 on torchvision's VGG-19: segments of 2, 2, 4, 4, 4 convolutions, and 3 fc layers."""
    models = pytest.importorskip("torchvision.models")
    plan = Plan(
        primary=Window(bottom="features.19"),
        auxiliary={"loss1": Window(top="features.18"), "loss2": Window(top="features.27", bottom="features.10")},
    )
    heads = {"loss1": nn.Flatten(), "loss2": nn.Flatten()}
    relay = Relay(models.vgg19(num_classes=2, init_weights=False), plan, heads)
    relay(torch.randn(1, 3, 32, 32))
    assert relay.depths == {"primary": 4 + 4 + 3, "loss1": 2 + 2 + 4, "loss2": 4 + 4}
    assert relay.plan.describe(relay.depths).splitlines()[1].split()[-1] == "11"
    assert relay.plan is plan


@pytest.mark.parametrize(("build", "depth"), [("resnet50", 50), ("resnet18", 18)])
def test_depth_of_residual_networks_is_the_number_in_their_name(build: str, depth: int) -> None:
    models = pytest.importorskip("torchvision.models")
    relay = Relay(getattr(models, build)(num_classes=2), Plan())
    relay(torch.randn(2, 3, 32, 32))
    assert relay.depths == {"primary": depth}


def test_check_relay() -> None:
    PAPER.check_relay()
    FIGURE2.check_relay()
    Plan().check_relay()
    PAPER.multi_loss().check_relay()
    with pytest.raises(
        WindowError, match=r"window of 'primary' ends at .*below the head of 'aux', the output of layer3.3"
    ):
        PAPER.isolated().check_relay()
    with pytest.raises(WindowError, match="'loss2'"):
        Plan(FIGURE2.primary, FIGURE2.isolated().auxiliary).check_relay()
    with pytest.raises(WindowError):  # by names alone: modules of a container run in numeric order
        Plan(Window(bottom="features.16"), {"aux": Window(top="features.9")}).check_relay()
    Plan(Window(bottom="features.9"), {"aux": Window(top="features.16")}).check_relay()


def test_check_relay_uses_the_order_of_the_forward_pass() -> None:
    model = nn.Sequential()
    for name in ("zeta", "alpha", "mid"):
        model.add_module(name, nn.Linear(2, 2))
    plan = Plan(Window(bottom="mid"), {"aux": Window(top="zeta")})
    plan.check_relay()  # the names do not show it
    relay = Relay(model, plan, {"aux": nn.Linear(2, 2)})
    relay(torch.randn(1, 2))
    with pytest.raises(WindowError, match="ends at the input of mid"):
        relay.plan.check_relay(relay.order)


def test_check_relay_requires_a_complete_order() -> None:
    plan = Plan(Window(bottom="2"), {"aux": Window(top="1")})
    relay = Relay(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), plan, {"aux": nn.Linear(2, 2)})
    remedy = r"a forward pass in training mode records them\. Run relay\.train\(\)\(images\) with this plan first"
    with pytest.raises(PlanError, match=rf"the order of boundaries is empty: .*{remedy}"):
        relay.plan.check_relay(relay.order)
    relay.eval()(torch.randn(1, 2))
    with pytest.raises(PlanError, match="is empty"):
        relay.plan.check_relay(relay.order)
    relay.train()(torch.randn(1, 2))
    with pytest.raises(WindowError, match="ends at the input of 2"):
        relay.plan.check_relay(relay.order)
    relay.plan = Plan(Window(bottom="0"), plan.auxiliary)  # the order is still that of the old plan
    with pytest.raises(PlanError, match=rf"the order of boundaries does not include the input of 0: .*{remedy}"):
        relay.plan.check_relay(relay.order)
    relay(torch.randn(1, 2))
    relay.plan.check_relay(relay.order)
    Plan().check_relay(())  # no boundaries


def test_isolated_refuses_the_order_of_another_plan() -> None:
    plan = Plan(Window(bottom="2"), {"aux": Window(top="1")})
    relay = Relay(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), plan, {"aux": nn.Linear(2, 2)})
    relay(torch.randn(1, 2))
    other = Plan(Window(bottom="3"), {"aux": Window(top="2")})
    with pytest.raises(PlanError, match=r"does not include the output of 2: .*plan\.isolated\(relay\.order\)"):
        other.isolated(relay.order)
    assert plan.isolated(relay.order).primary.after == "1"


def test_isolated_without_an_order_uses_the_order_of_the_plan() -> None:
    """`auxiliary` lists the lowest head first, so an empty `Relay.order` gives the same plan."""
    relay = Relay(
        nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))),
        Plan(Window(bottom="1"), {"low": Window(top="0"), "high": Window(top="2", bottom="0")}),
        {"low": nn.Linear(2, 2), "high": nn.Linear(2, 2)},
    )
    before = relay.plan.isolated(relay.order)
    relay(torch.randn(1, 2))
    assert before == relay.plan.isolated(relay.order)
    assert before.windows["primary"].after == "2"


names = st.text(st.characters(codec="utf-8", exclude_characters=".", exclude_categories=["C"]), min_size=1, max_size=8)
weights = st.floats(1e-3, 1e3)


@st.composite
def windows(draw: st.DrawFn, top: bool) -> Window:
    end = draw(st.sampled_from(["bottom", "after", "several", None]))
    given = {} if end is None else {end: "low." + draw(names)}
    if end == "several":
        given = {"after": tuple("low." + name for name in draw(st.lists(names, min_size=1, max_size=3)))}
    return Window(top="top." + draw(names) if top else None, weight=draw(st.none() | weights), **given)


loss_names = names.filter(lambda name: name != PRIMARY and not hasattr(nn.ModuleDict(), name))
plans = st.builds(Plan, windows(top=False), st.dictionaries(loss_names, windows(top=True), max_size=4))


@given(plans)
def test_round_trips(plan: Plan) -> None:
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan


@given(plans)
def test_schemes_keep_heads_and_weights(plan: Plan) -> None:
    for scheme in (plan.multi_loss(), plan.isolated()):
        assert scheme.weights == plan.weights
        assert {name: w.top for name, w in scheme.windows.items()} == {name: w.top for name, w in plan.windows.items()}
    assert all(not window.ends for window in plan.multi_loss().windows.values())
    assert not plan.standard().auxiliary
