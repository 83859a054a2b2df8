"""Option types shared by the commands. No torch in here, so that `relaylab COMMAND --help` answers at once."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from relaylab.errors import InputError
from relaylab.files import available_cores


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


DIGITS_DEFAULTS = {"seeds": 3, "size": 8, "epochs": 30, "batch_size": 32, "lr": 0.02, "width": 32, "convs": 3}
PHOTO_DEFAULTS = {"seeds": 1, "size": 64, "epochs": 12, "batch_size": 64, "lr": 0.01, "width": 16, "convs": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Compare three schemes on handwritten digits, with a report.

    Without options it trains on handwritten digits that come along, in two to three minutes on two cores. Options that
    are left out take a value that suits the data.
    """

    data: Images = ()
    """Images to train on: a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or tar files (.tar, .tar.xz, ...) with
    such members, train and val in one or in several. Without it: scikit-learn's handwritten digits."""

    out: Folder = None
    """Folder for the report; it must be new or empty. (default: runs/demo/TIME-sSEED)."""

    seed: int = 0
    """First seed, for weights, batches, crops and dropout."""

    seeds: Number = None
    """Number of seeds: how often each scheme is trained (default: 3 for the digits, 1 for photos)."""

    epochs: Number = None
    """Passes over the training images (default: 30 for the digits, 12 for photos)."""

    train_per_class: Number = None
    """At most this many training images of each class, for quick runs (default: all)."""

    val_per_class: Number = None
    """At most this many validation images of each class, for quick runs (default: all)."""

    classes: Number = None
    """Only the first so many classes in the order of their folders' names, for quick runs (default: all)."""

    size: Number = None
    """Side of the square crop that the network sees, in pixels (default: 64; the digits are 8x8)."""

    long_tail: Rate = None
    """Thin the training images out so that class sizes fall exponentially from the largest class's to that divided by
    X; which images are kept is listed beside the report (default: keep all)."""

    sampling: Literal["class-aware", "shuffled", "square-root"] = "class-aware"
    """How training images are chosen: each class as often as any other, each image as often as any other, or between
    the two."""

    workers: Number = None
    """Processes that decode images (default: one on each core)."""

    no_flip: Switch = False
    """Do not mirror half of the training images. The built-in digits never are: a mirrored 2 is no 2."""

    batch_size: Number = None
    """Images per step (default: 32 for the digits, 64 for photos)."""

    lr: Rate = None
    """Learning rate at the start; divided by 10 at 70 % and at 90 % of the epochs (default: 0.02 for the digits,
    0.01 for photos)."""

    width: Number = None
    """Filters in the first segment; they double from segment to segment, up to eightfold (default: 32 for the
    digits, 16 for photos)."""

    convs: Number = None
    """Convolutions per segment (default: 3 for the digits, 2 for photos)."""

    @property
    def flip(self) -> bool:
        """Whether to mirror half of the training images."""
        return bool(self.data) and not self.no_flip

    def resolved(self) -> "DemoConfig":
        """The same options with the defaults for the kind of data filled in.

        Raises:
            InputError: an option out of range, or --size without --data.
        """
        if not self.data and self.size not in (None, 8):
            raise InputError("--size needs --data: the built-in digits are 8x8")
        defaults = PHOTO_DEFAULTS if self.data else DIGITS_DEFAULTS
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if self.workers is None:
            missing["workers"] = available_cores()
        config = dataclasses.replace(self, **missing)
        _check_ranges(config)
        return config


def _check_ranges(config: DemoConfig) -> None:
    least = {"seed": 0, "seeds": 1, "epochs": 1, "train_per_class": 1, "val_per_class": 1, "classes": 2}
    least |= {"size": 8, "batch_size": 1, "width": 1, "convs": 1, "long_tail": 1, "workers": 0}
    most = {"seed": 2**31, "seeds": 100, "size": 1024, "width": 1024, "convs": 32}
    wrong: list[str] = []
    for name, low in least.items():
        value, high = getattr(config, name), most.get(name)
        if value is not None and (value < low or (high is not None and value > high)):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            wrong.append(f"--{name.replace('_', '-')} must be {allowed}, not {value}")
    if config.lr is not None and not 0 < config.lr <= 10:
        wrong.append(f"--lr must be above 0 and at most 10, not {config.lr:g}")
    if wrong:
        raise InputError("; ".join(wrong))
