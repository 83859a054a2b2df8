"""From runs to the tables of results/evidence.md: what was found, and what differs by how much."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.studies import ARMS, STUDIES, Study
from experiments.training import NotChosenError, Place, Run, run_of
from relaylab.model_commands import BATCH, cost_of
from relaylab.report.tables import Table
from relaylab.train import runs
from relaylab.train.compare import difference, mean_and_spread
from relaylab.train.records import read_metrics

COLLAPSED = 98.0  # per cent of top-1 error; guessing among 100 classes gives 99
NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Finding:
    """What a finished run has found.

    Attributes:
        arm: its name.
        seed: of the run.
        rate: the learning rate.
        top1: error after the last iteration, in per cent.
        top5: the same.
        loss: on the same images.
        curve: top-1 error by iteration.
        trained: mean top-1 error in the training batches of the last tenth of the iterations, with crops, mirroring and
            dropout.
        images_per_s: median over the run.
        gflops: of a training step, per image.
    """

    arm: str
    seed: int
    rate: float
    top1: float
    top5: float
    loss: float
    curve: Mapping[int, float]
    trained: float
    images_per_s: float
    gflops: float

    @property
    def collapsed(self) -> bool:
        """Whether it has learnt nothing."""
        return self.top1 >= COLLAPSED


def findings(place: Place) -> list[Finding]:
    """What the finished runs have found, in the order of `ARMS`."""
    found: list[Finding] = []
    for name, arm in ARMS.items():
        for seed in arm.seeds:
            try:
                run = run_of(name, seed, place)
            except NotChosenError:
                continue
            if run.result is not None:
                found.append(_finding(run))
    return found


def _finding(run: Run) -> Finding:
    assert run.result is not None
    recipe = runs.recipe_of(run.folder)
    lines = read_metrics(run.folder / runs.METRICS)
    training = [line for line in lines if line["kind"] == "train"]
    last = run.result.last
    cost = cost_of(recipe).totals[recipe.scheme].flops
    return Finding(
        arm=run.arm,
        seed=run.seed,
        rate=recipe.optimizer.lr,
        top1=last["top1"],
        top5=last["top5"],
        loss=last["loss"],
        curve={int(point["step"]): point["top1"] for point in run.result.validations},
        trained=statistics.fmean(line["top1"] for line in training if line["step"] > 0.9 * run.iterations),
        images_per_s=statistics.median(line["images_per_s"] for line in training),
        gflops=cost / BATCH / 1e9,
    )


def table_of(study: Study, found: Sequence[Finding]) -> Table:
    """A study's table; arms that have not been run are said to be missing.

    Args:
        study: which arms.
        found: of all runs.
    """
    own = {word: _seeds(study, name, found) for word, name in study.arms.items()}
    header = ["", "rate", "seeds", "top-1 error", "top-5 error", "in training", "GFLOPs"]
    header += [f"{top} minus {word}" for word in study.against for top in ("top-1", "top-5")]
    rows: list[tuple[str, ...]] = []
    for word, by_seed in own.items():
        if not by_seed:
            rows.append((word, *[""] * 2, NOT_RUN, *[""] * (len(header) - 4)))
            continue
        first = next(iter(by_seed.values()))
        cells = [word, f"{first.rate:g}", ", ".join(map(str, by_seed))]
        cells += [mean_and_spread([getattr(each, top) for each in by_seed.values()]) for top in ("top1", "top5")]
        cells += [f"{statistics.fmean(each.trained for each in by_seed.values()):.2f}", f"{first.gflops:.3f}"]
        for base in study.against:
            cells += [_minus(by_seed, own[base], top) if base != word else "" for top in ("top1", "top5")]
        rows.append(tuple(cells))
    return Table(study.title, tuple(header), tuple(rows), tuple(_notes(own, study.against)))


def _seeds(study: Study, name: str, found: Sequence[Finding]) -> dict[int, Finding]:
    own = {each.seed: each for each in found if each.arm == name}
    return {seed: each for seed, each in own.items() if study.seeds is None or seed in study.seeds}


def _minus(ours: Mapping[int, Finding], base: Mapping[int, Finding], top: str) -> str:
    both = [seed for seed in ours if seed in base]
    return difference([getattr(ours[seed], top) - getattr(base[seed], top) for seed in both])


def _notes(own: Mapping[str, Mapping[int, Finding]], against: Sequence[str]) -> list[str]:
    """Which runs have collapsed, and the differences without their seeds."""
    bad = {word: [seed for seed, each in by_seed.items() if each.collapsed] for word, by_seed in own.items()}
    notes = [f"Collapsed: {word}, seed {', '.join(map(str, seeds))}." for word, seeds in bad.items() if seeds]
    for base in against if notes else ():
        for word, by_seed in own.items():
            lost = {*bad[word], *bad[base]}
            if word != base and lost & by_seed.keys():
                rest = {seed: each for seed, each in by_seed.items() if seed not in lost}
                notes.append(f"{word} minus {base} without them, top-1: {_minus(rest, own[base], 'top1')}.")
    return notes


def as_values(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as plain values for JSON."""
    return [{name: getattr(each, name) for name in Finding.__dataclass_fields__} for each in found]


def all_tables(found: Sequence[Finding]) -> list[Table]:
    """The tables of all studies of which something has been run."""
    names = {each.arm for each in found}
    return [table_of(study, found) for study in STUDIES.values() if names & set(study.arms.values())]
