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
from relaylab.recipes.schema import SCHEMES, Recipe, ends_of
from relaylab.train.options import TrainOptions, option_problems
from relaylab.train.run_folder import CHECKPOINTS, CONFIG, candidates, read_run, stored_recipe, value_changes
from relaylab.train.torchrun import restart_count

# The options that define a run. All others may change when it resumes.
FIXED = ("recipe", "scale", "changes", "seed", "precision", "batch_norm", "images")


@dataclass(frozen=True)
class Request:
    """A request to train: complete options, the recipe with its overrides, and the run to resume.

    Attributes:
        options: the complete options.
        recipe: the recipe at its scale, with overrides applied.
        folder: folder of the run to resume; None for a new run.
        checkpoint: checkpoint to resume from; None for the newest valid one.
        images: training and validation images, in place of paths.
    """

    options: TrainOptions
    recipe: Recipe
    folder: Path | None = None
    checkpoint: Path | None = None
    images: tuple[Source, Source] | None = None


def resolve(
    options: TrainOptions, given: Collection[str] | None = None, *, images: tuple[Source, Source] | None = None
) -> Request:
    """Resolve options to a request. Reads files, but writes none.

    Args:
        options: the options.
        given: names of the options that the user set, which override the options of a resumed run; None for all options
            that differ from their defaults.
        images: training and validation images, in place of paths in the options. A run does not record them: pass them
            again to resume it.

    Raises:
        InputError: invalid options; the message lists all problems.

    Example:
        >>> request = resolve(TrainOptions(recipe="digits"))
        >>> outcome = relaylab.train.session.train(request)
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
        problems.append("images are given both as sources and as paths: pass only one of them")
    elif not options.data and recipe is not None and images is None:
        problems.append("--data is required: a folder or tar files with train/CLASS/IMAGE and val/CLASS/IMAGE")
    recipe = _checked(recipe, problems + path_problems((*options.data, *options.val_data)))
    if options.resume == "auto":
        folder = _find_matching(options, recipe)
        if folder is not None:
            return Request(_merged(options, folder, given), recipe, folder, images=images)
    elif options.out is not None and (options.out / CONFIG).exists() and not restart_count():
        resume = f"resume it with --resume {options.out}, or choose a different --out"
        raise InputError(f"{options.out} already contains a run; {resume}")
    return Request(options, recipe, images=images)


def _with_absolute_paths(options: TrainOptions) -> TrainOptions:
    """Make the paths of recipe files absolute, so that the run can be resumed from any working directory."""
    changes = tuple(map(with_absolute_paths, options.changes))
    recipe = str(Path(options.recipe).absolute()) if options.recipe and is_file(options.recipe) else options.recipe
    return dataclasses.replace(options, recipe=recipe, changes=changes)


def _recipe_of(options: TrainOptions, folder: Path | None = None) -> tuple[Recipe | None, list[str]]:
    """Return the recipe with its overrides, or None, and error messages about the recipe and the options.

    Args:
        options: the options.
        folder: folder of the run to resume, whose stored recipe replaces a recipe file.
    """
    problems = option_problems(options)
    if options.recipe is None:
        return None, ["a recipe is required (`relaylab recipes` lists them), or --resume PATH", *problems]
    if folder is not None and is_file(options.recipe):
        recipe = stored_recipe(folder)
        return recipe, problems + _way_problems(recipe, options)
    try:
        recipe = find_recipe(options.recipe, options.scale)
    except InputError as error:
        return None, [str(error), *problems]
    if recipe.trained_as is not None:
        problems.append(
            f"{recipe.name} evaluates the network trained by {recipe.trained_as}: train {recipe.trained_as}"
        )
    recipe, invalid = with_changes(recipe, options.changes)
    problems += path_problems([Path(recipe.network.pretrained)] if recipe.network.pretrained and folder is None else [])
    if folder is None:
        _allow(recipe)
    problems += invalid or recipe_problems(recipe)
    return recipe, problems + _way_problems(recipe, options)


def _way_problems(recipe: Recipe, options: TrainOptions) -> list[str]:
    """Return an error message for each option that cannot train the recipe."""
    problems = batch_problems(recipe, options, options.devices)
    windows = {"primary": recipe.plan.primary} | {f"auxiliary.{k}": v for k, v in recipe.plan.auxiliary.items()}
    if options.early_release and recipe.scheme in ("relay", "isolated"):
        problems += [
            f"--early-release does not support plan.{name}.after={window.after}: the window has several ends; train "
            "without it"
            for name, window in windows.items()
            if isinstance(ends_of(window.after), tuple)
        ]
    return problems


def _allow(recipe: Recipe) -> None:
    """Trust the network code that the user has named."""
    if recipe.network.is_code:
        from relaylab.models.named import allow  # imports torch

        allow(recipe.network)


def batch_problems(recipe: Recipe, options: TrainOptions, devices: int) -> list[str]:
    """Return error messages if the batch cannot be split evenly, or the micro-batches are too small.

    Args:
        recipe: the recipe.
        options: options, which include the number of micro-batches per device.
        devices: number of processes.
    """
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
            f"augmentation.{mixes[0]} mixes the images of a micro-batch, and optimizer.batch_size {size} leaves one "
            f"image per micro-batch: use at least 2 x {divisor}, or --set augmentation.{mixes[0]}=0"
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
    """Use the packaged digits as images, if the recipe is for them and the user has given no others."""
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
        raise InputError(f"--resume {path}: expected the folder of a run, with {CONFIG}, or one of its checkpoints")
    merged = _merged(options, folder, given)
    recipe, problems = _recipe_of(merged, folder)
    merged = merged if images is not None else _with_digits(merged, recipe)
    moved = path_problems((*merged.data, *merged.val_data))
    problems += [f"{problem}; if the images have moved, give their new path with --data" for problem in moved]
    recipe = _checked(recipe, problems)
    _check_recipe(recipe, folder)
    return Request(merged, recipe, folder, checkpoint, images)


def _merged(options: TrainOptions, folder: Path, given: Collection[str]) -> TrainOptions:
    """Return the options of a run, overridden by the given ones that may change."""
    stored = read_run(folder).options
    raise_all(
        [
            f"the run in {folder} has {name} {getattr(stored, name)!r}, not {getattr(options, name)!r}: "
            "this option cannot change when a run resumes"
            for name in _different(options, stored)
            if name in given
        ]
    )
    new = {name: getattr(options, name) for name in given if getattr(options, name) is not None}
    return dataclasses.replace(stored, **{**new, "resume": options.resume, "out": options.out})


def _different(options: TrainOptions, stored: TrainOptions) -> list[str]:
    """Return the fixed options that differ from those of a run; images "auto" matches memory and disk."""
    names = [name for name in FIXED if getattr(options, name) not in (getattr(stored, name), None)]
    return [name for name in names if name != "images" or options.images != "auto"]


def _check_recipe(recipe: Recipe, folder: Path) -> None:
    """Raise an InputError if a recipe has changed since the run started."""
    stored = read_run(folder).recipe.values
    if changes := value_changes(stored, recipe, folder / CONFIG):
        raise InputError(
            f"recipe {recipe.name} has changed since the run in {folder} started: {'; '.join(changes[:5])}; start a "
            "new run with --out, or restore the recipe"
        )


def _find_matching(options: TrainOptions, recipe: Recipe) -> Path | None:
    """Return the newest run with the same options and recipe; raise an error if --out contains a different run."""
    for folder in candidates(options):
        if (folder / CONFIG).is_file():
            try:
                _check_matching(options, recipe, folder)
                return folder
            except InputError:
                if options.out is not None:
                    raise
    return None


def _check_matching(options: TrainOptions, recipe: Recipe, folder: Path) -> None:
    stored = read_run(folder).options
    differences = [
        f"{name} {getattr(stored, name)!r}, not {getattr(options, name)!r}" for name in _different(options, stored)
    ]
    differences += ["different images"] if _paths(options) != _paths(stored) else []
    if differences:
        reason = "; ".join(differences)
        raise InputError(f"the run in {folder} has {reason}: choose a different --out, or remove that folder")
    _check_recipe(recipe, folder)


def _paths(options: TrainOptions) -> list[Path]:
    """Return the absolute paths of the images; the packaged digits are the same in any cache folder."""
    paths = (*options.data, Path("--"), *options.val_data)
    return [Path(digits.NAME) if path.name == digits.NAME else path.absolute() for path in paths]


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe of a run, at its scale and with its overrides.

    Raises:
        InputError: the run cannot be read, or the recipe has changed since.
    """
    recipe = _checked(*_recipe_of(read_run(folder).options, folder))
    _check_recipe(recipe, folder)
    return recipe


def title_of(folder: Path) -> str:
    """Return the title of a run: its scheme and folder name.

    Raises:
        InputError: the folder does not contain a run.
    """
    return f"{SCHEMES[recipe_of(folder).scheme]} ({folder.resolve().name})"


def arguments_of(options: TrainOptions) -> list[str]:
    """Return the command line that sets the given options."""
    arguments = ["train", *([] if options.recipe is None else [options.recipe])]
    for entry in dataclasses.fields(options):
        value = getattr(options, entry.name)
        if entry.name in ("recipe", "given") or (value == entry.default and entry.name not in options.given):
            continue
        option = "--set" if entry.name == "changes" else f"--{entry.name.replace('_', '-')}"
        arguments += [option] if value is True else [option, *map(str, value if isinstance(value, tuple) else [value])]
    return arguments
