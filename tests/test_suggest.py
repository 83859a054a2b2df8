"""Chains and suggested plans: the paper's choices on its networks, and valid plans on others."""

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.networks import VGG22
from nets import CASES, make_case
from relaybackprop import LinearHead, Plan, Relay, Window, cost, reach, suggest_plan
from relaybackprop.engine.pytree import tensors_in
from relaybackprop.errors import AppliedTwiceError, BoundaryError, LeakError, PlanError, WindowError
from relaybackprop.planning.budget import Packing, balance
from relaybackprop.planning.chain import Link, chain
from relaybackprop.planning.suggest import Suggestion


def meta(build: Any, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


def mlp(layers: int = 8) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)) for _ in range(layers)))


def assert_trains(model: nn.Module, suggestion: Suggestion, *inputs: Any) -> Relay:
    """Run a step with linear heads of the suggested input shapes: no leak, no gap, and neighbours overlap."""
    heads = {
        name: nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 5, device=inputs[0].device))
        for name, shape in suggestion.head_inputs.items()
    }
    relay = Relay(model, suggestion.plan, {name: head.to(inputs[0].dtype) for name, head in heads.items()})
    output = relay(*inputs)
    relay.plan.check_relay(relay.order)
    torch.stack([t.sum() for t in tensors_in([output.primary, output.auxiliary])]).sum().backward()
    assert all(p.grad is not None for p in relay.parameters() if p.requires_grad)
    assert relay.depths == suggestion.depths
    return relay


# Chains.


class Skipped(nn.Module):
    """A stage with a shortcut around it, and an identity that both paths cross."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.same = nn.Identity()
        self.stage = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.stage(self.same(x)) + x)


class Views(nn.Module):
    """In-place activations, views, a module with many calls, and containers that return their last module's output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Sequential(nn.Conv2d(4, 4, 3)))
        self.act = nn.ReLU(inplace=True)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(16, 4)
        self.out = nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.out(self.act(self.fc(self.flatten(self.act(self.body(x)))))))


def test_links_are_exactly_the_possible_window_ends() -> None:
    """Test the definition: a window that ends at each module's output in turn."""
    result = {"link": 0, "leak": 0, "twice": 0, "beside": 0}
    models: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "skipped": (Skipped(), (torch.randn(2, 4),)),
        "views": (Views(), (torch.randn(2, 3, 6, 6),)),
    }
    models |= {name: (case.model, case.inputs) for name in CASES for case in [make_case(name)]}
    for model, inputs in models.values():
        model.train()
        names = {name for link in chain(model, inputs) for name in link.names}
        for name, module in model.named_modules():
            yields: list[Any] = []
            handle = module.register_forward_hook(lambda _m, _a, output, yields=yields: yields.append(output))
            model(*inputs)
            handle.remove()
            if not name or len(yields) == 0 or not isinstance(yields[0], Tensor):
                assert name not in names
                continue
            relay = Relay(model, Plan(Window(after=name)))
            if len(yields) > 1:
                error: Any = pytest.raises(BoundaryError)
                result["twice"] += 1
            elif name in names:
                relay(*inputs)
                result["link"] += 1
                continue
            # Nothing is below these outputs: no leak, but no bottleneck either. `shift` reads a parameter.
            elif name.startswith("0.branch") or name == "blocks.0.shift":
                relay(*inputs)
                result["beside"] += 1
                continue
            else:
                error = pytest.raises(LeakError)
                result["leak"] += 1
            with error:
                relay(*inputs)
            assert name not in names
    assert min(result.values()) > 0, "every case must occur"
    assert result["link"] > 30
    assert result["leak"] > 10


def test_links_of_a_chain_with_views_and_in_place_operations() -> None:
    links = chain(Views(), torch.randn(2, 3, 6, 6))
    assert links[:4] == (
        Link("body.0", ("body.0",), (2, 4, 4, 4), 1),
        Link("body.1", ("body.1",), (2, 4, 4, 4), 1),
        Link("body", ("body.2.0", "body.2", "body"), (2, 4, 2, 2), 2),
        Link("flatten", ("flatten",), (2, 16), 2),
    )
    # A last operation that is not a module (`act` runs three times) is a link without a name.
    assert [link.name for link in links[4:]] == ["fc", "out.0", "out", ""]
    assert links[-1] == Link("", (), (2, 4), 4)


