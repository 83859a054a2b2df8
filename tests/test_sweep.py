"""A sweep over real models: suggested plan, fitting heads, backward pass and early release, against the reference.

float64. Each model is exact or is refused for a reason that is listed here by its name; none is wrong silently.
"""

from typing import Any

import pytest
import torch

import zoo
from oracle import assert_same, expected_gradients, relay_gradients, seed_each_module, step_gradients
from relaybackprop import Relay, RelayError, head_for, suggest_plan

pytestmark = pytest.mark.slow

# Skips, several scales at once, one block that runs many times, relative positions that every block reads: no plan has
# only windows of at most 88 % of the layers, or none with one end. Windows with several ends can be written by hand.
NO_ROOM, NEARLY_ALL, NO_CHAIN = (
    "has only 0 valid head positions; num_auxiliary=1 was requested",
    r"a window may have at most 88% of them",
    "module output that every path crosses: at least two are required",
)
REFUSED = {
    "lraspp_mobilenet": NO_ROOM, "hrnet_w18_small": NO_ROOM, "hf deberta-v2": NO_ROOM,
    "hf segformer": NEARLY_ALL, "hf albert": NEARLY_ALL, "monai basic unet": NEARLY_ALL,
    "monai segresnet": NEARLY_ALL, "monai attention unet": NEARLY_ALL,
    "hf t5": NO_CHAIN,
}  # fmt: skip


LIBRARIES = {
    "torchvision": zoo.torchvision_models(), "timm": zoo.timm_models(), "transformers": zoo.transformers_models(),
    "monai": zoo.monai_models(),
}  # fmt: skip
ENTRIES = [(library, name) for library, models in LIBRARIES.items() for name in models]


def prepared(entry: zoo.Entry) -> tuple[Any, Any, dict[str, Any]]:
    """The model and its inputs in float64. Noise on all weights: some models start with a zero classifier."""
    torch.manual_seed(0)
    model = entry.build().double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    named = entry.inputs if isinstance(entry.inputs, dict) else {}
    double = {name: value.double() if value.is_floating_point() else value for name, value in named.items()}
    args = () if named else (entry.inputs.double(),)
    return model, args, double


@pytest.mark.parametrize(("library", "name"), ENTRIES)
def test_every_model_is_exact_or_refused(library: str, name: str) -> None:
    pytest.importorskip(library)
    entry = LIBRARIES[library][name]
    model, args, named = prepared(entry)
    example = named or args
    if name in REFUSED:
        with pytest.raises(RelayError, match=REFUSED[name]):
            suggest_plan(model, example)
        return
    plan = suggest_plan(model, example).plan
    relay = Relay(model, plan, head_for(model, plan, example, entry.classes))
    seed_each_module(relay)
    right = expected_gradients(relay, *args, **named)
    got = relay_gradients(relay, *args, **named)
    assert_same(got, right, entry.tolerance)
    everywhere = Relay(model, plan.multi_loss(), dict(relay.heads.items()))
    with pytest.raises(AssertionError):
        assert_same(relay_gradients(everywhere, *args, **named), right, entry.tolerance)
    assert_same(step_gradients(relay, *args, **named), right, entry.tolerance)
