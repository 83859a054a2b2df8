"""What a plan costs: by hand on small networks, and against the benchmarks' own count on the paper's."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import engine
from benchmarks.measure import count_flops
from benchmarks.networks import Subject, resnet50, vgg22
from nets import make_case
from relaybackprop import LinearHead, Plan, Relay, Window, cost
from relaybackprop.engine.pytree import tensors_in
from relaybackprop.errors import BoundaryError, HeadError, LeakError, ModuleNameError, PlanError
from relaybackprop.planning.chain import StandIn, total
from relaybackprop.planning.cost import Cost
from relaybackprop.planning.profile import Spent

SCHEMES = ["standard", "multi_loss", "isolated", "relay", "early_release"]


def mlp(inplace: bool = False) -> nn.Sequential:
    """Layers of 4 x 6, 6 x 5 and 5 x 3; one pass over two rows costs 2 * 2 * 4 * 6 = 96, 120 and 60."""
    layers = [nn.Linear(4, 6), nn.ReLU(inplace), nn.Linear(6, 5), nn.ReLU(inplace), nn.Linear(5, 3)]
    return nn.Sequential(*layers)


PLAN = Plan(Window(after="1"), {"aux": Window(top="3")})
ROWS = torch.zeros(2, 4)


def spent(found: Cost, scheme: str) -> list[Spent]:
    return [part.schemes[scheme] for part in found.parts]


def test_an_mlp_by_hand() -> None:
    found = cost(mlp(), PLAN, ROWS, {"aux": nn.Linear(5, 3)})
    assert [part.name for part in found.parts] == [
        "up to output of 1",
        "up to output of 3",
        "up to the model's output",
        "head aux",
    ]
    assert [part.parameters for part in found.parts] == [4 * 6 + 6, 6 * 5 + 5, 5 * 3 + 3, 5 * 3 + 3]
    assert list(found.totals) == SCHEMES
    # Saved, in float32: the rows (2 x 4) and what the first ReLU gives (2 x 6), which the next layer saves as well;
    # the second ReLU's output (2 x 5), which the last layer and the head save as well.
    low, top = Spent(96, 96, 4 * (2 * 4 + 2 * 6)), Spent(60, 120, 0)  # nobody asks for the rows' gradient
    middle = Spent(120, 2 * 120, 4 * 2 * 5)
    assert spent(found, "standard") == [low, middle, top, Spent()]
    head = Spent(60, 120, 4 * 2 * 5)  # its input is a copy
    assert spent(found, "multi_loss") == [low, middle, top, head]
    assert spent(found, "isolated") == [low, middle, top, head]
    # The auxiliary loss's gradient goes through the overlap in a lane, one more input-gradient pass ...
    assert spent(found, "relay") == [low, Spent(120, 3 * 120, 4 * 2 * 5), top, head]
    # With early release the graph ends there, so that nothing is computed to be dropped ...
    assert spent(found, "early_release") == [low, Spent(120, 2 * 120, 4 * 2 * 5), top, Spent(60, 120)]
    # ... and in one pass over everything the sum's own input gradient is dropped there: one layer, so all of it.
    assert [part.lower_bound for part in found.parts] == [192, 120 + 2 * 120, 180, 180]
    assert found.lower_bound == 192 + 360 + 180 + 180
    standard = 192 + 360 + 180
    assert found.ratios == {
        "standard": 1.0,
        "multi_loss": (standard + 180) / standard,
        "isolated": (standard + 180) / standard,
        "relay": (standard + 180 + 120) / standard,
        "early_release": (standard + 180) / standard,
        "lower_bound": (standard + 180) / standard,
    }


def test_stand_ins_cost_nothing() -> None:
    found = cost(mlp(), PLAN, ROWS)
    assert [part.name for part in found.parts] == ["up to output of 1", "up to output of 3", "up to the model's output"]
    assert found.totals["multi_loss"] == found.totals["standard"]
    assert found.totals["relay"].flops == found.totals["standard"].flops + 120


def test_a_copy_for_a_head_counts() -> None:
    """The layers after the boundary, or the head, may continue in place: the head keeps its own 2 x 5 numbers."""
    plan = Plan(Window(after="0"), {"aux": Window(top="2")})
    heads = {"aux": nn.Linear(5, 3)}
    assert spent(cost(mlp(inplace=True), plan, ROWS, heads), "relay")[-1].saved == 4 * 2 * 5
    assert spent(cost(mlp(), plan, ROWS, heads), "relay")[-1].saved == 4 * 2 * 5


def test_convolutions_by_hand() -> None:
    convs = [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1, stride=2)]
    model = nn.Sequential(*convs, nn.Flatten(), nn.Linear(5 * 3 * 3, 2))
    plan = Plan(Window(bottom="1"), {"aux": Window(top="2")})
    found = cost(model, plan, torch.zeros(2, 3, 6, 6), {"aux": LinearHead(5, 2)})
    first, second, third = (2 * 2 * out * area * 9 * k for k, out, area in ((3, 4, 36), (4, 4, 36), (4, 5, 9)))
    fc, head = 2 * 2 * 45 * 2, 2 * 2 * 5 * 2
    assert [part.schemes["relay"].forward for part in found.parts] == [first, second + third, fc, head]
    assert [part.schemes["relay"].backward for part in found.parts] == [
        first,
        3 * (second + third),
        2 * fc,
        2 * head,
    ]
    assert found.totals["relay"].flops - found.lower_bound == second, "the layer at the end of the primary window"
    # Each convolution saves what comes in, the classifier the same memory as a view, and the head its 2 x 5 means.
    sizes = [4 * 2 * 3 * 36, 4 * 2 * 4 * 36 * 2, 4 * 2 * 5 * 9, 4 * 2 * 5]
    assert [part.schemes["relay"].saved for part in found.parts] == sizes


@pytest.fixture(scope="module")
def counted() -> Callable[[str], tuple[Subject, Cost]]:
    """The cost of a network of the benchmarks, counted once."""

    @functools.cache
    def count(name: str) -> tuple[Subject, Cost]:
        pytest.importorskip("torchvision")
        subject = resnet50(224, 1, device="meta") if name == "resnet50" else vgg22(4, 64, 2, device="meta")
        return subject, cost(subject.model, subject.plan, subject.images, {"aux": subject.head})

    return count


@pytest.mark.parametrize("name", ["resnet50", "vgg22"])
def test_agrees_with_the_benchmark_which_cuts_the_network_by_hand(
    name: str, counted: Callable[[str], tuple[Subject, Cost]]
) -> None:
    subject, found = counted(name)
    counts = engine.flops(subject, ["standard", "multi_loss", "relay"])
    totals = {name: spent.flops for name, spent in found.totals.items()}
    assert {name: totals[name] for name in ("standard", "multi_loss", "relay")} | {
        "lower_bound": found.lower_bound
    } == counts
    assert totals["isolated"] == totals["multi_loss"], "each layer is passed once"
    assert counts["multi_loss"] < counts["lower_bound"] < counts["relay"]


def test_resnet50_costs_what_the_method_says(counted: Callable[[str], tuple[Subject, Cost]]) -> None:
    """docs/method/index.md: 1.086 and 1.069, at 224 pixels."""
    subject, found = counted("resnet50")
    assert found.ratios["relay"] == pytest.approx(1.0859, abs=1e-4)
    assert found.ratios["lower_bound"] == pytest.approx(1.0690, abs=1e-4)
    assert sum(part.parameters for part in found.parts) == sum(p.numel() for p in subject.parameters)
    assert found.totals["relay"].saved / found.totals["standard"].saved == pytest.approx(1.01, abs=2e-3)


@pytest.mark.parametrize("name", ["vgg", "resnet", "inception", "transformer"])
def test_parts_add_up_to_a_real_step(name: str) -> None:
    """Totals against steps on the CPU, not split up, with everything that the engine does."""
    case = make_case(name)
    found = cost(case.model, case.plan, case.inputs, case.heads)
    schemes = {"standard": case.plan.standard(), "multi_loss": case.plan.multi_loss(), "relay": case.plan}
    for scheme, plan in schemes.items():
        heads = {} if scheme == "standard" else case.heads
        relay = Relay(case.model.train(), plan, heads)

        def step(relay: Relay = relay) -> None:
            total(tensors_in(list(relay(*case.inputs)))).backward()

        step()
        assert found.totals[scheme].flops == count_flops(step) > 0
    assert found.lower_bound < found.totals["relay"].flops


def test_saved_bytes_are_those_of_a_real_step() -> None:
    case = make_case("vgg")
    relay = Relay(case.model, case.plan, case.heads)
    relay(*case.inputs)
    owned = {p.untyped_storage().data_ptr() for p in relay.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        relay(*case.inputs)
    real = sum(storage.nbytes() for address, storage in kept.items() if address not in owned)
    assert cost(case.model, case.plan, case.inputs, case.heads).totals["relay"].saved == real > 0


def test_three_windows_by_the_equation() -> None:
    """Figure 2 in small: in each overlap G is 2, so each costs one more input-gradient pass: W + G*D."""
    case = make_case("vgg")
    found = {part.name: part for part in cost(case.model, case.plan, case.inputs, case.heads).parts}
    extra = {name: p.schemes["relay"].flops - p.schemes["multi_loss"].flops for name, p in found.items()}
    # By segment, pixels of the map, and channels in and out.
    batch, area, channels = 3, {3: 4 * 4, 4: 2 * 2}, {3: (6, 6), 4: (6, 8)}
    one_pass = {n: 2 * batch * area[n] * 9 * (low * high + high * high) for n, (low, high) in channels.items()}
    assert extra.pop("up to output of segment3") == one_pass[3]
    assert extra.pop("up to output of segment4") == one_pass[4]
    assert not any(extra.values())
    dropped = {name: p.schemes["relay"].flops - p.lower_bound for name, p in found.items()}
    low, high = channels[3]
    assert dropped.pop("up to output of segment3") == 2 * batch * area[3] * 9 * low * high
    low, high = channels[4]
    assert dropped.pop("up to output of segment4") == 2 * batch * area[4] * 9 * low * high
    assert not any(dropped.values())


def test_a_gap_between_windows_has_no_backward_pass() -> None:
    plan = Plan(Window(after="3"), {"aux": Window(top="1")})
    low, gap, high = cost(mlp(), plan, ROWS).parts
    assert (low.schemes["relay"].backward, high.schemes["relay"].backward) == (96, 2 * 60)  # half of it is dropped
    assert gap.schemes["relay"] == Spent(120, 0, 4 * 2 * 5)
    assert gap.schemes["standard"].backward == gap.schemes["isolated"].backward == 240
    assert (low.lower_bound, gap.lower_bound, high.lower_bound) == (192, 120, 60 + 60)


def test_a_primary_window_alone() -> None:
    found = cost(mlp(), Plan(Window(after="1")), ROWS)
    assert [part.schemes["relay"].backward for part in found.parts] == [0, 2 * 180]
    assert [part.lower_bound for part in found.parts] == [96, 180 + 120 + 120], "the lowest layer gives no gradient on"


def test_frozen_layers() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    low, middle, _top = cost(model, PLAN, ROWS).parts
    assert low == type(low)("up to output of 1", 0, dict.fromkeys(SCHEMES, Spent(96, 0, 0)), 96)
    assert middle.schemes["relay"].backward == 120, "nothing below wants a gradient, so no lane either"
    assert middle.lower_bound == 240


def test_tied_weights_count_once_and_in_the_lowest_part() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    model[3].weight = model[0].weight
    found = cost(model, Plan(Window(after="0"), {"aux": Window(top="2")}), ROWS)
    assert [part.parameters for part in found.parts] == [16, 32, 0]


def test_checkpointing_costs_a_second_forward_and_keeps_less() -> None:
    class Recomputed(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            self.low, self.body, self.reentrant = nn.Linear(4, 4), mlp(), reentrant

        def forward(self, x: Tensor) -> Tensor:
            x = self.low(x)
            return self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)

    plan = Plan(auxiliary={"aux": Window(top="low")})
    plain, lazy, old = (cost(Recomputed(how), plan, ROWS).parts for how in (None, False, True))
    assert plain[1].schemes["relay"].backward == 2 * (96 + 120 + 60)
    assert lazy[1].schemes["relay"].backward == 2 * (96 + 120 + 60) + (96 + 120)  # stops when all is there again
    assert old[1].schemes["relay"].backward == 3 * (96 + 120 + 60)
    assert lazy[0].schemes["relay"].flops == old[0].schemes["relay"].flops == plain[0].schemes["relay"].flops
    assert lazy[1].schemes["relay"].saved < plain[1].schemes["relay"].saved


def test_a_head_on_a_branch_has_no_isolated_scheme() -> None:
    case = make_case("resnet")
    found = cost(case.model, case.plan, case.inputs, case.heads)
    assert list(found.totals) == list(found.peaks) == [scheme for scheme in SCHEMES if scheme != "isolated"]


def test_one_module_as_two_heads() -> None:
    head = nn.Linear(4, 2)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    plan = Plan(auxiliary={"low": Window(top="0"), "high": Window(top="1")})
    found = {part.name: part for part in cost(model, plan, ROWS, {"low": head, "high": head}).parts}
    assert found["head low"].schemes["relay"].flops == found["head high"].schemes["relay"].flops == 3 * 2 * 2 * 4 * 2
    assert (found["head low"].parameters, found["head high"].parameters) == (10, 0)


def test_no_auxiliary_loss() -> None:
    found = cost(mlp(), Plan(), ROWS)
    (part,) = found.parts
    assert part.schemes == {"standard": Spent(96 + 120 + 60, 96 + 240 + 120, 4 * 2 * (4 + 6 + 5))}
    assert found.lower_bound == found.totals["standard"].flops == 276 + 456
    assert found.ratios == {"standard": 1.0, "lower_bound": 1.0}
    assert str(found).splitlines()[0].split("  ")[-2:] == ["standard", "lower_bound"]


PRINTED = """\
FLOPs of a step           parameters  saved B  standard  multi_loss  isolated    relay  early_release  lower_bound
up to output of 1                 30    80.00    192.00      192.00    192.00   192.00         192.00       192.00
up to output of 3                 35    40.00    360.00      360.00    360.00   480.00         360.00       360.00
up to the model's output          18     0.00    180.00      180.00    180.00   180.00         180.00       180.00
head aux                          18    40.00      0.00      180.00    180.00   180.00         180.00       180.00
sum                              101   160.00    732.00      912.00    912.00  1032.00         912.00       912.00
of standard                             1.333     1.000       1.246     1.246    1.410          1.246        1.246
peak B                                           308.00      332.00    332.00   380.00         412.00
of standard                                       1.000       1.078     1.078    1.234          1.338
"""


def test_printed() -> None:
    lines = str(cost(mlp(), PLAN, ROWS, {"aux": nn.Linear(5, 3)})).splitlines()
    assert [line.rstrip() for line in lines] == PRINTED.splitlines()


def test_the_table_fits_a_page() -> None:
    long = nn.Sequential()
    long.add_module("a" * 90, nn.Linear(4, 4))
    long.add_module("b" * 90, nn.Linear(4, 4))
    wide = 10**8  # no memory is needed
    with torch.device("meta"):
        long.append(nn.Linear(4, wide))
    text = str(cost(long, Plan(auxiliary={"aux": Window(top="a" * 90)}), torch.zeros(4096, 4)))
    assert max(map(len, text.splitlines())) <= 120
    assert "up to ..." in text


def test_wrong_arguments() -> None:
    with pytest.raises(PlanError, match="a model and a plan, in this order"):
        cost(mlp(), "plan", ROWS)  # type: ignore[arg-type]
    with pytest.raises(HeadError, match="without a head"):
        cost(mlp(), PLAN, ROWS, {})
    with pytest.raises(ModuleNameError, match="'9'"):
        cost(mlp(), Plan(Window(after="9")), ROWS)
    with pytest.raises(PlanError, match=r"RuntimeError: .*in the head 'aux'"):
        cost(mlp(), PLAN, ROWS, {"aux": nn.Linear(7, 3)})
    with pytest.raises(PlanError, match="on the meta device"):
        cost(mlp(), PLAN, torch.zeros(2, 3))


def test_errors_of_relay_come_through() -> None:
    case = make_case("resnet")
    with pytest.raises(LeakError):
        cost(case.model, Plan(Window(after="blocks.2.conv2")), case.inputs)
    shared = nn.ReLU()
    with pytest.raises(BoundaryError, match="a second time"):
        cost(nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared), Plan(Window(after="1")), ROWS)


def test_the_model_is_left_alone_also_when_it_fails() -> None:
    model = nn.Sequential(*mlp(), nn.BatchNorm1d(3), nn.Dropout(0.5))
    head, rows = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), torch.randn(2, 4)
    model[3].eval()
    model[0].weight.grad = torch.ones(6, 4)
    both = nn.ModuleList([model, head])
    before, random = copy.deepcopy(both.state_dict()), torch.get_rng_state()
    modes = [module.training for module in both.modules()]
    cost(model, PLAN, rows, {"aux": head})
    with pytest.raises(PlanError):
        cost(model, PLAN, rows, {"aux": nn.Sequential(head, nn.Linear(9, 1))})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in both.modules())
    assert not torch.equal(torch.get_rng_state(), random), "two heads were built since"
    random = torch.get_rng_state()
    cost(model, PLAN, rows, {"aux": head})
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in both.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [module.training for module in both.modules()] == modes
    assert [name for name, p in both.named_parameters() if p.grad is not None] == ["0.0.weight"]
    assert all(p.device.type == "cpu" for p in both.parameters())


def test_random_generators_are_as_before() -> None:
    class Draws(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input * torch.rand((), device="cpu").item())

    state = torch.get_rng_state()
    Draws()(ROWS)
    assert not torch.equal(torch.get_rng_state(), state), "it does draw"
    model = Draws(*mlp())
    state = torch.get_rng_state()
    cost(model, PLAN, ROWS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stand_in_reads_everything() -> None:
    state = {"tokens": torch.ones(2, 3, requires_grad=True), "mask": torch.ones(2, dtype=torch.bool)}
    assert StandIn()(state).item() == 6
