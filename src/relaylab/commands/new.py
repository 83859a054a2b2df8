"""`relaylab recipes new`: write a recipe file for a network and a data set."""

import ast
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relaylab.errors import InputError, raise_all
from relaylab.files import write_text
from relaylab.options import File, Images, MustExist, Number, too_small, writable
from relaylab.outside.reading import LARGEST, read_bytes
from relaylab.recipes.changes import ARCHITECTURE, hold_out_problems, located
from relaylab.recipes.decoding import plain_value

SAMPLE = 500  # images to decode
Network = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NETWORK", help_behavior_hint="")]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewOptions:
    """Write a recipe file for a network and a data set.

    Classes, sizes and training length are derived from the images; windows and heads, from the network. A comment gives
    the reason for each value: review the file, and edit it as needed.
    """

    network: Network
    """timm:NAME, torchvision:NAME, package.module:function or path/to/file.py:function."""

    data: Annotated[Images, MustExist]
    """Images, as for `relaylab train`."""

    val_data: Annotated[Images, MustExist] = ()
    """Validation images, if --data has training images only."""

    val_split: Annotated[Literal["val", "test"] | None, tyro.conf.arg(metavar="{val,test}", help_behavior_hint="")] = (
        None
    )
    """Split to validate on (default: val)."""

    hold_out: Annotated[float | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """Hold out training images for validation: a fraction of each class if below 1, otherwise images per class."""

    pretrained: Annotated[File, MustExist] = None
    """Pretrained weights: safetensors or a PyTorch state dict. Tensors that do not match, such as those of a final
    layer trained for other classes, keep their random initialisation (default: train from scratch)."""

    epochs: int = 30
    """Epochs to train."""

    size: Number = None
    """Crop size in pixels (default: derived from the images, at most 224)."""

    batch_size: Number = None
    """Batch size (default: derived from the number of images, at most 128)."""

    optimizer: Annotated[Literal["sgd", "adamw"] | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Optimizer (default: adamw for networks with layer normalisation and no batch normalisation, otherwise sgd)."""

    options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]", help_behavior_hint="")] = ()
    """Further keyword arguments of the network, such as drop_rate=0.1."""

    heads: int = 1
    """Number of auxiliary losses."""

    out: File = None
    """Recipe file to write (default: name of the network with .toml)."""


def main(options: NewOptions) -> int:
    """Scan the images, profile the network, and write the recipe."""
    problems = too_small(options, epochs=1, size=8, batch_size=2, heads=1)
    problems += hold_out_problems("--hold-out", options.hold_out)
    if options.hold_out is not None and (options.val_split or options.val_data):
        problems.append("--hold-out cannot be combined with --val-split or --val-data")
    pairs = [text.partition("=") for text in options.options]
    problems += [f"--options {text}: expected KEY=VALUE" for text in options.options if "=" not in text]
    if not options.data:
        problems.append("--data is required: a folder or tar files with train/CLASS/IMAGE and val/CLASS/IMAGE")
    if options.network.endswith(".py"):
        problems.append(_without_function(options.network))
    raise_all(problems)
    name = options.network.rpartition(":")[2] if ":" in options.network else options.network
    out = writable(options.out or Path(f"{name}.toml"), suffixes=(".toml",))
    if out.exists():
        raise InputError(f"{out} already exists: choose a different --out, or remove it")
    from relaylab.data.scan import ScanResults, scan
    from relaylab.models.named import allow
    from relaylab.progress import progress
    from relaylab.recipes.files import to_toml
    from relaylab.recipes.schema import ImagesConfig, NetworkConfig
    from relaylab.train.images import check_classes, chosen_indices, open_sources
    from relaylab.train.options import RuntimeOptions
    from relaylab.train.proposal import Preferences, propose

    held = int(options.hold_out) if options.hold_out is not None and options.hold_out >= 1 else options.hold_out
    images = ImagesConfig(data_set="any", short_side=1, sampling="shuffled", held_out=held, val_split=options.val_split)
    network = located(ARCHITECTURE, options.network)
    allow(NetworkConfig(architecture=network, num_classes=2, image_size=1))
    train, val = open_sources(RuntimeOptions(data=options.data, val_data=options.val_data), images)
    check_classes(train, val)
    chosen, _ = chosen_indices(images, train)
    results = ScanResults()
    with progress("decoding", min(SAMPLE, len(train))) as task:
        scan(train, results, limit=SAMPLE, task=task)
    if not results.widths:
        raise InputError(f"{train.title}: none of {results.examined} images can be read; run `relaylab data check`")
    preferences = Preferences(
        name=out.stem,
        epochs=options.epochs,
        size=options.size,
        batch_size=options.batch_size,
        heads=options.heads,
        optimizer=options.optimizer,
        network=_relative(network, out),
        pretrained=options.pretrained and os.path.relpath(options.pretrained.resolve(), out.absolute().parent),
        options={key: plain_value(value) for key, _, value in pairs},
    )
    proposal = propose(network, train, images, len(train) if chosen is None else len(chosen), results, preferences)
    write_text(out, to_toml(proposal.recipe, proposal.notes))
    command = ["train", str(out), "--data", *map(str, options.data)]
    if options.val_data:
        command += ["--val-data", *map(str, options.val_data)]
    if proposal.recipe.plan.auxiliary and not proposal.is_scarce:
        grid = ",".join(f"{rate:g}" for rate in _grid(proposal.recipe.optimizer.lr))
        command = ["compare", *command[1:], "--tune", f"optimizer.lr={grid}"]
    print("\n".join(proposal.notes[""]).rstrip())
    print(f"\nRecipe: {out.resolve()}\nNext:   relaylab {shlex.join(command)}")
    return 0


def _grid(rate: float) -> list[float]:
    """Return three rates of the form 1 or 3 times a power of ten; the middle one is nearest to the given rate."""
    middle = round(2 * math.log10(rate))  # in half decades
    return [float(f"{(1, 3)[half % 2]}e{half // 2}") for half in (middle - 1, middle, middle + 1)]


def _without_function(path: str) -> str:
    """Return the error message for a Python file without a function; the file is parsed, not imported."""
    try:
        nodes = ast.parse(read_bytes(Path(path).expanduser(), LARGEST)).body
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    except (SyntaxError, ValueError) as error:
        return f"{path}: {error}"
    names = [node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    public = [name for name in names if not name.startswith("_")]
    return f"{path} is a file: expected {path}:FUNCTION; this file has {', '.join(public) or 'no function or class'}"


def _relative(network: str, out: Path) -> str:
    """Return a network's name for the recipe file `out`: Python files are relative to the recipe's folder."""
    path, colon, function = network.rpartition(":")
    return f"{os.path.relpath(path, out.absolute().parent)}{colon}{function}" if Path(path).is_absolute() else network
