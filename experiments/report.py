"""Tables, figures and pictures of what the experiments have found, as files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from experiments.pictures import angles_figure, curves_figure, errors_figure
from experiments.studies import STUDIES
from experiments.tables import Finding, all_tables, finding_of
from experiments.testing import test_finished
from experiments.training import Place, Run, finished_runs
from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.pictures import write_figure
from relaylab.report.paper_figures import gradient_figure
from relaylab.report.tables import render
from relaylab.train import runs
from relaylab.train.records import read_metrics

GRADIENTS = STUDIES["model-a"].arms
ANGLES = {
    "multi-loss, weight 0.3": "model-a/multi_loss",
    "Relay BP, weight 0.3": "model-a/relay",
    "Relay BP, weight 1": "relay-weight-1/relay",
}


def write_report(place: Place, folder: Path) -> str:
    """Write evidence-SIZE.md, evidence-SIZE.json and pictures about all runs that are finished.

    Args:
        place: where the runs are; if it has images, runs are tested on them first, as far as they have not been.
        folder: which is made if need be.

    Returns:
        The tables.

    Raises:
        InputError: no run is finished.
        OSError: something cannot be written.
    """
    finished = finished_runs(place)
    if not finished:
        raise InputError(f"no finished run in {place.out}: train first")
    if place.data:
        test_finished(finished)
    found = [finding_of(run) for run in finished]
    tables = "\n".join(render(table, "markdown") for table in all_tables(found))
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"evidence-{place.size}"
    write_text(folder / f"{stem}.md", tables)
    write_text(
        folder / f"{stem}.json",
        json.dumps({"size": place.size, "runs": [asdict(each) for each in found]}, indent=1) + "\n",
    )
    for name, figure in _figures(finished, found):
        write_figure(figure, folder / f"{stem}-{name}.png")
    return tables


def _figures(finished: Sequence[Run], found: Sequence[Finding]) -> Iterator[tuple[str, Figure]]:
    there = {run.arm for run in finished}
    shown = [name for name, study in STUDIES.items() if name != "selection" and there & set(study.arms.values())]
    if shown:
        yield "errors", errors_figure(shown, found)
    models = [name for name in ("model-a", "model-b") if name in shown]
    if models:
        yield "curves", curves_figure(models, found)
    gradients = _metrics(finished, GRADIENTS)
    if gradients:
        yield "gradients", gradient_figure({word: seeds[0] for word, seeds in gradients.items()})
    angles = _metrics(finished, ANGLES)
    if angles:
        yield "angles", angles_figure(angles)


def _metrics(finished: Sequence[Run], arms: Mapping[str, str]) -> dict[str, list[list[dict[str, object]]]]:
    """By word, of those arms that have finished runs, their metrics seed by seed."""
    own = {word: [run.folder / runs.METRICS for run in finished if run.arm == arm] for word, arm in arms.items()}
    return {word: list(map(read_metrics, files)) for word, files in own.items() if files}
