"""Typed decoding of recipes from text, TOML and JSON. All problems are collected and reported together."""

import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from relaylab.errors import nearest
from relaylab.outside.showing import brief
from relaylab.recipes.schema import (
    GROUPS,
    CosineConfig,
    DecayConfig,
    PlateauConfig,
    Recipe,
    StepsConfig,
    value_text,
)

SCHEDULES = {"plateau": PlateauConfig, "steps": StepsConfig, "decay": DecayConfig, "cosine": CosineConfig}
RENAMED = {"above": "after"}  # fields of any group
MOVED = {"optimizer.label_smoothing": "loss.label_smoothing"}
MOST_SHOWN = 500  # characters of a problem
DEFAULT = "the recipe's default"  # source of values that are not given


class Problem(ValueError):
    """One thing that is wrong with one value."""


def decode_recipe(values: Mapping[str, Any], sources: Mapping[str, str], problems: list[str]) -> Recipe:
    """Return the recipe of nested plain values, which is whole if there are no problems.

    Args:
        values: tables as mappings, lists as lists, None or "none" for none; name and row among them.
        sources: by dotted name.
        problems: receives an error message for each wrong value.
    """
    return decode(Recipe, {**values, "sources": {**dict.fromkeys(GROUPS, DEFAULT), **sources}}, "", problems)


def decode(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """Return a plain value as one of a type; error messages are added to `problems`."""
    try:
        if isinstance(value, Mapping):
            return _table(hint, cast("Mapping[str, Any]", value), key, problems)
        if hint is Any:
            return tuple(value) if isinstance(value, list) else value
        if dataclasses.is_dataclass(hint) or get_origin(hint) is Mapping:
            raise Problem(f"{key} is a table, not one value")
        return parse(value_text(tuple(value) if isinstance(value, list) else value), hint, key)
    except Problem as error:
        problems.append(brief(str(error), MOST_SHOWN))
        return None


def _table(hint: Any, value: Mapping[str, Any], key: str, problems: list[str]) -> Any:
    """Return a table as a mapping, or as the dataclass that it stands for; that of a schedule depends on its kind."""
    if get_origin(hint) is Mapping:
        part_hint = get_args(hint)[1]
        return MappingProxyType({n: decode(part_hint, part, f"{key}.{n}", problems) for n, part in value.items()})
    choices = [choice for choice in get_args(hint) or (hint,) if dataclasses.is_dataclass(choice)]
    if not choices:
        raise Problem(f"{key} is one value, not a table")
    if len(choices) == 1:
        return _dataclass(choices[0], value, key, problems)
    if value.get("kind") not in SCHEDULES:
        raise Problem(f"{key}.kind={value.get('kind', '')}: expected one of {', '.join(SCHEDULES)}")
    return _dataclass(SCHEDULES[value["kind"]], value, key, problems)


def _dataclass(kind: Any, value: Mapping[str, Any], key: str, problems: list[str]) -> Any:
    prefix, hints = f"{key}." if key else "", get_type_hints(kind)
    problems += [no_value(prefix + name, [prefix + known for known in hints]) for name in value if name not in hints]
    given = {name: decode(hints[name], part, prefix + name, problems) for name, part in value.items() if name in hints}
    required = [
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    lacking = [name for name in required if name not in given]
    if lacking:
        problems.append(f"{key or 'the recipe'} also needs {', '.join(prefix + name for name in lacking)}")
    return kind(**dict.fromkeys(lacking), **given)


def no_value(key: str, names: Sequence[str]) -> str:
    """Return the error message for an unknown name, with its new name or the nearest ones."""
    name = current_name(key)
    if name != key:
        return f"no value {brief(key)}; it is named {brief(name)} now"
    return f"no value {brief(key)}{nearest(key[:MOST_SHOWN], names)}"


def current_name(key: str) -> str:
    """Return the name that a value of an earlier version has now."""
    group, dot, field = key.rpartition(".")
    return MOVED.get(key, f"{group}{dot}{RENAMED.get(field, field)}")


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by their dotted names as tables in tables."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        table = found
        for group in groups:
            table = table.setdefault(group, {})
        table[name] = value
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over tables in tables by dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            yield prefix + name, value


def parse(text: str, hint: Any, key: str) -> Any:
    """Return a value of a type from text; a `Problem` if it is not one."""
    if hint is type(None):
        if text.lower() == "none":
            return None
        raise Problem(f"{key}={text}: expected none")
    if hint is Any:
        return plain_value(text)
    if hint in (int, float, str):
        try:
            return hint(text)
        except ValueError:
            raise Problem(f"{key}={text}: expected a {'whole ' if hint is int else ''}number") from None
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise Problem(f"{key}={text}: expected true or false")
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        if text in arguments:
            return text
        raise Problem(f"{key}={text}: expected one of {', '.join(arguments)}")
    if get_origin(hint) is tuple:
        return tuple(parse(part.strip(), arguments[0], key) for part in text.split(",") if part.strip())
    if get_origin(hint) in (Union, types.UnionType):
        problems: list[Problem] = []
        for choice in sorted(arguments, key=lambda choice: choice is not type(None)):
            try:
                return parse(text, choice, key)
            except Problem as error:
                problems.append(error)
        raise problems[-1]
    raise Problem(f"{key} cannot be set from the command line")


def plain_value(text: str) -> Any:
    """Return a value of a type that its text tells: a number, true or false, or text; a tuple where it has commas."""
    if "," in text:
        return tuple(plain_value(part.strip()) for part in text.split(",") if part.strip())
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
