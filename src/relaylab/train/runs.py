"""Runs as folders: made, described, found again, and never overwritten.

runs/RECIPE/TIME-sSEED/
config.json        what is trained: options, and every value of the recipe with its source
environment.json   where, with which versions: an entry for each time that it was started
metrics.jsonl      a line for each look at training, validation and gradients
tensorboard/       the same for TensorBoard
log.txt
checkpoints/       see relaylab.train.checkpoint
model.safetensors  at the end; see relaylab.models.file
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
from relaylab.errors import InputError, raise_all
from relaylab.files import ROOT, timestamp, write_text
from relaylab.options import path_problems
from relaylab.recipes import find_recipe
from relaylab.recipes.changes import recipe_problems, with_changes
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import SCHEMES, Recipe
from relaylab.train.environment import environment
from relaylab.train.options import TrainConfig, engine_problems
from relaylab.train.torchrun import restart_count

log = logging.getLogger("relaylab.train")

CONFIG, ENVIRONMENT, METRICS, LOG = "config.json", "environment.json", "metrics.jsonl", "log.txt"
CHECKPOINTS, TENSORBOARD, MODEL = "checkpoints", "tensorboard", "model.safetensors"
LOCK = ".lock"
BEFORE_THE_FIRST_STEP = (LOCK, LOG, ENVIRONMENT)  # all that a run that failed at once has left behind
# What a run is. All other options may change when it goes on.
FIXED = ("recipe", "scale", "changes", "seed", "precision", "batch_norm", "images")


@dataclass(frozen=True)
class Request:
    """What the options ask for.

    Attributes:
        config: the options, those of a run that goes on filled in.
        recipe: at its scale, with its changes.
        folder: of the run that goes on; None for a new one.
        checkpoint: that was named; None for the newest that is whole.
    """

    config: TrainConfig
    recipe: Recipe
    folder: Path | None = None
    checkpoint: Path | None = None


def understand(config: TrainConfig, given: Collection[str] | None = None) -> Request:
    """From the options to a recipe and a run. Looks at files, but writes nothing.

    Args:
        config: options.
        given: the names of those that the user gave, which matters when a run goes on; None for all that are not as by
            default.

    Raises:
        InputError: all that is wrong with the options, at once.
    """
    if config.resume is not None and config.resume != "auto":
        return _named_run(config, Path(config.resume), _given(config, given))
    recipe, problems = _recipe_of(config)
    config = _with_digits(config, recipe)
    if not config.data:
        problems.append("--data is missing: a folder or tar files with train/CLASS/IMAGE and val/CLASS/IMAGE")
    problems += path_problems((*config.data, *config.val_data))
    raise_all(problems)
    assert recipe is not None
    if config.resume == "auto":
        folder = _newest_alike(config, recipe)
        if folder is not None:
            return Request(_merged(config, folder, _given(config, given)), recipe, folder)
    elif config.out is not None and (config.out / CONFIG).exists() and not restart_count():
        raise InputError(f"{config.out} holds a run: go on with it by --resume {config.out}, or take another --out")
    return Request(config, recipe)


def _recipe_of(config: TrainConfig) -> tuple[Recipe | None, list[str]]:
    problems = engine_problems(config)
    recipe = None
    if config.recipe is None:
        problems.insert(0, "which recipe? 'relaylab recipes' lists them; or --resume PATH")
    else:
        try:
            recipe = at_scale(find_recipe(config.recipe), config.scale)
        except InputError as error:
            problems.insert(0, str(error))
    if recipe is not None:
        if recipe.trained_as is not None:
            problems.append(f"{recipe.name} tests the network that {recipe.trained_as} trains: train that one")
        recipe, wrong = with_changes(recipe, config.changes)
        problems += wrong or recipe_problems(recipe)
        if recipe.optimizer.batch_size % max(1, config.devices * config.accumulate):
            problems.append(
                f"optimizer.batch_size is {recipe.optimizer.batch_size}: it has to divide evenly among "
                f"{config.devices} devices in {config.accumulate} parts each"
            )
    return recipe, problems


def _with_digits(config: TrainConfig, recipe: Recipe | None) -> TrainConfig:
    """The options with the embedded digits as images, where the recipe is for them and the user names no others."""
    if recipe is None or recipe.images.data_set != "digits" or config.val_data:
        return config
    is_lost = len(config.data) == 1 and config.data[0].name == digits.NAME and not config.data[0].exists()
    return dataclasses.replace(config, data=(digits.digits_tar(),)) if is_lost or not config.data else config


def _given(config: TrainConfig, given: Collection[str] | None) -> Collection[str]:
    if given is not None:
        return given
    entries = dataclasses.fields(TrainConfig)
    return {entry.name for entry in entries if getattr(config, entry.name) != entry.default}


def _named_run(config: TrainConfig, path: Path, given: Collection[str]) -> Request:
    checkpoint = None
    folder = path
    if path.parent.name == CHECKPOINTS and not (path / CONFIG).exists():
        checkpoint, folder = path, path.parent.parent
    if not path.exists():
        raise InputError(f"--resume {path}: no such run or checkpoint")
    if not (folder / CONFIG).is_file():
        raise InputError(f"--resume {path}: expected a run's folder, with {CONFIG}, or one of its checkpoints")
    merged = _merged(config, folder, given)
    recipe, problems = _recipe_of(merged)
    merged = _with_digits(merged, recipe)
    problems += [
        f"{problem}; if the images have moved, say where to with --data"
        for problem in path_problems((*merged.data, *merged.val_data))
    ]
    raise_all(problems)
    assert recipe is not None
    _check_recipe(recipe, folder)
    return Request(merged, recipe, folder, checkpoint)


def _merged(config: TrainConfig, folder: Path, given: Collection[str]) -> TrainConfig:
    """A run's own options, and of those that may change the ones given now."""
    stored = _stored_options(folder)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for entry in dataclasses.fields(TrainConfig):
        now, own = getattr(config, entry.name), getattr(stored, entry.name)
        values[entry.name] = own
        if entry.name in ("resume", "out") or entry.name not in given or now in (own, None):
            continue
        values[entry.name] = now
        if entry.name in FIXED and not (entry.name == "images" and now == "auto"):
            problems.append(f"the run in {folder} has {entry.name} {own!r}, not {now!r}: that cannot change")
    raise_all(problems)
    return TrainConfig(**{**values, "resume": config.resume, "out": config.out})


