"""Suggested plans of networks from timm, torchvision and transformers: heads, windows, or the reason for an error.

Every configuration is small and has random weights. What a plan claims about gradients is tested in float64 against the
reference, also where a network computes values from constants or runs on the example's values only.
"""

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracle import assert_same, expected_gradients, relay_gradients, seed_each_module, step_gradients
from relaybackprop import Plan, Relay, Window, cost, head_for, suggest_plan
from relaybackprop.engine.pytree import map_tensors, tensors_in
from relaybackprop.errors import LeakError, PlanError, WindowError
from relaybackprop.planning.arrange import MAX_SHARE, Arrangement, arrange, outside_blocks, places_of
from relaybackprop.planning.chain import chain
from relaybackprop.planning.suggest import Suggestion

Example = dict[str, Tensor]
WORDS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SMALL_VIT = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32, "patch_size": 8}


def timm(name: str, pixels: int = 64, **options: Any) -> tuple[nn.Module, Tensor]:
    return pytest.importorskip("timm").create_model(name, num_classes=5, **options), torch.rand(2, 3, pixels, pixels)


def torchvision(name: str, pixels: int = 64, **options: Any) -> tuple[nn.Module, Tensor]:
    return pytest.importorskip("torchvision.models").get_model(name, **options), torch.rand(2, 3, pixels, pixels)


def transformers(name: str, config: str, example: Example, **options: Any) -> tuple[nn.Module, Example]:
    library = pytest.importorskip("transformers")
    return getattr(library, name)(getattr(library, config)(**options)), example


def words(**options: Any) -> Example:
    """Return token ids with an attention mask; the second text is shorter."""
    return {"input_ids": torch.randint(3, 99, (2, 12)), "attention_mask": (torch.arange(24) < 20).long().view(2, 12)}


def pixels(size: int = 64) -> Example:
    return {"pixel_values": torch.rand(2, 3, size, size)}


