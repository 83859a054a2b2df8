"""Redraws the tables and figures of docs/evidence/index.md, and the README's table, from results/second-check/.

python -m experiments.second.page [runs/second]    # first copies the results of comparisons from their folders
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from experiments.second.arms import BELOW, GAIN, RATE, RESULTS, ROOT, SCHEMES, Arm, read
from experiments.second.memory import divisions, windows_figure, windows_tables
from experiments.second.rates import curves_figure, rates_figure
from relaylab.files import write_text
from relaylab.recipes.schema import SCHEME_NAMES
from relaylab.report.style import write_figure
from relaylab.tables import Table, markdown_lines, renewed

PAGE = ROOT / "docs" / "evidence" / "index.md"
README = ROOT / "README.md"
# Further rows of a comparison's table: comparison, scheme, label.
MODELS = ("model-a", "model-b")
FURTHER = {
    **{
        model: (
            (f"{model}-weight-1", "relay", "Relay BP, weight 1"),
            (f"{model}-equal-time", "relay", "Relay BP, 5,455 iterations"),
            (f"{model}-rates", "multi_loss", "standard BP, separate rate below the head"),
        )
        for model in MODELS
    },
    "resnet18": (
        ("resnet18-two-branches", "relay", "Relay BP, two branches (layer2.0, layer3.0)"),
        ("resnet18-early-branches", "relay", "Relay BP, two branches (layer1.1, layer2.1)"),
    ),
}
BASES = {"standard BP": "standard", "multi-loss": "multi_loss", "Relay BP": "relay"}


def schemes_table(name: str) -> Table | None:
    """Return a comparison's errors by scheme with paired differences; None if it has not been run."""
    arms = read(name)
    if not arms:
        return None
    rows = [(SCHEME_NAMES[scheme], scheme, arms[scheme]) for scheme in SCHEMES if scheme in arms]
    for other, scheme, label in FURTHER.get(name, ()):
        if found := read(other).get(scheme):
            rows.append((label, "", found))
    has_gains = any(GAIN in arm.values for _, _, arm in rows)
    cells: list[tuple[str, ...]] = []
    for label, scheme, arm in rows:
        chosen = arm.values or arms["relay"].values
        gain = (chosen.get(GAIN, "he"),) if has_gains else ()
        rate = chosen[RATE] + (f" (below x {chosen[BELOW]})" if BELOW in chosen else "")
        minus = ["" if base == scheme else arm.minus(arms[base]) for base in BASES.values()]
        cells.append((label, *gain, rate, arm.error_text, *minus))
    gains = ("gain",) if has_gains else ()
    return Table(name, ("", *gains, "learning rate", "top-1 error", *(f"minus {base}" for base in BASES)), tuple(cells))


def models_table() -> Table:
    """Return the errors of models A and B by scheme, with differences to standard BP."""
    arms = [read(model) for model in MODELS]
    rows = [
        (SCHEME_NAMES[scheme], *(cell for own in arms for cell in _against_standard(own, scheme))) for scheme in SCHEMES
    ]
    header = [cell for model in ("model A", "model B") for cell in (f"{model}: top-1 error, %", "minus standard BP")]
    return Table("models A and B", ("method", *header), tuple(rows))


def _against_standard(arms: Mapping[str, Arm], scheme: str) -> tuple[str, str]:
    own = arms[scheme]
    return own.error_text, "" if scheme == "standard" else own.minus(arms["standard"])


def start_table() -> Table:
    """Return the initial losses of untrained networks over the loss of guessing, by gain."""
    found: dict[str, dict[str, dict[str, float]]] = json.loads((RESULTS / "start.json").read_text(encoding="utf-8"))
    rows = [
        (name, *(", ".join(f"{loss:.2f}" for loss in gains[gain].values()) for gain in ("he", "quiet")))
        for name, gains in found.items()
    ]
    return Table("initial losses", ("recipe", 'gain "he"', 'gain "quiet"'), tuple(rows))


def copy_results(runs: Path) -> None:
    """Copy the results of all comparisons that have finished."""
    for path in sorted(runs.glob("*/comparison.json")):
        write_text(RESULTS / f"{path.parent.name}.json", path.read_text(encoding="utf-8"))


def tables() -> dict[str, list[str]]:
    """Return the lines of each table of the page that has results, by the table's marker."""
    names = (*MODELS, "resnet18", "resnet18-tuned", "vit", "vit-tuned")
    found = {"start": start_table(), **windows_tables(), **{name: schemes_table(name) for name in names}}
    return {name: markdown_lines(table) for name, table in found.items() if table is not None}


def readme_tables() -> dict[str, list[str]]:
    """Return the lines of the README's table, by its marker."""
    return {"models": markdown_lines(models_table())}


def main(arguments: list[str]) -> None:
    """Copy results if a folder of runs is given, and redraw the tables and figures."""
    if arguments:
        copy_results(Path(arguments[0]))
    for page, lines in {PAGE: tables(), README: readme_tables()}.items():
        write_text(page, renewed(page.read_text(encoding="utf-8"), lines))
    if divisions():
        write_figure(windows_figure(), RESULTS / "windows.svg")
    models = [model for model in MODELS if read(model)]
    if models:
        write_figure(rates_figure(models), RESULTS / "rates.svg")
        write_figure(curves_figure(models), RESULTS / "curves.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
