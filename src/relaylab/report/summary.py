"""Tables of a comparison: errors per method, failed runs, results of the paper, and values of the recipe."""

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from relaybackprop.planning.cost import EARLY_RELEASE
from relaybackprop.planning.cost import Cost as StepCost
from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.outside.showing import markdown
from relaylab.recipes import RECIPES
from relaylab.recipes.schema import SCHEME_NAMES, value_text
from relaylab.report.comparison import Comparison, Run, joined
from relaylab.report.costs import cost_of
from relaylab.report.curves import curve_plot
from relaylab.report.paper_tables import COLUMNS, NAMES, reported, reported_rows
from relaylab.report.snippet import CODE, snippet
from relaylab.report.tuned import tuning_plots, tuning_table
from relaylab.report.verdict import (
    Cost,
    compared_scheme,
    difference_text,
    differences,
    interval,
    mean_text,
    paired_differences,
    verdict,
)
from relaylab.tables import Table, markdown_lines
from relaylab.train.metrics import TOP, Measure

RATE = "optimizer.lr"
TUNED = "tuned on held-out images (--tune)"
TABLE, RESULTS, CURVES = "comparison.md", "comparison.json", "curves.svg"
TASK = ("network.", "images.")  # values that define the paper's task
PAPER_TABLE = {architecture: number for number in ("3", "6") for architecture in COLUMNS[number]}


def write_comparison(folder: Path, comparison: Comparison, changes: Sequence[str]) -> tuple[Table, list[str]]:
    """Write comparison.md, comparison.json, plots and relay.py, and return the table and the verdict.

    Args:
        folder: folder of the comparison.
        comparison: a comparison with at least one finished run.
        changes: overrides of the recipe, as given by the user.
    """
    shown, recipe, verdict = summary(comparison), comparison.runs[0].recipe, verdict_of(comparison)
    measure = comparison.measure
    pictures = {CURVES: curve_plot(comparison.metrics, "val", measure.name, curve_title(measure), "per cent")}
    notes = [*([f"Overrides: {markdown(', '.join(changes))}."] if changes else [])]
    notes += [*map(markdown, comparison.failure_texts), *shown.notes]
    text = [f"# {recipe.name}\n", *(f"- {markdown(line)}" for line in verdict), "", *markdown_lines(shown), ""]
    text += [*(f"{note}\n" for note in notes), f"![Validation error]({CURVES})\n"]
    if comparison.tuning is not None:
        trials = tuning_table(comparison.tuning, comparison.guess(), measure)
        text += [f"## {trials.title}\n", *markdown_lines(trials), "", *(f"{markdown(note)}\n" for note in trials.notes)]
        for number, (key, picture) in enumerate(tuning_plots(comparison.tuning, measure).items(), 1):
            pictures[f"tuning-{number}.svg"] = picture
            text.append(f"![Error of the trials against {key}](tuning-{number}.svg)\n")
    code = code_of(comparison)
    if code is not None:
        text += [
            f"## Use it in your own training loop\n\n`{CODE}` in this folder:\n\n```python",
            code.rstrip(),
            "```\n",
        ]
        write_text(folder / CODE, code)
    write_text(folder / TABLE, "\n".join(text))
    for name, picture in pictures.items():
        write_text(folder / name, picture)
    write_text(folder / RESULTS, json.dumps(_results(comparison, changes, verdict), indent=1) + "\n")
    return shown, verdict


def _results(comparison: Comparison, changes: Sequence[str], verdict: Sequence[str]) -> dict[str, Any]:
    """Return the content of comparison.json."""
    runs: list[dict[str, Any]] = []
    for run in comparison.runs:
        validations = [line for line in run.metrics if line["kind"] == "val"]
        runs.append({"scheme": run.recipe.scheme, "seed": run.about["seed"], "validations": validations})
    failures = [{"scheme": s, "seed": n, **asdict(failure)} for (s, n), failure in comparison.failures.items()]
    pairs = [
        {
            **asdict(difference),
            "mean": statistics.fmean(difference.values),
            "interval": interval(difference.values),
            "decision": difference.decision,
            "text": difference.text,
        }
        for difference in differences(comparison.errors(), comparison.guess())
    ]
    return {
        "recipe": comparison.runs[0].recipe.name,
        "changes": list(changes),
        "verdict": list(verdict),
        "differences": pairs,
        "guessing": comparison.guess(),
        "costs": {scheme: asdict(cost) for scheme, cost in method_costs(comparison).items()},
        "tuning": comparison.tuning and asdict(comparison.tuning),
        "runs": runs,
        "failures": failures,
    }


def verdict_of(comparison: Comparison) -> list[str]:
    """Return the verdict of a comparison, in sentences."""
    measure, costs = comparison.measure, method_costs(comparison)
    points = f"per cent of {measure.title}" if measure.name in TOP else f"{measure.title}, in per cent"
    return verdict(comparison.errors(), comparison.guess(), costs, error=points)