def recipe_of(folder: Path) -> Recipe:
    """What the run in a folder trains, at its scale and with its changes.

    Raises:
        InputError: it cannot be read, or recipes are not what they were.
    """
    recipe, problems = _recipe_of(_stored_options(folder))
    raise_all(problems)
    assert recipe is not None
    _check_recipe(recipe, folder)
    return recipe


def title_of(folder: Path) -> str:
    """Return a run's scheme and name.

    Raises:
        InputError: the folder does not hold a run.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} holds no run: expected {CONFIG}, as `relaylab train` writes it")
    return f"{SCHEMES[recipe_of(folder).scheme]} ({folder.resolve().name})"


def _stored_options(folder: Path) -> TrainConfig:
    try:
        options: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["options"]
        names = {entry.name for entry in dataclasses.fields(TrainConfig)}
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
        for name in ("data", "val_data"):
            values[name] = tuple(map(Path, values[name]))
        return TrainConfig(**{name: value for name, value in values.items() if name in names})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG} cannot be read: {error}") from None


def _check_recipe(recipe: Recipe, folder: Path) -> None:
    """Recipes are code, which may have changed since."""
    try:
        stored = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["recipe"]["values"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG} cannot be read: {error}") from None
    now = values_of(recipe)
    other = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if other:
        told = "; ".join(f"{name} was {stored.get(name)!r} and is {now.get(name)!r}" for name in other[:5])
        raise InputError(f"recipe {recipe.name} is not what the run in {folder} trains: {told}")


def _newest_alike(config: TrainConfig, recipe: Recipe) -> Path | None:
    """The newest run of the very same options and recipe.

    Raises:
        InputError: --out names a run of others.
    """
    folders = [config.out] if config.out is not None else sorted((ROOT / name_of(config)).glob("*"), reverse=True)
    for folder in folders:
        if not (folder / CONFIG).is_file():
            continue
        try:
            _check_alike(config, recipe, folder)
        except InputError:
            if config.out is not None:
                raise
            continue
        return folder
    return None


def _check_alike(config: TrainConfig, recipe: Recipe, folder: Path) -> None:
    stored = _stored_options(folder)
    other = [name for name in FIXED if name != "images" and getattr(config, name) != getattr(stored, name)]
    if config.images not in ("auto", stored.images):
        other.append("images")
    if _paths(config) != _paths(stored):
        other.append("data")
    if other:
        raise InputError(f"the run in {folder} has another {' and another '.join(other)}: take another folder")
    _check_recipe(recipe, folder)


def _paths(config: TrainConfig) -> list[str]:
    return [str(path.absolute()) for path in (*config.data, Path("--"), *config.val_data)]


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


def name_of(config: TrainConfig) -> str:
    """The name that runs of a recipe share."""
    assert config.recipe is not None
    return config.recipe if config.scale == "paper" else f"{config.recipe}-{config.scale}"


def new_folder(config: TrainConfig) -> Path:
    """A new folder for a run.

    Raises:
        InputError: it is not empty, or cannot be made.
    """
    try:
        if config.out is not None:
            config.out.mkdir(parents=True, exist_ok=True)
            if any(path.name not in BEFORE_THE_FIRST_STEP for path in config.out.iterdir()):
                raise InputError(f"{config.out} is not empty; give a new folder with --out")
            return config.out
        parent = ROOT / name_of(config)
        parent.mkdir(parents=True, exist_ok=True)
        stem = f"{timestamp()}-s{config.seed}"
        for suffix in ("", *(f"-{number}" for number in range(2, 100))):
            try:
                (parent / f"{stem}{suffix}").mkdir()
                return parent / f"{stem}{suffix}"
            except FileExistsError:
                continue
        raise InputError(f"{parent} has a hundred runs of this second")
    except OSError as error:
        raise InputError(f"cannot make a folder for the run: {error}") from None


def values_of(recipe: Recipe) -> dict[str, Any]:
    """All values of a recipe by their dotted names, as JSON gives them back."""
    return json.loads(json.dumps({name: value for name, value, _ in recipe.fields()}))


def describe(folder: Path, config: TrainConfig, recipe: Recipe, about: Mapping[str, Any]) -> None:
    """Write what a new run trains.

    Args:
        folder: of the run.
        config: options; where the images lie is made absolute.
        recipe: as it is trained.
        about: what else is worth keeping.

    Raises:
        OSError: it cannot be written.
    """
    data = {"data": [str(p.absolute()) for p in config.data], "val_data": [str(p.absolute()) for p in config.val_data]}
    options = {**dataclasses.asdict(config), **data, "out": None, "resume": None}
    del options["given"]
    sources = {name: source for name, _, source in recipe.fields()}
    whole = {
        "options": options,
        "recipe": {"name": recipe.name, "row": recipe.row, "values": values_of(recipe), "sources": sources},
        **about,
    }
    write_text(folder / CONFIG, json.dumps(whole, indent=2) + "\n")


def note_start(folder: Path, about: Mapping[str, Any]) -> None:
    """Add this start to a run's environment, and say what has changed since the last one.

    Raises:
        OSError: it cannot be written.
    """
    starts = starts_of(folder)
    here = environment()
    versions: dict[str, str] = here["versions"]
    command = [Path(sys.argv[0]).name, *sys.argv[1:]]
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    before = starts[-1]["versions"] if starts else versions
    for name, version in versions.items():
        if before.get(name) not in (version, None):
            log.warning(
                "%s %s now, %s before: the numbers may differ in their last digits", name, version, before[name]
            )
    starts.append({"started_at": now, "command": command, **about, **here})
    write_text(folder / ENVIRONMENT, json.dumps({"starts": starts}, indent=2) + "\n")


def find_launch(config: TrainConfig, launch: str) -> Path | None:
    """The run that the processes of this launch trained before they were started again."""
    folders = [config.out] if config.out is not None else sorted((ROOT / name_of(config)).glob("*"), reverse=True)
    for folder in folders:
        if any(start.get("launch") == launch for start in starts_of(folder)):
            return folder
    return None


def forget(folder: Path) -> None:
    """Remove the folder of a run that failed before there was anything to keep."""
    if (folder / CONFIG).exists():
        return
    for name in BEFORE_THE_FIRST_STEP:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else
        folder.rmdir()


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """Return the environments that a run was started in, the first one first."""
    try:
        return json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError):
        return []


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run to this process. The lock goes with the process, however it ends.

    Forked processes do not inherit locks of this kind: a loader's worker may outlive a process that is killed.

    Raises:
        InputError: another process has it.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(f"another process is training the run in {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield
