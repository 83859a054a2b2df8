"""From runs to the tables of the evidence: what was found, and what differs by how much."""

import json
import statistics
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from experiments.studies import PER_CLASS, SAMPLING, STUDIES, TAILS, Study
from experiments.testing import Tested, tested, tested_from
from experiments.training import Run
from relaylab.data.sources.subset import long_tail
from relaylab.report.costs import BATCH, cost_of
from relaylab.report.verdict import difference_text, mean_text
from relaylab.tables import Table
from relaylab.train import runs
from relaylab.train.images import CHOICE_SEED

COLLAPSED = 98.0  # per cent of top-1 error; guessing among 100 classes gives 99
NOT_RUN = "not run yet"
Failed = Set[tuple[str, int]]
"""Arms and seeds of runs whose loss was not finite."""


@dataclass(frozen=True)
class Finding:
    """What a run has found.

    Attributes:
        arm: its name.
        seed: of the run.
        rate: the learning rate.
        top1: error after the last iteration, in per cent.
        top5: the same.
        loss: on the same images.
        curve: top-1 error by iteration.
        tested: on training images too; None if it has not been.
        images_per_s: median over the run, or what it reaches alone, if it has shared a GPU with others.
        gflops: of a training step, per image.
        ended: whether it has come to its end.
        device: that has trained it.
    """

    arm: str
    seed: int
    rate: float
    top1: float
    top5: float
    loss: float
    curve: Mapping[int, float]
    tested: Tested | None
    images_per_s: float | None
    gflops: float
    ended: bool
    device: str

    @property
    def collapsed(self) -> bool:
        """Whether it has learnt nothing by its end."""
        return self.ended and self.top1 >= COLLAPSED


def finding_of(run: Run, step: int | None = None) -> Finding:
    """What a run has found.

    Args:
        run: that has been validated.
        step: of the validation that counts; None for the last one.
    """
    recipe = runs.recipe_of(run.folder)
    lines = run.lines
    points = [line for line in lines if line["kind"] == "val" and (step is None or line["step"] <= step)]
    speeds = [line["images_per_s"] for line in lines if line["kind"] == "train" and "images_per_s" in line]
    last = points[-1]
    starts = json.loads((run.folder / runs.ENVIRONMENT).read_text(encoding="utf-8"))["starts"]
    cost = cost_of(recipe).totals[recipe.scheme].flops
    return Finding(
        arm=run.arm,
        seed=run.seed,
        rate=recipe.optimizer.lr,
        top1=last["top1"],
        top5=last["top5"],
        loss=last["loss"],
        curve={point["step"]: point["top1"] for point in points},
        tested=None if last["step"] < run.iterations else tested(run),
        images_per_s=statistics.median(speeds) if speeds else None,
        gflops=cost / BATCH / 1e9,
        ended=last["step"] == run.iterations,
        device=starts[-1]["device"],
    )


def finding_from(values: Mapping[str, Any]) -> Finding:
    """A finding as it stands in evidence-SIZE.json."""
    own: dict[str, Any] = {entry.name: values[entry.name] for entry in fields(Finding)}
    own["curve"] = {int(step): top1 for step, top1 in own["curve"].items()}
    own["tested"] = own["tested"] and tested_from(own["tested"])
    return Finding(**own)


def table_of(study: Study, found: Sequence[Finding], failed: Failed = frozenset()) -> Table:
    """A study's table; arms that have not been run are said to be missing.

    Args:
        study: which arms.
        found: of all runs but those that failed.
        failed: arms and seeds of these.
    """
    own = {word: _seeds(study, name, found) for word, name in study.arms.items()}
    header = ["", "rate", "seeds", "top-1 error", "top-5 error", "on training images", "dead", "GFLOPs"]
    header += [f"{top} minus {word}" for word in study.against for top in ("top-1", "top-5")]
    rows: list[tuple[str, ...]] = []
    for word, by_seed in own.items():
        if not by_seed:
            told = NOT_RUN if study.arms[word] not in {arm for arm, _ in failed} else "failed"
            rows.append((word, "", "", told, *[""] * (len(header) - 4)))
            continue
        first = next(iter(by_seed.values()))
        cells = [word, f"{first.rate:g}", ", ".join(map(str, by_seed))]
        cells += [mean_text([getattr(each, top) for each in by_seed.values()]) for top in ("top1", "top5")]
        tests = [each.tested for each in by_seed.values() if each.tested is not None]
        cells.append(f"{statistics.fmean(each.train for each in tests):.2f}" if tests else "")
        dead = [100 * each.dead for each in tests if each.dead is not None]
        cells.append(f"{statistics.fmean(dead):.0f} %" if dead else "")
        cells.append(f"{first.gflops:.3f}")
        for base in study.against:
            cells += [_minus(by_seed, own[base], top) if base != word else "" for top in ("top1", "top5")]
        rows.append(tuple(cells))
    words = {arm: word for word, arm in study.arms.items()}
    lost = [
        f"Failed, since losses or gradients were not finite: {words[a]}, seed {s}." for a, s in failed if a in words
    ]
    return Table(study.title, tuple(header), tuple(rows), (*lost, *_notes(own, study.against), *_devices(own)))


