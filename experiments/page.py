"""The tables of docs/evidence.md, made from results/evidence-SIZE.json.

python -m experiments.page    # renews them
"""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.studies import STUDIES, TAILS, Size
from experiments.tables import Finding, finding_from, tail_table
from relaylab.files import write_text
from relaylab.report.verdict import difference_text, mean_text
from relaylab.tables import Table, markdown_lines, renewed

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "evidence.md", ROOT / "results"
# Studies of the page, by size.
SHOWN: dict[Size, tuple[str, ...]] = {
    "64px": ("model-a",),
    "32px": (
        "model-a",
        "model-b-cores",
        "weight",
        "equal-rate",
        "overlap",
        "clipped",
        "length-2",
        "branches",
        "depth",
        "resnet50",
        "inception-v3",
        "tail-50",
    ),
}


def sections() -> dict[str, list[str]]:
    """By marker of the page, the lines of its table."""
    tables: dict[str, list[str]] = {}
    for size, names in SHOWN.items():
        text = (RESULTS / f"evidence-{size}.json").read_text(encoding="utf-8")
        found = [finding_from(values) for values in json.loads(text)["runs"]]
        tables |= {f"{name}-{size}": brief(name, found) for name in names}
        for ratio in TAILS:
            if f"tail-{ratio:g}" in names:
                tables[f"tail-{ratio:g}-thirds-{size}"] = markdown_lines(tail_table(ratio, found))
    return tables


def brief(name: str, found: Sequence[Finding]) -> list[str]:
    """A study in few columns, as Markdown. Runs that collapsed are counted, and left out of means and differences.

    Args:
        name: of the study.
        found: of all runs. Those that did not come as far as the others of the study are left out.
    """
    study = STUDIES[name]
    own = [each for each in found if study.counts(each.arm, each.seed)]
    furthest = max(max(each.curve) for each in own)
    good = {
        word: {each.seed: each for each in own if each.arm == arm and furthest in each.curve and not each.collapsed}
        for word, arm in study.arms.items()
    }
    header = ("", "rate", "top-1 error", "top-5 error", *(f"top-1 minus {base}" for base in study.against))
    rows: list[tuple[str, ...]] = []
    for word, arm in study.arms.items():
        runs = [each for each in own if each.arm == arm and furthest in each.curve]
        if not runs:
            continue
        lost = len(runs) - len(good[word])
        errors = [[getattr(each, top) for each in good[word].values()] for top in ("top1", "top5")]
        cells = [mean_text(values) if values else "" for values in errors]
        cells[0] += f" ({lost} of {len(runs)} collapsed)" if lost else ""
        for base in study.against:
            both = good[word].keys() & good[base].keys() if base != word else set[int]()
            pairs = [good[word][seed].top1 - good[base][seed].top1 for seed in sorted(both)]
            cells.append(difference_text(pairs) if pairs else "")
        rows.append((word, f"{runs[0].rate:g}", *(cell.strip() for cell in cells)))
    return markdown_lines(Table(study.title, header, tuple(rows)))


if __name__ == "__main__":
    write_text(PAGE, renewed(PAGE.read_text(encoding="utf-8"), sections()))
