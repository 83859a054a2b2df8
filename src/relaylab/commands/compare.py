"""`relaylab compare`: one recipe under several schemes and seeds."""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from relaylab.errors import FAILED, INTERRUPTED, WRONG_INPUT, InputError, raise_all
from relaylab.files import ROOT, available_cores, new_folder
from relaylab.options import Folder, Listed, Number, listed, too_small
from relaylab.recipes.schema import SCHEMES
from relaylab.train.options import Engine, TrainConfig, name_of

if TYPE_CHECKING:
    from relaylab.report.comparison import Comparison, Member
    from relaylab.train.runs import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions(Engine):
    """Train a recipe under several schemes and seeds, in one table.

    Runs that exist already are resumed. A run that diverges or fails is reported, and the others continue.
    """

    schemes: Listed = "standard,multi-loss,relay"
    """Schemes, in place of the recipe's."""

    seeds: Listed = "0,1,2"
    """Seeds. A seed gives all schemes the same weights, batches, crops and dropout."""

    jobs: Number = None
    """Runs at once, each in its own process. The results do not depend on it. (default: as many as the cores allow; 1
    with a GPU)."""

    out: Folder = None
    """Folder of the comparison; it may hold the runs of an earlier one. (default: runs/compare/RECIPE)."""


def main(options: CompareOptions) -> int:
    """Train the missing runs, then write and print the table."""
    with new_folder(options.out, ROOT / "compare" / name_of(options), may_hold=True) as folder:
        comparison = compare(options, folder)
        if comparison is None:
            return INTERRUPTED
        print_results(comparison, folder, options.changes)
        return FAILED if comparison.failures else 0


def compare(options: CompareOptions, folder: Path) -> "Comparison | None":
    """Train the runs that are missing in the folder of a comparison.

    Returns:
        The results; None after SIGINT or SIGTERM, and then the same call resumes.

    Raises:
        InputError: wrong options or images, before anything is trained.
    """
    from relaylab.train import failures, runs

    _check_folder(folder)
    members = _members(options, folder)
    requests = {key: runs.understand(member) for key, member in members.items()}
    iterations = next(iter(requests.values())).recipe.optimizer.iterations
    folders = {key: folder / runs.member_name(*key) for key in members}
    failed = {key: failures.read_failure(path) for key, path in folders.items()}
    missing = {
        key: request.config
        for key, request in requests.items()
        if not (folders[key] / runs.MODEL).is_file() and getattr(failed[key], "kind", None) != "diverged"
    }
    if missing and not _train(options, folder, requests, missing, iterations):
        done = sum((path / runs.MODEL).is_file() for path in folders.values())
        print(f"Stopped: {done} of {len(members)} runs have finished. The same command resumes the others.")
        return None
    from relaylab.report.comparison import open_runs

    ended = {key for key, path in folders.items() if (path / runs.MODEL).is_file() or failures.read_failure(path)}
    comparison = open_runs([folders[key] for key in members if key in ended], may_fail=True)
    reason = failures.Failure("failed", 0, "it wrote no result; the disk may be full")
    lost = dict.fromkeys((key for key in members if key not in ended), reason)
    return dataclasses.replace(comparison, failures={**comparison.failures, **lost})


def _check_folder(folder: Path) -> None:
    """Check that a folder is empty or holds an earlier comparison."""
    from relaylab.train import runs

    inside = list(folder.iterdir())
    if inside and not any(map(runs.member_of, inside)):
        raise InputError(f"{folder} is not empty and holds no comparison; give a new folder with --out")


def print_results(comparison: "Comparison", folder: Path, changes: Sequence[str]) -> None:
    """Write and print a comparison's table and its verdict in one sentence, and name the runs that have failed."""
    from relaylab.report.summary import TABLE, write_comparison
    from relaylab.report.verdict import verdict
    from relaylab.tables import markdown_lines

    if comparison.runs:
        print("\n".join(markdown_lines(write_comparison(folder, comparison, changes))))
        print(f"\n{verdict(comparison.errors('top1'))}\n\nTable: {(folder / TABLE).resolve()}")
    for text in comparison.failure_texts:
        print(text, file=sys.stderr)
    kinds = {failure.kind for failure in comparison.failures.values()}
    if "failed" in kinds:
        print("The same command resumes the runs that have failed.", file=sys.stderr)
    if "diverged" in kinds:
        advice = f"Change the recipe and give another --out, or remove their folders in {folder}."
        print(f"Diverged runs are not retried; they would diverge again. {advice}", file=sys.stderr)


def listed_schemes(text: str) -> tuple[list[str], list[str]]:
    """Return the schemes in a list, and error messages."""
    names, problems = listed(text.replace("-", "_"), SCHEMES, "scheme")
    if len(set(names)) != len(names) or not names:
        problems.append(f"--schemes {text}: expected one or more, each once")
    return names, problems


