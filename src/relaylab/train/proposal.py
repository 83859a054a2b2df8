"""Propose a recipe for a network and a data set: sizes, schedule, windows and heads, each with its reason."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from relaybackprop import RelayError, cost, head_for, suggest_plan
from relaybackprop.plan import Plan, Window
from relaybackprop.planning.cost import EARLY_RELEASE
from relaylab.data.scan import ScanResults
from relaylab.data.sources.source import Source, class_counts, targets_of
from relaylab.errors import InputError
from relaylab.models.building import build_meta_network
from relaylab.recipes.decoding import decode_recipe, nested
from relaylab.recipes.scales import stored_side
from relaylab.recipes.schema import SCHEME_NAMES, ImagesConfig, NetworkConfig, Recipe

LARGEST, STEP = 224, 32  # crop size in pixels: the paper's size, and a multiple that can be halved five times
SMALLEST = 32  # crop size in pixels up to which images are padded
LARGEST_BATCH, LEAST_BATCH, STEPS = 128, 8, 20  # STEPS is the intended minimum per epoch
IMBALANCE = 1.5  # ratio of the largest to the smallest class from which sampling is class-aware
SCARCE = 2  # images of a class up to which its errors say little
VALIDATIONS = 50  # maximum per run
SIZE_OPTIONS = ("img_size", "image_size")  # arguments of networks with a fixed image size
WIDTH = 98  # columns

Value = tuple[Any, str]  # value and its source


@dataclass(frozen=True, kw_only=True)
class Preferences:
    """Preferences of the user; None to derive the value from the images.

    Attributes:
        name: name of the recipe.
        network: architecture, as written to the recipe file.
        epochs: number of epochs.
        size: crop size in pixels.
        batch_size: batch size.
        heads: number of auxiliary losses.
        optimizer: a name in `relaylab.train.optimizers.OPTIMIZERS`.
        pretrained: file of pretrained weights, as written to the recipe file.
        options: further keyword arguments of the network.
    """

    name: str
    network: str
    epochs: int = 30
    size: int | None = None
    batch_size: int | None = None
    heads: int = 1
    optimizer: str | None = None
    pretrained: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Proposal:
    """A recipe, notes, which are comments to write above its TOML tables, and whether a class has too few images."""

    recipe: Recipe
    notes: Mapping[str, Sequence[str]]
    is_scarce: bool = False


def propose(
    network: str, train: Source, images: ImagesConfig, chosen: int, results: ScanResults, preferences: Preferences
) -> Proposal:
    """Propose a recipe.

    Args:
        network: architecture.
        train: all training images.
        images: settings for held-out images and validation.
        chosen: number of images to train on.
        results: results of a scan of some of the images.
        preferences: the user's preferences.

    Raises:
        InputError: the network cannot be built, or does not accept the images.
    """
    values = _sizes(results, preferences) | _images(train, images)
    values |= _crops(values["network.image_size"][0])
    size, batch = values["network.image_size"][0], preferences.batch_size or _batch_size(chosen)
    config = NetworkConfig(
        architecture=network, num_classes=len(train.classes), image_size=size, options=preferences.options
    )
    config, model = _fitting(config)
    for name, value in config.options.items():
        source = "the command line" if name in preferences.options else "the crop size"
        values[f"network.options.{name}"] = value, source
    values |= _optimizer(model, chosen, batch, preferences)
    if preferences.pretrained is not None:
        values |= _fine_tuning(values, model, preferences.pretrained)
    example = torch.empty(batch, 3, size, size, device="meta")
    plan, notes = _windows(model, example, config, preferences.heads)
    values |= plan
    values |= {
        "network.architecture": (preferences.network, "the command line"),
        "network.num_classes": (len(train.classes), "the images"),
    }
    head = {"name": preferences.name, "row": f"{preferences.network} on {train.title}"}
    problems: list[str] = []
    plain, sources = ({name: pair[i] for name, pair in values.items()} for i in (0, 1))
    recipe = decode_recipe(nested(plain) | head, sources, problems)
    assert not problems, problems
    rest = "Omitted values have the defaults that `relaylab recipes show` prints for this file."
    about = [*_wrapped(_about(preferences.network, train, chosen, results)), ""]
    counts = class_counts(train)
    least = int(counts[counts > 0].min())
    if is_scarce := least <= SCARCE:
        about += [*_wrapped(f"A class has only {_counted(least, 'image')}: too few to tune or compare."), ""]
    notes[""] = [*about, *notes[""], "", rest, ""]
    return Proposal(recipe, notes, is_scarce)


def _sizes(results: ScanResults, preferences: Preferences) -> dict[str, Value]:
    sides = np.minimum(results.widths, results.heights)
    median = int(np.median(sides))
    size = preferences.size or min(LARGEST, max(STEP, median // STEP * STEP))
    given = (
        f"half of the images have shorter sides of at least {median} pixels; a multiple of {STEP}, at most {LARGEST}"
    )
    stored = stored_side(size)
    return {
        "network.image_size": (size, "the command line" if preferences.size else given),
        "images.short_side": (stored, "in proportion to the paper's, 256 for crops of 224"),
        "evaluation.protocol": ("single crop", "the paper, section 5.1"),
        "evaluation.scales": ([stored], "the size of the training images"),
    }


def _crops(size: int) -> dict[str, Value]:
    """Return the crop settings; small images are padded, since the paper's margin would leave few positions."""
    if size > SMALLEST:
        return {"augmentation.crop": ("window", "the paper, section 5.1")}
    source = f"usual for small images: an eighth of the size, 4 for CIFAR's {SMALLEST} (He et al., 2016, section 4.2)"
    return {
        "images.short_side": (size, "the crop size; padding shifts the crops"),
        "evaluation.scales": ([size], "the size of the training images"),
        "augmentation.crop": ("window", "usual for small images, after padding"),
        "augmentation.padding": (size // 8, source),
    }


def _images(train: Source, images: ImagesConfig) -> dict[str, Value]:
    counts, has_several = class_counts(train), targets_of(train) is not None
    ratio = counts.max() / max(1, counts.min())
    sampling = "class-aware" if ratio >= IMBALANCE and not has_several else "shuffled"
    unequal = f"the largest class has {ratio:.3g} times as many images as the smallest"
    why = "all classes have the same number of images" if ratio == 1 else unequal
    several = "the images are multi-label"
    function: Value = ("cross-entropy", "usual for single-label images")
    values: dict[str, Value] = {
        "images.data_set": ("any", "the command line, --data"),
        "images.sampling": (sampling, several if has_several else why),
        "loss.function": ("binary", several) if has_several else function,
        "augmentation.flip": (True, "usual for photographs; set to false if mirroring changes the class"),
        "augmentation.colour_shift": (0.0, "none; the paper's is 0.1"),
        "augmentation.mean": ("channel", "usual; the paper's is the mean image"),
        "augmentation.divide": (True, "usual: the learning rate then transfers between networks"),
    }
    for name in ("held_out", "val_split"):
        if (value := getattr(images, name)) is not None:
            values[f"images.{name}"] = (value, "the command line")
    return values


def _batch_size(count: int) -> int:
    return min(LARGEST_BATCH, max(LEAST_BATCH, 2 ** int(math.log2(max(1, count / STEPS)))))


def _optimizer(model: nn.Module, count: int, batch: int, preferences: Preferences) -> dict[str, Value]:
    epochs, epoch = preferences.epochs, max(1, count // batch)
    has_batch_norm = _has(model, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]
    is_adamw = _has(model, nn.LayerNorm) and not has_batch_norm
    norm = "layer" if is_adamw else "batch" if has_batch_norm else "no"
    algorithm: Value = ("adamw" if is_adamw else "sgd", f"usual for networks with {norm} normalisation")
    if preferences.optimizer is not None:
        algorithm = preferences.optimizer, "the command line"
    return {
        "optimizer.algorithm": algorithm,
        **(_adamw(batch, is_adamw) if algorithm[0] == "adamw" else _sgd(batch, has_batch_norm)),
        "optimizer.batch_size": (batch, f"a power of two with {_counted(epoch, 'step')} per epoch"),
        "optimizer.iterations": (epochs * epoch, f"{_counted(epochs, 'epoch')} of {_counted(epoch, 'step')}"),
        "optimizer.schedule.kind": ("cosine", "it has no hyperparameters"),
        "optimizer.evaluate_every": (max(epoch, epochs * epoch // VALIDATIONS), "every epoch, at most 50 times"),
        "optimizer.warmup": (epoch, "one epoch") if epochs > 1 else (0, "none in a single epoch"),
    }


def _has(model: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in model.modules())


def _sgd(batch: int, has_batch_norm: bool) -> dict[str, Value]:
    values: dict[str, Value] = {
        "optimizer.momentum": (0.9, "the paper, section 5.1"),
        "optimizer.weight_decay": (0.0005, "usual for small data sets; the paper's is 0.0002"),
    }
    if has_batch_norm:
        rate = "0.1 for batches of 256, in proportion (Goyal et al., 2017); batch normalisation"
        return values | {
            "optimizer.lr": (0.1 * batch / 256, rate),
            "optimizer.decay_norms_and_biases": (False, "He et al. (2019), section 3.1: no bias decay"),
            "optimizer.clip_norm": (None, "none, since the network has batch normalisation"),
        }
    return values | {
        "optimizer.lr": (0.01, "the paper, section 5.1; without batch normalisation"),
        "optimizer.decay_norms_and_biases": (True, "the default, as in Caffe"),
        "optimizer.clip_norm": (1.0, "without batch normalisation, gradients may be large at first"),
    }


def _adamw(batch: int, has_layer_norm: bool) -> dict[str, Value]:
    deit = "DeiT (Touvron et al., 2021)"
    rate: Value = (0.001, "torch.optim.AdamW's own")
    if has_layer_norm:
        by = "by the square root of the batch (Malladi et al., 2022)"
        rate = (float(f"{0.001 * (batch / 1024) ** 0.5:.2g}"), f"0.001 for batches of 1,024 in {deit}, Table 9, {by}")
    return {
        "optimizer.lr": rate,
        "optimizer.betas": ((0.9, 0.999), "AdamW's own, as in DeiT"),
        "optimizer.weight_decay": (0.05, f"{deit}, Table 9"),
        "optimizer.decay_norms_and_biases": (False, "as in timm, with which DeiT was trained"),
        "optimizer.clip_norm": (1.0, "Steiner et al. (2022), How to train your ViT"),
    }


def _fine_tuning(values: Mapping[str, Value], model: nn.Module, file: str) -> dict[str, Value]:
    rate, source = values["optimizer.lr"]
    found: dict[str, Value] = {
        "network.pretrained": (file, "the command line"),
        "optimizer.lr": (rate / 10, f"a tenth, since the weights are pretrained, of {source}"),
    }
    if _has(model, nn.LayerNorm):
        found["optimizer.layer_decay"] = (0.75, "MAE (He et al., 2022), Table 9, for fine-tuning")
    return found


def _fitting(config: NetworkConfig) -> tuple[NetworkConfig, nn.Module]:
    """Build the network on the meta device; one with a fixed image size is built for the crop size."""
    try:
        return config, build_meta_network(config)
    except InputError as error:
        for option in SIZE_OPTIONS if config.is_named else ():
            sized = replace(config, options={**config.options, option: config.image_size})
            try:
                return sized, build_meta_network(sized)
            except InputError:
                continue
        raise error from None


def _windows(
    model: nn.Module, example: torch.Tensor, config: NetworkConfig, heads: int
) -> tuple[dict[str, Value], dict[str, list[str]]]:
    """Return the values of the plan and the scheme, and notes: the reasons, and the cost of each scheme."""
    try:
        suggested = suggest_plan(model, example, num_auxiliary=heads)
        chosen = head_for(model, suggested.plan, example, config.num_classes)
        costs = _costs(model, suggested.plan, example, chosen)
    except RelayError as error:
        note = f"No windows were found for this network: {error} Only standard backpropagation is available; "
        note += "docs/method/windows.md describes how to define windows manually."
        return {"scheme": ("standard", "no windows were found")}, {"": _wrapped(note)}
    values: dict[str, Value] = {"scheme": ("relay", "the paper's method; relaylab compare also trains the others")}
    for name, window in {"primary": suggested.plan.primary, **suggested.plan.auxiliary}.items():
        group = "plan.primary" if name == "primary" else f"plan.auxiliary.{name}"
        values |= {f"{group}.{end}": pair for end, pair in _ends(window)}
        if window.top is not None:
            values[f"{group}.top"] = (window.top, "relaybackprop.suggest_plan, for the reasons above")
            values[f"{group}.weight"] = (window.weight, "the paper, section 5.1")
            values[f"{group}.head"] = ("auto", chosen.reasons[name].rstrip("."))
    reasons = [f"{number}. {reason}" for number, reason in enumerate(suggested.reasons, 1)]
    reasons = ["Windows from relaybackprop.suggest_plan:", *reasons]
    above = "plan.primary" if suggested.plan.primary.ends else f"plan.auxiliary.{next(iter(suggested.plan.auxiliary))}"
    return values, {"": costs, above: [line for reason in reasons for line in _wrapped(reason)]}


def _ends(window: Window) -> Iterator[tuple[str, Value]]:
    source = "relaybackprop.suggest_plan, for the reasons above"
    if window.bottom is not None:
        yield "bottom", (window.bottom, source)
    if window.after is not None:
        yield "after", (window.after if isinstance(window.after, str) else ",".join(window.after), source)


def _costs(model: nn.Module, plan: Plan, example: torch.Tensor, heads: Mapping[str, nn.Module]) -> list[str]:
    predicted, batch = cost(model, plan, example, heads), len(example)
    names = {**SCHEME_NAMES, EARLY_RELEASE: "Relay BP, --early-release"}
    lines = [f"Predicted cost of a training step, batch size {batch}, float32 (details: relaylab cost --segments):"]
    size, unit = (1e3, "kB") if max(predicted.peaks.values()) < 1e7 else (1e6, "MB")
    for scheme, total in predicted.totals.items():
        flops, ratio = total.flops / 1e9 / batch, predicted.ratios[scheme]
        peak = f"peak memory {predicted.peaks[scheme] / size:7,.0f} {unit}"
        lines.append(f"  {names[scheme]:<26} {flops:7.3g} GFLOPs per image, {ratio:5.2f} x, {peak}")
    return lines


def _about(network: str, train: Source, chosen: int, results: ScanResults) -> str:
    counts = class_counts(train)
    sides = np.minimum(results.widths, results.heights)
    bad = len(results.unreadable) + len(results.damaged)
    faults = f" {bad} of {results.examined:,} decoded images are damaged; run `relaylab data check`." if bad else ""
    labels = "" if targets_of(train) is None else "multi-label, "
    return (
        f"{network} on {train.title}: {_counted(chosen, 'training image')}, {labels}{len(train.classes)} classes of "
        f"{_range(counts)} image{'' if counts.max() == 1 else 's'}, shorter sides of {_range(sides)} pixels.{faults}"
    )


def _range(values: NDArray[Any]) -> str:
    least, most = values.min(), values.max()
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _counted(count: int, unit: str) -> str:
    return f"{count:,} {unit}{'s' * (count != 1)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="   " if text[:1].isdecimal() else "")
