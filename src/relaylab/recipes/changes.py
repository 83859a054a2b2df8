"""Change the values of a recipe by KEY=VALUE texts and check the values. All problems are reported together."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from relaylab.errors import nearest
from relaylab.recipes.decoding import Problem, decode, no_value, parse
from relaylab.recipes.schema import (
    GROUPS,
    AugmentationConfig,
    Recipe,
    ScheduleConfig,
    StepsConfig,
    changed,
    value_text,
)

SOURCE = "the command line"
KIND = "optimizer.schedule.kind"
LEAST = {  # minimum values, by field
    "momentum": 0, "weight_decay": 0, "warmup": 0, "long_tail": 1, "colour_shift": 0, "batch_size": 1,
    "iterations": 1, "evaluate_every": 1, "segment_lr": 0, "patience": 1, "every": 1, "least": 0,
    "padding": 0, "policy_operations": 1, "policy_magnitude": 0, "erasing": 0, "mixup": 0, "cutmix": 0,
}  # fmt: skip
ARCHITECTURE, PRETRAINED = "network.architecture", "network.pretrained"  # values that may be paths
OPTIONS = "network.options"  # names and values are defined by the network
POSITIVE = ("lr", "eps", "clip_norm", "weight", "factor")
MAGNITUDE = 30  # largest magnitude of a policy's operations


def with_changes(recipe: Recipe, texts: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Return the recipe with all valid changes, and error messages for the others.

    Args:
        recipe: recipe to change; it is not modified.
        texts: KEY=VALUE texts. Keys are the dotted names of `Recipe.fields`; list items are separated by commas; "none"
            is None. With `optimizer.schedule.kind`, the other values of the schedule come from the other texts, or are
            its defaults.
    """
    problems: list[str] = []
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(f"--set {text}: expected KEY=VALUE")
        elif key in pairs:
            problems.append(f"--set {key} is given twice")
        else:
            pairs[key] = value.strip()
    recipe = _with_schedule(recipe, pairs, problems)
    for key, value in pairs.items():
        try:
            recipe = changed(recipe, SOURCE, {key: parse(value, _hint(recipe, key), key)})
        except Problem as error:
            problems.append(str(error))
    return recipe, problems


def with_absolute_paths(text: str) -> str:
    """Return a KEY=VALUE text in which the path of a file, if the value is one, is absolute."""
    key, equals, value = text.partition("=")
    return f"{key}={located(key.strip(), value.strip())}" if equals else text


def located(key: str, value: str, folder: Path | None = None) -> str:
    """Return a value with an absolute path if it is the path of a file, otherwise unchanged.

    Args:
        key: dotted name of the value.
        value: value as text.
        folder: folder that the path is relative to; by default the current one.
    """
    path, colon, function = value.rpartition(":") if key == ARCHITECTURE else (value, "", "")
    names_file = path.endswith(".py") if key == ARCHITECTURE else key == PRETRAINED and value.lower() != "none"
    return f"{((folder or Path()) / Path(path).expanduser()).resolve()}{colon}{function}" if names_file else value


def _with_schedule(recipe: Recipe, pairs: dict[str, str], problems: list[str]) -> Recipe:
    """Return the recipe with the given kind of schedule, if any; the schedule's values are removed from the pairs."""
    if KIND not in pairs:
        return recipe
    group = KIND.removesuffix(".kind")
    values = {key.removeprefix(f"{group}."): pairs.pop(key) for key in list(pairs) if key.startswith(f"{group}.")}
    wrong: list[str] = []
    schedule = decode(ScheduleConfig, values, group, wrong)
    problems += wrong
    return recipe if wrong else changed(recipe, SOURCE, {group: schedule})


def _hint(recipe: Recipe, key: str) -> Any:
    """Return the type of the value with this dotted name."""
    names = recipe.names()
    value: Any = recipe
    hint: Any = None
    for depth, name in enumerate(key.split(".")):
        if isinstance(value, Mapping):
            hint = get_args(hint)[1]
            is_known = name in value or not dataclasses.is_dataclass(hint)  # segment_lr accepts any segment
            value = cast("Mapping[str, Any]", value).get(name)
        else:
            hints = get_type_hints(type(value)) if dataclasses.is_dataclass(value) else {}
            is_known = name != "kind" and name in (hints if depth else GROUPS)
            hint, value = hints.get(name), getattr(value, name, None)
        if not is_known:
            raise Problem(no_value(key, names))
    if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
        raise Problem(f"{key} is a group{nearest(key, names)}")
    return hint


def recipe_problems(recipe: Recipe) -> list[str]:
    """Return an error message for each value of a recipe that is out of range."""
    optimizer, problems = recipe.optimizer, list[str]()
    for name, value, _ in recipe.fields():
        group, _, field = name.rpartition(".")
        least = LEAST.get("segment_lr" if group == "optimizer.segment_lr" else field)
        if value is None or (least is None and field not in POSITIVE) or group == OPTIONS:
            continue
        if not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
            wanted = "above 0" if least is None else f"at least {least}"
            problems.append(f"{name} is {value}: expected a finite number, {wanted}")
    if optimizer.momentum >= 1:
        problems.append(f"optimizer.momentum is {optimizer.momentum}: expected less than 1")
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        problems.append(f"optimizer.betas is {value_text(optimizer.betas)}: expected two numbers from 0 to below 1")
    if optimizer.layer_decay is not None and not 0 < optimizer.layer_decay <= 1:
        problems.append(f"optimizer.layer_decay is {optimizer.layer_decay}: expected above 0, at most 1")
    if optimizer.ema_decay is not None and not 0 < optimizer.ema_decay < 1:
        problems.append(f"optimizer.ema_decay is {optimizer.ema_decay}: expected between 0 and 1, such as 0.999")
    if not 0 <= recipe.loss.label_smoothing < 1:
        problems.append(f"loss.label_smoothing is {recipe.loss.label_smoothing}: expected at least 0 and below 1")
    for name in ("held_out", "set_aside"):
        problems += hold_out_problems(f"images.{name}", getattr(recipe.images, name))
    side, size = recipe.images.short_side, recipe.network.image_size
    if side < size:
        problems.append(f"images.short_side is {side}: expected at least network.image_size, {size}")
    problems += _augmentation_problems(recipe.augmentation)
    if isinstance(optimizer.schedule, StepsConfig):
        at = optimizer.schedule.at
        if list(at) != sorted(at) or not all(0 < place < 1 for place in at):
            problems.append(f"optimizer.schedule.at is {at}: expected shares between 0 and 1, in ascending order")
    return problems


def hold_out_problems(name: str, count: float | None) -> list[str]:
    """Return an error message if a number of images per class, or a share below 1, cannot be held out."""
    if count is None or 0 < count < 1 or (count >= 1 and math.isfinite(count) and count == int(count)):
        return []
    return [f"{name} is {count:g}: expected a number of images per class, or a share below 1"]


def _augmentation_problems(config: AugmentationConfig) -> list[str]:
    """Return an error message for each augmentation value that is out of range."""
    problems: list[str] = []
    for name, most in (("crop_scale", 1.0), ("crop_ratio", math.inf)):
        ends = getattr(config, name)
        if len(ends) != 2 or not 0 < ends[0] <= ends[1] <= most or math.isinf(ends[1]):
            wanted = "above 0" + (" and at most 1" if most == 1 else "")
            problems.append(
                f"augmentation.{name} is {value_text(ends)}: expected two numbers {wanted}, the smaller one first"
            )
    if config.erasing > 1:
        problems.append(f"augmentation.erasing is {config.erasing}: expected a probability, 0 to 1")
    if config.policy_magnitude > MAGNITUDE:
        problems.append(f"augmentation.policy_magnitude is {config.policy_magnitude}: expected 0 to {MAGNITUDE}")
    return problems
