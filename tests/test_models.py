"""The paper's networks: sizes, orders and shapes that the paper and the authors' release fix, and their windows."""

import copy
import dataclasses
import itertools
import math
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="needs the lab extra")

import torchvision

from oracle import assert_same, expected_gradients, relay_gradients
from relaybackprop import LinearHead, Plan, Relay, Window, heads
from relaylab import models
from relaylab.errors import InputError
from relaylab.models.building import build_head, build_heads, build_network, build_plan, head_inputs
from relaylab.models.layers import set_gain
from relaylab.models.model_b import Inception
from relaylab.models.pyramid import SpatialPyramid
from relaylab.recipes import RECIPES, schema, windows
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import AuxiliaryConfig, NetworkConfig, PlanConfig, PrimaryConfig, changed


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return getattr(models, name)(**options)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(key, value.shape) for key, value in model.state_dict().items()]


def outputs(model: nn.Module, size: int) -> dict[str, tuple[int, ...]]:
    """By child, the shape of what comes out, in the order of the forward pass."""
    found: dict[str, tuple[int, ...]] = {}
    for name, child in model.named_children():
        child.register_forward_hook(lambda _m, _a, out, name=name: found.update({name: tuple(out.shape[1:])}))
    model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return found


# Design facts: the released definition gives model B's, Table 2 and the text model A's.
@pytest.mark.parametrize(
    ("name", "parameters"), [("model_a", 175_882_961), ("model_a_printed", 101_563_857), ("model_b", 171_252_113)]
)
def test_parameters(name: str, parameters: int) -> None:
    assert count(on_meta(name)) == parameters
    assert count(on_meta(name, num_classes=400)) == parameters - 4097


def test_model_a_has_table_2s_maps_in_forward_order() -> None:
    assert outputs(on_meta("model_a"), 224) == {
        "segment1": (64, 112, 112),
        "segment2": (128, 56, 56),
        "segment3": (256, 28, 28),
        "segment4": (512, 14, 14),
        "segment5": (63 * 512,),
        "classifier": (401,),
    }
    assert outputs(on_meta("model_a_printed"), 224)["segment5"] == (63 * 256,)


def test_model_b_has_table_2s_maps_in_forward_order() -> None:
    assert outputs(on_meta("model_b"), 224) == {
        "segment1": (128, 56, 56),
        "segment2": (256, 28, 28),
        "segment3": (512, 14, 14),
        "segment4": (63 * 512,),
        "classifier": (401,),
    }


@pytest.mark.parametrize("name", ["model_a", "model_b"])
def test_the_small_shape_has_the_same_depth_and_a_4x4_map(name: str) -> None:
    def weights(model: nn.Module) -> list[str]:
        return [key for key, value in model.state_dict().items() if value.ndim > 1]

    small = on_meta(name, num_classes=100, width=16, image_size=64, pyramid=(4, 2, 1))
    assert weights(small) == weights(on_meta(name))
    maps = list(outputs(small, 64).values())
    assert maps[-3][1:] == (4, 4)
    assert maps[-2:] == [(21 * 128,), (100,)]


