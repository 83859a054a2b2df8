"""The options of `relaylab demo`. No torch in here, so that `relaylab --help` answers at once."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from relaylab.errors import InputError

DIGITS_DEFAULTS = {"size": 8, "flip": False, "epochs": 20, "batch_size": 16, "lr": 0.02, "width": 24, "convs": 3}
PHOTO_DEFAULTS = {"size": 64, "flip": True, "epochs": 12, "batch_size": 64, "lr": 0.01, "width": 16, "convs": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Options of the demo. Those that are None take the value that suits the data; see `resolved`."""

    data: tuple[Path, ...] = ()
    """Images to train on: a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or tar files (.tar, .tar.xz, ...) with
    such members, train and val in one or in several. Without it: scikit-learn's handwritten digits."""

    out: Path | None = None
    """Folder for the report; it must be new or empty. Default: runs/demo/TIME-sSEED."""

    seed: int = 0
    """First seed, for weights, batches, crops and dropout."""

    seeds: int = 3
    """Number of seeds: how often each scheme is trained."""

    epochs: int | None = None
    """Passes over the training images (digits 20, photos 12)."""

    train_per_class: int | None = None
    """At most this many training images of each class, for quick runs (all)."""

    classes: int | None = None
    """Only the first so many classes in the order of their folders' names, for quick runs (all)."""

    size: int | None = None
    """Side of the square crop that the network sees, in pixels (photos 64; the digits are 8x8)."""

    flip: bool | None = None
    """Mirror half of the training images (photos yes; never the digits: a mirrored 2 is no 2)."""

    batch_size: int | None = None
    """Images per step (digits 16, photos 64)."""

    lr: float | None = None
    """Learning rate at the start; divided by 10 at 60 % and at 85 % of the epochs (digits 0.02, photos 0.01)."""

    width: int | None = None
    """Filters in the first segment; they double from segment to segment, up to eightfold (digits 24, photos 16)."""

    convs: int | None = None
    """Convolutions per segment (digits 3, photos 2)."""

    def resolved(self) -> "DemoConfig":
        """The same options with the defaults for the kind of data filled in.

        Raises:
            InputError: an option out of range, or one that the digits do not have.
        """
        if not self.data and (self.size not in (None, 8) or self.flip):
            raise InputError("--size and --flip need --data: the built-in digits are 8x8 and must not be mirrored")
        defaults = PHOTO_DEFAULTS if self.data else DIGITS_DEFAULTS
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **missing)
        _check_ranges(config)
        return config


def _check_ranges(config: DemoConfig) -> None:
    least = {"seed": 0, "seeds": 1, "epochs": 1, "train_per_class": 1, "classes": 2}
    least |= {"size": 8, "batch_size": 1, "width": 1, "convs": 1}
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
