"""Redraws the tables of docs/evidence/first-check.md and the figures of results/ from results/evidence-SIZE.json.

python -m experiments.page
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.figures import figures
from experiments.findings import RESULTS, SIZES, Finding, Size, read_findings
from experiments.studies import PER_CLASS, STUDIES, TAIL, Study
from relaylab.data.sources.subset import long_tail
from relaylab.files import write_text
from relaylab.report.style import write_figure
from relaylab.report.verdict import difference_text, mean_text
from relaylab.tables import Table, markdown_lines, renewed
from relaylab.train.images import CHOICE_SEED

PAGE = Path(__file__).parents[1] / "docs" / "evidence" / "first-check.md"
TABLES: dict[Size, tuple[str, ...]] = {"32px": tuple(STUDIES), "64px": ("model-a",)}


def sections() -> dict[str, list[str]]:
    """Return the lines of each table of the page, by marker."""
    tables: dict[str, list[str]] = {}
    for size, names in TABLES.items():
        findings = read_findings(size)
        tables |= {f"{name}-{size}": markdown_lines(study_table(STUDIES[name], findings)) for name in names}
        if f"tail-{TAIL}" in names:
            tables[f"tail-{TAIL}-thirds-{size}"] = markdown_lines(thirds_table(findings))
    return tables


def study_table(study: Study, findings: Sequence[Finding]) -> Table:
    """Return the errors of each arm with runs, and the differences paired by seed.

    Collapsed runs are counted, and excluded from means and differences.
    """
    runs = {label: study.runs(label, findings) for label in study.arms}
    learnt = {label: {run.seed: run for run in arm_runs if not run.collapsed} for label, arm_runs in runs.items()}
    rows: list[tuple[str, ...]] = []
    for label, arm_runs in runs.items():
        if not arm_runs:
            continue
        ours = learnt[label]
        errors = [[getattr(run, top) for run in ours.values()] for top in ("top1", "top5")]
        cells = [mean_text(values) if values else "" for values in errors]
        lost = len(arm_runs) - len(ours)
        cells[0] += f" ({lost} of {len(arm_runs)} collapsed)" if lost else ""
        cells += [_difference(ours, learnt[base]) if base != label else "" for base in study.against]
        rows.append((label, f"{arm_runs[0].rate:g}", *(cell.strip() for cell in cells)))
    header = ("", "rate", "top-1 error", "top-5 error", *(f"top-1 minus {base}" for base in study.against))
    return Table(study.title, header, tuple(rows))


def _difference(ours: dict[int, Finding], base: dict[int, Finding]) -> str:
    pairs = [ours[seed].top1 - base[seed].top1 for seed in sorted(ours.keys() & base.keys())]
    return difference_text(pairs) if pairs else ""


def thirds_table(findings: Sequence[Finding]) -> Table:
    """Return the top-1 errors on thirds of the classes, by their number of training images."""
    study = STUDIES[f"tail-{TAIL}"]
    rows: list[tuple[str, ...]] = []
    for label in study.arms:
        errors = np.mean([run.by_class for run in study.runs(label, findings)], axis=0)
        labels = np.repeat(np.arange(len(errors)), PER_CLASS)
        sizes = np.bincount(labels[long_tail(labels, ratio=TAIL, seed=CHOICE_SEED)])
        thirds = np.array_split(np.argsort(-sizes, kind="stable"), 3)
        rows.append((label, *(f"{errors[third].mean():.2f}" for third in thirds)))
    header = ("", *(f"{many} training images" for many in ("many", "some", "few")))
    return Table(study.title, header, tuple(rows))


def main() -> None:
    """Rewrite the page's tables and the figures."""
    write_text(PAGE, renewed(PAGE.read_text(encoding="utf-8"), sections()))
    for size in SIZES:
        for name, figure in figures(size).items():
            write_figure(figure, RESULTS / f"evidence-{size}-{name}.svg")


if __name__ == "__main__":
    main()
