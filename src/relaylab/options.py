"""Option types shared by the commands. No torch in here, so that `relaylab COMMAND --help` answers at once."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from relaylab.errors import InputError


class MustExist:
    """Marks a type of paths that are checked before anything slow is imported."""


# Defaults that depend on the data are part of the help text, so the uninformative None is hidden.
Number = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Rate = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]
Listed = Annotated[str, tyro.conf.arg(metavar="A,B,...")]
OptionalList = Annotated[str, tyro.conf.arg(metavar="A,B,...", help_behavior_hint="")]
Images = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Split = Annotated[Literal["train", "val", "test"] | None, tyro.conf.arg(help_behavior_hint="")]
Sources = Annotated[
    tuple[Path, ...], MustExist, tyro.conf.Positional, tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="")
]
Runs = Annotated[
    tuple[Path, ...], MustExist, tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")
]
Scores = Annotated[
    tuple[Path, ...],
    MustExist,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="SCORES [SCORES ...]", help_behavior_hint=""),
]
Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help_behavior_hint="")]
Model = Annotated[Path, MustExist, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help_behavior_hint="")]


def check_paths(options: object) -> None:
    """Check that all paths whose type asks for it exist.

    Args:
        options: a dataclass.

    Raises:
        InputError: a path that does not exist or cannot be read.
    """
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        if MustExist in getattr(hint, "__metadata__", ()):
            value: Any = getattr(options, name)
            for problem in path_problems([value] if isinstance(value, Path) else value or ()):
                raise InputError(problem)


def path_problems(paths: Sequence[Path]) -> list[str]:
    """Return an error message for each path that does not exist or cannot be read."""
    problems: list[str] = []
    for path in paths:
        try:
            path.stat()
        except FileNotFoundError:
            problems.append(f"no such file or folder: {path}")
        except OSError as error:
            problems.append(f"cannot read {path}: {error.strerror}")
    return problems


def given_options(kind: type[Any], arguments: Sequence[str]) -> set[str]:
    """Return the fields of an option class that a command line sets.

    Args:
        kind: a dataclass.
        arguments: of the command line.
    """
    names = {f"--{entry.name.replace('_', '-')}": entry.name for entry in fields(kind)} | {"--set": "changes"}
    return {names[word] for argument in arguments if (word := argument.partition("=")[0]) in names}