def test_link_depths_equal_relay_depths() -> None:
    for name in ("vgg", "resnet", "inception"):
        case = make_case(name)
        for link in chain(case.model, case.inputs):
            if link.name:
                relay = Relay(case.model, Plan(auxiliary={"a": Window(top=link.name)}), {"a": nn.Flatten()})
                relay(*case.inputs)
                assert link.depth == relay.depths["a"], link


def test_parallel_towers_are_not_links() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.join, self.last = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            joined = self.join(self.left(left) + self.right(right))
            return {"scores": self.last(joined), "other": joined}

    links = chain(Towers(), (torch.randn(2, 4), torch.randn(2, 4)))
    assert [link.names for link in links] == [("join",), ()], "both outputs of the model are one last link"
    named = chain(Towers(), {"right": torch.randn(2, 4), "left": torch.randn(2, 4)})
    assert named == links


def test_frozen_layers_are_below_the_chain_and_tied_weights_count_where_they_are_used() -> None:
    model = mlp(4)
    model[0].requires_grad_(False)
    assert [(link.name, link.depth) for link in chain(model, torch.randn(2, 4))][1::2] == [("1", 1), ("2", 2), ("3", 3)]
    model = mlp(4)
    model[2][0].weight = model[0][0].weight
    assert chain(model, torch.randn(2, 4))[-1].depth == 4


def test_models_without_a_chain_raise() -> None:
    with pytest.raises(PlanError, match=r"(?s)Sequential has 1 module output that every path crosses.*by hand"):
        chain(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(PlanError, match="Sequential has 0 module outputs"):
        chain(mlp().requires_grad_(False), torch.randn(2, 4))
    with pytest.raises(PlanError, match="the model is a function"):
        chain(lambda x: x, torch.randn(2, 4))  # type: ignore[arg-type]


class LooksAtValues(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.sum() > 0 else input


def test_model_that_depends_on_values() -> None:
    with pytest.raises(PlanError, match=r"(?s)raised \w+Error \(.*on the meta device.*example input that fits"):
        suggest_plan(LooksAtValues(*mlp()), torch.randn(2, 4, device="meta"))
    result = suggest_plan(LooksAtValues(*mlp()), torch.ones(2, 4))
    assert result.plan == suggest_plan(mlp(), torch.ones(2, 4)).plan
    with pytest.raises(PlanError, match=r"raised RuntimeError \(.*Give an example input that fits the model"):
        suggest_plan(mlp(), torch.randn(2, 5))


# Suggestions.


def windows(suggestion: Suggestion) -> dict[str, tuple[str | None, str | None]]:
    return {name: (window.top, window.after) for name, window in suggestion.plan.windows.items()}


def depths(suggestion: Suggestion) -> list[int]:
    return list(suggestion.depths.values())


def test_papers_model_a() -> None:
    """Table 2: the head after segment 4, and the primary loss down to segment 4."""
    model = VGG22(2, 32, 5).double()
    suggestion = suggest_plan(model, torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    assert windows(suggestion) == {"primary": (None, "segment3"), "aux": ("segment4", None)}
    assert depths(suggestion) == [5 + 5 + 3, 2 + 2 + 5 + 5]
    assert suggestion.head_inputs == {"aux": (2, 16, 2, 2)}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    relay = Relay(model, suggestion.plan, {"aux": LinearHead(16, 5).double()})
    assert relay(images).auxiliary["aux"].shape == (2, 5)
    assert_trains(model, suggestion, images)


def test_figure_2() -> None:
    """VGGNet-19 with two heads: segments 1 to 3, 3 to 4 and 4 to 5."""
    model = meta(pytest.importorskip("torchvision.models").vgg19, init_weights=False)
    images = torch.zeros(2, 3, 224, 224, device="meta")
    suggestion = suggest_plan(model, images, num_auxiliary=2)
    assert windows(suggestion) == {
        "primary": (None, "features.18"),
        "aux1": ("features.18", None),
        "aux2": ("features.27", "features.9"),
    }
    assert depths(suggestion) == [4 + 4 + 3, 2 + 2 + 4, 4 + 4]
    assert suggestion.head_inputs == {"aux1": (2, 256, 28, 28), "aux2": (2, 512, 14, 14)}
    relay = assert_trains(model, suggestion, images)
    layers = {
        loss: {n.split(".")[2] for n in names if "model.features" in n}
        for loss, names in reach(relay, images).losses.items()
    }
    convolutions = [name for name, m in model.features.named_children() if isinstance(m, nn.Conv2d)]
    first, second, third, fourth = convolutions[:4], convolutions[4:8], convolutions[8:12], convolutions[12:]
    assert layers == {
        "primary": {*third, *fourth},
        "aux1": {*first, *second},
        "aux2": {*second, *third},
    }


@pytest.mark.parametrize(
    ("build", "pixels", "heads", "expected", "deepest"),
    [
        # Section 5.2: conv4.1 to conv4.4 of conv4.1 to conv4.6 are shared; here the whole stage is.
        ("resnet50", 224, 1, {"primary": (None, "layer2"), "aux": ("layer3", None)}, 40),
        # The same for inception4a to 4d; torchvision calls the stage Mixed_6a to Mixed_6e.
        ("inception_v3", 299, 1, {"primary": (None, "Mixed_5d"), "aux": ("Mixed_6e", None)}, 37),
        (
            "vit_b_16",
            224,
            1,
            {
                "primary": (None, "encoder.layers.encoder_layer_5"),
                "aux": ("encoder.layers.encoder_layer_8", None),
            },
            37,
        ),
        # A normalisation at the start of the next stage's downsampling is not the end of a stage.
        ("convnext_tiny", 224, 1, {"primary": (None, "features.3"), "aux": ("features.5", None)}, 48),
        ("vgg19", 224, 1, {"primary": (None, "features.18"), "aux": ("features.27", None)}, 12),
    ],
)
def test_known_networks(build: str, pixels: int, heads: int, expected: dict[str, Any], deepest: int) -> None:
    models = pytest.importorskip("torchvision.models")
    arguments = {"aux_logits": False, "init_weights": False} if build == "inception_v3" else {}
    model = meta(getattr(models, build), **arguments)
    images = torch.zeros(2, 3, pixels, pixels, device="meta")
    suggestion = suggest_plan(model, images, heads)
    assert windows(suggestion) == expected
    assert max(depths(suggestion)) == deepest
    assert_trains(model, suggestion, images)


def test_ties_are_explained() -> None:
    model = meta(pytest.importorskip("torchvision.models").resnet50)
    (tie,) = [reason for reason in suggest_plan(model, torch.zeros(2, 3, 64, 64)).reasons if "equally deep" in reason]
    assert tie == (
        "With the head after layer2, the deepest window would be equally deep; ties go to the higher head, whose "
        "features are closer to the output."
    )


def test_plain_mlp_has_five_segments() -> None:
    model, rows = mlp().double(), torch.randn(3, 4, dtype=torch.float64)
    suggestion = suggest_plan(model, rows)
    assert windows(suggestion) == {"primary": (None, "3"), "aux": ("5", None)}, "layers 1 | 1 | 2 | 2 | 2"
    assert depths(suggestion) == [4, 6]
    assert_trains(model, suggestion, rows)
    two = suggest_plan(model, rows, 2)
    assert max(depths(two)) == 4
    assert_trains(model, two, rows)


def test_no_places_inside_a_stage_with_a_shortcut() -> None:
    model = nn.Sequential(nn.Linear(4, 4), *(Skipped() for _ in range(4)), nn.Linear(4, 4)).double()
    rows = torch.randn(2, 4, dtype=torch.float64)
    suggestion = suggest_plan(model, rows)
    names = [name for pair in windows(suggestion).values() for name in pair if name is not None]
    assert names
    assert not [name for name in names if ".stage" in name or ".same" in name]
    assert_trains(model, suggestion, rows)


def test_heads_are_above_the_lowest_third() -> None:
    """Most layers are in the last stage. The balanced place would be after the first two of 12 layers."""

    def stage(channels: int, out: int, layers: int) -> nn.Sequential:
        convs = [nn.Conv2d(channels if n == 0 else out, out, 3, padding=1) for n in range(layers)]
        return nn.Sequential(*convs, nn.MaxPool2d(2))

    model = nn.Sequential(stage(3, 4, 1), stage(4, 4, 2), stage(4, 4, 9)).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    suggestion = suggest_plan(model, images)
    relay = assert_trains(model, suggestion, images)
    assert any("halved" in reason for reason in suggestion.reasons), "the stages alone have only a low place"
    (top,) = [window.top for window in relay.plan.auxiliary.values()]
    assert top is not None
    assert top.startswith("2.")
    high = suggest_plan(nn.Sequential(stage(3, 4, 2), stage(4, 4, 2), stage(4, 4, 8)).double(), images)
    assert windows(high)["aux"] == ("1", None), "exactly a third is allowed"


def test_max_layers() -> None:
    rows = torch.randn(2, 4)
    assert depths(suggest_plan(mlp(), rows, max_layers=6)) == [4, 6]
    assert "The deepest window is within max_layers=6." in suggest_plan(mlp(), rows, max_layers=6).reasons
    with pytest.raises(WindowError, match=r"has 6 .*num_auxiliary=1.*at most max_layers=5.*num_auxiliary=2, the"):
        suggest_plan(mlp(), rows, max_layers=5)
    assert max(depths(suggest_plan(mlp(), rows, 2, max_layers=5))) <= 5, "the remedy works"
    with pytest.raises(WindowError, match=r"No number of heads suffices; this model's smallest max_layers is 3"):
        suggest_plan(mlp(), rows, max_layers=2)
    assert min(max(depths(suggest_plan(mlp(), rows, k))) for k in range(1, 6)) == 3, "and is the minimum"


def test_too_many_heads() -> None:
    with pytest.raises(
        WindowError, match=r"only 5 valid head positions; num_auxiliary=9 was requested.* Pass num_auxiliary=5"
    ):
        suggest_plan(mlp(), torch.randn(2, 4), 9)
    assert len(suggest_plan(mlp(), torch.randn(2, 4), 5).plan.auxiliary) == 5
    with pytest.raises(
        WindowError, match=r"only 0 valid head positions.* Use standard backpropagation, or write a Plan"
    ):
        suggest_plan(mlp(2), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_auxiliary": 0}, "num_auxiliary=0"),
        ({"num_auxiliary": True}, "num_auxiliary=True"),
        ({"num_auxiliary": 1.0}, "num_auxiliary=1.0"),
        ({"max_layers": 0}, "max_layers=0"),
        ({"max_layers": False}, "max_layers=False"),
    ],
)
def test_invalid_numbers_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(
        PlanError, match=f"{message} is invalid: it must be an integer of at least 1. Pass an integer, such"
    ):
        suggest_plan(mlp(), torch.randn(2, 4), **arguments)


def test_relay_as_model_raises() -> None:
    with pytest.raises((PlanError, AppliedTwiceError)):
        suggest_plan(Relay(mlp(), Plan()), torch.randn(2, 4))


def test_str_has_plan_and_reasons() -> None:
    suggestion = suggest_plan(mlp(), torch.randn(2, 4))
    assert str(suggestion).splitlines() == [
        "loss     weight  from                down to          depth",
        "primary  1       the model's output  output of 3      4",
        "aux      0.3     output of 5         the first layer  6",
        "",
        "1. The 8 weight layers form 1 segment of equal map size; pooling ends a segment, and the classifier belongs "
        "to the last one.",
        "2. There are too few positions for heads, so the longest segments were halved, giving 5.",
        "3. From lowest to highest, the segments have 1, 1, 2, 2 and 2 weight layers.",
        "4. A head may read the end of a segment, except the first and the last, above the lowest third of the "
        "layers (the paper's lowest is after 8 of 19): after 3 (4) and 5 (6).",
        "5. With the head after 5, the deepest window has 6 weight layers, the minimum over these positions.",
        "6. With the head after 3, the deepest window would be equally deep; ties go to the higher head, whose "
        "features are closer to the output.",
        "7. Neighbouring windows overlap over the whole segment below the lower head: 2 layers up to 5.",
        "8. The head aux reads (2, 4).",
    ]


class Drawing(nn.Module):
    """Draws a random number and modifies a buffer and an argument in each forward pass; has a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("count", torch.zeros(()))
        self.scale = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = self.norm(x.mul_(self.scale) + torch.rand(1))
        return self.body(x) * torch.arange(4)


def test_model_does_not_change_even_on_failure() -> None:
    model, rows = Drawing(), torch.randn(3, 4)
    model.body[1].eval()
    model.body[0][0].weight.grad = torch.ones(4, 4)
    before, given, random = copy.deepcopy(model), rows.clone(), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    suggest_plan(model, rows)
    with pytest.raises(PlanError):
        suggest_plan(model, torch.randn(3, 5))
    torch.set_rng_state(random)  # undo the draw of the line above
    suggest_plan(model, rows)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(rows, given)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is grad for p, grad in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(model.body[0][0].weight.grad, torch.ones(4, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Within a memory budget.


def wide_mlp(layers: int = 12) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(layers)), nn.Linear(32, 5))


def test_windows_fit_the_memory_budget_with_the_fewest_heads() -> None:
    model, rows = wide_mlp(), torch.zeros(512, 32)
    standard = cost(model, Plan(), rows).peaks["standard"]
    heads: list[int] = []
    for part in (0.9, 0.78, 0.71, 0.64):
        budget = int(part * standard)
        result = suggest_plan(model, rows, memory_budget=budget)
        assert cost(model, result.plan, rows).peaks["early_release"] <= budget
        heads.append(len(result.plan.auxiliary))
        assert_trains(model, result, rows)
        assert "that fits the budget: a step then peaks at" in result.reasons[1]
    assert heads == sorted(heads)
    assert heads[0] == 1 < heads[-1]


def test_too_small_budget_error_states_the_smallest_peak() -> None:
    model, rows = wide_mlp(), torch.zeros(512, 32)
    with pytest.raises(WindowError, match=r"memory_budget=1,000 bytes") as caught:
        suggest_plan(model, rows, memory_budget=1000)
    least = int(re.findall(r"is ([\d,]+) bytes\.", str(caught.value))[0].replace(",", ""))
    assert 1000 < least
    with pytest.raises(PlanError, match=r"memory_budget"):
        suggest_plan(model, rows, memory_budget=0)


def test_budget_with_a_depth_limit() -> None:
    model, rows = wide_mlp(), torch.zeros(512, 32)
    budget = int(0.8 * cost(model, Plan(), rows).peaks["standard"])
    with pytest.raises(WindowError, match=r"max_layers=2"):
        suggest_plan(model, rows, max_layers=2, memory_budget=budget)
    result = suggest_plan(model, rows, max_layers=12, memory_budget=budget)
    assert max(result.depths.values()) <= 12  # pyright: ignore


def test_balanced_windows_by_hand() -> None:
    links = [Link(f"{n}", (f"{n}",), (2, 4), n + 1) for n in range(6)]
    assert balance(links, [1] * 6, 1, 1) == Packing((3,), 1)  # four links and three, one of them shared
    assert balance(links, [1] * 6, 1, 2) == Packing((3,), 2)  # four and four
    assert balance(links, [10, 1, 1, 1, 1, 1], 1, 1) == Packing((1,), 1)  # most saved bytes are at the bottom
    assert balance(links, [1] * 6, 2, 1) is not None
    assert balance(links, [1] * 6, 6, 1) is None
    maps = [Link(f"{n}", (f"{n}",), (2, 4, *((4, 4) if n < 3 else (1, 1))), n + 1) for n in range(6)]
    result = balance(maps, [1] * 6, 1, 1)
    assert result is not None
    assert max(result.tops) < 3, "no head within a classifier"
