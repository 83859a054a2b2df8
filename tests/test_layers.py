"""Layers for layer-wise decay: against timm's own group matchers, and on networks that have none."""

import pytest
import torch
from torch import nn

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

import torchvision

from relaylab.models.building import build_relay
from relaylab.recipes.schema import Recipe
from relaylab.train.layers import layer_factors, layers_of
from relaylab.train.optimizers import parameter_groups
from relaylab.train.segments import segments_of
from test_optimizers import recipe_of


def numbers_of(model: nn.Module) -> dict[str, int]:
    return layers_of(model, [name for name, _ in model.named_parameters()])


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "test_vit", "deit_tiny_patch16_224"])
def test_layers_are_those_of_timms_group_matcher(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    from timm.models import group_parameters

    with torch.device("meta"):
        model = timm.create_model(name)
    expected = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    found = numbers_of(model)
    assert found == expected
    assert max(found.values()) >= 7


def test_layers_of_networks_without_a_matcher() -> None:
    with torch.device("meta"):
        vgg, vit = torchvision.models.vgg11_bn(num_classes=5), torchvision.models.vit_b_16()
    found = numbers_of(vgg)
    assert max(found.values()) == 10  # 8 convolutions, 3 linear layers
    assert found["features.0.bias"] == found["features.1.weight"] == 0 < found["features.4.weight"] == 1
    assert (found["classifier.0.weight"], found["classifier.6.bias"]) == (8, 10)
    found = numbers_of(vit)
    assert found["class_token"] == found["conv_proj.weight"] == found["encoder.pos_embedding"] == 0
    assert found["encoder.layers.encoder_layer_11.mlp.3.bias"] == found["encoder.ln.weight"] == 12
    assert found["heads.head.weight"] == max(found.values()) == 13


def test_stages_are_divided_into_their_blocks() -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    with torch.device("meta"):
        convnext, swin = timm.create_model("convnext_atto"), torchvision.models.swin_t()
    found = numbers_of(convnext)
    blocks = [found[f"stages.{stage}.blocks.{n}.mlp.fc1.bias"] for stage, n in ((0, 0), (0, 1), (1, 0), (3, 1))]
    assert blocks == [1, 2, 4, 15]  # after the stem; then behind one downsampling, and behind three
    assert found["stages.3.blocks.1.gamma"] == found["head.norm.weight"] == found["head.fc.weight"] - 1 == 15
    found = numbers_of(swin)
    assert found["features.1.0.attn.qkv.weight"] == found["features.1.0.mlp.3.bias"] == 1
    assert found["features.1.1.attn.relative_position_bias_table"] == 2


def test_each_layer_has_the_factor_of_its_depth_and_heads_have_one() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2))
    names = [name for name, _ in model.named_parameters()]
    factors = layer_factors(model, names, 0.5)
    assert factors == {"0.weight": 0.25, "0.bias": 0.25, "2.weight": 0.5, "2.bias": 0.5, "3.weight": 1, "3.bias": 1}


def test_factors_of_layers_and_segments_multiply() -> None:
    plain, decayed = recipe_of(), recipe_of("optimizer.layer_decay=0.5", "optimizer.segment_lr.aux=3")
    segments = segments_of(plain)
    relay = build_relay(plain, on_meta=True)
    names = {id(parameter): name for name, parameter in relay.named_parameters()}

    def factors(recipe: Recipe) -> dict[str, float]:
        groups = parameter_groups(relay, segments, recipe.optimizer)
        return {names[id(p)]: group["lr_factor"] for group in groups for p in group["params"]}

    assert set(factors(plain).values()) == {1.0}
    found, layers = factors(decayed), numbers_of(relay.model)
    last = max(layers.values())
    for name, factor in found.items():
        own = 3.0 if segments.of[name] == "aux" else 1.0
        depth = last - layers[name.removeprefix("model.")] if name.startswith("model.") else 0
        assert factor == own * 0.5**depth, name
    assert {found[name] for name in found if name.startswith("heads.")} == {1.0}
    assert min(found.values()) < 0.1
