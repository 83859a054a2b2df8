"""Heads for every layout: their outputs, their errors, and the choices of `head_for`."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from oracle import assert_same, expected_gradients, relay_gradients, step_gradients
from relaybackprop import AuxiliaryHead, LinearHead, Plan, Relay, TokenHead, Window, head_for
from relaybackprop.errors import HeadError, ModuleNameError, PlanError
from relaybackprop.heads import DenseHead, Select
from relaybackprop.planning.matching import Heads

CLASSES = 5
AUX = Plan(auxiliary={"aux": Window(top="1")})


def plan_of(low: str, top: str) -> Plan:
    """Return a relay with an overlap from the output of `low` to the output of `top`."""
    return Plan(Window(after=low), {"aux": Window(top=top)})


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side)


def resnet18() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    models = pytest.importorskip("torchvision").models
    return models.resnet18(num_classes=CLASSES), plan_of("layer1", "layer2.1"), (images(48),)


def swin_of_torchvision() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    models = pytest.importorskip("torchvision").models
    model = models.SwinTransformer([4, 4], 8, [1, 2], [1, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES)
    return model, plan_of("features.1", "features.3.0"), (images(),)


def vit_of_torchvision() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    models = pytest.importorskip("torchvision").models
    model = models.VisionTransformer(32, 8, 4, 2, 12, 16, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # zero by default: no gradient
    blocks = "encoder.layers.encoder_layer_"
    return model, plan_of(f"{blocks}0", f"{blocks}2"), (images(),)


def r3d() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    models = pytest.importorskip("torchvision").models
    return models.video.r3d_18(num_classes=CLASSES), plan_of("layer1", "layer2"), (torch.randn(2, 3, 2, 16, 16),)


def fcn() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    models = pytest.importorskip("torchvision").models
    backbone = models._utils.IntermediateLayerGetter(models.resnet18(), {"layer4": "out"})
    model = models.segmentation.FCN(backbone, models.segmentation.fcn.FCNHead(512, CLASSES))
    return model, plan_of("backbone.layer1", "backbone.layer2"), (images(48),)


def swin_of_timm() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    pytest.importorskip("timm")
    from timm.models.swin_transformer import SwinTransformer

    options = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4, "num_classes": CLASSES}
    return SwinTransformer(32, 4, **options, drop_path_rate=0.0), plan_of("layers.0", "layers.1.blocks.0"), (images(),)


def mambaout_of_timm() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    pytest.importorskip("timm")
    from timm.models.mambaout import MambaOut

    model = MambaOut(num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))
    return model, plan_of("stages.0", "stages.1"), (images(64),)


def vit_of_timm() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer

    options = {"embed_dim": 12, "depth": 4, "num_heads": 2, "num_classes": CLASSES, "global_pool": "avg"}
    return VisionTransformer(32, 8, **options), plan_of("blocks.0", "blocks.2"), (images(),)


SMALL: dict[str, Any] = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}


def words() -> Tensor:
    return torch.randint(19, (2, 6))


def bert() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    """A model with an attention mask, which does not run on the meta device."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL, intermediate_size=12, num_labels=CLASSES)
    model = transformers.BertForSequenceClassification(config)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    return model, plan_of("bert.encoder.layer.0", "bert.encoder.layer.2"), (words(), mask)


def gpt2() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    """A model with untied weights: for the reference, a whole parameter is inside or outside a window."""
    transformers = pytest.importorskip("transformers")
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=19, n_embd=8, n_layer=4, n_head=2, tie_word_embeddings=False, **ids)
    return transformers.GPT2LMHeadModel(config), plan_of("transformer.h.0", "transformer.h.2"), (words(),)


class Pair(nn.Module):
    """A layer that returns a dict of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, value: Any) -> Any:
        tokens = value if isinstance(value, Tensor) else value["state"][1]
        return {"mask": torch.ones(2, dtype=torch.bool, device=tokens.device), "state": [1, self.fc(tokens)]}


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, value: Any) -> Tensor:
        return self.fc(value["state"][1].mean(1))


def nested() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    return nn.Sequential(Pair(), Pair(), Pair(), Last()), plan_of("0", "1"), (torch.randn(2, 3, 4),)


def rows() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    return model, plan_of("1", "3"), (torch.randn(3, 4),)


def audio() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    convs = (nn.Conv1d(2, 4, 3), nn.GELU(), nn.Conv1d(4, 6, 3), nn.GELU(), nn.Conv1d(6, 6, 3))
    pool = (nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, CLASSES))
    return nn.Sequential(*convs, *pool), plan_of("1", "3"), (torch.randn(2, 2, 20),)


def volumes() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    """Segmentation in three dimensions."""
    down = (nn.Conv3d(1, 4, 3, 2, 1), nn.GELU(), nn.Conv3d(4, 4, 3, 1, 1), nn.GELU())
    return nn.Sequential(*down, nn.ConvTranspose3d(4, CLASSES, 2, 2)), plan_of("1", "3"), (torch.randn(2, 1, 4, 6, 8),)


def lstm() -> tuple[nn.Module, Plan, tuple[Any, ...]]:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.LSTM(4, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.two(self.norm(self.one(x)[0]))[0][:, -1])

    return Classifier(), plan_of("norm", "two"), (torch.randn(2, 3, 4),)


# For each model: the head, words of the reason, and the shape of its scores.
CASES: list[tuple[Callable[[], tuple[nn.Module, Plan, tuple[Any, ...]]], type[nn.Module], str, tuple[int, ...]]] = [
    (resnet18, AuxiliaryHead, "32 and 256 features, batch-normalised", (2, 5)),
    (swin_of_torchvision, TokenHead, "mean over all tokens", (2, 5)),
    (vit_of_torchvision, TokenHead, "first token", (2, 5)),
    (r3d, LinearHead, "average pooling", (2, 5)),
    (fcn, DenseHead, "each side times 8", (2, 5, 48, 48)),
    (swin_of_timm, TokenHead, "mean over all tokens", (2, 5)),
    (mambaout_of_timm, TokenHead, "mean over all tokens", (2, 5)),
    (vit_of_timm, TokenHead, "first token", (2, 5)),
    (bert, TokenHead, "mean over all tokens", (2, 5)),
    (nested, Select, "output['state'][1] of 1", (2, 5)),
    (rows, LinearHead, "features without a map", (3, 5)),
    (audio, LinearHead, "average pooling", (2, 5)),
    (volumes, DenseHead, "each side times 2", (2, 5, 4, 6, 8)),
    (lstm, Select, "output[0] of two", (2, 5)),
    (gpt2, TokenHead, "scores of each token", (2, 6, 19)),
]


@pytest.mark.parametrize(("make", "kind", "reason", "scores"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_head_for_builds_a_head_whose_gradients_are_exact(
    make: Callable[[], tuple[nn.Module, Plan, tuple[Any, ...]]],
    kind: type[nn.Module],
    reason: str,
    scores: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    model, plan, inputs = make()
    model.double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    heads = head_for(model, plan, inputs, scores[-1] if make is gpt2 else CLASSES)
    assert list(heads) == ["aux"]
    assert type(heads["aux"]) is kind
    assert reason in heads.reasons["aux"]
    assert str(heads) == f"aux: {heads.reasons['aux']}"
    relay = Relay(model, plan, heads)
    assert relay(*inputs).auxiliary["aux"].shape == scores
    expected = expected_gradients(relay, *inputs)
    assert_same(relay_gradients(relay, *inputs), expected)
    assert any(gradient.any() for name, gradient in expected.items() if name.startswith("heads."))
    with pytest.raises(AssertionError, match=r"relative error|expected no gradient"):
        assert_same(relay_gradients(relay, *inputs), expected_gradients(relay, *inputs, plan=plan.multi_loss()))
    if kind is not AuxiliaryHead:  # dropout draws in another order in a step
        assert_same(step_gradients(relay, *inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "top", "reason"),
    [
        ("hrnet_w18_small", "stage2", "AuxiliaryHead.*output.0. of stage2: channels first"),
        ("convnext_atto", "stages.2", "AuxiliaryHead.*channels first"),
        ("mvitv2_tiny", "stages.1", "TokenHead .mean.*output.0. of stages.1: channels last"),
        ("levit_128s", "stages.1", "TokenHead .mean.*channels last"),
        ("nest_tiny", "levels.1", "AuxiliaryHead.*channels first"),
        ("swinv2_tiny_window8_256", "layers.1", "TokenHead .mean.*channels last"),
        ("volo_d1_224", "network.2", "TokenHead .mean.*14, 14, 384.*channels last"),
        ("cait_xxs24_224", "blocks.5", "TokenHead .mean"),  # it adds its class token later
        ("vit_tiny_patch16_224", "blocks.5", "TokenHead .the first token"),
        ("twins_pcpvt_small", "blocks.2.0", "TokenHead .mean.*channels last"),
    ],
)
def test_head_for_reads_timms_layouts(name: str, top: str, reason: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES)
    x = torch.empty(2, *model.default_cfg["input_size"], device="meta")
    heads = head_for(model, Plan(auxiliary={"aux": Window(top=top)}), x, CLASSES)
    assert re.match(reason, heads.reasons["aux"]), heads.reasons["aux"]


def refused(*parts: str) -> Any:
    return pytest.raises(HeadError, match="(?s)" + ".*".join(re.escape(part) for part in parts))


REFUSED: dict[str, tuple[nn.Module, Any, tuple[str, ...]]] = {
    "tokens": (LinearHead(32, 5), (2, 17, 32), ("(2, 17, 32)", "(N, 32) or (N, 32, H, W)", "TokenHead(32, classes)")),
    "Swin": (LinearHead(96, 5), (2, 4, 4, 96), ("(2, 4, 4, 96)", "(N, 96, H, W)", "TokenHead(96, classes)")),
    "Swin's rows": (
        AuxiliaryHead(14, 5),
        (2, 14, 14, 384),
        ("(2, 14, 14, 384)", "(N, 14, H, W)", "height read as channels: TokenHead(384, classes)", "channels_first"),
    ),
    "H == C": (
        LinearHead(8, 5),
        (2, 8, 6, 8),
        ("(2, 8, 6, 8)", "is not declared", "Either dimension may be the channels"),
    ),
    "video": (LinearHead(64, 5), (2, 64, 4, 8, 8), ("(2, 64, 4, 8, 8)", "(N, 64, H, W)", "layout='channels_first'")),
    "audio": (AuxiliaryHead(64, 5), (2, 64, 50), ("(2, 64, 50)", "(N, 64, H, W)", "LinearHead(", "channels_first")),
    "rows": (AuxiliaryHead(64, 5), (2, 64), ("(2, 64)", "(N, 64, H, W)", "LinearHead(")),
    "another width": (
        LinearHead(6, 5),
        (2, 5, 4, 4),
        ("(2, 5, 4, 4)", "(N, 6, H, W)", "LinearHead(5, ...) reads 5 channels", "head_for("),
    ),
    "declared": (
        LinearHead(6, 5, layout="channels_first"),
        (2, 4, 4, 6),
        ("(2, 4, 4, 6)", "(N, 6, H, W)", "TokenHead(6, classes)"),
    ),
    "maps": (TokenHead(6, 5), (2, 6, 4, 4), ("(2, 6, 4, 4)", "(N, L, 6)", "layout='channels_first'")),
    "maps by one token": (TokenHead(6, 5, pool="first"), (2, 4, 4, 6), ("(2, 4, 4, 6)", "(N, L, 6)", "TokenHead(6")),
    "dense tokens": (DenseHead(6, 5, size=(8, 8)), (2, 9, 6), ("(2, 9, 6)", "(N, 6, H, W)", "TokenHead(6")),
    "volumes": (
        DenseHead(6, 5, size=(8, 8, 8)),
        (2, 6, 4, 4, 4),
        ("DenseHead", "(2, 6, 4, 4, 4)", "must be declared", "channels_"),
    ),
    "a scalar": (LinearHead(6, 5), (), ("a tensor of shape ()", "(N, 6)", "has 6 channels")),
    "a dict": (LinearHead(6, 5), {"out": torch.ones(2, 6)}, ("dict with items ['out']", "(N, 6)", "Select(key")),
    "another key": (Select("x", LinearHead(6, 5)), [torch.ones(2, 6)], ("list with items [0]", "item 'x'", "[0]")),
    "one tensor": (Select(0, LinearHead(6, 5)), (2, 6), ("(2, 6)", "item 0", "without Select")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_inputs_raise(name: str) -> None:
    head, value, parts = REFUSED[name]
    with refused(*parts):
        head(torch.ones(value) if isinstance(value, tuple) else value)


def test_state_dict_keys_and_initial_values_are_stable() -> None:
    torch.manual_seed(3)
    got = {**AuxiliaryHead(6, 5, batch_norm=True).state_dict(), **LinearHead(6, 5).state_dict()}
    torch.manual_seed(3)
    layers = {"conv": nn.Conv2d(6, 128, 1, bias=False), "norm": nn.BatchNorm2d(128), "fc1": nn.Linear(2048, 1024)}
    layers |= {"fc2": nn.Linear(1024, 5), "fc": nn.Linear(6, 5)}
    assert_close(got, dict(nn.ModuleDict(layers).state_dict()), rtol=0, atol=0)
    maps = torch.randn(2, 6, 6, 6)  # a map with equal dimensions is read as channels first
    head = LinearHead(6, 5)
    assert_close(head(maps), head.fc(maps.mean(dim=(2, 3))), rtol=0, atol=0)


def test_channels_last_equals_channels_first() -> None:
    maps = torch.randn(3, 6, 5, 7)
    rows = maps.movedim(1, -1).contiguous()
    for kind in (LinearHead, AuxiliaryHead, lambda *args, **options: DenseHead(*args, size=2, **options)):
        first, last = kind(6, 5, layout="channels_first").eval(), kind(6, 5, layout="channels_last").eval()
        last.load_state_dict(first.state_dict())
        assert_close(last(rows), first(maps))
        assert_close(first(maps), kind(6, 5).eval().requires_grad_(False)(maps) * 0 + first(maps))


def test_token_head_pools() -> None:
    tokens = torch.randn(2, 7, 6)
    normed = nn.functional.layer_norm(tokens, (6,))
    pooled = {"mean": normed.mean(1), "first": normed[:, 0], "last": normed[:, -1], None: normed}
    for pool, value in pooled.items():
        head = TokenHead(6, 5, pool=pool)
        assert_close(head(tokens), head.fc(value))
    head = TokenHead(6, 5)
    assert_close(head(tokens.unflatten(1, (7, 1))), head(tokens))


def test_dense_head_is_a_convolution_and_an_interpolation() -> None:
    maps = torch.randn(2, 6, 3, 4)
    head = DenseHead(6, 5, size=(9, 10))
    scores = nn.functional.conv2d(maps, head.conv.weight.unsqueeze(-1), head.conv.bias)
    expected = nn.functional.interpolate(scores, (9, 10), mode="bilinear", align_corners=False)
    assert_close(head(maps), expected)
    assert DenseHead(6, 5, size=3)(maps).shape == (2, 5, 9, 12)
    target = torch.randint(5, (2, 9, 10))
    assert nn.functional.cross_entropy(head(maps), target).isfinite()


HEADS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "auxiliary": (AuxiliaryHead, (64, 64, 6, 6)),
    "auxiliary, normed": (lambda *args, **options: AuxiliaryHead(*args, batch_norm=True, **options), (64, 64, 6, 6)),
    "linear": (LinearHead, (64, 64)),
    "tokens": (TokenHead, (64, 9, 64)),
    "token": (lambda *args, **options: TokenHead(*args, pool="first", **options), (64, 9, 64)),
    "each token": (lambda *args, **options: TokenHead(*args, pool=None, **options), (64, 9, 64)),
    "dense": (lambda *args, **options: DenseHead(*args, size=1, **options), (64, 64, 6, 6)),
}


def excess(head: nn.Module, shape: tuple[int, ...], classes: int) -> float:
    """Return the initial loss on normalised input over ln(classes), minus one."""
    scores = head(torch.randn(shape))
    scores = scores if scores.ndim == 2 or isinstance(head, DenseHead) else scores.movedim(-1, 1)
    target = torch.randint(classes, (scores.shape[0], *scores.shape[2:]))
    return abs(float(nn.functional.cross_entropy(scores, target).detach()) / math.log(classes) - 1)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("name", HEADS)
def test_quiet_head_starts_near_the_chance_loss(name: str, classes: int) -> None:
    torch.manual_seed(0)
    make, shape = HEADS[name]
    head = make(64, classes, gain="quiet")
    assert excess(head, shape, classes) < 0.1
    last = [p for key, p in head.named_parameters() if key.endswith("weight") and p.ndim > 1][-1]
    assert float(last.detach().std()) == pytest.approx(0.1 / last.shape[1] ** 0.5, rel=0.3)


def test_he_gain_has_larger_scores_than_quiet() -> None:
    torch.manual_seed(0)
    assert excess(LinearHead(64, 10, gain="he"), (256, 64), 10) > 0.1
    layer = LinearHead(4096, 50, gain="he").fc
    assert float(layer.weight.detach().std()) == pytest.approx((2 / 4096) ** 0.5, rel=0.02)
    assert not layer.bias.any()


def test_invalid_options_raise() -> None:
    with refused("gain='loud'", "'quiet'", "Pass gain='default'."):
        LinearHead(6, 5, gain="loud")  # pyright: ignore[reportArgumentType]
    with refused("pool='max'", "('mean', 'first', 'last', None)", "Pass pool='mean'."):
        TokenHead(6, 5, pool="max")  # pyright: ignore[reportArgumentType]
    with refused("layout='NCHW'", "'channels_first', 'channels_last'", "Pass layout='channels_first'."):
        LinearHead(6, 5, layout="NCHW")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", HEADS)
def test_heads_run_compiled_and_without_values(name: str) -> None:
    make, shape = HEADS[name]
    head = make(64, 3).eval()
    x = torch.randn(shape)
    assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), head(x))
    assert head.to("meta")(x.to("meta")).is_meta


class Mixed(nn.Module):
    """A block that works channels first and then channels last, as in ConvNeXt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).movedim(1, -1)).movedim(-1, 1)


