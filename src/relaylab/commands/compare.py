"""`relaylab compare`: train one recipe under several schemes and seeds."""

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from relaylab.errors import FAILED, INTERRUPTED, InputError, raise_all
from relaylab.files import ROOT, new_folder
from relaylab.options import Folder, Listed, Number, listed, too_small
from relaylab.recipes.schema import SCHEMES
from relaylab.train.options import RuntimeOptions, TrainOptions, name_of

if TYPE_CHECKING:
    from relaylab.recipes.schema import Recipe
    from relaylab.report.comparison import Comparison, Member
    from relaylab.train.tuning import Axis

Tune = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=A,B,... [KEY=A,B,... ...]", help_behavior_hint="")]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions(RuntimeOptions):
    """Train a recipe under several schemes and seeds, and compare the results.

    Existing runs are resumed. A run that diverges or fails is reported, and the others continue.
    """

    schemes: Listed = "standard,multi-loss,relay"
    """Training schemes to compare: standard, multi-loss, relay, isolated."""

    seeds: Listed = "0,1,2"
    """Seeds to train each scheme with. For a given seed, all schemes share initial weights, batches, crops and dropout
    masks."""

    tune: Tune = ()
    """Values to tune for each scheme before the comparison, such as optimizer.lr=0.003,0.01,0.03
    plan.auxiliary.*.weight=0.3,1. Trials are evaluated on held-out training images. All schemes start from the same
    grid, which is extended if the best value is at its edge."""

    tune_share: float = 1.0
    """Length of a tuning trial, as a fraction of the recipe's iterations."""

    tune_hold_out: Annotated[float, tyro.conf.arg(metavar="N")] = 0.2
    """Training images held out for tuning: a fraction of each class if below 1, otherwise images per class."""

    jobs: Number = None
    """Number of concurrent runs, each in its own process; does not change the results (default: as many as the cores
    allow; 1 with a GPU)."""

    out: Folder = None
    """Folder of the comparison; may contain runs of an earlier one (default: runs/compare/RECIPE)."""


def main(options: CompareOptions) -> int:
    """Train the missing runs, then write and print the results."""
    with new_folder(options.out, ROOT / "compare" / name_of(options), may_hold=True) as folder:
        comparison = compare(options, folder)
        if comparison is None:
            return INTERRUPTED
        print_results(comparison, folder, options.changes)
        return FAILED if comparison.failures else 0


def compare(options: CompareOptions, folder: Path) -> "Comparison | None":
    """Tune each scheme if requested and train the runs that are missing in the folder of a comparison.

    Returns:
        The results; None after SIGINT or SIGTERM, in which case the same call resumes.

    Raises:
        InputError: invalid options or images, before anything is trained.
        LabError: a tuning trial failed.
    """
    from relaylab.train import failures, requests, run_folder
    from relaylab.train.devices import precision_warnings
    from relaylab.train.many import is_missing, shared_by, train_many
    from relaylab.train.trials import Search, tune

    _check_folder(folder)
    members = _members(options, folder)
    first = next(iter(members.values()))
    request = requests.resolve(dataclasses.replace(first, out=None, resume=None))
    axes = _axes(options, request.recipe)
    hold_out = options.tune_hold_out if any(len(axis.values) > 1 for axis in axes) else None
    shared = shared_by(folder, request.options, request.recipe, len(members), hold_out=hold_out)
    schemes = list(dict.fromkeys(scheme for scheme, _ in members))
    for text in (*precision_warnings(request.options), *_window_warnings(request.recipe, schemes)):
        print(f"warning: {text}", file=sys.stderr)

    def train(configs: "Mapping[str, TrainOptions]", iterations: int) -> bool:
        return train_many(configs, shared, at_once=options.jobs, iterations=iterations)

    if axes:
        search = Search(folder, request.recipe, first, axes, options.tune_hold_out, options.tune_share)
        tuning = tune(search, schemes, train)
        if tuning is None:
            print("Stopped while tuning. Run the same command again to resume.")
            return None
        members = {
            (scheme, seed): dataclasses.replace(config, changes=(*config.changes, *tuning.choices[scheme].changes))
            for (scheme, seed), config in members.items()
        }
    resolved = {key: requests.resolve(member) for key, member in members.items()}
    folders = {key: folder / run_folder.member_name(*key) for key in members}
    missing = {folders[key].name: request.options for key, request in resolved.items() if is_missing(folders[key])}
    if not missing:
        print("All runs have finished or diverged; nothing to train.", file=sys.stderr)
    if missing and not train(missing, next(iter(resolved.values())).recipe.optimizer.iterations):
        done = sum((path / run_folder.MODEL).is_file() for path in folders.values())
        print(f"Stopped: {done} of {len(members)} runs have finished. Run the same command again to resume the others.")
        return None
    from relaylab.report.comparison import open_runs

    ended = {key for key, path in folders.items() if (path / run_folder.MODEL).is_file() or failures.read_failure(path)}
    comparison = open_runs([folders[key] for key in members if key in ended], may_fail=True)
    failure = failures.Failure("failed", 0, "it wrote no result; the disk may be full")
    lost = dict.fromkeys((key for key in members if key not in ended), failure)
    return dataclasses.replace(comparison, failures={**comparison.failures, **lost})