def _seeds(study: Study, name: str, found: Sequence[Finding]) -> dict[int, Finding]:
    return {each.seed: each for each in found if each.arm == name and study.counts(name, each.seed)}


def _minus(ours: Mapping[int, Finding], base: Mapping[int, Finding], top: str) -> str:
    both = [seed for seed in ours if seed in base]
    return difference_text([getattr(ours[seed], top) - getattr(base[seed], top) for seed in both])


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


def _devices(own: Mapping[str, Mapping[int, Finding]]) -> list[str]:
    """Which runs were not made where most were."""
    by_device: dict[str, list[str]] = {}
    for word, by_seed in own.items():
        for seed, each in by_seed.items():
            by_device.setdefault(each.device, []).append(f"{word}, seed {seed}")
    rare = sorted(by_device, key=lambda device: len(by_device[device]))[:-1]
    return [f"Trained on another device ({device}): {'; '.join(by_device[device])}." for device in rare]


def tail_table(ratio: float, found: Sequence[Finding]) -> Table:
    """Errors of the classes that have many training images, some and few, a third of the classes each.

    Args:
        ratio: largest to smallest class.
        found: of all runs.
    """
    rows: list[tuple[str, ...]] = []
    for kind in SAMPLING:
        own = [each.tested for each in found if each.arm == f"tail-{ratio:g}/{kind}" and each.tested is not None]
        if own:
            errors = np.mean([each.by_class for each in own], axis=0)
            labels = np.repeat(np.arange(len(errors)), PER_CLASS)
            sizes = np.bincount(labels[long_tail(labels, ratio=ratio, seed=CHOICE_SEED)])
            thirds = np.array_split(np.argsort(-sizes, kind="stable"), 3)
            rows.append((kind, *(f"{errors[third].mean():.2f}" for third in thirds)))
    header = ("", *(f"{many} training images" for many in ("many", "some", "few")))
    return Table(f"Question 5: top-1 errors of thirds of the classes, {ratio:g} : 1", header, tuple(rows))


def shown_studies(arms: Set[str]) -> list[str]:
    """The studies that have something to say which no study before them has said.

    Args:
        arms: of which there are runs.
    """
    names: list[str] = []
    seen: set[str] = set()
    for name, study in STUDIES.items():
        there = arms & set(study.arms.values())
        if there - seen:
            names.append(name)
        seen |= there
    return names


def common_table(study: Study, begun: Sequence[Run]) -> Table | None:
    """Where some of a study's runs have not come to their end, what all had found by their last common validation.

    Args:
        study: which arms.
        begun: all runs that have been validated.

    Returns:
        None if all are finished or have failed, or are of different lengths.
    """
    own = [run for run in begun if study.counts(run.arm, run.seed) and not run.failed]
    if all(run.result is not None for run in own) or len({run.iterations for run in own}) > 1:
        return None
    step = min(max(line["step"] for line in run.lines if line["kind"] == "val") for run in own)
    title = f"{study.title}: after {step:,} of {own[0].iterations:,} iterations, also of runs that were broken off"
    return table_of(replace(study, title=title), [finding_of(run, step) for run in own])


def all_tables(begun: Sequence[Run], found: Sequence[Finding]) -> list[Table]:
    """The tables of all studies of which something has been run.

    Args:
        begun: all runs that have been validated, or have failed.
        found: of those that have come to their end.
    """
    failed = {(run.arm, run.seed) for run in begun if run.failed}
    whole = shown_studies({each.arm for each in found})
    own: list[Table | None] = []
    for name in shown_studies({run.arm for run in begun}):
        study = STUDIES[name]
        own += [table_of(study, found, failed) if name in whole else None, common_table(study, begun)]
    tails = [table for ratio in TAILS if (table := tail_table(ratio, found)).rows]
    return [table for table in own if table is not None] + tails