def curve_title(measure: Measure) -> str:
    """Return the title of an error curve."""
    return f"Validation error, {measure.short}"


def code_of(comparison: Comparison) -> str | None:
    """Return the program of the compared method; None if no method with heads was trained."""
    ours = compared_scheme(comparison.by_scheme)
    return None if ours is None else snippet(comparison.by_scheme[ours][0].recipe)


def summary(comparison: Comparison) -> Table:
    """Return the main table: errors and costs per method."""
    by_scheme, shown, first = comparison.by_scheme, comparison.measures, comparison.runs[0]
    errors = {measure.name: comparison.errors(measure) for measure in shown}
    ours, costs = compared_scheme(by_scheme), method_costs(comparison)
    paper = reported("3", [first.recipe.network.architecture]) if _has_papers_rows(first) else {}
    header = ["method", "runs", *(f"{measure.title}, %" for measure in shown)]
    header += [f"{SCHEME_NAMES[ours]} minus this method, {measure.short}" for measure in shown] if ours else []
    own_values = _tuned_values(comparison)
    tuned = list(next(iter(own_values.values()), {}))
    header += [
        "learning rate",
        *(key.rpartition(".")[2] for key in tuned),
        "training time",
        "FLOPs",
        "peak memory",
    ]

    def row(name: str, runs: str, cells: Sequence[str]) -> tuple[str, ...]:
        return (name, runs, *cells, *[""] * (len(header) - 2 - len(cells)))

    rows: list[tuple[str, ...]] = []
    for scheme in errors[comparison.measure.name]:
        scheme_runs = by_scheme.get(scheme, [])
        cells = [mean_text([run.last[top] for run in scheme_runs]) if scheme_runs else "" for top in errors]
        for top in errors if ours else ():
            pairs = paired_differences(errors[top][str(ours)], errors[top][scheme])
            cells.append(difference_text(pairs) if scheme_runs and scheme != ours else "")
        cost = costs.get(scheme, Cost())
        cells.append(f"{scheme_runs[0].recipe.optimizer.lr:g}" if scheme_runs else "")
        cells += [own_values.get(scheme, {}).get(key, "") for key in tuned]
        cells.append(_seconds_text(cost.seconds))
        cells += ["" if ratio is None else f"{100 * ratio:.0f} %" for ratio in (cost.flops, cost.memory)]
        rows.append(row(SCHEME_NAMES[scheme], _runs_text(comparison, scheme), cells))
        if scheme in paper:
            rows.append(row(f"{SCHEME_NAMES[scheme]} (the paper)", "", paper[scheme][: len(shown)]))
    rows.append(row("chance level", "", [f"{comparison.guess(measure):.2f}" for measure in shown]))
    return Table("Errors on the validation images", tuple(header), tuple(rows), _notes(comparison, ours))


def method_costs(comparison: Comparison) -> dict[str, Cost]:
    """Return the cost of each method, for its own windows."""
    costs: dict[str, Cost] = {}
    cached: dict[str, StepCost | None] = {}
    base: StepCost | None = None  # cost of standard BP, whose network may have different values
    for scheme, runs in comparison.by_scheme.items():  # standard BP first
        seconds = [run.last["seconds"] for run in runs if "seconds" in run.last]
        costs[scheme] = Cost(statistics.fmean(seconds) if seconds else None)
        plan = repr((runs[0].recipe.network, runs[0].recipe.plan))
        if plan not in cached:
            try:
                cached[plan] = cost_of(runs[0].recipe)
            except InputError:  # the network can be trained, but its cost cannot be predicted
                cached[plan] = None
        if (step := cached[plan]) is None:
            continue
        base = base if base is not None and "standard" in costs else step
        is_early = scheme == "relay" and runs[0].starts[-1].get("options", {}).get("early_release")
        kind = EARLY_RELEASE if is_early and EARLY_RELEASE in step.peaks else scheme
        if kind in step.peaks:
            flops = step.totals[kind].flops / max(1, base.totals["standard"].flops)
            peak = step.peaks[kind] / max(1, base.peaks["standard"])
            costs[scheme] = replace(costs[scheme], flops=flops, memory=peak)
    return costs


def _notes(comparison: Comparison, ours: str | None) -> tuple[str, ...]:
    first, seeds = comparison.runs[0], max(map(len, comparison.by_scheme.values()))
    step, iterations = first.last["step"], first.recipe.optimizer.iterations
    when = "at the end of training" if step == iterations else f"at iteration {step:,} of {iterations:,} (unfinished)"
    text = f"Single crop, {when}"
    if seeds > 1:
        text += "; ± is the standard deviation over seeds"
        if ours:
            text += ". Differences are paired by seed, with 95 % confidence intervals over seeds (t) in brackets"
    device = str(first.starts[-1].get("device")).replace("cpu", "CPU")
    seconds = f"Training time is the time spent on updates ({device}), mean over seeds"
    memory = "the predicted peak memory of a step's activations"
    notes = (f"{text}. {seconds}; FLOPs and {memory} are relative to standard BP.",)
    choices = comparison.tuning.choices if comparison.tuning else {}
    untuned = [SCHEME_NAMES[scheme] for scheme in comparison.by_scheme if scheme not in choices]
    return (*notes, f"Not tuned: {', '.join(untuned)}.") if choices and untuned else notes


