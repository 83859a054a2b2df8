"""Small real models of torchvision, timm, transformers and MONAI, with random weights, for test_sweep.py."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Lazy:
    """A lazily imported package, so that collecting tests does not import it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


models, swin = Lazy("torchvision.models"), Lazy("torchvision.models.swin_transformer")
timm, metaformer, mlp_mixer = Lazy("timm"), Lazy("timm.models.metaformer"), Lazy("timm.models.mlp_mixer")
transformers, nets = Lazy("transformers"), Lazy("monai.networks.nets")

CLASSES = 5
TOKENS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)


@dataclass(frozen=True)
class Entry:
    """One model of the sweep.

    Args:
        build: makes it.
        inputs: its arguments by name, or one tensor.
        classes: of its output.
        tolerance: relative error; larger where the model computes in float32 inside.
    """

    build: Callable[[], nn.Module]
    inputs: Any
    classes: int = CLASSES
    tolerance: float = 1e-8


def image(side: int, channels: int = 3, dims: int = 2, batch: int = 2) -> Tensor:
    return torch.rand(batch, channels, *[side] * dims, generator=torch.Generator().manual_seed(0))


def torchvision_models() -> dict[str, Entry]:
    def of(name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(models, name)(num_classes=CLASSES, **options)

    plain = ["resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0",
             "shufflenet_v2_x0_5", "mnasnet0_5"]  # fmt: skip
    found = {name: Entry(of(name), image(32)) for name in plain}
    found["squeezenet1_1"] = Entry(of("squeezenet1_1"), image(64))
    found["googlenet"] = Entry(of("googlenet", aux_logits=False, init_weights=False), image(64))
    block = {"patch_size": [4, 4], "embed_dim": 12, "depths": [1, 2, 4], "num_heads": [1, 2, 3], "window_size": [4, 4]}
    found["swin"] = Entry(lambda: swin.SwinTransformer(**block, num_classes=CLASSES), image(64))
    found["swin v2"] = Entry(lambda: swin.SwinTransformer(**block, num_classes=CLASSES,
        block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2), image(64))  # fmt: skip
    found["vit"] = Entry(lambda: models.VisionTransformer(32, 8, 6, 2, 16, 32, num_classes=CLASSES), image(32))
    found["resnet50, narrow"] = Entry(of("resnet50", width_per_group=8), image(32))
    found["lraspp_mobilenet"] = Entry(lambda: models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES), image(64))  # fmt: skip
    return found


