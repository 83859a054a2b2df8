"""The options of the commands. No torch in here, so that `relaylab --help` answers at once."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relaylab.cores import available_cores
from relaylab.errors import InputError

DIGITS_DEFAULTS = {"seeds": 3, "size": 8, "epochs": 30, "batch_size": 32, "lr": 0.02, "width": 32, "convs": 3}
PHOTO_DEFAULTS = {"seeds": 1, "size": 64, "epochs": 12, "batch_size": 64, "lr": 0.01, "width": 16, "convs": 2}

# Their help texts give the defaults, which depend on the data; None would be news to nobody.
Number = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Rate = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
Images = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Split = Annotated[Literal["train", "val", "test"] | None, tyro.conf.arg(help_behavior_hint="")]
Sources = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="")
]
Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Train standard BP, multi-loss and relay on one network and write a report.

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


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which images."""

    paths: Sources
    """Folders or tar files with CLASS/IMAGE, perhaps below train/, val/ and test/; or a list file with NAME LABEL lines
    and the folder that it is about; or ImageNet's validation images with their development kit."""

    split: Split = None
    """One of train, val and test, where the data has them (default: all, one after another)."""

    categories: File = None
    """For a list: file with a line NAME LABEL for each class (default: categories*.txt beside the list)."""

    cache: Folder = None
    """Folder for indexes and unpacked archives (default: RELAYLAB_CACHE, or the user's cache folder)."""

    workers: Number = None
    """Processes that decode (default: one on each core)."""

    out: Folder = None
    """Folder for the results; it must be new or empty. (default: runs/data/TIME)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectConfig(DataConfig):
    """Say what a data set holds: images, classes, balance, sizes, formats; a sample of the images is decoded."""

    sample: Annotated[int, tyro.conf.arg(metavar="N")] = 2000
    """How many images to decode, evenly spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig(DataConfig):
    """Decode every image of a data set and list those that cannot be read."""


def check_data_config(config: DataConfig) -> None:
    """Check what can be checked without the data.

    Raises:
        InputError: no paths, or a number out of range.
    """
    if not config.paths:
        raise InputError("which images? Give a folder, tar files or a list")
    if config.workers is not None and config.workers < 0:
        raise InputError(f"--workers must be at least 0, not {config.workers}")
    if isinstance(config, InspectConfig) and config.sample < 1:
        raise InputError(f"--sample must be at least 1, not {config.sample}")


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
