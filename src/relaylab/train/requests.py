"""Requests: the options of a training run, resolved to its recipe and to the run that it resumes."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from relaylab.data.sources import digits
from relaylab.data.sources.source import Source
from relaylab.errors import InputError, raise_all
from relaylab.options import path_problems
from relaylab.recipes import find_recipe
from relaylab.recipes.changes import recipe_problems, with_absolute_paths, with_changes
from relaylab.recipes.files import is_file
from relaylab.recipes.schema import SCHEMES, Recipe
from relaylab.train.options import TrainOptions, option_problems
from relaylab.train.run_folder import CHECKPOINTS, CONFIG, candidates, read_run, stored_recipe, value_changes
from relaylab.train.torchrun import restart_count

# The options that define a run. All others may change when it resumes.
FIXED = ("recipe", "scale", "changes", "seed", "precision", "batch_norm", "images")


@dataclass(frozen=True)
class Request:
    """A training: complete options, the recipe with its changes, and the run and checkpoint to resume.

    The folder is None for a new run, and the checkpoint is None for the newest valid one. Training and validation
    `images` of the caller's own take the place of paths.
    """

    options: TrainOptions
    recipe: Recipe
    folder: Path | None = None
    checkpoint: Path | None = None
    images: tuple[Source, Source] | None = None


def resolve(
    options: TrainOptions, given: Collection[str] | None = None, *, images: tuple[Source, Source] | None = None
) -> Request:
    """Derive the recipe and the run from the options. Reads files, but writes none.

    Args:
        options: options.
        given: names of the options that the user set, which override those of a run that resumes; None for all that
            differ from their defaults.
        images: training and validation images, in place of paths in the options. A run does not record them: give them
            again to resume it.

    Raises:
        InputError: all problems with the options, at once.
    """
    options = _with_absolute_paths(options)
    if given is None:
        fields = dataclasses.fields(TrainOptions)
        given = {entry.name for entry in fields if getattr(options, entry.name) != entry.default}
    if options.resume is not None and options.resume != "auto":
        return _resumed(options, Path(options.resume), given, images)
    recipe, problems = _recipe_of(options)
    options = options if images is not None else _with_digits(options, recipe)
    if images is not None and (options.data or options.val_data):
        problems.append("images are given as sources and as paths: expected one of both")
    elif not options.data and recipe is not None and images is None:
        problems.append("--data is missing: a folder or tar files with train/CLASS/IMAGE and val/CLASS/IMAGE")
    recipe = _checked(recipe, problems + path_problems((*options.data, *options.val_data)))
    if options.resume == "auto":
        folder = _newest_alike(options, recipe)
        if folder is not None:
            return Request(_merged(options, folder, given), recipe, folder, images=images)
    elif options.out is not None and (options.out / CONFIG).exists() and not restart_count():
        resume = f"resume it with --resume {options.out}, or take another --out"
        raise InputError(f"{options.out} already contains a run; {resume}")
    return Request(options, recipe, images=images)


def _with_absolute_paths(options: TrainOptions) -> TrainOptions:
    """The options with the absolute paths of the recipe's files, so that the run can resume in any folder."""
    changes = tuple(map(with_absolute_paths, options.changes))
    recipe = str(Path(options.recipe).absolute()) if options.recipe and is_file(options.recipe) else options.recipe
    return dataclasses.replace(options, recipe=recipe, changes=changes)


def _recipe_of(options: TrainOptions, folder: Path | None = None) -> tuple[Recipe | None, list[str]]:
    """The recipe at its scale with its changes, and all problems with it and with the options.

    A run, in `folder`, keeps the recipe of a file as it was.
    """
    problems = option_problems(options)
    if options.recipe is None:
        return None, ["a recipe is required: 'relaylab recipes' lists them; or --resume PATH", *problems]
    if folder is not None and is_file(options.recipe):
        recipe = stored_recipe(folder)
        return recipe, problems + batch_problems(recipe, options, options.devices)
    try:
        recipe = find_recipe(options.recipe, options.scale)
    except InputError as error:
        return None, [str(error), *problems]
    if recipe.trained_as is not None:
        problems.append(f"{recipe.name} tests the network that {recipe.trained_as} trains: train that one")
    recipe, wrong = with_changes(recipe, options.changes)
    problems += path_problems([Path(recipe.network.pretrained)] if recipe.network.pretrained and folder is None else [])
    if folder is None:
        _allow(recipe)
    problems += wrong or recipe_problems(recipe)
    return recipe, problems + batch_problems(recipe, options, options.devices)


def _allow(recipe: Recipe) -> None:
    """Note that the user has named a network's code."""
    if recipe.network.is_code:
        from relaylab.models.named import allow  # imports torch

        allow(recipe.network)


def batch_problems(recipe: Recipe, options: TrainOptions, devices: int) -> list[str]:
    """Return an error message if the recipe's batch cannot be divided evenly, or into parts that can be used."""
    size, parts = recipe.optimizer.batch_size, max(1, devices * options.accumulate)
    divisor = f"devices x accumulate ({devices} x {options.accumulate})"
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
    if options.batch_norm == "local" or devices == 1:
        from relaylab.train.normalisation import single_image_problem  # imports torch

        problem = single_image_problem(recipe)
        problems += [problem] if problem else []
    return problems


