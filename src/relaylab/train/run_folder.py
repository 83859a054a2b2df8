"""Run folders: create, describe, lock and read them. A run is never overwritten.

runs/RECIPE/TIME-sSEED/
config.json        options, and every value of the recipe with its source
environment.json   machine and versions, one entry per start
metrics.jsonl      metrics of training, validation and gradients, one JSON object per line
tensorboard/       the same for TensorBoard
log.txt
checkpoints/       see relaylab.train.checkpoint
model.safetensors  the trained network; see relaylab.models.file
model.ema.safetensors  the same with averaged weights, if optimizer.ema_decay is set
"""

import dataclasses
import fcntl
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from relaylab.errors import InputError, raise_all
from relaylab.files import ROOT, create_folder, timestamp, write_text
from relaylab.outside.folders import open_for_writing
from relaylab.outside.reading import DamagedFileError, read_json, typed
from relaylab.recipes.decoding import current_name, decode_recipe, nested
from relaylab.recipes.schema import SCHEMES, Recipe
from relaylab.train.environment import environment, network_versions
from relaylab.train.failures import FILE
from relaylab.train.options import TrainOptions, name_of, option_problems

log = logging.getLogger("relaylab.train")

CONFIG, ENVIRONMENT, METRICS, LOG = "config.json", "environment.json", "metrics.jsonl", "log.txt"
CHECKPOINTS, TENSORBOARD, MODEL = "checkpoints", "tensorboard", "model.safetensors"
AVERAGED = "model.ema.safetensors"
LOCK = ".lock"
BEFORE_THE_FIRST_STEP = (LOCK, LOG, ENVIRONMENT, FILE)  # files written before the first step


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecipe:
    """The recipe of a run when it started: values by dotted name, and their sources."""

    name: str
    row: str
    values: dict[str, Any]
    sources: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """The configuration of a run, as written by `write_config`.

    Attributes:
        options: options, with renamed values of earlier versions under their current names.
        recipe: recipe of the run.
        classes: display names of the classes.
        keys: keys of the classes; None in runs of earlier versions.
        counts: number of images per class, by split.
        images: number of images by split, for multi-label images.
    """

    options: TrainOptions
    recipe: StoredRecipe
    classes: tuple[str, ...] = ()
    keys: tuple[str, ...] | None = None
    counts: dict[str, list[int]] = dataclasses.field(default_factory=dict[str, list[int]])
    images: dict[str, int] = dataclasses.field(default_factory=dict[str, int])


def read_run(folder: Path) -> StoredRun:
    """Read the configuration of a run.

    Raises:
        InputError: the folder does not contain a run, or the file is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not a run: expected the folder of a run, with {CONFIG}")
    run = read_json(path, StoredRun)
    if problems := option_problems(run.options):
        raise DamagedFileError(f"{path} is damaged or was not written by relaylab: {'; '.join(problems)}")
    pairs = [text.partition("=") for text in run.options.changes]
    changes = tuple(f"{current_name(key)}{equals}{value}" for key, equals, value in pairs)
    return dataclasses.replace(run, options=dataclasses.replace(run.options, changes=changes))


def stored_recipe(folder: Path) -> Recipe:
    """Return the recipe stored in the folder of a run, possibly by an earlier version.

    Raises:
        InputError: the run cannot be read.
    """
    stored = read_run(folder).recipe
    return _decoded({"name": stored.name, "row": stored.row, **stored.values}, stored.sources, folder / CONFIG)


def _decoded(values: Mapping[str, Any], sources: Mapping[str, str], path: Path) -> Recipe:
    """Decode the stored values of a recipe; values that an earlier version did not have get their defaults."""
    problems: list[str] = []
    values, sources = ({current_name(name): value for name, value in stored.items()} for stored in (values, sources))
    recipe = decode_recipe(nested(values), sources, problems)
    raise_all([f"{path}: {problem}" for problem in problems])
    return recipe


def value_changes(stored: Mapping[str, Any], recipe: Recipe, path: Path) -> list[str]:
    """Return a description of each value of a recipe that differs from the stored values of a run.

    Args:
        stored: values by dotted name, possibly from an earlier version.
        recipe: the recipe to compare.
        path: file of the stored values, for errors.

    Raises:
        InputError: the stored values are not a valid recipe.
    """
    head = {"name": recipe.name, "row": recipe.row}
    before, now = values_of(_decoded({**head, **stored}, {}, path)), values_of(recipe)
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Return all values of a recipe by dotted name, as JSON types."""
    return json.loads(json.dumps({name: value for name, value, _ in recipe.fields()}))


def write_config(folder: Path, options: TrainOptions, recipe: Recipe, about: Mapping[str, Any]) -> None:
    """Write the configuration of a new run: options with absolute paths, recipe, and further entries `about` it."""
    values = dataclasses.asdict(options) | {"out": None, "resume": None}
    values |= {name: [str(path.absolute()) for path in getattr(options, name)] for name in ("data", "val_data")}
    del values["given"]
    sources = {name: source for name, _, source in recipe.fields()}
    about_recipe = {"name": recipe.name, "row": recipe.row, "values": values_of(recipe), "sources": sources}
    write_text(folder / CONFIG, json.dumps({"options": values, "recipe": about_recipe, **about}, indent=2) + "\n")


def member_name(scheme: str, seed: int) -> str:
    """Return the folder name of a run of a comparison, such as "relay-s0"."""
    return f"{scheme.replace('_', '-')}-s{seed}"


def parse_member_name(folder: Path) -> tuple[str, int] | None:
    """Return the scheme and the seed in a folder name from `member_name`; None for other folders."""
    scheme, _, seed = folder.resolve().name.rpartition("-s")
    scheme = scheme.replace("-", "_")
    return (scheme, int(seed)) if scheme in SCHEMES and seed.isdecimal() else None


def new_folder(options: TrainOptions) -> Path:
    """Create the folder of a new run.

    Raises:
        InputError: the folder is not empty, or cannot be created.
    """
    try:
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            if any(path.name not in BEFORE_THE_FIRST_STEP for path in options.out.iterdir()):
                raise InputError(f"{options.out} is not empty; choose a new folder with --out")
            return options.out
        return create_folder(ROOT / name_of(options) / f"{timestamp()}-s{options.seed}")
    except OSError as error:
        raise InputError(f"cannot create a folder for the run: {error}") from None


def candidates(options: TrainOptions) -> list[Path]:
    """Return the folders that may contain an earlier run with these options, newest first."""
    return [options.out] if options.out is not None else sorted((ROOT / name_of(options)).glob("*"), reverse=True)


def find_launch(options: TrainOptions, launch: str) -> Path | None:
    """Return the run that the processes of this torchrun launch trained before they restarted, if any."""
    folders = candidates(options)
    return next((path for path in folders if any(start.get("launch") == launch for start in read_starts(path))), None)


def remove_unstarted(folder: Path) -> None:
    """Remove the folder of a run that failed before it wrote its configuration."""
    if (folder / CONFIG).exists():
        return
    for name in BEFORE_THE_FIRST_STEP:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        folder.rmdir()


@dataclass(frozen=True)
class _Start:
    """The entries of a start record that are read back; all others are informational."""

    versions: dict[str, str]
    threads: int
    launch: str = ""
    started_at: str = ""
    device: str = ""
    processes: int = 1
    commit: str | None = None
    python: str = ""
    system: str = ""
    processor: str = ""
    cores: int | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class _Starts:
    starts: tuple[_Start, ...]


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the environments in which a run was started, in order; empty if the file is damaged."""
    try:
        values = read_json(folder / ENVIRONMENT, dict[str, Any])
        typed(values, _Starts, str(folder / ENVIRONMENT))
        return values["starts"]
    except DamagedFileError:  # results do not depend on it
        return []


def record_start(folder: Path, recipe: Recipe, about: Mapping[str, Any]) -> None:
    """Append this start to the environment of a run and warn if versions have changed since the last start."""
    starts = read_starts(folder)
    here = environment()
    versions: dict[str, str] = here["versions"]
    versions |= (of_network := network_versions(recipe.network))
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    before: dict[str, str] = starts[-1]["versions"] if starts else versions
    for name, version in versions.items():
        if (old := before.get(name)) not in (version, None):
            effect = "the network may differ" if name in of_network else "results may differ by rounding"
            log.warning("%s %s now, %s before: %s", name, version, old, effect)
    starts.append({"started_at": now, "command": command, **about, **here})
    write_text(folder / ENVIRONMENT, json.dumps({"starts": starts}, indent=2) + "\n")


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder within the block. The operating system releases the lock when the process ends.

    Forked processes do not inherit this kind of lock: data-loading workers may outlive a killed process.

    Raises:
        InputError: another process holds the lock, and `wait` is false.
    """
    with open_for_writing(folder / LOCK, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"another process is training the run in {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield
