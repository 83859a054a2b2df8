"""Runs as folders: created, described, found again, and never overwritten.

runs/RECIPE/TIME-sSEED/
config.json        options, and every value of the recipe with its source
environment.json   machine and versions, an entry for each start
metrics.jsonl      metrics of training, validation and gradients, one JSON object on each line
tensorboard/       the same for TensorBoard
log.txt
checkpoints/       see relaylab.train.checkpoint
model.safetensors  the trained network; see relaylab.models.file
model.ema.safetensors  the same with averaged weights, with optimizer.ema_decay
"""

import dataclasses
import fcntl
import json
import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from relaylab.data.sources import digits
from relaylab.data.sources.source import Source
from relaylab.errors import InputError, raise_all
from relaylab.files import ROOT, timestamp, write_text
from relaylab.options import path_problems
from relaylab.outside.folders import open_for_writing
from relaylab.outside.reading import DamagedFileError, read_json, typed
from relaylab.recipes import find_recipe
from relaylab.recipes.changes import recipe_problems, with_absolute_paths, with_changes
from relaylab.recipes.decoding import current_name, decode_recipe, nested
from relaylab.recipes.files import is_file
from relaylab.recipes.schema import SCHEMES, Recipe
from relaylab.train.environment import environment, network_versions
from relaylab.train.failures import FILE
from relaylab.train.options import TrainConfig, engine_problems, name_of
from relaylab.train.torchrun import restart_count

log = logging.getLogger("relaylab.train")

CONFIG, ENVIRONMENT, METRICS, LOG = "config.json", "environment.json", "metrics.jsonl", "log.txt"
CHECKPOINTS, TENSORBOARD, MODEL = "checkpoints", "tensorboard", "model.safetensors"
AVERAGED = "model.ema.safetensors"
LOCK = ".lock"
BEFORE_THE_FIRST_STEP = (LOCK, LOG, ENVIRONMENT, FILE)  # the files of a run that failed before its first step
# The options that define a run. All others may change when it resumes.
FIXED = ("recipe", "scale", "changes", "seed", "precision", "batch_norm", "images")


@dataclass(frozen=True)
class Request:
    """A training: complete options, the recipe with its changes, and the run and checkpoint to resume.

    The folder is None for a new run, and the checkpoint is None for the newest valid one. Training and validation
    `images` of the caller's own take the place of paths.
    """

    config: TrainConfig
    recipe: Recipe
    folder: Path | None = None
    checkpoint: Path | None = None
    images: tuple[Source, Source] | None = None


def understand(
    config: TrainConfig, given: Collection[str] | None = None, *, images: tuple[Source, Source] | None = None
) -> Request:
    """Derive the recipe and the run from the options. Reads files, but writes none.

    Args:
        config: options.
        given: names of the options that the user set, which override those of a run that resumes; None for all that
            differ from their defaults.
        images: training and validation images, in place of paths in the options. A run does not record them: give them
            again to resume it.

    Raises:
        InputError: all problems with the options, at once.
    """
    config = _with_absolute_paths(config)
    if given is None:
        fields = dataclasses.fields(TrainConfig)
        given = {entry.name for entry in fields if getattr(config, entry.name) != entry.default}
    if config.resume is not None and config.resume != "auto":
        return _resumed(config, Path(config.resume), given, images)
    recipe, problems = _recipe_of(config)
    config = config if images is not None else _with_digits(config, recipe)
    if images is not None and (config.data or config.val_data):
        problems.append("images are given as sources and as paths: expected one of both")
    elif not config.data and recipe is not None and images is None:
        problems.append("--data is missing: a folder or tar files with train/CLASS/IMAGE and val/CLASS/IMAGE")
    recipe = _checked(recipe, problems + path_problems((*config.data, *config.val_data)))
    if config.resume == "auto":
        folder = _newest_alike(config, recipe)
        if folder is not None:
            return Request(_merged(config, folder, given), recipe, folder, images=images)
    elif config.out is not None and (config.out / CONFIG).exists() and not restart_count():
        resume = f"resume it with --resume {config.out}, or take another --out"
        raise InputError(f"{config.out} already contains a run; {resume}")
    return Request(config, recipe, images=images)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The options with the absolute paths of the recipe's files, so that the run can resume in any folder."""
    changes = tuple(map(with_absolute_paths, config.changes))
    recipe = str(Path(config.recipe).absolute()) if config.recipe and is_file(config.recipe) else config.recipe
    return dataclasses.replace(config, recipe=recipe, changes=changes)


def _recipe_of(config: TrainConfig, folder: Path | None = None) -> tuple[Recipe | None, list[str]]:
    """The recipe at its scale with its changes, and all problems with it and with the options.

    A run, in `folder`, keeps the recipe of a file as it was.
    """
    problems = engine_problems(config)
    if config.recipe is None:
        return None, ["a recipe is required: 'relaylab recipes' lists them; or --resume PATH", *problems]
    if folder is not None and is_file(config.recipe):
        recipe = kept_recipe(folder)
        return recipe, problems + batch_problems(recipe, config, config.devices)
    try:
        recipe = find_recipe(config.recipe, config.scale)
    except InputError as error:
        return None, [str(error), *problems]
    if recipe.trained_as is not None:
        problems.append(f"{recipe.name} tests the network that {recipe.trained_as} trains: train that one")
    recipe, wrong = with_changes(recipe, config.changes)
    problems += path_problems([Path(recipe.network.pretrained)] if recipe.network.pretrained and folder is None else [])
    if folder is None:
        _allow(recipe)
    problems += wrong or recipe_problems(recipe)
    return recipe, problems + batch_problems(recipe, config, config.devices)


def kept_recipe(folder: Path) -> Recipe:
    """Return the recipe that a run has stored, which may be that of an earlier version.

    Raises:
        InputError: the run cannot be read.
    """
    stored = read_run(folder).recipe
    return _decoded({"name": stored.name, "row": stored.row, **stored.values}, stored.sources, folder / CONFIG)


def _decoded(values: Mapping[str, Any], sources: Mapping[str, str], path: Path) -> Recipe:
    """The recipe of stored values. Values that the version that stored them did not have are the defaults."""
    problems: list[str] = []
    values, sources = ({current_name(name): value for name, value in stored.items()} for stored in (values, sources))
    recipe = decode_recipe(nested(values), sources, problems)
    raise_all([f"{path}: {problem}" for problem in problems])
    return recipe


def value_changes(stored: Mapping[str, Any], recipe: Recipe, path: Path) -> list[str]:
    """Return a sentence for each value of a recipe that differs from those that a run has stored.

    Args:
        stored: values by dotted name, perhaps of an earlier version.
        recipe: to compare them with.
        path: of the file that they are from, for errors.

    Raises:
        InputError: stored values that are not a recipe's.
    """
    head = {"name": recipe.name, "row": recipe.row}
    before, now = values_of(_decoded({**head, **stored}, {}, path)), values_of(recipe)
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _allow(recipe: Recipe) -> None:
    """Note that the user has named a network's code."""
    if recipe.network.is_code:
        from relaylab.models.named import allow  # imports torch

        allow(recipe.network)


def batch_problems(recipe: Recipe, config: TrainConfig, devices: int) -> list[str]:
    """Return an error message if the recipe's batch cannot be divided evenly, or into parts that can be used."""
    size, parts = recipe.optimizer.batch_size, max(1, devices * config.accumulate)
    divisor = f"devices x accumulate ({devices} x {config.accumulate})"
    if size % parts:
        return [f"optimizer.batch_size is {size}: it must be divisible by {divisor}"]
    if size != parts:
        return []
    problems: list[str] = []
    mixes = [name for name in ("mixup", "cutmix") if getattr(recipe.augmentation, name)]
    if mixes:
        problems.append(
            f"augmentation.{mixes[0]} mixes images of one batch, and optimizer.batch_size {size} leaves one image to "
            f"each part of it: take at least 2 x {divisor}, or --set augmentation.{mixes[0]}=0"
        )
    if config.batch_norm == "local" or devices == 1:
        from relaylab.train.normalisation import single_image_problem  # imports torch

        problem = single_image_problem(recipe)
        problems += [problem] if problem else []
    return problems


def _checked(recipe: Recipe | None, problems: list[str]) -> Recipe:
    raise_all(problems)
    assert recipe is not None
    return recipe


def _with_digits(config: TrainConfig, recipe: Recipe | None) -> TrainConfig:
    """The options with the embedded digits as images, if the recipe is for them and the user names no others."""
    if recipe is None or recipe.images.data_set != "digits" or config.val_data:
        return config
    is_lost = len(config.data) == 1 and config.data[0].name == digits.NAME and not config.data[0].exists()
    return dataclasses.replace(config, data=(digits.digits_tar(),)) if is_lost or not config.data else config


def _resumed(config: TrainConfig, path: Path, given: Collection[str], images: tuple[Source, Source] | None) -> Request:
    checkpoint, folder = None, path
    if path.parent.name == CHECKPOINTS and not (path / CONFIG).exists():
        checkpoint, folder = path, path.parent.parent
    if not path.exists():
        raise InputError(f"--resume {path}: no such run or checkpoint")
    if not (folder / CONFIG).is_file():
        raise InputError(f"--resume {path}: expected a run's folder, with {CONFIG}, or one of its checkpoints")
    merged = _merged(config, folder, given)
    recipe, problems = _recipe_of(merged, folder)
    merged = merged if images is not None else _with_digits(merged, recipe)
    moved = path_problems((*merged.data, *merged.val_data))
    problems += [f"{problem}; if the images have moved, say where to with --data" for problem in moved]
    recipe = _checked(recipe, problems)
    _check_recipe(recipe, folder)
    return Request(merged, recipe, folder, checkpoint, images)