def test_layers_determine_the_layout_of_ambiguous_shapes() -> None:
    x = torch.randn(2, 8, 8, 8)
    rows = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    maps = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    for top in ("1", "2"):  # the third has no weights: the layers around it determine the layout
        plan = Plan(auxiliary={"aux": Window(top=top)})
        assert "channels last" in head_for(rows, plan, x, 3).reasons["aux"]
        assert "channels first" in head_for(maps, plan, x, 3).reasons["aux"]


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Conv2d(8, 8, 1), Mixed(8)), nn.Sequential(nn.Tanh(), nn.Tanh())], ids=["both", "none"]
)
def test_undetectable_layout_raises(model: nn.Module) -> None:
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    with refused("(2, 8, 8, 8), the output of 1, the top of 'aux'", "layout='channels_first'", "'channels_last'"):
        head_for(model, AUX, x, 3)
    assert type(head_for(model, AUX, x, 3, layout="channels_first")["aux"]) is AuxiliaryHead
    assert type(head_for(model, AUX, x, 3, layout="channels_last")["aux"]) is TokenHead
    if any(isinstance(module, Mixed) for module in model.modules()):  # with other sizes the layout can be detected
        assert "channels first" in head_for(model, AUX, torch.randn(2, 8, 4, 4), 3).reasons["aux"]


class LooksAtValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > -1e9 else -x


def test_head_for_does_not_change_the_model() -> None:
    for extra in (nn.Identity(), LooksAtValues()):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), extra).train()
        model[2].eval()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        rng = torch.get_rng_state()
        heads = head_for(model, AUX, torch.randn(2, 3, 8, 8), 5)
        assert isinstance(heads, Heads)
        assert [module.training for module in model] == [True, True, False, True]
        assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
        assert not any(module._forward_hooks for module in model.modules())
        assert all(p.grad is None for p in model.parameters())
        assert not torch.equal(torch.get_rng_state(), rng)  # the heads' own weights
    with pytest.raises(PlanError, match="item"):
        head_for(model, AUX, torch.empty(2, 3, 8, 8, device="meta"), 5)


def test_head_for_errors() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(0, 1), nn.Unflatten(0, (2, 6)), nn.Conv2d(6, 5, 1))
    x = torch.randn(2, 3, 8, 8)
    with refused("[(12, 8, 8)]", "N = 2", "Move the top"):
        head_for(conv, AUX, x, 3)
    flat = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Flatten(2), nn.Unflatten(2, (8, 8)), nn.Conv2d(6, 5, 1))
    with refused("(2, 6, 64)", "is not a map", "(2, 5, 8, 8)", "Move the top"):
        head_for(flat, AUX, x, 5, layout="channels_first")
    assert "no output of the model has 4 classes" in str(head_for(conv, Plan(auxiliary={"a": Window(top="0")}), x, 4))
    with pytest.raises(ModuleNameError):
        head_for(conv, Plan(auxiliary={"aux": Window(top="9")}), x, 3)
    uncalled = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    uncalled.forward = uncalled[0].forward
    with refused("does not call 1", "a module that runs", "Name a module"):
        head_for(uncalled, AUX, torch.randn(2, 3), 3)


def test_head_for_options() -> None:
    tokens = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    heads = head_for(tokens, AUX, torch.randn(2, 3, 4), 5, pool="last", gain="quiet")
    head = heads["aux"]
    assert isinstance(head, TokenHead)
    assert head.pool == "last"
    assert not head.fc.bias.any()
    words = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    for pool in (None, "mean"):
        head = head_for(words, AUX, torch.ones(2, 3, dtype=torch.long), 9, pool=pool)["aux"]
        assert isinstance(head, TokenHead)
        assert head.pool == pool


def test_pooling_determines_the_layout_of_concatenated_maps() -> None:
    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)
            self.pool = nn.MaxPool2d(2)
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(torch.cat([self.left(x), self.right(x)], dim=1))  # (2, 6, 8, 6): no layer has six channels
            return self.fc(x.mean((2, 3)))

    heads = head_for(Inception(), Plan(auxiliary={"aux": Window(top="pool")}), torch.rand(2, 3, 16, 12), 5)
    assert "channels first, as in pool" in heads.reasons["aux"]
