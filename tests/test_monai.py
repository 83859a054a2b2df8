"""The example for MONAI: deep supervision on a U-Net, through a window with several ends."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import assert_same, gradients_of
from relaybackprop import Plan, RelayLoss, Window
from relaybackprop.errors import LeakError
from relaybackprop.reference import reference_gradients

pytestmark = pytest.mark.filterwarnings("ignore")  # MONAI's, of what it imports


@pytest.fixture
def example() -> ModuleType:
    pytest.importorskip("monai", reason="MONAI is not installed")
    return importlib.import_module("examples.monai_segmentation")


def deep_supervision() -> Any:
    from monai.losses import DeepSupervisionLoss, DiceCELoss

    return DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))


@pytest.mark.slow
def test_the_example_learns(example: ModuleType) -> None:
    assert example.main(epochs=4) > 0.7  # the Dice coefficient; 0.1 where all is called a ball


def test_gradients_of_deep_supervision(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary loss reads a list of two outputs, the auxiliary one a tensor; both by MONAI's criterion."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # MONAI casts to float32, which rounds where weights go in
    monkeypatch.setattr(torch, "float", torch.float64)
    torch.manual_seed(0)
    relay, criterion = example.make_relay().double().train(), deep_supervision()
    volumes, labels = (tensor.double() for tensor in example.balls(2).tensors)

    def losses(outputs: dict[str, Any]) -> dict[str, Tensor]:
        return {name: criterion(scores, labels) for name, scores in outputs.items()}

    def by_definition(plan: Plan) -> dict[str, Tensor]:
        return reference_gradients(relay.model, plan, dict(relay.heads.items()), losses, volumes)

    output = relay(volumes)
    shapes = [tuple(scores.shape) for scores in (*output.primary, output.auxiliary["aux"])]
    assert shapes == [(2, 2, 16, 16, 16), (2, 2, 8, 8, 8), (2, 2, 16, 16, 16)]
    RelayLoss(criterion)(output, labels).backward()
    assert_same(gradients_of(relay), by_definition(relay.plan))
    with pytest.raises(AssertionError, match=r"model\.encoder"):  # negative control: the windows matter
        assert_same(gradients_of(relay), by_definition(relay.plan.multi_loss()))
    assert relay.eval()(volumes).shape == (2, 2, 16, 16, 16), "the plain model has one output in evaluation"


def test_a_skip_that_is_not_among_the_ends_is_a_leak(example: ModuleType) -> None:
    relay = example.make_relay()
    relay.plan = Plan(Window(after=relay.plan.primary.after[:2]), relay.plan.auxiliary)
    with pytest.raises(LeakError, match=r"encoder\.layers\.0"):
        relay(torch.rand(2, 1, 16, 16, 16))