SHALLOW = {"depths": (1, 2, 4, 1)}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (1, 2, 4), "num_heads": (1, 2, 3)}
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "vit_tiny_patch16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6}),
    "cait_xxs24_224": (32, {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 6, "num_heads": 2}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "embed_dim": 24, "depth": 6}),
    "convnext_atto": (32, {**SHALLOW, "dims": (8, 12, 16, 24)}),
    "convnextv2_atto": (32, {**SHALLOW, "dims": (8, 12, 16, 24)}),
    "mambaout_femto": (64, {**SHALLOW, "dims": (8, 12, 16, 24)}),
    "swin_tiny_patch4_window7_224": (64, SWIN),
    "swinv2_tiny_window8_256": (64, SWIN),
    "edgenext_xx_small": (64, {**SHALLOW, "dims": (8, 16, 24, 32)}),
    "pvt_v2_b0": (64, {"depths": (1, 1, 3, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}),
    "twins_svt_small": (64, {"depths": (1, 1, 4, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}),
    "resnest14d": (32, {}),
    "hrnet_w18_small": (64, {}), "dla46_c": (32, {}),

    "regnetx_002": (32, {}),
}  # fmt: skip


def timm_models() -> dict[str, Entry]:
    def of(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name, num_classes=CLASSES, **options)

    found = {name: Entry(of(name, options), image(side)) for name, (side, options) in TIMM.items()}
    mixer = {"num_classes": CLASSES, "img_size": 32, "patch_size": 8, "embed_dim": 24, "num_blocks": 6}
    former = {"num_classes": CLASSES, **SHALLOW, "dims": (8, 12, 32, 32)}

    def caformer() -> nn.Module:
        mixers = [metaformer.SepConv] * 2 + [metaformer.Attention] * 2
        norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
        return metaformer.MetaFormer(**former, token_mixers=mixers, norm_layers=norms)

    return found | {
        "mlp-mixer": Entry(lambda: mlp_mixer.MlpMixer(**mixer), image(32)),
        "resmlp": Entry(lambda: mlp_mixer.MlpMixer(**mixer, mlp_ratio=4, block_layer=mlp_mixer.ResBlock), image(32)),
        "poolformer": Entry(lambda: metaformer.MetaFormer(**former, token_mixers=metaformer.Pooling), image(64)),
        "caformer": Entry(caformer, image(64)),
    }


def transformers_models() -> dict[str, Entry]:
    small = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 48}
    words = {"vocab_size": 64, "max_position_embeddings": 64, "num_labels": CLASSES}
    text = {"input_ids": TOKENS, "attention_mask": MASK}
    pixels = {"pixel_values": image(32)}
    vision = {**small, "image_size": 32, "patch_size": 8, "num_labels": CLASSES}
    causal = {
        **small,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "use_cache": False,
        "tie_word_embeddings": False,
    }  # tied weights count in the window of each use: tests/test_autograd.py

    def of(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options))

    return {
        "hf vit": Entry(of("ViTForImageClassification", "ViTConfig", **vision), pixels),
        "hf deit": Entry(of("DeiTForImageClassification", "DeiTConfig", **vision), pixels),
        "hf beit": Entry(of("BeitForImageClassification", "BeitConfig", **vision), pixels),
        "hf dinov2": Entry(of("Dinov2ForImageClassification", "Dinov2Config", **{**vision, "mlp_ratio": 2}), pixels),
        "hf vit-mae": Entry(of("ViTMAEForPreTraining", "ViTMAEConfig", **small, image_size=32, patch_size=8,
            decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
            decoder_intermediate_size=48), pixels),
        "hf swin": Entry(of("SwinForImageClassification", "SwinConfig", image_size=64, embed_dim=12, depths=[1, 2, 2],
            num_heads=[1, 2, 2], window_size=4, num_labels=CLASSES), {"pixel_values": image(64)}),
        "hf swinv2": Entry(of("Swinv2ForImageClassification", "Swinv2Config", image_size=64, embed_dim=12,
            depths=[1, 2, 2], num_heads=[1, 2, 2], window_size=4, num_labels=CLASSES), {"pixel_values": image(64)}),
        "hf convnext": Entry(of("ConvNextForImageClassification", "ConvNextConfig", depths=[1, 1, 3, 1],
            hidden_sizes=[8, 16, 24, 32], num_labels=CLASSES), {"pixel_values": image(64)}),
        "hf resnet": Entry(of("ResNetForImageClassification", "ResNetConfig", embedding_size=8, depths=[1, 2, 3, 1],
            hidden_sizes=[16, 24, 32, 48], num_labels=CLASSES), {"pixel_values": image(64)}),
        "hf segformer": Entry(of("SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 2, 1],
            hidden_sizes=[8, 16, 24, 32], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
            num_labels=CLASSES), {"pixel_values": image(64)}),
        "hf bert": Entry(of("BertForSequenceClassification", "BertConfig", **small, **words), text),
        "hf roberta": Entry(of("RobertaForSequenceClassification", "RobertaConfig", **small, **words), text),
        "hf distilbert": Entry(of("DistilBertForSequenceClassification", "DistilBertConfig", dim=32, n_layers=6,
            n_heads=2, hidden_dim=48, **words), text),
        "hf electra": Entry(of("ElectraForSequenceClassification", "ElectraConfig", **small, **words), text),
        "hf albert": Entry(of("AlbertForSequenceClassification", "AlbertConfig", **small, **words,
            embedding_size=16), text),
        "hf deberta-v2": Entry(of("DebertaV2ForSequenceClassification", "DebertaV2Config", **small, **words,
            relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm",
            share_att_key=True), text),
        "hf bert mlm": Entry(of("BertForMaskedLM", "BertConfig", **small, **words, tie_word_embeddings=False),
            text, 64),
        "hf gpt2": Entry(of("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=6, n_head=2, vocab_size=64,
            n_positions=64, use_cache=False, tie_word_embeddings=False), text, 64),
        "hf opt": Entry(of("OPTForCausalLM", "OPTConfig", **{**causal, "ffn_dim": 48, "word_embed_proj_dim": 32}),
            text, 64),
        "hf gpt-neox": Entry(of("GPTNeoXForCausalLM", "GPTNeoXConfig", **causal), text, 64, 1e-5),
        "hf bloom": Entry(of("BloomForCausalLM", "BloomConfig", hidden_size=32, n_layer=6, n_head=2, vocab_size=64,
            use_cache=False, tie_word_embeddings=False), text, 64, 1e-5),
        "hf llama": Entry(of("LlamaForCausalLM", "LlamaConfig", **causal), text, 64, 1e-5),
        "hf mistral": Entry(of("MistralForCausalLM", "MistralConfig", **causal, num_key_value_heads=1), text, 64, 1e-5),
        "hf qwen3": Entry(of("Qwen3ForCausalLM", "Qwen3Config", **causal, num_key_value_heads=1, head_dim=16),
            text, 64, 1e-5),
        "hf gemma": Entry(of("GemmaForCausalLM", "GemmaConfig", **causal, num_key_value_heads=1, head_dim=16),
            text, 64, 1e-5),
        "hf mamba": Entry(of("MambaForCausalLM", "MambaConfig", hidden_size=32, num_hidden_layers=6, vocab_size=64,
            state_size=4, use_cache=False, tie_word_embeddings=False), {"input_ids": TOKENS}, 64, 1e-5),
        "hf t5": Entry(of("T5ForConditionalGeneration", "T5Config", vocab_size=64, d_model=32, d_kv=16, d_ff=48,
            num_layers=4, num_heads=2, decoder_start_token_id=0, use_cache=False,
            tie_word_embeddings=False),
            {"input_ids": TOKENS, "decoder_input_ids": TOKENS}, 64, 1e-5),
        "hf wav2vec2": Entry(of("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **small, conv_dim=(16, 16),
            conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2, num_labels=CLASSES, mask_time_prob=0.0, layerdrop=0.0),
            {"input_values": image(400, 1, 1)[:, 0]}),
    }  # fmt: skip


def monai_models() -> dict[str, Entry]:
    volume = image(16, 1, 3)
    sides = {"spatial_dims": 3, "in_channels": 1, "out_channels": CLASSES}
    return {
        "monai resnet10": Entry(lambda: nets.resnet10(n_input_channels=1, num_classes=CLASSES, widen_factor=0.125),
            volume),
        "monai unet": Entry(lambda: nets.UNet(**sides, channels=(4, 8, 16), strides=(2, 2), num_res_units=1), volume),
        "monai basic unet": Entry(lambda: nets.BasicUNet(**sides, features=(4, 4, 8, 8, 16, 4)), image(32, 1, 3)),
        "monai segresnet": Entry(lambda: nets.SegResNet(**sides, init_filters=8), volume),
        "monai attention unet": Entry(lambda: nets.AttentionUnet(**sides, channels=(4, 8, 16), strides=(2, 2)), volume),
    }  # fmt: skip