def _merged(config: TrainConfig, folder: Path, given: Collection[str]) -> TrainConfig:
    """The options of a run, overridden by the given ones that may change."""
    stored = _stored_options(folder)
    raise_all(
        [
            f"the run in {folder} has {name} {getattr(stored, name)!r}, not {getattr(config, name)!r}: "
            "that cannot change"
            for name in _different(config, stored)
            if name in given
        ]
    )
    new = {name: getattr(config, name) for name in given if getattr(config, name) is not None}
    return dataclasses.replace(stored, **{**new, "resume": config.resume, "out": config.out})


def _different(config: TrainConfig, stored: TrainConfig) -> list[str]:
    """The fixed options that differ from those of a run; where the images are kept, "auto" accepts either."""
    names = [name for name in FIXED if getattr(config, name) not in (getattr(stored, name), None)]
    return [name for name in names if name != "images" or config.images != "auto"]


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe that the run in a folder trains, at its scale and with its changes.

    Raises:
        InputError: the run cannot be read, or the recipe has changed since.
    """
    recipe = _checked(*_recipe_of(_stored_options(folder), folder))
    _check_recipe(recipe, folder)
    return recipe


def member_name(scheme: str, seed: int) -> str:
    """Return the name of a run's folder in that of its comparison."""
    return f"{scheme.replace('_', '-')}-s{seed}"


def member_of(folder: Path) -> tuple[str, int] | None:
    """Return the scheme and the seed that `member_name` gave a folder; None for any other folder."""
    scheme, _, seed = folder.resolve().name.rpartition("-s")
    scheme = scheme.replace("-", "_")
    return (scheme, int(seed)) if scheme in SCHEMES and seed.isdecimal() else None


def title_of(folder: Path) -> str:
    """Return a run's scheme and name.

    Raises:
        InputError: the folder does not hold a run.
    """
    return f"{SCHEMES[recipe_of(folder).scheme]} ({folder.resolve().name})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRecipe:
    """A run's recipe as it was when the run began: values by dotted name, and their sources."""

    name: str
    row: str
    values: dict[str, Any]
    sources: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """A run's configuration, as `describe` writes it.

    Attributes:
        options: with the names that values of earlier versions have now.
        recipe: that it trains.
        classes: display names.
        keys: the classes' keys; None in runs of earlier versions.
        counts: images of each class by split.
        images: their number by split, where it is not the sum of those.
    """

    options: TrainConfig
    recipe: StoredRecipe
    classes: tuple[str, ...] = ()
    keys: tuple[str, ...] | None = None
    counts: dict[str, list[int]] = dataclasses.field(default_factory=dict[str, list[int]])
    images: dict[str, int] = dataclasses.field(default_factory=dict[str, int])


def read_run(folder: Path) -> StoredRun:
    """Read a run's configuration.

    Raises:
        InputError: the folder holds no run, or the file is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} holds no run: expected {CONFIG}, as `relaylab train` writes it")
    run = read_json(path, StoredRun)
    if problems := engine_problems(run.options):
        raise DamagedFileError(f"{path} is damaged, or not what relaylab writes: {'; '.join(problems)}")
    pairs = [text.partition("=") for text in run.options.changes]
    changes = tuple(f"{current_name(key)}{equals}{value}" for key, equals, value in pairs)
    return dataclasses.replace(run, options=dataclasses.replace(run.options, changes=changes))


def _stored_options(folder: Path) -> TrainConfig:
    return read_run(folder).options


def _check_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuse a recipe whose code has changed since the run began."""
    stored = read_run(folder).recipe.values
    if changes := value_changes(stored, recipe, folder / CONFIG):
        raise InputError(f"recipe {recipe.name} is not what the run in {folder} trains: {'; '.join(changes[:5])}")


def _candidates(config: TrainConfig) -> list[Path]:
    """The folders that may hold an earlier run of these options, the newest first."""
    return [config.out] if config.out is not None else sorted((ROOT / name_of(config)).glob("*"), reverse=True)


def _newest_alike(config: TrainConfig, recipe: Recipe) -> Path | None:
    """The newest run of the same options and recipe; an error if --out names a run of others."""
    for folder in _candidates(config):
        if (folder / CONFIG).is_file():
            try:
                _check_alike(config, recipe, folder)
                return folder
            except InputError:
                if config.out is not None:
                    raise
    return None


