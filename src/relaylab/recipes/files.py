"""Recipes as TOML files: the comment after each value is its source."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relaylab.errors import InputError
from relaylab.outside.reading import read_bytes
from relaylab.recipes.changes import ARCHITECTURE, PRETRAINED, located
from relaylab.recipes.decoding import DEFAULT, decode_recipe, flat
from relaylab.recipes.schema import GROUPS, Recipe, ReportedErrors

SUFFIX = ".toml"
LARGEST_FILE = 1 << 20  # bytes
BARE = re.compile(r"[A-Za-z0-9_-]+")  # a key that needs no quotes
COLUMN = 44  # rightmost column of comments


def is_file(name: str | None) -> bool:
    """Return whether a recipe is given as a file."""
    return name is not None and name.endswith(SUFFIX)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Paths in it are relative to its folder.

    Raises:
        InputError: the file does not exist or is not TOML, or values are wrong. The message lists all wrong values.
    """
    try:
        text = read_bytes(path, LARGEST_FILE).decode()
        values = tomllib.loads(text)
    except FileNotFoundError:
        raise InputError(f"no such recipe file: {path}") from None
    except (ValueError, RecursionError, OSError) as error:  # not TOML, not UTF-8, or unreadable
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: {reason}") from None
    name, problems = path.stem, list[str]()
    comments = dict(_comments(text))
    sources = {key: _source(key, comments) or path.name for key, _ in flat(values) if key.partition(".")[0] in GROUPS}
    recipe = decode_recipe({"name": name, "row": name, **values}, sources, problems)
    if problems:
        raise InputError("\n  ".join([f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}:", *problems]))
    return _with_paths(recipe, path.parent)


def _with_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with absolute paths of files."""
    architecture = located(ARCHITECTURE, recipe.network.architecture, folder)
    pretrained = recipe.network.pretrained and located(PRETRAINED, recipe.network.pretrained, folder)
    return replace(recipe, network=replace(recipe.network, architecture=architecture, pretrained=pretrained))


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted names of values and table headers with the comments after them."""
    table = ""
    for line in text.splitlines():
        for place in [match.start() for match in re.finditer("#", line)] or [len(line)]:
            try:
                path = _path(tomllib.loads(line[:place]))
            except tomllib.TOMLDecodeError:
                continue  # the mark is inside a string
            if not path:
                break
            if line.lstrip().startswith("["):
                table, path = f"{path}.", ""
            yield (table + path).removesuffix("."), line[place:].lstrip("#").strip()
            break


def _path(values: Mapping[str, Any]) -> str:
    """Return the dotted name of the value or table on a line."""
    names: list[str] = []
    while isinstance(values, Mapping) and values:
        name, values = next(iter(values.items()))
        names.append(name)
    return ".".join(names)


def _source(key: str, comments: Mapping[str, str]) -> str:
    """Return the comment after a value, else the comment after the header of its table."""
    while not comments.get(key) and "." in key:
        key = key.rpartition(".")[0]
    return comments.get(key, "")


def to_toml(recipe: Recipe, notes: Mapping[str, Sequence[str]] | None = None) -> str:
    """Return a recipe as TOML text, from which `read_recipe` reads the same recipe.

    Values whose source is `DEFAULT` are omitted.

    Args:
        recipe: recipe to write.
        notes: comment lines to write above a table, by table name such as "plan"; "" for the start of the file.
    """
    notes = notes or {}
    head = {"name": recipe.name, "row": recipe.row, "trained_as": recipe.trained_as}
    lines = [f"# {line}".rstrip() for line in notes.get("", ())]
    lines += [f"{key} = {_value(value)}" for key, value in head.items() if value is not None]
    for table, fields in sorted(_tables(recipe).items(), key=lambda pair: bool(pair[0])):
        lines += ["", *(f"# {line}".rstrip() for line in notes.get(table, ()) if table)]
        lines += [f"[{_name(table)}]"] if table else []
        pairs = [(f"{_name(name)} = {_value(value)}", source) for name, value, source in fields]
        width = min(COLUMN, max(len(text) for text, _ in pairs))
        lines += [f"{text:<{width}}  # {' '.join(source.split())}" for text, source in pairs]
    if recipe.reported is not None:
        lines += ["", "[reported]", *_errors(recipe.reported)]
    return "\n".join(lines) + "\n"


def _tables(recipe: Recipe) -> dict[str, list[tuple[str, Any, str]]]:
    """Return name, value and source of all fields except defaults, by table; "" for fields outside tables."""
    tables: dict[str, list[tuple[str, Any, str]]] = {}
    for key, value, source in recipe.fields():
        if source != DEFAULT:
            table, _, name = key.rpartition(".")
            tables.setdefault(table, []).append((name, value, source))
    return tables


def _errors(reported: ReportedErrors) -> list[str]:
    values = {"top1": reported.top1, "top5": reported.top5, "split": reported.split}
    return [f"{key} = {_value(value)}" for key, value in values.items() if value is not None]


def _name(key: str) -> str:
    names = key.split(".")
    return ".".join(name if BARE.fullmatch(name) else json.dumps(name, ensure_ascii=False) for name in names)


def _value(value: Any) -> str:
    match value:
        case None:
            return '"none"'
        case bool() | int() | float():
            return str(value).lower()
        case tuple() | list():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            return json.dumps(str(value), ensure_ascii=False)
