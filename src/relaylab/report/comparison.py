"""A comparison's results: read from its runs, as one table with the spread over the seeds, and as curves."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relaylab.files import write_text
from relaylab.recipes.schema import SCHEMES
from relaylab.report.curves import curve_picture
from relaylab.report.verdict import CONFIDENCE, difference_text, mean_text, paired_differences
from relaylab.tables import Table, markdown_lines
from relaylab.train import runs
from relaylab.train.failures import Failure
from relaylab.train.records import read_metrics

TABLE, RESULTS, CURVES = "comparison.md", "comparison.json", "curves.svg"
TOPS = {"top1": "top-1", "top5": "top-5"}
Member = tuple[str, int]
"""A scheme and a seed."""


@dataclass(frozen=True)
class Result:
    """One finished run of a comparison.

    Attributes:
        scheme: that trained it.
        seed: of weights, batches, crops and dropout.
        validations: step, top1, top5 and loss, in their order.
    """

    scheme: str
    seed: int
    validations: tuple[Mapping[str, float], ...]

    @property
    def last(self) -> Mapping[str, float]:
        """The validation at the end of training."""
        return self.validations[-1]


@dataclass(frozen=True)
class Comparison:
    """One recipe under several schemes and seeds.

    Attributes:
        name: of the recipe, with its scale.
        changes: of the recipe's values.
        results: by scheme and seed, in the order that the user gave; the failure of a run that has failed, None for a
            run that is missing. All schemes are compared with the first one.
    """

    name: str
    changes: Sequence[str]
    results: Mapping[Member, Result | Failure | None]

    @property
    def finished(self) -> list[Result]:
        """The runs that have finished."""
        return [result for result in self.results.values() if isinstance(result, Result)]

    @property
    def failures(self) -> dict[Member, Failure]:
        """The runs that have failed."""
        return {key: result for key, result in self.results.items() if isinstance(result, Failure)}

    def errors(self, top: str) -> dict[str, dict[int, float | None]]:
        """Return the final errors in per cent by scheme and seed, None for a run without a result.

        Args:
            top: "top1" or "top5".
        """
        found: dict[str, dict[int, float | None]] = {}
        for (scheme, seed), result in self.results.items():
            found.setdefault(scheme, {})[seed] = result.last[top] if isinstance(result, Result) else None
        return found


def result_of(folder: Path, iterations: int, scheme: str, seed: int) -> Result | None:
    """Return the result of a run, or None if its metrics do not reach its last iteration."""
    if not (folder / runs.METRICS).is_file():
        return None
    found = [line for line in read_metrics(folder / runs.METRICS) if line["kind"] == "val"]
    if not found or found[-1]["step"] != iterations:
        return None
    names = ("step", "top1", "top5", "loss")
    return Result(scheme, seed, tuple({name: line[name] for name in names} for line in found))


def write(folder: Path, comparison: Comparison) -> Table:
    """Write the table, the results behind it and the curves.

    Returns:
        The table.

    Raises:
        OSError: they cannot be written.
    """
    shown = table(comparison)
    picture = ""
    if comparison.finished:
        write_text(folder / CURVES, curves(comparison.finished))
        picture = f"\n![Validation error]({CURVES})\n"
    text = [f"# {shown.title}\n", *markdown_lines(shown), "", *(f"{note}\n" for note in shown.notes)]
    write_text(folder / TABLE, "\n".join(text) + picture)
    figures = {
        "recipe": comparison.name,
        "changes": list(comparison.changes),
        "runs": [dataclasses.asdict(result) for result in comparison.finished],
        "failures": [
            {"scheme": scheme, "seed": seed, **dataclasses.asdict(failure)}
            for (scheme, seed), failure in comparison.failures.items()
        ],
    }
    write_text(folder / RESULTS, json.dumps(figures, indent=1) + "\n")
    return shown


def table(comparison: Comparison) -> Table:
    """Return a comparison's table; the first scheme is the one that the others are compared with."""
    errors = {top: comparison.errors(top) for top in TOPS}
    first = next(iter(errors["top1"]))
    header = ["scheme", "seeds", *(f"{name} error" for name in TOPS.values())]
    header += [f"{name} minus {SCHEMES[first]}" for name in TOPS.values()]
    rows: list[tuple[str, ...]] = []
    for scheme, seeds in errors["top1"].items():
        done = sum(error is not None for error in seeds.values())
        cells = [SCHEMES[scheme], str(done) if done == len(seeds) else f"{done} of {len(seeds)}"]
        own = {top: [error for error in errors[top][scheme].values() if error is not None] for top in TOPS}
        cells += [mean_text(own[top]) if own[top] else "-" for top in TOPS]
        pairs = {top: paired_differences(errors[top][scheme], errors[top][first]) for top in TOPS}
        cells += ["" if scheme == first else difference_text(pairs[top]) for top in TOPS]
        rows.append(tuple(cells))
    changes = [f"Changed: {', '.join(comparison.changes)}."] if comparison.changes else []
    failed = [
        f"{SCHEMES[scheme]}, seed {seed}: {failure.text}" for (scheme, seed), failure in comparison.failures.items()
    ]
    notes = (
        *changes,
        *failed,
        "Single-crop errors on the validation images after the last iteration, in per cent: mean ± standard deviation "
        f"over seeds. Differences are paired by seed, with their {100 * CONFIDENCE:.0f} % confidence interval (t). One "
        "seed gives all schemes the same weights, batches, crops and dropout masks.",
    )
    return Table(comparison.name, tuple(header), tuple(rows), notes)


def curves(results: Sequence[Result]) -> str:
    """Draw top-1 errors against iterations, as SVG text."""
    lines: dict[str, list[list[dict[str, Any]]]] = {}
    for result in results:
        lines.setdefault(result.scheme, []).append([{"kind": "val", **line} for line in result.validations])
    return curve_picture(lines, "val", "top1", "Validation error, top-1", "per cent")