@pytest.mark.parametrize("depth", [13, 16, 19])
def test_vgg_is_torchvisions(depth: int) -> None:
    own, theirs = models.vgg(depth, 10, width=8, image_size=64), on_meta("vgg", depth=depth)
    reference = getattr(torchvision.models, f"vgg{depth}")
    with torch.device("meta"):
        expected = reference(init_weights=False)
    assert shapes(theirs) == shapes(expected)
    assert [type(m) for m in theirs.modules()] == [type(m) for m in expected.modules()]
    assert own(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_vgg_22_and_25_add_3_and_6_convolutions_on_the_smallest_maps() -> None:
    def convolutions(depth: int) -> list[int]:
        return [m.out_channels for m in on_meta("vgg", depth=depth).modules() if isinstance(m, nn.Conv2d)]

    for depth, more in ((22, 1), (25, 2)):
        expected = [64] * 2 + [128] * 2 + [256] * (4 + more) + [512] * (4 + more) + [512] * (4 + more)
        assert convolutions(depth) == expected
        assert len(expected) + 3 == depth
    # 3 more of 3x3: 256 to 256, twice 512 to 512, with biases.
    assert count(on_meta("vgg", depth=22)) - count(on_meta("vgg", depth=19)) == 589_824 + 256 + 2 * (2_359_296 + 512)


def test_he_initialisation_by_the_number_of_inputs() -> None:
    model = models.model_a(10, width=16, image_size=64, pyramid=(4, 2, 1))
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            inputs = layer.weight[0].numel()
            if layer.weight.numel() > 10_000:
                assert float(layer.weight.detach().std()) == pytest.approx((2 / inputs) ** 0.5, rel=0.05)
            assert layer.bias is not None
            assert not layer.bias.any()
    # Signals keep their size through 19 layers: this is what He's initialisation is for.
    assert 0.1 < float(model.eval()(torch.randn(8, 3, 64, 64)).detach().std()) < 30


def test_networks_without_batch_normalisation() -> None:
    for name in ("model_a", "model_b"):
        model = on_meta(name)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_inception_concatenates_1x1_3x3_and_double_3x3() -> None:
    module = Inception(3, 2)
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        for i, branch in enumerate((module.branch1x1, module.branch3x3, module.branch3x3dbl)):
            branch[-2].bias.fill_(100.0 * (i + 1))  # type: ignore[union-attr]
        y = module(x)
    assert y.shape == (1, 8, 5, 5)
    assert (y[0].mean((1, 2)) / 100).round().tolist() == [1, 1, 2, 2, 3, 3, 3, 3]
    assert [m.kernel_size for m in module.modules() if isinstance(m, nn.Conv2d)] == [(1, 1)] + [(3, 3)] * 3


def caffe_max_pool(image: Tensor, size: int) -> list[float]:
    """By hand: windows from 0, `size` apart, until the map is covered; the last one is cut off by the edge."""
    side = image.shape[-1]
    starts = range(0, side, size)
    return [float(image[y : y + size, x : x + size].max()) for y in starts for x in starts]


def test_the_pyramid_rounds_as_caffe_does() -> None:
    """On 14x14, three bins are windows of 5, 5 and 4: rows 0-4, 5-9 and 10-13."""
    ramp = torch.arange(196.0).view(1, 1, 14, 14)  # the largest value of a window is its last
    pyramid = SpatialPyramid()
    got = pyramid(ramp)[0].tolist()
    last = [4, 9, 13]
    three = [14.0 * y + x for y in last for x in last]  # 60, 65, 69, 130, 135, 139, 186, 191, 195
    two = [14.0 * y + x for y in (6, 13) for x in (6, 13)]
    seven = [14.0 * y + x for y in range(1, 14, 2) for x in range(1, 14, 2)]
    assert three == [60, 65, 69, 130, 135, 139, 186, 191, 195]
    assert got == [195.0, *two, *three, *seven]
    # Its second window starts at row 5; PyTorch's adaptive pooling starts it at row 4.
    falling = SpatialPyramid((3,), 14)(-ramp)[0].tolist()
    assert falling == [-14.0 * y - x for y in (0, 5, 10) for x in (0, 5, 10)]
    assert nn.AdaptiveMaxPool2d(3)(-ramp).flatten().tolist() != falling


@pytest.mark.parametrize(("bins", "side"), [((7, 3, 2, 1), 14), ((7, 3, 2, 1), 20), ((7, 3, 2, 1), 13), ((4, 2, 1), 4)])
def test_the_pyramid_is_channel_major_and_coarse_first(bins: tuple[int, ...], side: int) -> None:
    maps = torch.randn(2, 3, side, side)
    expected = [
        [value for b in sorted(bins) for channel in image for value in caffe_max_pool(channel, -(-side // b))]
        for image in maps
    ]
    torch.testing.assert_close(SpatialPyramid(bins, side)(maps), torch.tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize("size", [16, 64, 96, 256])
def test_images_that_the_pyramid_does_not_fit(size: int) -> None:
    with pytest.raises(
        InputError, match=r"\{7, 3, 2, 1\} bins does not fit .* Image sizes that fit it: .*224"
    ) as error:
        on_meta("model_a", image_size=size)
    assert "\n" not in str(error.value)


def test_images_of_another_size_than_built_for() -> None:
    model = on_meta("model_b")
    with pytest.raises(InputError, match="maps of 14 x 14 and received one of 16 x 16"):
        model(torch.empty(1, 3, 256, 256, device="meta"))


@pytest.mark.parametrize("bins", [(0, 1), (3, -1)])
def test_pyramids_that_are_none(bins: tuple[int, ...]) -> None:
    with pytest.raises((InputError, ZeroDivisionError)):
        SpatialPyramid(bins, 14)


def test_resnet_50_for_small_images_keeps_all_shapes() -> None:
    usual, small = on_meta("resnet50"), on_meta("resnet50", image_size=64)
    assert [(k, v.shape) for k, v in usual.state_dict().items()] == [
        (k, v.shape) for k, v in small.state_dict().items()
    ]
    assert outputs(usual, 224)["layer4"] == (2048, 7, 7)
    assert outputs(small, 64)["layer4"] == (2048, 8, 8)


def test_a_narrow_resnet_50_is_torchvisions_with_fewer_filters() -> None:
    usual, narrow = (on_meta("resnet50", num_classes=3, width=width) for width in (64, 16))
    expected = [(key, tuple(side // 4 if side >= 64 else side for side in shape)) for key, shape in shapes(usual)]
    assert [(key, tuple(shape)) for key, shape in shapes(narrow)] == expected
    of_usual, of_narrow = outputs(usual, 224), outputs(narrow, 224)
    assert list(of_narrow) == list(of_usual)
    assert [of_narrow[name][1:] for name in of_narrow] == [of_usual[name][1:] for name in of_usual]
    weight = models.resnet50(width=16).get_submodule("layer3.0.conv2").weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05), "torchvision's initialisation"


def test_inception_v3_enlarges_small_images() -> None:
    assert outputs(on_meta("inception_v3"), 299)["Mixed_6e"] == (768, 17, 17)
    small = on_meta("inception_v3", image_size=64)
    assert outputs(small, 64)["Mixed_6e"] == (768, 4, 4)
    assert not any("Aux" in name for name, _ in small.named_modules())


# ---------------------------------------------------------------------------------------------- plans


# (weight layers of each loss's window), counted by hand from Table 2, Figure 2 and the networks' definitions.
DEPTHS = {
    "table3-model-a-relay": {"primary": 5 + 5 + 3, "aux": 2 + 2 + 5 + 5},
    "table3-model-b-relay": {"primary": 8 + 8 + 3, "aux": 1 + 8 + 8},
    "figure2-vgg19-relay": {"primary": 4 + 4 + 3, "aux2": 4 + 4, "aux1": 2 + 2 + 4},
    "table6-resnet50-relay": {"primary": 3 * 6 + 3 * 3 + 1, "aux": 1 + 3 * 3 + 3 * 4 + 3 * 4},
    # 6b-6e have 5 layers each on their longest branch, 7a 4, 7b and 7c 3; below, 5 convolutions, 5b-5d 3 each, 6a 3.
    "table6-inception-v3-relay": {"primary": 4 * 5 + 4 + 2 * 3 + 1, "aux": 5 + 3 * 3 + 3 + 4 * 5},
}


@pytest.mark.parametrize("name", DEPTHS)
def test_windows_have_the_papers_depths_and_overlap(name: str) -> None:
    recipe = RECIPES[name]
    with torch.device("meta"):
        model = build_network(recipe.network)
        heads = build_heads(recipe.plan, recipe.network, model)
    relay = Relay(model, build_plan(recipe.plan), heads)
    size = recipe.network.image_size
    output = relay(torch.empty(2, 3, size, size, device="meta"))
    assert dict(relay.depths) == DEPTHS[name]
    relay.plan.check_relay(relay.order)
    assert all(scores.shape == output.primary.shape for scores in output.auxiliary.values())


def test_the_heads_read_what_table_2_says() -> None:
    for name, expected in {
        "table3-model-a-relay": (512, 14, 14),
        "table3-model-b-relay": (512, 14, 14),
        "table1-vgg25-places2": (512, 14, 14),
        "table6-resnet50-relay": (1024, 14, 14),
        "table6-inception-v3-relay": (768, 17, 17),
    }.items():
        recipe = RECIPES[name]
        with torch.device("meta"):
            model = build_network(recipe.network)
        assert head_inputs(recipe.plan, recipe.network, model) == {"aux": expected}


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        *itertools.product(["relay"], DEPTHS),
        *(("multi_loss", name) for name in DEPTHS if name != "table6-inception-v3-relay"),
        pytest.param("multi_loss", "table6-inception-v3-relay", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_every_network_equal_the_reference(scheme: str, name: str) -> None:
    recipe = at_scale(RECIPES[name], "tiny")
    if recipe.network.architecture == "resnet50":
        recipe = changed(recipe, "ours: the same graph with fewer filters", {"network.width": 8})
    torch.manual_seed(1)
    model = build_network(recipe.network).double()
    heads = {name: head.double() for name, head in build_heads(recipe.plan, recipe.network, model).items()}
    relay = Relay(model, build_plan(recipe.plan, scheme), heads)
    images = torch.randn(2, 3, recipe.network.image_size, recipe.network.image_size, dtype=torch.float64)
    got = relay_gradients(relay, images)
    # Batch normalisation over two images amplifies rounding.
    tolerance = 1e-8 if name.startswith("table6") else 1e-12
    assert_same(got, expected_gradients(relay, images), tolerance)
    other = build_plan(recipe.plan, "relay" if scheme == "multi_loss" else "multi_loss")
    with pytest.raises(AssertionError, match=r"relative error|expected no gradient"):  # negative control
        assert_same(got, expected_gradients(relay, images, plan=other), tolerance)


def test_figure_2_word_for_word() -> None:
    model = on_meta("vgg", depth=19)
    pools = [name for name, m in model.named_modules() if isinstance(m, nn.MaxPool2d)]
    plan = build_plan(windows.vgg_figure_2())
    assert plan == Plan(
        Window(after=pools[2]), {"aux1": Window(top=pools[2]), "aux2": Window(after=pools[1], top=pools[3])}
    )


# ---------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(("head", "parameters"), [("linear", 513 * 10), ("inception", None), ("googlenet", None)])
def test_heads_by_name(head: str, parameters: int | None) -> None:
    module = build_head(head, (512, 17, 17), 10, batch_norm=False)
    assert module(torch.randn(2, 512, 17, 17)).shape == (2, 10)
    if parameters is not None:
        assert count(module) == parameters


def test_head_errors() -> None:
    with pytest.raises(InputError, match="map of at least 17 pixels a side, but this one is 14 x 14"):
        build_head("inception", (512, 14, 14), 10, batch_norm=False)
    with pytest.raises(InputError, match="unknown head 'fancy'"):
        build_head("fancy", (512, 14, 14), 10, batch_norm=False)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NetworkConfig(architecture="vgg7", num_classes=5, image_size=64), "unknown architecture 'vgg7'"),
        (
            NetworkConfig(architecture="inception_v3", num_classes=5, image_size=64, width=3),
            "inception_v3 has no width",
        ),
        (NetworkConfig(architecture="vgg19", num_classes=5, image_size=64, pyramid=(1,)), "vgg19 has no pyramid"),
        (NetworkConfig(architecture="model_a", num_classes=1, image_size=64), "num_classes is 1"),
        (NetworkConfig(architecture="vgg19", num_classes=5, image_size=16), "at least 32"),
    ],
)
def test_configurations_that_cannot_be(config: NetworkConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_network(config)


def test_vgg_of_another_depth() -> None:
    with pytest.raises(InputError, match="VGGNet-17: expected a depth among 13, 16, 19, 22, 25"):
        models.vgg(17)


def test_schemes_that_cannot_be() -> None:
    with pytest.raises(InputError, match="unknown scheme 'relais'"):
        build_plan(windows.MODEL_A, "relais")
    with pytest.raises(InputError, match="needs auxiliary losses"):
        build_plan(PlanConfig(primary=PrimaryConfig()), "relay")
    assert build_plan(PlanConfig(), "standard") == Plan()
    assert build_plan(windows.MODEL_A, "isolated").primary == Window(after="segment4", weight=1.0)


# ----------------------------------------------------------------------------- other libraries' models


def relay_step(model: nn.Module, prefix: str, channels: int) -> Relay:
    """Relay by module names, one step; returns the bound relay."""
    plan = Plan(Window(bottom=f"{prefix}.0"), {"aux": Window(top=f"{prefix}.3")})
    relay = Relay(model, plan, {"aux": LinearHead(channels, 7)})
    output = relay(torch.randn(2, 3, 64, 64))
    primary = output.primary if isinstance(output.primary, Tensor) else output.primary.logits
    (primary.square().sum() + 0.3 * output.auxiliary["aux"].square().sum()).backward()
    return relay


def test_timms_resnet_50_by_module_names() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    relay = relay_step(timm.create_model("resnet50", num_classes=7), "layer3", 1024)
    assert dict(relay.depths) == DEPTHS["table6-resnet50-relay"]


def test_timms_inception_v3_by_module_names() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    plan = build_plan(windows.INCEPTION_V3)
    relay = Relay(timm.create_model("inception_v3", num_classes=7), plan, {"aux": LinearHead(768, 7)})
    output = relay(torch.randn(2, 3, 128, 128))
    (output.primary.square().sum() + output.auxiliary["aux"].square().sum()).backward()
    assert dict(relay.depths) == DEPTHS["table6-inception-v3-relay"]


def test_transformers_resnet_50_by_module_names() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=7))
    relay = relay_step(model, "resnet.encoder.stages.2.layers", 1024)
    assert dict(relay.depths) == DEPTHS["table6-resnet50-relay"]


def test_a_window_of_ones_own() -> None:
    config = PlanConfig(
        primary=PrimaryConfig(after="segment1"), auxiliary={"aux": AuxiliaryConfig(top="segment2", weight=0.5)}
    )
    plan = build_plan(config)
    assert plan == Plan(Window(after="segment1"), {"aux": Window(top="segment2", weight=0.5)})


@pytest.mark.parametrize("gain", ["quiet", None])
@pytest.mark.parametrize("name", ["table3-model-a-relay", "table3-model-b-relay", "figure2-vgg19-relay"])
def test_a_quiet_gain_starts_near_the_loss_of_guessing(name: str, gain: Literal["quiet"] | None) -> None:
    torch.manual_seed(0)
    network = dataclasses.replace(at_scale(RECIPES[name], "small").network, gain=gain)
    model = build_network(network).eval()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(
            model(torch.randn(32, 3, network.image_size, network.image_size)), torch.arange(32)
        ).item()
    guessing = math.log(network.num_classes)
    assert loss < guessing * 1.1 if gain else loss > guessing * 1.1


def test_gains_are_of_the_last_layer_alone() -> None:
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 5))
    after = copy.deepcopy(before)
    set_gain(after, "he", 5)
    assert torch.equal(after[0].weight, before[0].weight)
    assert float(after[1].weight.detach().std()) == pytest.approx((2 / 300) ** 0.5, rel=0.1)
    set_gain(after, "default", 5)
    assert float(after[1].weight.detach().abs().max()) <= 300**-0.5
    with pytest.raises(InputError, match="needs a linear or convolutional layer with 7 outputs"):
        set_gain(after, "quiet", 7)


def test_recipes_and_heads_have_the_same_gains() -> None:
    assert get_args(schema.Gain) == get_args(heads.Gain)
