"""Option types and checks shared by the commands. Does not import torch, so that `--help` is fast."""

import inspect
import shlex
from collections.abc import Collection, Sequence
from dataclasses import fields
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from tyro.conf import Positional

from relaylab.errors import InputError, nearest
from relaylab.files import expanded

PICTURES = (".svg", ".png")


class MustExist:
    """Marker for path options that are checked before anything slow is imported."""


# The help text states data-dependent defaults, so the uninformative `None` is hidden.
_arg = partial(tyro.conf.arg, help_behavior_hint="")

Number = Annotated[int | None, _arg(metavar="N")]
Switch = Annotated[bool, _arg()]
Word = Annotated[str | None, _arg(metavar="NAME")]
Listed = Annotated[str, tyro.conf.arg(metavar="A,B,...")]
OptionalList = Annotated[str, _arg(metavar="A,B,...")]
Images = Annotated[tuple[Path, ...], _arg(metavar="PATH [PATH ...]")]
Folder = Annotated[Path | None, _arg(metavar="FOLDER")]
File = Annotated[Path | None, _arg(metavar="FILE")]
Split = Annotated[Literal["train", "val", "test"] | None, _arg(metavar="{train,val,test}")]
Sources = Annotated[tuple[Path, ...], MustExist, Positional, _arg(metavar="PATH [PATH ...]")]
Runs = Annotated[tuple[Path, ...], MustExist, Positional, _arg(metavar="RUN [RUN ...]")]
Scores = Annotated[tuple[Path, ...], MustExist, Positional, _arg(metavar="SCORES [SCORES ...]")]
Name = Annotated[str, Positional, _arg(metavar="RECIPE")]
Names = Annotated[tuple[str, ...], Positional, _arg(metavar="RECIPE")]
Model = Annotated[Path, MustExist, Positional, _arg(metavar="MODEL")]


def listed(text: str, known: Collection[str] = (), what: str = "") -> tuple[list[Any], list[str]]:
    """Split a list "A,B,..." and return its items, and an error message for each unknown one.

    Args:
        text: value of the option.
        known: allowed names; empty to allow any.
        what: what an item is, for messages.
    """
    items = [item for word in text.split(",") if (item := word.strip())]
    unknown = [item for item in items if known and item not in known]
    return items, [f"unknown {what} {item!r}{nearest(item, known)}" for item in unknown]


def too_small(options: object, **least: int) -> list[str]:
    """Return an error message for each option whose number is below its minimum."""
    values = {name: getattr(options, name, None) for name in least}
    small = {name: value for name, value in values.items() if value is not None and value < least[name]}
    return [f"--{name.replace('_', '-')} must be at least {least[name]}, not {small[name]}" for name in small]


@cache
def join_help_lines(kind: type[Any]) -> None:
    """Join the wrapped lines of the help texts of a dataclass of options.

    tyro keeps the line breaks of attribute docstrings, because it looks for paragraphs before it removes indentation.
    """
    import docstring_parser

    for base in kind.__mro__[:-1]:
        try:
            entries = docstring_parser.parse_from_object(base).params
        except (OSError, TypeError):  # a class without a source file
            continue
        for entry in entries:
            hint = inspect.get_annotations(base).get(entry.arg_name)
            if hint is not None and not isinstance(hint, str):
                text = " ".join((entry.description or "").split())
                base.__annotations__[entry.arg_name] = Annotated[hint, tyro.conf.arg(help=text)]


def writable(path: Path, option: str = "--out", suffixes: Sequence[str] = ()) -> Path:
    """Return the path of a file to write; raise InputError if its folder is missing or its suffix is not allowed."""
    if suffixes and path.suffix not in suffixes:
        raise InputError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{option} {path}: the folder {path.parent} does not exist")
    return path


def check_paths(options: object) -> None:
    """Raise InputError if the path of a `MustExist` option does not exist, cannot be read, or is a recipe file."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if MustExist in getattr(hint, "__metadata__", ()):
            value: Any = getattr(options, name)
            paths: Sequence[Path] = [value] if isinstance(value, Path) else value or ()
            problems = path_problems(paths) or [_of_recipe(path) for path in paths if path.suffix == ".toml"]
            for problem in problems:
                raise InputError(problem)


def _of_recipe(path: Path) -> str:
    return f"{path} is a recipe file: to train it, run `relaylab train {shlex.quote(str(path))} --data IMAGES`"


def path_problems(paths: Sequence[Path]) -> list[str]:
    """Return an error message for each path that does not exist or cannot be read. Patterns are expanded."""
    problems: list[str] = []
    for path in expanded(paths):
        try:
            path.stat()
        except FileNotFoundError:
            problems.append(f"no such file or folder: {path}")
        except OSError as error:
            problems.append(f"cannot read {path}: {error.strerror}")
    return problems


def given_options(kind: type[Any], arguments: Sequence[str]) -> set[str]:
    """Return the fields of an options dataclass that a command line sets."""
    names = {f"--{entry.name.replace('_', '-')}": entry.name for entry in fields(kind)} | {"--set": "changes"}
    words = (argument.partition("=")[0].replace("_", "-") for argument in arguments)  # tyro accepts both spellings
    return {names[word] for word in words if word in names}