class Join(nn.Module):
    """A decoder step of a U-Net: upsampling, the encoder's map, a convolution."""

    def __init__(self, low: int, skip: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(low + skip, out, 3, padding=1)

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        low = nn.functional.interpolate(low, scale_factor=2)
        return self.conv(torch.cat([low, skip], 1)).relu()


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = [3, 4, 6, 8, 8]
        layers = [(nn.Conv2d(low, high, 3, padding=1), nn.ReLU()) for low, high in pairwise(widths)]
        self.down = nn.ModuleList(nn.Sequential(*pair) for pair in layers)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList(
            Join(8 if k == 3 else widths[k + 2], widths[k + 1], widths[k + 1]) for k in (3, 2, 1, 0)
        )
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for conv in self.down:
            x = conv(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for join in self.up:
            x = join(x, skips.pop())
        return self.last(x)


SWIN = {"embed_dim": 12, "depths": (1, 2, 4, 2), "num_heads": (1, 2, 3, 4), "img_size": 64, "window_size": 2}
HF_SWIN = {
    "embed_dim": 12,
    "depths": [1, 2, 4, 2],
    "num_heads": [1, 2, 3, 4],
    "image_size": 64,
    "window_size": 2,
}
SPEECH = {name: value for name, value in WORDS.items() if name != "max_position_embeddings"} | {
    "conv_dim": (16,) * 7,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
}

# For each model: the module that the head reads, and the end of the primary loss's window.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str, str]] = {
    "timm ViT": (lambda: timm("vit_tiny_patch16_224", img_size=64), "blocks.8", "blocks.5"),
    "timm Swin": (lambda: timm("swin_tiny_patch4_window7_224", **SWIN), "layers.2", "layers.1"),
    "timm Swin-v2": (lambda: timm("swinv2_tiny_window8_256", **SWIN), "layers.2", "layers.1"),
    "timm ConvNeXt": (lambda: timm("convnext_atto"), "stages.2", "stages.1"),
    "timm MobileNetV3": (lambda: timm("mobilenetv3_small_050", 128), "blocks.3", "blocks.1"),
    "timm EfficientNet": (lambda: timm("efficientnet_b0", 128), "blocks.4", "blocks.2"),
    "timm MambaOut": (lambda: timm("mambaout_femto"), "stages.2", "stages.1"),
    "timm LeViT": (lambda: timm("levit_128s", 224), "stages.1", "stages.0"),
    "timm RegNet": (lambda: timm("regnetx_002"), "s3", "s2"),  # a stage of one block
    "timm MViT-v2": (lambda: timm("mvitv2_tiny", 224), "stages.2", "stages.1"),  # blocks return tuples
    "torchvision Swin": (lambda: torchvision("swin_t"), "features.5", "features.3"),
    "torchvision Swin-v2": (lambda: torchvision("swin_v2_t"), "features.5", "features.3"),
    "torchvision MobileNetV2": (lambda: torchvision("mobilenet_v2", 128), "features.13", "features.6"),
    "torchvision EfficientNet": (lambda: torchvision("efficientnet_b0", 128), "features.5", "features.3"),
    "HF Swin": (
        lambda: transformers("SwinForImageClassification", "SwinConfig", pixels(), **HF_SWIN),
        "swin.encoder.layers.2.blocks.3",
        "swin.encoder.layers.1.blocks.1",
    ),
    "HF ViT": (
        lambda: transformers("ViTForImageClassification", "ViTConfig", pixels(32), **SMALL_VIT),
        "vit.layers.8",
        "vit.layers.5",
    ),
    "HF BERT": (
        lambda: transformers("BertForSequenceClassification", "BertConfig", words(), **WORDS),
        "bert.encoder.layer.2",
        "bert.encoder.layer.1",
    ),
    "HF Llama": (
        lambda: transformers("LlamaForCausalLM", "LlamaConfig", words(), **WORDS, use_cache=False),
        "model.layers.2",
        "model.layers.1",
    ),
    "HF Bloom": (  # blocks return a tuple of two tensors with gradients, one of them unused
        lambda: transformers(
            "BloomForCausalLM", "BloomConfig", words(), vocab_size=99, hidden_size=32, n_layer=6, n_head=2
        ),
        "transformer.h.2",
        "transformer.h.1",
    ),
    "HF ViT-MAE": (  # the decoder is part of the chain
        lambda: transformers(
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            pixels(32),
            **SMALL_VIT,
            num_hidden_layers=6,
            decoder_hidden_size=24,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=2,
            decoder_intermediate_size=48,
        ),
        "decoder.decoder_embed",
        "vit.layers.2",
    ),
    "HF Wav2Vec2": (
        lambda: transformers(
            "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", {"input_values": torch.rand(2, 4000)}, **SPEECH
        ),
        "wav2vec2.encoder.layers.2",
        "wav2vec2.feature_extractor.conv_layers.5",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_heads_and_windows_are_at_ends_of_blocks_and_stages(name: str) -> None:
    make, top, end = MODELS[name]
    suggestion = suggest_plan(*make())
    windows = suggestion.plan.windows
    assert (windows["aux"].top, windows["primary"].after) == (top, end)
    assert windows["aux"].after is None
    total = _total(suggestion)
    assert max(suggestion.depths.values()) <= MAX_SHARE * total


def _total(suggestion: Suggestion) -> int:
    """Return the model's number of weight layers, from the first reason."""
    return int(suggestion.reasons[0].split()[1])


# transformers' Llama always normalises in float32.
EXACT = {"timm Swin-v2": 1e-12, "timm Swin": 1e-12, "HF BERT": 1e-12, "HF Llama": 1e-6, "timm ConvNeXt": 1e-12}


@pytest.mark.parametrize(("name", "tolerance"), EXACT.items())
def test_gradients_of_suggested_plans_are_exact(name: str, tolerance: float) -> None:
    torch.manual_seed(0)
    model, example = MODELS[name][0]()
    model, example = model.double(), map_tensors(lambda t: t.double() if t.is_floating_point() else t, example)
    suggestion = suggest_plan(model, example)
    classes = 99 if "Llama" in name else 5
    relay = Relay(_Named(model, example), _renamed(suggestion.plan), head_for(model, suggestion.plan, example, classes))
    seed_each_module(relay)
    inputs = tuple(example.values()) if isinstance(example, dict) else (example,)
    got, expected = relay_gradients(relay, *inputs), expected_gradients(relay, *inputs)
    assert_same(got, expected, tolerance)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(got, expected_gradients(relay, *inputs, plan=relay.plan.multi_loss()), tolerance)


class _Named(nn.Module):
    """Passes positional arguments to a model by name, and returns its scores."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model, self.names = model, list(example) if isinstance(example, dict) else []

    def forward(self, *inputs: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, inputs, strict=True))) if self.names else self.model(*inputs)
        return getattr(output, "logits", output)


def _renamed(plan: Plan) -> Plan:
    auxiliary = {name: Window(top=f"model.{window.top}") for name, window in plan.auxiliary.items()}
    return Plan(Window(after=f"model.{plan.primary.after}"), auxiliary)


# Models that depend on values.


class LooksAtValues(nn.Module):
    """Branches on the values of its input."""

    def __init__(self, model: nn.Module, look: bool = True) -> None:
        super().__init__()
        self.model, self.look = model, look

    def forward(self, *inputs: Tensor) -> Any:
        if self.look and any(value.float().sum().item() != value.float().sum().item() for value in inputs):
            return None
        return self.model(*inputs)


def network(kind: str) -> nn.Module:
    if kind == "recurrent":
        return Recurrent()
    if kind == "masked":
        return nn.Sequential(*(Causal() for _ in range(6)))
    if kind == "transformer":
        layer = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(6)]
        return nn.Sequential(*layer, nn.Linear(8, 5))
    norms = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for _ in range(6)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *norms, nn.Flatten(), nn.Linear(8 * 36, 5))


class Causal(nn.Module):
    """Attention with a mask of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        query, key, value = self.qkv(x).unflatten(2, (6, 4)).transpose(1, 2).chunk(3, 1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + mixed.transpose(1, 2).flatten(2)


class Recurrent(nn.Module):
    """Alternating LSTMs and linear layers. Each LSTM starts with a constant state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstms = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(6))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for lstm, layer in zip(self.lstms, self.layers, strict=True):
            x = layer(lstm(x)[0])
        return x


@pytest.mark.parametrize("kind", ["convolutional", "transformer", "masked", "recurrent"])
def test_values_and_the_meta_device_give_the_same_plan_and_cost(kind: str) -> None:
    model = network(kind)
    x = torch.rand(2, 3, 8, 8) if kind == "convolutional" else torch.rand(2, 7, 8)
    without, with_values = LooksAtValues(model, look=False), LooksAtValues(model)
    suggestion, other = suggest_plan(without, x), suggest_plan(with_values, x)
    assert (other.plan, other.depths, other.reasons) == (suggestion.plan, suggestion.depths, suggestion.reasons)
    expected, counted = cost(without, suggestion.plan, x), cost(with_values, suggestion.plan, x)
    assert counted.parts == expected.parts
    if kind != "recurrent":  # fused cells have a lower peak
        assert counted.peaks == expected.peaks
    budget = int(0.8 * expected.peaks["standard"])
    if kind == "convolutional":
        assert (
            suggest_plan(with_values, x, memory_budget=budget).plan
            == suggest_plan(without, x, memory_budget=budget).plan
        )


def test_running_on_values_does_not_change_model_or_example() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = network("convolutional")
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            assert x.sum().item() != 0
            return self.model(self.drop(x.mul_(2.0)))

    model, x = Changing().eval(), torch.rand(2, 3, 8, 8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    given, random = x.clone(), torch.get_rng_state()
    plan = suggest_plan(model, x).plan
    cost(model, plan, x)
    assert torch.equal(torch.get_rng_state(), random)
    head_for(model, plan, x, 5)
    assert torch.equal(x, given)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module.training or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


class Graph(nn.Module):
    """Graph convolutions with a sparse adjacency matrix, whose number of nodes depends on the edges."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        nodes = int(edges.max().item()) + 1
        ones = torch.ones(edges.shape[1], dtype=x.dtype)
        adjacency = torch.sparse_coo_tensor(edges, ones, (nodes, nodes), check_invariants=True)
        for layer in self.layers:
            x = layer(torch.sparse.mm(adjacency, x)).relu()
        return x


def test_graph_network_runs_on_values() -> None:
    torch.manual_seed(0)
    model, example = Graph().double(), (torch.rand(5, 8).double(), torch.randint(5, (2, 9)))
    example[1][0, 0] = 4
    suggestion = suggest_plan(model, example)
    assert (suggestion.plan.auxiliary["aux"].top, suggestion.plan.primary.after) == ("layers.3", "layers.2")
    assert list(cost(model, suggestion.plan, example).totals)[-1] == "early_release"
    relay = Relay(model, suggestion.plan, head_for(model, suggestion.plan, example, 5))
    expected = expected_gradients(relay, *example)
    assert_same(relay_gradients(relay, *example), expected)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(relay_gradients(relay, *example), expected_gradients(relay, *example, plan=relay.plan.multi_loss()))


def test_value_dependent_model_on_the_meta_device_raises() -> None:
    model, x = LooksAtValues(network("convolutional")), torch.rand(2, 3, 8, 8)
    plan = suggest_plan(model, x).plan
    for call in (lambda: suggest_plan(model, x.to("meta")), lambda: cost(model, plan, x.to("meta"))):
        with pytest.raises(PlanError, match=r"item\(\).*shapes but no values.*off the meta device"):
            call()
    with pytest.raises(PlanError, match=r"raised RuntimeError \(.*channels.*on the meta device or on its values"):
        suggest_plan(model, torch.rand(2, 4, 8, 8))


# Constants.


class WithBias(nn.Module):
    """Adds an inner network's output for a constant, as Swin v2 does for relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.bias = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 8))
        self.register_buffer("where", torch.rand(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).tanh() + self.bias(self.where)


class FromShape(nn.Module):
    """Adds a layer's output for ones in the shape of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bias = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh() + self.bias(torch.ones_like(x)) + self.bias(x.new_zeros(8))


class SharedBias(nn.Module):
    """All blocks share one bias computed from constants, as in MPNet: a path that bypasses each block."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Linear(2, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias(torch.ones(1, 2, dtype=x.dtype))
        for block in self.blocks:
            x = (block(x) + bias).tanh()
        return x


class Towers(nn.Module):
    """Two towers of words and one of sound. Words are integers, which have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
        self.sound = nn.Linear(8, 8)
        self.top = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))

    def forward(self, left: Tensor, right: Tensor, sound: Tensor) -> Tensor:
        return self.top(self.left(left) + self.right(right) + self.sound(sound))


@pytest.mark.parametrize("kind", [WithBias, FromShape, Recurrent])
def test_windows_can_end_at_links_beside_constants(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = (Recurrent() if kind is Recurrent else nn.Sequential(*(kind() for _ in range(6)))).double()
    x = torch.rand(3, 4, 8, dtype=torch.float64)
    links = [link for link in chain(model, x) if link.name]
    assert len(links) >= 6
    for low, high in pairwise(links):
        relay = Relay(model, Plan(Window(after=low.name), {"aux": Window(top=high.name)}), {"aux": _Sum()})
        expected = expected_gradients(relay, x)
        assert_same(relay_gradients(relay, x), expected)
        assert_same(step_gradients(relay, x), expected)
        with pytest.raises(AssertionError, match="relative error"):
            assert_same(relay_gradients(relay, x), expected_gradients(relay, x, plan=relay.plan.multi_loss()))


class _Sum(nn.Module):
    def forward(self, value: Any) -> Tensor:
        return torch.stack([tensor.sum() for tensor in tensors_in(value)]).sum()


def test_constants_that_feed_both_sides_bypass_the_output() -> None:
    model, x = SharedBias(), torch.rand(3, 8)
    with pytest.raises(WindowError):
        suggest_plan(model, x)
    assert not [link for link in chain(model, x) if link.name.startswith("blocks.") and link.name != "blocks.5"][1:]
    with pytest.raises(LeakError):
        Relay(model, Plan(Window(after="blocks.3")))(x)
    Relay(model, Plan(Window(after=("blocks.3", "bias"))))(x)  # the remedy in the error


def test_integer_inputs_form_towers() -> None:
    ids, sound = torch.randint(9, (2, 3)), torch.rand(2, 3, 8)
    assert next(link.name for link in chain(Towers(), (ids, ids, sound))) == "top.0"


def test_tuple_output_is_a_link_if_one_tensor_is_used() -> None:
    names = [link.name for link in chain(Recurrent(), torch.rand(3, 4, 8))]
    assert {"lstms.0", "layers.0", "lstms.5"} <= set(names)


# Layouts.


class Tokens(nn.Module):
    """Stages of (N, L, C) tokens. Pairs of tokens are merged between two stages."""

    def __init__(self) -> None:
        super().__init__()
        stages = [[nn.Linear(8 * 2**n, 8 * 2**n) for _ in range(3)] for n in range(4)]
        self.stages = nn.ModuleList(nn.Sequential(*layers) for layers in stages)
        self.merge = nn.ModuleList(nn.Linear(16 * 2**n, 16 * 2**n) for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for number, stage in enumerate(self.stages):
            if number:
                x = self.merge[number - 1](x.unflatten(1, (-1, 2)).flatten(2))
            x = stage(x)
        return x


def test_spatial_shape_of_tokens_is_their_number() -> None:
    x = torch.rand(2, 32, 8)
    assert {link.name: link.spatial_shape for link in chain(Tokens(), x)}["stages.1"] == (16,)
    suggestion = suggest_plan(Tokens(), x)
    assert (suggestion.plan.auxiliary["aux"].top, suggestion.plan.primary.after) == ("stages.2", "stages.1")


# Models without useful windows.


def test_unet_has_no_suggestion_but_a_valid_plan() -> None:
    model, x = UNet().double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(WindowError, match=r"has 9 of the 10 weight layers of UNet.*at most 88% ") as caught:
        suggest_plan(model, x)
    assert "Window(after=(" in str(caught.value)
    plan = Plan(Window(after=("middle", "down.3", "down.2", "down.1", "down.0")), {"aux": Window(top="up.1")})
    relay = Relay(model, plan, {"aux": _Sum()})
    expected = expected_gradients(relay, x)
    assert_same(relay_gradients(relay, x), expected)
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(relay_gradients(relay, x), expected_gradients(relay, x, plan=plan.multi_loss()))


def test_error_suggests_more_heads_if_they_help() -> None:
    """With one head, after the second or the third block, a window has 18 of 20 layers; with two heads, 16."""
    blocks = [nn.Sequential(*(nn.Linear(4, 4) for _ in range(size))) for size in (2, 8, 8, 2)]
    model = nn.Sequential(*(_Skip(block) for block in blocks))
    with pytest.raises(WindowError, match=r"has 18 of the 20 .*Pass num_auxiliary=2"):
        suggest_plan(model, torch.rand(2, 4))
    assert sorted(suggest_plan(model, torch.rand(2, 4), 2).depths.values()) == [10, 10, 16]


class _Skip(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_deepest_window_is_the_minimum_over_all_placements(heads: int) -> None:
    """Compare with all placements of the heads."""
    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    model = nn.Sequential(*(nn.Sequential(*(nn.Linear(4, 4) for _ in range(size))) for size in sizes))
    links = outside_blocks(model, chain(model, torch.rand(2, 4)))
    best = arrange(links, heads)
    assert best is not None
    every = [Arrangement(best.segments, each) for each in combinations(places_of(best.segments), heads)]
    assert best.deepest == min(one.deepest for one in every)
