"""Reference pages generated from the code: the options of commands and the keys of recipes."""

import ast
import dataclasses
import importlib
import inspect
import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from relaylab.cli import COMMANDS
from relaylab.recipes import schema


def commands() -> str:
    """Return all commands and their options, with the text of `--help`."""
    lines: list[str] = []
    for name in COMMANDS:
        if name != "recipes list":  # the same as `recipes`
            lines += ["", f"## relaylab {name}", "", *_command(name)]
    return "\n".join(lines) + "\n"


def _command(name: str) -> Iterator[str]:
    module, _, function = COMMANDS[name].partition(":")
    run = getattr(importlib.import_module(f"relaylab.commands.{module}"), function)
    kind = get_type_hints(run)["options"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other API that describes the options
        config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
        parser = tyro.extras.get_parser(kind, prog=f"relaylab {name}", config=config)
    yield _escaped(inspect.cleandoc(kind.__doc__ or ""))
    for action in parser._actions:
        if action.dest == "help":
            continue
        metavar = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar or ())
        yield ""
        yield f"`{' '.join([*', '.join(action.option_strings).split(), *metavar.split()])}`"
        text = re.sub(r"\s+", " ", action.help or "").strip()
        yield f":   {_escaped(text)}"


def recipe_keys() -> str:
    """Return the keys of a recipe: name, type, default, meaning."""
    lines: list[str] = []
    for group in schema.GROUPS:
        kind = get_type_hints(schema.Recipe)[group]
        lines += ["", f"## {group}"]
        if dataclasses.is_dataclass(kind):
            lines += ["", _escaped(_summary(kind))]
            lines += _keys(group, kind)
        else:
            schemes = "; ".join(f"`{name}`: {label}" for name, label in schema.SCHEMES.items())
            lines += ["", f"`{group}`", f":   {_type(kind)}. {_escaped(schemes)}."]
    return "\n".join(lines) + "\n"


def _keys(prefix: str, kind: Any) -> Iterator[str]:
    hints, documented = get_type_hints(kind), _field_docs(kind)
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}.{field.name}", hints[field.name]
        nested = [part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)]
        if get_origin(hint) in (Union, types.UnionType) and len(nested) > 1:  # the schedules
            for part in nested:
                yield from ("", f"### {name}.kind={_default_of(part, 'kind')}", "", _escaped(_summary(part)))
                yield from _keys(name, part)
        elif nested:
            inner = f"{name}.NAME" if get_origin(hint) not in (None, Union, types.UnionType) else name
            yield from ("", f"### {inner}", "", _escaped(_summary(nested[-1])))
            yield from _keys(inner, nested[-1])
        else:
            inner = f"{name}.NAME" if get_origin(hint) in (Mapping, typing.Mapping) else name
            default = _default(field)
            yield from (
                "",
                f"`{inner}`",
                f":   {_type(hint)}{default}. {_escaped(documented.get(field.name, ''))}".rstrip(),
            )


def _type(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("`none`" if part is type(None) else _type(part) for part in arguments)
    if origin is tuple:
        parts = [part for part in arguments if part is not Ellipsis]
        return f"{_type(parts[0])}s, separated by commas" if Ellipsis in arguments else f"{len(parts)} numbers"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _type(arguments[1])
    names = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", Any: "any value"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "" if field.default_factory is not dataclasses.MISSING else "; required"
    return f"; default `{schema.value_text(field.default)}`"


def _default_of(kind: Any, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(kind) if field.name == name)


def _summary(kind: Any) -> str:
    return re.sub(r"\s+", " ", inspect.cleandoc(kind.__doc__ or ""))


def _field_docs(kind: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields, by field."""
    (body,) = (
        node for node in ast.parse(inspect.cleandoc(inspect.getsource(kind))).body if isinstance(node, ast.ClassDef)
    )
    documented: dict[str, str] = {}
    for before, node in zip(body.body, body.body[1:], strict=False):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(node, ast.Expr):
            value = ast.literal_eval(node.value)
            documented[before.target.id] = re.sub(r"\s+", " ", value).strip()
    return documented


def _escaped(text: str) -> str:
    """Escape Markdown in text, except in code between backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>\[\]{}|])", r"\\\1", part) for part in parts)