def _runs_text(comparison: Comparison, scheme: str) -> str:
    done = len(comparison.by_scheme.get(scheme, []))
    kinds = Counter(failure.kind for (own, _), failure in comparison.failures.items() if own == scheme)
    seeds = done + kinds.total()
    unit = "seeds" if seeds > 1 else "seed"
    failed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{done} of {seeds} {unit}; {failed}" if failed else f"{done} {unit}"


def _tuned_values(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Return the tuned values of each scheme, except the learning rate, by scheme and name."""
    choices = comparison.tuning.choices if comparison.tuning else {}
    keys = dict.fromkeys(axis.key for choice in choices.values() for axis in choice.axes if axis.key != RATE)
    return {scheme: {key: choice.values.get(key, "") for key in keys} for scheme, choice in choices.items()}


def _seconds_text(mean: float | None) -> str:
    if mean is None:
        return ""
    unit, size = next((unit for unit in (("h", 3600), ("min", 60)) if mean >= 2 * unit[1]), ("s", 1))
    return f"{mean / size:.3g} {unit}"


def is_papers_task(run: Run) -> bool:
    """Return whether a run trains a network of the paper's tables on the paper's images."""
    recipe = RECIPES.get(run.recipe.name)
    if recipe is None or recipe.network.architecture not in PAPER_TABLE:
        return False
    papers = {name: value for name, value, _ in recipe.fields() if name.startswith(TASK)}
    return papers == {name: value for name, value, _ in run.recipe.fields() if name.startswith(TASK)}


def _has_papers_rows(run: Run) -> bool:
    """Return whether the paper reports single-crop errors, as measured during training, for the task of a run."""
    return is_papers_task(run) and PAPER_TABLE[run.recipe.network.architecture] == "3"


def papers_table(comparison: Comparison) -> Table | None:
    """Return the results of the paper, for a comparison on a different task; None if the main table has them."""
    if _has_papers_rows(comparison.runs[0]):
        return None
    architecture = comparison.runs[0].recipe.network.architecture
    architecture = architecture if architecture in PAPER_TABLE else "model_a"
    number = PAPER_TABLE[architecture]
    data = "Places2, 8.1 million training images, single crop" if number == "3" else "ImageNet 2012, dense evaluation"
    title = f"Table {number} of the paper, {NAMES[architecture]}: {data}"
    notes = ("In brackets, the improvement over standard BP.",)
    rows = tuple(reported_rows(number, [architecture]))
    return Table(title, ("method", "top-1 error, %", "top-5 error, %"), rows, notes)


def failure_table(comparison: Comparison) -> Table | None:
    """Return a table of failed runs with their errors; None if there are none."""
    rows = [
        (f"{SCHEME_NAMES[scheme]}, seed {seed}", failure.kind, str(failure.step), failure.error)
        for (scheme, seed), failure in comparison.failures.items()
    ]
    return Table("Failed runs", ("run", "outcome", "step", "error"), tuple(rows)) if rows else None


def recipe_table(comparison: Comparison) -> Table:
    """Return all values of the recipe with their sources, per scheme where they differ."""
    tuned = comparison.tuning.names if comparison.tuning else ()
    fields = {scheme: named[0].recipe.fields() for scheme, named in comparison.by_scheme.items()}
    texts = {
        scheme: {n: (value_text(value), TUNED if n in tuned else source) for n, value, source in named}
        for scheme, named in fields.items()
    }
    names = dict.fromkeys(name for named in texts.values() for name in named if name != "scheme")
    rows: list[tuple[str, ...]] = []
    for name in names:
        cells = {scheme: named[name] for scheme, named in texts.items() if name in named}
        rows.append((name, *(joined({scheme: cell[i] for scheme, cell in cells.items()}) for i in (0, 1))))
    return Table(comparison.runs[0].recipe.name, ("name", "value", "source"), tuple(rows))


def run_table(comparison: Comparison) -> Table:
    """Return the environment of each run: start time, machine and versions."""
    rows: list[tuple[str, ...]] = []
    for run in comparison.runs:
        start = run.starts[-1]
        versions: Mapping[str, str] = start.get("versions", {})
        where = f"{start.get('device')}, processes: {start.get('processes')}, threads: {start.get('threads')}"
        code = [f"{name} {version}" for name, version in versions.items()]
        code += [f"commit {start['commit']}"] if start.get("commit") else []
        name, started = run.folder.resolve().name, str(run.starts[0].get("started_at", ""))
        rows.append((name, str(run.last["step"]), started, where, ", ".join(code)))
    return Table("Runs", ("run", "last step", "started", "machine", "versions"), tuple(rows))
