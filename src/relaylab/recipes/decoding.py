"""Typed decoding of recipes from text, TOML and JSON. All problems are reported together."""

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
    """An error in a single value of a recipe."""


def decode_recipe(values: Mapping[str, Any], sources: Mapping[str, str], problems: list[str]) -> Recipe:
    """Decode a recipe from nested plain values. The result is valid only if no problems were added.

    Args:
        values: tables as mappings, lists as lists, None or "none" for None; includes name and row.
        sources: source of each value by dotted name.
        problems: an error message is appended for each wrong value.
    """
    return decode(Recipe, {**values, "sources": {**dict.fromkeys(GROUPS, DEFAULT), **sources}}, "", problems)


def decode(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """Convert a plain value to a type; error messages are appended to `problems`."""
    try:
        if isinstance(value, Mapping):
            return _table(hint, cast("Mapping[str, Any]", value), key, problems)
        if hint is Any:
            return tuple(value) if isinstance(value, list) else value
        if dataclasses.is_dataclass(hint) or get_origin(hint) is Mapping:
            raise Problem(f"{key} is a single value: expected a table")
        return parse(value_text(tuple(value) if isinstance(value, list) else value), hint, key)
    except Problem as error:
        problems.append(brief(str(error), MOST_SHOWN))
        return None


def _table(hint: Any, value: Mapping[str, Any], key: str, problems: list[str]) -> Any:
    """Convert a table to a mapping or dataclass. The dataclass of a schedule depends on its kind."""
    if get_origin(hint) is Mapping:
        item_hint = get_args(hint)[1]
        return MappingProxyType({n: decode(item_hint, item, f"{key}.{n}", problems) for n, item in value.items()})
    choices = [choice for choice in get_args(hint) or (hint,) if dataclasses.is_dataclass(choice)]
    if not choices:
        raise Problem(f"{key} is a table: expected a single value")
    if len(choices) == 1:
        return _dataclass(choices[0], value, key, problems)
    if value.get("kind") not in SCHEDULES:
        raise Problem(f"{key}.kind={value.get('kind', '')}: expected one of {', '.join(SCHEDULES)}")
    return _dataclass(SCHEDULES[value["kind"]], value, key, problems)


def _dataclass(kind: Any, value: Mapping[str, Any], key: str, problems: list[str]) -> Any:
    prefix, hints = f"{key}." if key else "", get_type_hints(kind)
    problems += [no_value(prefix + name, [prefix + known for known in hints]) for name in value if name not in hints]
    given = {name: decode(hints[name], item, prefix + name, problems) for name, item in value.items() if name in hints}
    required = [
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]
    lacking = [name for name in required if name not in given]
    if lacking:
        problems.append(f"{key or 'the recipe'} also requires {', '.join(prefix + name for name in lacking)}")
    return kind(**dict.fromkeys(lacking), **given)


def no_value(key: str, names: Sequence[str]) -> str:
    """Return the error message for an unknown name, with its new name or similar names."""
    name = current_name(key)
    if name != key:
        return f"no value {brief(key)}: it has been renamed to {brief(name)}"
    return f"no value {brief(key)}{nearest(key[:MOST_SHOWN], names)}"


def current_name(key: str) -> str:
    """Return the current name of a value, given its name in this or an earlier version."""
    group, dot, field = key.rpartition(".")
    return MOVED.get(key, f"{group}{dot}{RENAMED.get(field, field)}")


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values by dotted name to nested tables."""
    tables: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        table = tables
        for group in groups:
            table = table.setdefault(group, {})
        table[name] = value
    return tables


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested tables."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            yield prefix + name, value


def parse(text: str, hint: Any, key: str) -> Any:
    """Parse text as a value of a type; raise `Problem` if that fails."""
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
            raise Problem(f"{key}={text}: expected {'an integer' if hint is int else 'a number'}") from None
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
        return tuple(parse(item.strip(), arguments[0], key) for item in text.split(",") if item.strip())
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
    """Parse text by its form: as a number, true or false, a tuple if it has commas, or else text."""
    if "," in text:
        return tuple(plain_value(item.strip()) for item in text.split(",") if item.strip())
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
