"""Tables, figures and pictures of what the experiments have found, as files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from experiments.pictures import angles_figure, curves_figure, errors_figure, rates_figure
from experiments.studies import MODELS, SELECTION, STUDIES
from experiments.tables import Finding, all_tables, finding_of, shown_studies
from experiments.testing import test_finished
from experiments.training import Place, Run, begun_runs
from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.report.paper_figures import gradient_figure
from relaylab.report.style import write_figure
from relaylab.tables import render

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
    begun = begun_runs(place)
    finished = [run for run in begun if run.result is not None]
    if not finished:
        raise InputError(f"no finished run in {place.out}: train first")
    if place.data:
        test_finished(finished)
    failed = [run for run in begun if run.failed]
    found = [finding_of(run) for run in begun if not run.failed]
    ended = [each for each in found if each.ended]
    tables = "\n".join(render(table, "markdown") for table in all_tables(begun, ended))
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"evidence-{place.size}"
    write_text(folder / f"{stem}.md", tables)
    values = {
        "size": place.size,
        "runs": [asdict(each) for each in found],
        "failed": [{"arm": run.arm, "seed": run.seed} for run in failed],
    }
    write_text(folder / f"{stem}.json", json.dumps(values, indent=1) + "\n")
    for name, figure in _figures(finished, ended):
        write_figure(figure, folder / f"{stem}-{name}.svg")
    return tables


def _figures(finished: Sequence[Run], found: Sequence[Finding]) -> Iterator[tuple[str, Figure]]:
    shown = shown_studies({run.arm for run in finished})
    if SELECTION in shown:
        yield "rates", rates_figure(found)
    errors = [name for name in shown if name != SELECTION]
    if errors:
        yield "errors", errors_figure(errors, found)
    models = [name for name in MODELS if name in shown]
    if models:
        yield "curves", curves_figure(models, found)
    collapsed = {(each.arm, each.seed) for each in found if each.collapsed}
    good = [run for run in finished if (run.arm, run.seed) not in collapsed]
    gradients = _metrics(good, GRADIENTS)
    if gradients:
        yield "gradients", gradient_figure({word: seeds[0] for word, seeds in gradients.items()})
    angles = _metrics(good, ANGLES)
    if angles:
        yield "angles", angles_figure(angles, ANGLES)


def _metrics(finished: Sequence[Run], arms: Mapping[str, str]) -> dict[str, list[list[dict[str, object]]]]:
    """By word, of those arms that have finished runs, their metrics seed by seed."""
    own = {word: [run.lines for run in finished if run.arm == arm] for word, arm in arms.items()}
    return {word: lines for word, lines in own.items() if lines}
