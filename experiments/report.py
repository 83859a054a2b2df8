"""Tables, figures and pictures of what the experiments have found, as files."""

import json
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from experiments.pictures import angles_figure, curves_figure, errors_figure
from experiments.studies import ARMS, STUDIES
from experiments.tables import Finding, all_tables, as_values, findings
from experiments.testing import test_finished
from experiments.training import Place, finished_runs, run_of
from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.pictures import write_figure
from relaylab.report.paper_figures import gradient_figure
from relaylab.report.tables import render
from relaylab.train import runs
from relaylab.train.records import read_metrics

GRADIENTS = {
    "standard BP": "model-a/standard",
    "multi-loss": "model-a/multi_loss",
    "Relay BP": "model-a/relay",
    "isolated windows": "model-a/isolated",
}
ANGLES = {
    "multi-loss, weight 0.3": "model-a/multi_loss",
    "Relay BP, weight 0.3": "model-a/relay",
    "Relay BP, weight 1": "why/relay-weight-1",
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
        test_finished(finished, place)
    found = findings(finished)
    tables = "\n".join(render(table, "markdown") for table in all_tables(found))
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"evidence-{place.size}"
    write_text(folder / f"{stem}.md", tables)
    write_text(folder / f"{stem}.json", json.dumps({"size": place.size, "runs": as_values(found)}, indent=1) + "\n")
    for name, figure in _figures(place, found):
        write_figure(figure, folder / f"{stem}-{name}.png")
    return tables


def _figures(place: Place, found: list[Finding]) -> Iterator[tuple[str, Figure]]:
    there = {each.arm for each in found}
    shown = [name for name, study in STUDIES.items() if name != "selection" and there & set(study.arms.values())]
    if shown:
        yield "errors", errors_figure(shown, found)
    models = [name for name in ("model-a", "model-b") if name in shown]
    if models:
        yield "curves", curves_figure(models, found)
    gradients = {word: name for word, name in GRADIENTS.items() if name in there}
    if gradients:
        yield "gradients", gradient_figure({word: _metrics(place, name)[0] for word, name in gradients.items()})
    angles = {word: name for word, name in ANGLES.items() if name in there}
    if angles:
        yield "angles", angles_figure({word: _metrics(place, name) for word, name in angles.items()})


def _metrics(place: Place, name: str) -> list[list[dict[str, object]]]:
    """Of an arm's finished runs, seed by seed."""
    own = [run_of(name, seed, place) for seed in ARMS[name].seeds]
    return [read_metrics(run.folder / runs.METRICS) for run in own if run.result is not None]