def _checked(recipe: Recipe | None, problems: list[str]) -> Recipe:
    raise_all(problems)
    assert recipe is not None
    return recipe


def _with_digits(options: TrainOptions, recipe: Recipe | None) -> TrainOptions:
    """The options with the embedded digits as images, if the recipe is for them and the user names no others."""
    if recipe is None or recipe.images.data_set != "digits" or options.val_data:
        return options
    is_lost = len(options.data) == 1 and options.data[0].name == digits.NAME and not options.data[0].exists()
    return dataclasses.replace(options, data=(digits.digits_tar(),)) if is_lost or not options.data else options


def _resumed(
    options: TrainOptions, path: Path, given: Collection[str], images: tuple[Source, Source] | None
) -> Request:
    checkpoint, folder = None, path
    if path.parent.name == CHECKPOINTS and not (path / CONFIG).exists():
        checkpoint, folder = path, path.parent.parent
    if not path.exists():
        raise InputError(f"--resume {path}: no such run or checkpoint")
    if not (folder / CONFIG).is_file():
        raise InputError(f"--resume {path}: expected a run's folder, with {CONFIG}, or one of its checkpoints")
    merged = _merged(options, folder, given)
    recipe, problems = _recipe_of(merged, folder)
    merged = merged if images is not None else _with_digits(merged, recipe)
    moved = path_problems((*merged.data, *merged.val_data))
    problems += [f"{problem}; if the images have moved, say where to with --data" for problem in moved]
    recipe = _checked(recipe, problems)
    _check_recipe(recipe, folder)
    return Request(merged, recipe, folder, checkpoint, images)


def _merged(options: TrainOptions, folder: Path, given: Collection[str]) -> TrainOptions:
    """The options of a run, overridden by the given ones that may change."""
    stored = read_run(folder).options
    raise_all(
        [
            f"the run in {folder} has {name} {getattr(stored, name)!r}, not {getattr(options, name)!r}: "
            "that cannot change"
            for name in _different(options, stored)
            if name in given
        ]
    )
    new = {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    return dataclasses.replace(stored, **{**new, "resume": options.resume, "out": options.out})


def _different(options: TrainOptions, stored: TrainOptions) -> list[str]:
    """The fixed options that differ from those of a run; where the images are kept, "auto" accepts either."""
    names = [name for name in FIXED if getattr(options, name) not in (getattr(stored, name), None)]
    return [name for name in names if name != "images" or options.images != "auto"]


def _check_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuse a recipe whose code has changed since the run began."""
    stored = read_run(folder).recipe.values
    if changes := value_changes(stored, recipe, folder / CONFIG):
        raise InputError(f"recipe {recipe.name} is not what the run in {folder} trains: {'; '.join(changes[:5])}")


def _newest_alike(options: TrainOptions, recipe: Recipe) -> Path | None:
    """The newest run of the same options and recipe; an error if --out names a run of others."""
    for folder in candidates(options):
        if (folder / CONFIG).is_file():
            try:
                _check_alike(options, recipe, folder)
                return folder
            except InputError:
                if options.out is not None:
                    raise
    return None


def _check_alike(options: TrainOptions, recipe: Recipe, folder: Path) -> None:
    stored = read_run(folder).options
    other = _different(options, stored) + (["data"] if _paths(options) != _paths(stored) else [])
    if other:
        told = [f"{name} {getattr(stored, name)!r}, not {getattr(options, name)!r}" for name in other if name in FIXED]
        told += ["other images"] if "data" in other else []
        raise InputError(f"the run in {folder} has {'; '.join(told)}: give another --out, or remove that folder")
    _check_recipe(recipe, folder)


def _paths(options: TrainOptions) -> list[Path]:
    from relaylab.data.sources.digits import NAME  # the same images, wherever the cache is

    paths = (*options.data, Path("--"), *options.val_data)
    return [Path(NAME) if path.name == NAME else path.absolute() for path in paths]


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe that the run in a folder trains, at its scale and with its changes.

    Raises:
        InputError: the run cannot be read, or the recipe has changed since.
    """
    recipe = _checked(*_recipe_of(read_run(folder).options, folder))
    _check_recipe(recipe, folder)
    return recipe


def title_of(folder: Path) -> str:
    """Return a run's scheme and name.

    Raises:
        InputError: the folder does not hold a run.
    """
    return f"{SCHEMES[recipe_of(folder).scheme]} ({folder.resolve().name})"


def arguments_of(options: TrainOptions) -> list[str]:
    """Return the command line that sets these options."""
    arguments = ["train", *([] if options.recipe is None else [options.recipe])]
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if entry.name in ("recipe", "given") or (value == entry.default and entry.name not in options.given):
            continue
        option = "--set" if entry.name == "changes" else f"--{entry.name.replace('_', '-')}"
        arguments += [option] if value is True else [option, *map(str, value if isinstance(value, tuple) else [value])]
    return arguments
