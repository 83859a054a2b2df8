"""Changes of a recipe's values from text, KEY=VALUE, and what is wrong with a recipe. Problems are collected."""

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from relaylab.errors import nearest
from relaylab.recipes.schema import CosineConfig, DecayConfig, PlateauConfig, Recipe, StepsConfig

SOURCE = "the command line"
KIND = "optimizer.schedule.kind"
SCHEDULES = {"plateau": PlateauConfig, "steps": StepsConfig, "decay": DecayConfig, "cosine": CosineConfig}
GROUPS = ("network", "plan", "scheme", "images", "augmentation", "optimizer", "evaluation")
NOT_TRAINED = ("evaluation",)  # how a finished network is tested


class _Problem(ValueError):
    """One thing that is wrong with one change."""


def with_changes(recipe: Recipe, texts: Sequence[str]) -> tuple[Recipe, list[str]]:
    """The recipe with other values, and what is wrong with them.

    Args:
        recipe: is not changed.
        texts: KEY=VALUE each. Keys are dotted names as `Recipe.fields` gives them; values that are lists are separated
            by commas; "none" is None. `optimizer.schedule.kind` takes the other values of a schedule from the rest of
            the texts, and from its defaults.

    Returns:
        The recipe with those changes that can be made, and the problems with the others.
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
    try:
        recipe = _with_schedule(recipe, pairs)
    except _Problem as error:
        problems.append(str(error))
    for key, value in pairs.items():
        try:
            group, _, rest = key.partition(".")
            if group not in GROUPS:
                raise _Problem(f"no value {key}{nearest(key, [name for name, _, _ in recipe.fields()])}")
            hint = get_type_hints(Recipe)[group]
            changed = _changed(getattr(recipe, group), hint, rest.split(".") if rest else [], key, value, recipe)
            sources = {name: source for name, source in recipe.sources.items() if not name.startswith(f"{key}.")}
            sources[key] = SOURCE
            recipe = replace(recipe, **{group: changed}, sources=MappingProxyType(sources))
        except _Problem as error:
            problems.append(str(error))
    return recipe, problems


def _with_schedule(recipe: Recipe, pairs: dict[str, str]) -> Recipe:
    """The recipe with another kind of schedule, if one is asked for; its values are taken out of the pairs."""
    if KIND not in pairs:
        return recipe
    prefix = KIND.removesuffix("kind")
    kind = pairs.pop(KIND)
    own = {key: pairs.pop(key) for key in list(pairs) if key.startswith(prefix)}
    if kind not in SCHEDULES:
        raise _Problem(f"{KIND}={kind}: expected one of {', '.join(SCHEDULES)}")
    made = SCHEDULES[kind]
    hints = get_type_hints(made)
    values: dict[str, Any] = {}
    for key, text in own.items():
        name = key.removeprefix(prefix)
        if name not in hints:
            raise _Problem(f"a {kind} schedule has no {name}{nearest(name, hints)}")
        values[name] = _parse(text, hints[name], key)
    needed = [f.name for f in dataclasses.fields(made) if f.default is dataclasses.MISSING and f.name not in values]
    if needed:
        raise _Problem(f"a {kind} schedule also needs {', '.join(prefix + name for name in needed)}")
    sources = {name: source for name, source in recipe.sources.items() if not name.startswith(prefix)}
    sources["optimizer.schedule"] = SOURCE
    optimizer = replace(recipe.optimizer, schedule=made(**values))
    return replace(recipe, optimizer=optimizer, sources=MappingProxyType(sources))


def _changed(old: Any, hint: Any, path: list[str], key: str, text: str, recipe: Recipe) -> Any:
    """A value with another one somewhere inside it."""
    if not path:
        if dataclasses.is_dataclass(old) or isinstance(old, Mapping):
            raise _Problem(f"{key} is a group{nearest(key, [name for name, _, _ in recipe.fields()])}")
        return _parse(text, hint, key)
    name = path[0]
    if dataclasses.is_dataclass(old) and not isinstance(old, type):
        hints = get_type_hints(type(old))
        if name in hints and name != "kind":
            return replace(old, **{name: _changed(getattr(old, name), hints[name], path[1:], key, text, recipe)})
    elif isinstance(old, Mapping):
        mapping = cast("Mapping[str, Any]", old)
        inner = get_args(hint)[1]
        is_group = dataclasses.is_dataclass(inner)
        if name in mapping or not is_group:
            rest = path[1:] if is_group else []
            return MappingProxyType({**mapping, name: _changed(mapping.get(name), inner, rest, key, text, recipe)})
    raise _Problem(f"no value {key}{nearest(key, [name for name, _, _ in recipe.fields()])}")


def _parse(text: str, hint: Any, key: str) -> Any:
    """A value of a type, from text."""
    if hint is type(None):
        if text.lower() == "none":
            return None
        raise _Problem(f"{key}={text}: expected none")
    if hint in (int, float, str):
        try:
            return hint(text)
        except ValueError:
            raise _Problem(f"{key}={text}: expected a {'whole ' if hint is int else ''}number") from None
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise _Problem(f"{key}={text}: expected true or false")
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        if text in arguments:
            return text
        raise _Problem(f"{key}={text}: expected one of {', '.join(arguments)}")
    if get_origin(hint) is tuple:
        return tuple(_parse(part.strip(), arguments[0], key) for part in text.split(",") if part.strip())
    if get_origin(hint) in (Union, types.UnionType):
        problems: list[_Problem] = []
        for choice in sorted(arguments, key=lambda choice: choice is not type(None)):
            try:
                return _parse(text, choice, key)
            except _Problem as error:
                problems.append(error)
        raise problems[-1]
    raise _Problem(f"{key} cannot be set from the command line")


def recipe_problems(recipe: Recipe) -> list[str]:
    """What is wrong with the numbers of a recipe, so that it could not be trained."""
    optimizer, problems = recipe.optimizer, list[str]()

    def check(name: str, value: float | None, *, above: float | None = None, least: float | None = None) -> None:
        if value is None:
            return
        wanted = f"above {above:g}" if above is not None else f"at least {least:g}"
        good = math.isfinite(value) and (value > above if above is not None else value >= cast(float, least))
        if not good:
            problems.append(f"{name} is {value}: expected a finite number, {wanted}")

    check("optimizer.lr", optimizer.lr, above=0)
    check("optimizer.momentum", optimizer.momentum, least=0)
    check("optimizer.weight_decay", optimizer.weight_decay, least=0)
    check("optimizer.clip_norm", optimizer.clip_norm, above=0)
    check("optimizer.warmup", optimizer.warmup, least=0)
    check("images.held_out", recipe.images.held_out, least=1)
    check("images.long_tail", recipe.images.long_tail, least=1)
    check("augmentation.colour_shift", recipe.augmentation.colour_shift, least=0)
    for name in ("batch_size", "iterations", "evaluate_every"):
        check(f"optimizer.{name}", getattr(optimizer, name), least=1)
    for segment, factor in optimizer.segment_lr.items():
        check(f"optimizer.segment_lr.{segment}", factor, least=0)
    for name, window in recipe.plan.auxiliary.items():
        check(f"plan.auxiliary.{name}.weight", window.weight, above=0)
    if optimizer.momentum >= 1:
        problems.append(f"optimizer.momentum is {optimizer.momentum}: expected less than 1")
    if not 0 <= optimizer.label_smoothing < 1:
        problems.append(f"optimizer.label_smoothing is {optimizer.label_smoothing}: expected 0 to 1, without 1")
    if recipe.images.short_side < recipe.network.image_size:
        problems.append(
            f"images.short_side is {recipe.images.short_side}: expected at least network.image_size, "
            f"{recipe.network.image_size}"
        )
    match optimizer.schedule:
        case PlateauConfig(factor=factor, patience=patience, least=share):
            check("optimizer.schedule.patience", patience, least=1)
            check("optimizer.schedule.least", share, least=0)
        case StepsConfig(factor=factor, at=at):
            if list(at) != sorted(at) or not all(0 < place < 1 for place in at):
                problems.append(f"optimizer.schedule.at is {at}: expected shares between 0 and 1, in rising order")
        case DecayConfig(factor=factor, every=every):
            check("optimizer.schedule.every", every, least=1)
        case CosineConfig(least=share):
            factor = 1.0
            check("optimizer.schedule.least", share, least=0)
    check("optimizer.schedule.factor", factor, above=0)
    return problems