def _axes(options: CompareOptions, recipe: "Recipe") -> "tuple[Axis, ...]":
    """Return the axes of the tuning grid."""
    from relaylab.recipes.changes import hold_out_problems
    from relaylab.train.tuning import axes_of

    axes, problems = axes_of(options.tune, recipe)
    given = {change.partition("=")[0].strip() for change in options.changes}
    problems += [
        f"--tune {axis.key} and --set {name} set the same value: give only one of them"
        for axis in axes
        for name in axis.names
        if name in given
    ]
    if axes and recipe.images.set_aside is not None:
        problems.append(
            "--tune sets images.set_aside itself, for its trials: remove images.set_aside from the recipe; to hold out "
            "training images for validation, set images.held_out"
        )
    if not 0 < options.tune_share <= 1:
        problems.append(f"--tune-share {options.tune_share:g}: expected a fraction above 0, at most 1")
    problems += hold_out_problems("--tune-hold-out", options.tune_hold_out)
    raise_all(problems)
    return axes


def _window_warnings(recipe: "Recipe", schemes: Iterable[str]) -> list[str]:
    """Return the warnings about the windows of the schemes, without repetitions."""
    from relaylab.train.segments import segments_of, window_warnings

    recipes = [dataclasses.replace(recipe, scheme=scheme) for scheme in schemes]
    texts = [text for one in recipes for text in window_warnings(one, segments_of(one))]
    return list(dict.fromkeys(texts))


def _check_folder(folder: Path) -> None:
    """Check that a folder is empty or contains an earlier comparison."""
    from relaylab.train import run_folder
    from relaylab.train.tuning import FOLDER

    inside = list(folder.iterdir())
    if inside and not any(run_folder.parse_member_name(path) or path.name == FOLDER for path in inside):
        raise InputError(f"{folder} is not empty and does not contain a comparison; choose a new folder with --out")


def print_results(comparison: "Comparison", folder: Path, changes: Sequence[str]) -> None:
    """Write and print a comparison's table and verdict, and report the failed runs on stderr."""
    from relaylab.report.summary import TABLE, write_comparison
    from relaylab.tables import markdown_lines

    if comparison.runs:
        table, verdict = write_comparison(folder, comparison, changes)
        print("\n".join([*markdown_lines(table), "", *verdict, "", f"Results: {(folder / TABLE).resolve()}"]))
    for text in comparison.failure_texts:
        print(text, file=sys.stderr)
    kinds = {failure.kind for failure in comparison.failures.values()}
    if "failed" in kinds:
        print("Run the same command again to resume the failed runs.", file=sys.stderr)
    if "diverged" in kinds:
        advice = f"change the recipe and choose a different --out, or remove their folders in {folder}."
        print(f"Diverged runs are not retried, since they would diverge again: {advice}", file=sys.stderr)


def listed_schemes(text: str) -> tuple[list[str], list[str]]:
    """Parse the value of --schemes and return the schemes and error messages."""
    names, problems = listed(text.replace("-", "_"), SCHEMES, "scheme")
    if len(set(names)) != len(names) or not names:
        problems.append(f"--schemes {text}: expected one or more schemes, each once")
    return names, problems


def listed_seeds(text: str) -> tuple[list[int], list[str]]:
    """Parse the value of --seeds and return the seeds and error messages."""
    parts, _ = listed(text)
    if not parts or len(set(parts)) != len(parts) or not all(part.isdecimal() for part in parts):
        return [], [f"--seeds {text}: expected integers from 0, separated by commas, each once"]
    return [int(part) for part in parts], []


def _members(options: CompareOptions, folder: Path) -> "dict[Member, TrainOptions]":
    """Return the options of each run."""
    schemes, wrong_schemes = listed_schemes(options.schemes)
    seeds, wrong_seeds = listed_seeds(options.seeds)
    problems = wrong_schemes + wrong_seeds
    if any(change.replace(" ", "").startswith("scheme=") for change in options.changes):
        problems.append("--set scheme=... is not allowed here: use --schemes")
    problems += too_small(options, jobs=1)
    if options.devices > 1 and options.jobs not in (None, 1):
        problems.append(
            f"--jobs {options.jobs} with --devices {options.devices}: several concurrent runs need --devices 1"
        )
    raise_all(problems)
    from relaylab.train import run_folder

    shared = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(RuntimeOptions)}
    members: dict[Member, TrainOptions] = {}
    for seed, scheme in itertools.product(seeds, schemes):
        shared["changes"] = (*options.changes, f"scheme={scheme}")
        members[scheme, seed] = TrainOptions(
            **shared, seed=seed, out=folder / run_folder.member_name(scheme, seed), resume="auto"
        )
    return members