def _check_alike(config: TrainConfig, recipe: Recipe, folder: Path) -> None:
    stored = _stored_options(folder)
    other = _different(config, stored) + (["data"] if _paths(config) != _paths(stored) else [])
    if other:
        told = [f"{name} {getattr(stored, name)!r}, not {getattr(config, name)!r}" for name in other if name in FIXED]
        told += ["other images"] if "data" in other else []
        raise InputError(f"the run in {folder} has {'; '.join(told)}: give another --out, or remove that folder")
    _check_recipe(recipe, folder)


def _paths(config: TrainConfig) -> list[Path]:
    from relaylab.data.sources.digits import NAME  # the same images, wherever the cache is

    paths = (*config.data, Path("--"), *config.val_data)
    return [Path(NAME) if path.name == NAME else path.absolute() for path in paths]


def arguments_of(config: TrainConfig) -> list[str]:
    """Return the command line that sets these options."""
    arguments = ["train", *([] if config.recipe is None else [config.recipe])]
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if entry.name in ("recipe", "given") or (value == entry.default and entry.name not in config.given):
            continue
        option = "--set" if entry.name == "changes" else f"--{entry.name.replace('_', '-')}"
        arguments += [option] if value is True else [option, *map(str, value if isinstance(value, tuple) else [value])]
    return arguments


def new_folder(config: TrainConfig) -> Path:
    """Create the folder of a new run.

    Raises:
        InputError: it is not empty, or cannot be created.
    """
    try:
        if config.out is not None:
            config.out.mkdir(parents=True, exist_ok=True)
            if any(path.name not in BEFORE_THE_FIRST_STEP for path in config.out.iterdir()):
                raise InputError(f"{config.out} is not empty; give a new folder with --out")
            return config.out
        parent, stem, number = ROOT / name_of(config), f"{timestamp()}-s{config.seed}", 1
        parent.mkdir(parents=True, exist_ok=True)
        while True:  # several runs may start in the same second
            folder = parent / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise InputError(f"cannot make a folder for the run: {error}") from None


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Return all values of a recipe by their dotted names, with JSON's types."""
    return json.loads(json.dumps({name: value for name, value, _ in recipe.fields()}))


def describe(folder: Path, config: TrainConfig, recipe: Recipe, about: Mapping[str, Any]) -> None:
    """Write the configuration of a new run: its options, with absolute paths, its recipe, and further entries."""
    options = dataclasses.asdict(config) | {"out": None, "resume": None}
    options |= {name: [str(path.absolute()) for path in getattr(config, name)] for name in ("data", "val_data")}
    del options["given"]
    sources = {name: source for name, _, source in recipe.fields()}
    about_recipe = {"name": recipe.name, "row": recipe.row, "values": values_of(recipe), "sources": sources}
    write_text(folder / CONFIG, json.dumps({"options": options, "recipe": about_recipe, **about}, indent=2) + "\n")


def note_start(folder: Path, recipe: Recipe, about: Mapping[str, Any]) -> None:
    """Add this start to a run's environment, and warn of versions that have changed since the last start."""
    starts = starts_of(folder)
    here = environment()
    versions: dict[str, str] = here["versions"]
    versions |= (of_network := network_versions(recipe.network))
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    before: dict[str, str] = starts[-1]["versions"] if starts else versions
    for name, version in versions.items():
        if (old := before.get(name)) not in (version, None):
            effect = (
                "the network may be another one"
                if name in of_network
                else "the numbers may differ in their last digits"
            )
            log.warning("%s %s now, %s before: %s", name, version, old, effect)
    starts.append({"started_at": now, "command": command, **about, **here})
    write_text(folder / ENVIRONMENT, json.dumps({"starts": starts}, indent=2) + "\n")


def find_launch(config: TrainConfig, launch: str) -> Path | None:
    """Return the run that the processes of this launch trained before they restarted."""
    found = (path for path in _candidates(config) if any(start.get("launch") == launch for start in starts_of(path)))
    return next(found, None)


def forget(folder: Path) -> None:
    """Remove the folder of a run that failed before it wrote its configuration."""
    if (folder / CONFIG).exists():
        return
    for name in BEFORE_THE_FIRST_STEP:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not empty
        folder.rmdir()


@dataclass(frozen=True)
class _Start:
    """The entries of a start that are used; others are for people."""

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


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """Return the environments that a run was started in, the first one first."""
    try:
        found = read_json(folder / ENVIRONMENT, dict[str, Any])
        typed(found, _Starts, str(folder / ENVIRONMENT))
        return found["starts"]
    except DamagedFileError:  # no numbers depend on it
        return []


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock a folder. The system releases the lock when the process ends, however it ends.

    Forked processes do not inherit locks of this kind: a loader's worker may outlive a process that is killed.

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
