"""The memory benchmarks report measured values, and `cost` predicts them."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision", reason="needs torchvision")

from torchvision.models import VisionTransformer, resnet50

from benchmarks import depth, formulations, memory
from benchmarks.measure import count_bytes, peak_bytes, saved_bytes
from relaybackprop import LinearHead, Plan, Relay, RelayLoss, Window, cost

FLOATS = 4  # bytes


def test_peak_bytes_equal_the_allocators_count() -> None:
    def step() -> None:
        one = torch.ones(1000, 1000)
        two = one + 1
        del one
        two += 1

    assert peak_bytes(step) == pytest.approx(2 * FLOATS * 10**6, rel=1e-3)
    assert count_bytes(step, []) == pytest.approx(2 * FLOATS * 10**6, rel=1e-3)
    assert count_bytes(lambda: torch.ones(1000) + 1, []) < 3 * FLOATS * 10**3


def test_saved_bytes_are_those_of_saved_tensors() -> None:
    x = torch.randn(100, 10, requires_grad=True)
    assert saved_bytes(lambda: x.exp().exp().sum().backward(), [x]) == 2 * FLOATS * 1000
    assert saved_bytes(lambda: (x * x).sum().backward(), [x]) == 0


def networks() -> dict[str, tuple[nn.Module, Plan, dict[str, nn.Module], torch.Tensor]]:
    at = "encoder.layers.encoder_layer_{}".format
    vit_plan = Plan(Window(bottom=at(3)), {"low": Window(top=at(1)), "high": Window(top=at(3), bottom=at(1))})
    resnet_plan = Plan(
        Window(bottom="layer2.1"), {"low": Window(top="layer1.1"), "high": Window(top="layer2.1", bottom="layer1.1")}
    )
    return {
        "resnet": (
            resnet50(num_classes=10),
            resnet_plan,
            {"low": LinearHead(256, 10), "high": LinearHead(512, 10)},
            torch.randn(2, 3, 224, 224),
        ),
        "vit": (
            VisionTransformer(64, 8, 6, 4, 64, 128, num_classes=10),
            vit_plan,
            {"low": depth.MeanTokenHead(64), "high": depth.MeanTokenHead(64)},
            torch.randn(16, 3, 64, 64),
        ),
    }


@pytest.mark.parametrize("name", [pytest.param("resnet", marks=pytest.mark.slow), "vit"])
def test_cost_predicts_the_peak_within_ten_per_cent(name: str) -> None:
    """Images have the usual size. With small ones, workspaces of convolutions, which are not predicted, dominate."""
    model, plan, heads, images = networks()[name]
    if name == "vit":
        for head in heads.values():
            head.fc = nn.Linear(64, 10)
    relay, loss = Relay(model, plan, heads), RelayLoss(nn.CrossEntropyLoss())
    labels = torch.randint(10, (len(images),))
    for parameter in relay.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def standard() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()

    def early_release() -> None:
        relay.forward_backward(images, target=labels, loss=loss)

    predicted = cost(model, plan, images, heads).peaks
    measured: dict[str, int] = {}
    for step in (standard, early_release):
        step()
        measured[step.__name__] = peak_bytes(step)
        assert abs(predicted[step.__name__] / measured[step.__name__] - 1) <= 0.1, (step.__name__, predicted, measured)
    assert measured["early_release"] < 0.75 * measured["standard"]


TINY = memory.Settings(pixels=32, resnet50_batch=2, vit_b_batch=1, rounds=2, budget_s=0)


@pytest.mark.slow
def test_memory_benchmark_returns_its_metrics() -> None:
    workload = memory.resnet50(32, 2, classes=5)
    metrics = memory.measure_network("resnet50", workload, TINY)
    assert 0 < metrics["resnet50_two_branches_activation_ratio"] < 0.7
    assert metrics["resnet50_peak_mb_checkpoint_equal"] <= metrics["resnet50_peak_mb_standard"]
    assert {"resnet50_time_early_release_over_checkpoint_equal", "resnet50_flops_early_release"} <= metrics.keys()


def test_memory_benchmark_raises_for_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = memory.resnet50(32, 2, classes=5)
    monkeypatch.setattr(memory, "contenders", lambda workload: _swapped(workload))
    with pytest.raises(RuntimeError, match=r"early_release and relay differ"):
        memory.check_gradients(workload)


CONTENDERS = memory.contenders


def _swapped(workload: memory.Workload) -> dict[str, memory.Step]:
    steps = CONTENDERS(workload)
    return steps | {"early_release": steps["multi_loss"]}


@pytest.mark.slow
def test_depth_benchmark_stays_within_the_budget() -> None:
    settings = depth.Settings(depths=(1, 2), pixels=64, batch=16, rounds=2, budget_s=0)
    measured, budget = depth.measure_depth("vit", depth.vision_transformer, 1, settings, "cpu", None)
    deeper, _ = depth.measure_depth("vit", depth.vision_transformer, 2, settings, "cpu", budget)
    assert deeper["vit_x2_branches"] > measured["vit_x1_branches"]
    assert deeper["vit_x2_peak_mb_early_release"] <= 1.2 * measured["vit_x1_peak_mb_early_release"]
    assert deeper["vit_x2_peak_mb_standard"] > 1.4 * measured["vit_x1_peak_mb_standard"]


def test_formulations_are_counted_at_the_papers_size() -> None:
    metrics = formulations.count(formulations.places_b)
    assert metrics["flops_standard"] == metrics["peak_standard"] == 1
    assert metrics["flops_early_release"] == pytest.approx(metrics["flops_lower_bound"], rel=1e-12)
    order = ["standard", "multi_loss", "early_release", "relay", "two_backward", "overlap_twice", "reference"]
    costs = [metrics[f"flops_{name}"] for name in order]
    assert costs == sorted(costs)
    assert metrics["peak_early_release"] < 0.7
