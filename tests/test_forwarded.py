"""Methods that timm and transformers call on the module that they train. A relay has them if its model has them."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from oracle import assert_same, expected_gradients, relay_gradients
from relaybackprop import Plan, Relay, TokenHead, Window
from relaybackprop.forwarded import FORWARDED

WIDTH, CLASSES, DECAY = 16, 5, 0.05
PLAN = Plan(primary=Window(bottom="blocks.1"), auxiliary={"aux": Window(top="blocks.2")})


def timm_vit(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 4, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", **{"num_classes": CLASSES, **sizes, **options})


def timm_convnext() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(4, 8, 8, 16), num_classes=CLASSES)


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, image_size=16,
        patch_size=8, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def relay_of(model: nn.Module) -> Relay:
    return Relay(model, PLAN, {"aux": TokenHead(WIDTH, CLASSES)})


def test_relay_has_the_methods_of_its_model() -> None:
    plain, timm, transformers = Relay(nn.Linear(2, 2), Plan()), relay_of(timm_vit()), Relay(transformers_vit(), Plan())
    timms = {"no_weight_decay", "group_matcher", "set_grad_checkpointing"}
    others = {name for name in FORWARDED if hasattr(transformers.model, name)}  # versions of transformers differ
    assert others
    assert not others & timms
    for relay, expected in ((plain, set()), (timm, timms), (transformers, others)):
        for copied in (relay, copy.deepcopy(relay), pickle.loads(pickle.dumps(relay))):
            assert {name for name in FORWARDED if hasattr(copied, name)} == expected
        assert not hasattr(relay, "get_classifier")
    with pytest.raises(AttributeError, match="no_weight_decay"):
        plain.no_weight_decay()


Settings = dict[int, tuple[float, float]]


def settings(model: nn.Module, layer_decay: float | None) -> Settings:
    """Return each parameter's weight decay and learning-rate factor in timm's optimizer."""
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(model, "adamw", weight_decay=DECAY, layer_decay=layer_decay)
    groups = optimizer.param_groups
    return {id(p): (group["weight_decay"], group.get("lr_scale", 1.0)) for group in groups for p in group["params"]}


# In the last model, every parameter matches a pattern: the heads must not form an additional layer.
@pytest.mark.parametrize("build", [timm_vit, timm_convnext, lambda: timm_vit(num_classes=0)])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_timm_optimizer_groups_are_those_of_the_plain_model(
    build: Callable[[], nn.Module], layer_decay: float | None
) -> None:
    model = build()
    relay = Relay(model, Plan(auxiliary={"aux": Window(top=top_of(model))}), {"aux": nn.Linear(3, 3)})
    alone, together = settings(model, layer_decay), settings(relay, layer_decay)
    assert len(alone) == len(list(model.parameters()))
    assert {parameter: together[parameter] for parameter in alone} == alone
    weight, bias = relay.heads["aux"].parameters()
    assert together[id(weight)] == (DECAY, 1.0)
    assert together[id(bias)] == (0.0, 1.0)
    assert layer_decay is None or len({scale for _, scale in alone.values()}) > 3


def top_of(model: nn.Module) -> str:
    return "blocks.2" if hasattr(model, "blocks") else "stages.2"


def test_negative_control_a_wrapper_without_forwarding_loses_the_rules() -> None:
    """A module that contains the model and does not forward methods."""
    model = timm_vit()
    alone = settings(model, None)
    assert settings(relay_of(model), None)[id(model.pos_embed)] == alone[id(model.pos_embed)] == (0.0, 1.0)
    assert settings(nn.ModuleDict({"model": model}), None)[id(model.pos_embed)] == (DECAY, 1.0)


class WithGroups(nn.Module):
    """Three layers, with groups from a subclass."""

    def __init__(self, matcher: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
        self.matcher = matcher

    def group_matcher(self, coarse: bool = False) -> Any:
        return self.matcher


@pytest.mark.parametrize(
    "matcher",
    [
        {"stem": r"^layers\.0", "rest": r"^layers\.(\d+)"},
        {"stem": None, "all": [(r"^layers\.(\d+)\.weight", None), (r"layers|other", (99999,))]},
        lambda name: int(name.split(".")[1]),
        lambda name: (0, int(name.split(".")[1])),
    ],
    ids=["patterns", "lists", "numbers", "tuples"],
)
def test_all_kinds_of_timm_group_matchers(matcher: Any) -> None:
    pytest.importorskip("timm")
    from timm.models import group_parameters

    model = WithGroups(matcher)
    alone = group_parameters(model, model.group_matcher(), reverse=True)
    relay = Relay(model, Plan(auxiliary={"aux": Window(top="layers.1")}), {"aux": nn.Linear(2, 2)})
    together = group_parameters(relay, relay.group_matcher(), reverse=True)
    heads = {f"heads.aux.{kind}": max(alone.values()) for kind in ("weight", "bias")}
    assert together == {f"model.{name}": group for name, group in alone.items()} | heads


@pytest.mark.parametrize(
    "call", ["set_grad_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing"]
)
def test_models_own_activation_checkpointing(call: str) -> None:
    """Gradients are equal in float64, and blocks run twice."""
    if call == "set_grad_checkpointing":
        relay = relay_of(timm_vit()).double()
        layer = relay.model.blocks[3].mlp.fc1
    else:
        plan = Plan(primary=Window(bottom="vit.layers.1"), auxiliary={"aux": Window(top="vit.layers.2")})
        relay = Relay(transformers_vit(), plan, {"aux": TokenHead(WIDTH, CLASSES)}, output="logits").double()
        layer = relay.model.vit.layers[3].mlp.fc1
    name = call if call != "gradient_checkpointing" else "gradient_checkpointing_enable"
    if not hasattr(relay, name):
        pytest.skip(f"this transformers has no {name}")
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    expected, calls = expected_gradients(relay, images), []

    def count(*_: Any) -> None:
        calls.append(1)

    layer.register_forward_pre_hook(count)
    relay_gradients(relay, images)
    assert len(calls) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames it
        getattr(relay, name)()
    calls.clear()
    assert_same(relay_gradients(relay, images), expected)
    assert len(calls) == 2, "nothing was checkpointed"