def listed_seeds(text: str) -> tuple[list[int], list[str]]:
    """Return the seeds in a list, and error messages."""
    parts, _ = listed(text)
    if not parts or len(set(parts)) != len(parts) or not all(part.isdecimal() for part in parts):
        return [], [f"--seeds {text}: expected whole numbers from 0, separated by commas, each once"]
    return [int(part) for part in parts], []


def _members(options: CompareOptions, folder: Path) -> "dict[Member, TrainConfig]":
    """Return the options of each run."""
    schemes, wrong_schemes = listed_schemes(options.schemes)
    seeds, wrong_seeds = listed_seeds(options.seeds)
    problems = wrong_schemes + wrong_seeds
    if any(change.replace(" ", "").startswith("scheme=") for change in options.changes):
        problems.append("--set scheme=... is not allowed here: name the schemes with --schemes")
    problems += too_small(options, jobs=1)
    if options.devices > 1 and options.jobs not in (None, 1):
        problems.append(f"--jobs {options.jobs} with --devices {options.devices}: expected one of them to be 1")
    raise_all(problems)
    from relaylab.train import runs

    shared = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(Engine)}
    members: dict[Member, TrainConfig] = {}
    for seed, scheme in itertools.product(seeds, schemes):
        shared["changes"] = (*options.changes, f"scheme={scheme}")
        members[scheme, seed] = TrainConfig(
            **shared, seed=seed, out=folder / runs.member_name(scheme, seed), resume="auto"
        )
    return members


def _train(
    options: CompareOptions,
    folder: Path,
    requests: "Mapping[Member, Request]",
    missing: "Mapping[Member, TrainConfig]",
    length: int,
) -> bool:
    """Train the missing runs, or those of several devices one after another; False if they were stopped."""
    if options.devices > 1:
        return _train_in_turn(missing)
    from relaylab.train import jobs, runs

    jobs.start_server()
    images, threads = _alike(options, folder, requests)
    fitting = 1 if threads is None else max(1, available_cores() // threads)
    at_once = min(options.jobs or fitting, len(missing))
    workers = max(1, available_cores() // at_once) if options.workers is None else options.workers
    configs = {
        runs.member_name(*key): dataclasses.replace(config, images=images, workers=workers, resume="auto")
        for key, config in missing.items()
    }
    return jobs.train_all(configs, jobs=at_once, threads=threads, iterations=length)


def _alike(options: CompareOptions, folder: Path, requests: "Mapping[Member, Request]") -> tuple[str, int | None]:
    """Check the images, and return what must be the same for all runs, whatever the number of jobs.

    That is where the images are, "memory" or "disk", and the number of threads, None for PyTorch's default on a GPU.
    Both are those of the comparison's first run, if there is one, also of an earlier command.
    """
    import torch

    from relaylab.train import images, runs
    from relaylab.train.segments import segments_of

    first = next(iter(requests.values()))
    begun = next((file.parent for file in sorted(folder.glob(f"*/{runs.CONFIG}"))), None)
    cores = available_cores()
    segments_of(first.recipe)  # which builds the network: an unknown one is an error before any process starts
    train, val = images.open_sources(first.config, first.recipe.images)
    images.check_images(first.recipe, train, val)
    config = first.config
    if begun is not None:
        with runs.reading(begun) as stored:
            config = dataclasses.replace(config, images=stored["options"]["images"])
    in_memory = images.fits_memory(config, (train, val), images.view_of(first.recipe), min(cores, len(requests)))
    where = "memory" if in_memory else "disk"
    if options.accelerator != "cpu" and torch.cuda.is_available():
        return where, None
    threads = min(torch.get_num_threads(), max(1, cores // len(requests)))
    starts = runs.starts_of(begun) if begun is not None else []
    return where, min(starts[0]["threads"], cores) if starts else threads


def _train_in_turn(missing: "Mapping[Member, TrainConfig]") -> bool:
    """Train with several devices, whose processes torchrun starts; False if a run was stopped."""
    from relaylab.train import engine, runs
    from relaylab.train.failures import Failure, read_failure, write_failure

    for number, (key, config) in enumerate(missing.items(), 1):
        assert config.out is not None
        print(f"run {number} of {len(missing)}: {SCHEMES[key[0]]}, seed {key[1]}", file=sys.stderr, flush=True)
        code = engine.launch(config, runs.arguments_of(config))
        if code == INTERRUPTED:
            return False
        if code == WRONG_INPUT:
            raise InputError(f"the run in {config.out} could not begin: see the error above")
        if code and read_failure(config.out) is None:
            config.out.mkdir(parents=True, exist_ok=True)
            write_failure(config.out, Failure("failed", 0, f"its processes ended with exit code {code}"))
    return True
