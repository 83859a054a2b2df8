"""Results from stored scores: error rates, comparisons and ensembles, in evaluation.md and evaluation.json."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from relaylab.evaluate.ensembles import Combine, combined, fit_weights, halves
from relaylab.evaluate.error_rates import ErrorRates, difference, error_rates, misses
from relaylab.evaluate.protocols import Kind
from relaylab.evaluate.scores import ScoreFolder
from relaylab.files import write_text
from relaylab.outside.reading import DamagedFileError, read_json
from relaylab.outside.showing import markdown
from relaylab.recipes.schema import SCHEMES
from relaylab.tables import Table, markdown_lines
from relaylab.train.metrics import TOP, informative_tops

log = logging.getLogger("relaylab.evaluate")

TABLE, RESULTS = "evaluation.md", "evaluation.json"
Scored = tuple[str, Kind]  # network and protocol


@dataclass(frozen=True)
class Ensemble:
    """The evaluation of an ensemble on `images` images; `weights` is empty except for learnt weights."""

    members: tuple[str, ...]
    protocol: Kind
    how: Combine
    weights: tuple[float, ...]
    images: int
    errors: ErrorRates


def write(folder: ScoreFolder, ensembles: Sequence[Ensemble] = (), against: str | None = None) -> str:
    """Write the results of a folder of scores. Ensembles of earlier commands are kept.

    Args:
        folder: a folder of scores.
        ensembles: new ensembles.
        against: the network that the others are compared with; None for standard BP, see `baseline`.

    Returns:
        The tables as Markdown, and the path of evaluation.md.
    """
    labels = folder.images.labels
    scores: dict[Scored, Tensor] = {}
    for name in folder.names():
        scores |= {(name, kind): folder.protocol(name, kind) for kind in folder.protocols(name)}
    rates = {key: error_rates(values, labels) for key, values in scores.items()}
    tops = informative_tops(len(folder.images.classes))
    all_ensembles = {(e.members, e.protocol, e.how, e.images): e for e in (*_kept(folder), *ensembles)}
    text = [
        f"# {markdown(folder.images.title)}: {len(labels):,} images, {_class_count(folder)}\n",
        "Error rates in per cent, with 95 % bootstrap intervals over images in brackets.\n",
        *markdown_lines(_table(folder, rates, scores, against)),
    ]
    if all_ensembles:
        text += ["\n## Ensembles\n", *markdown_lines(_ensemble_table(list(all_ensembles.values()), tops))]
    results = {
        "images": {"title": folder.images.title, "count": len(labels), "fingerprint": folder.images.fingerprint},
        "networks": {name: folder.about(name) for name in folder.names()},
        "errors": [{"network": name, "protocol": kind, **asdict(errors)} for (name, kind), errors in rates.items()],
        "ensembles": [asdict(ensemble) for ensemble in all_ensembles.values()],
    }
    write_text(folder.path / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_text(folder.path / TABLE, "\n".join(text) + "\n")
    return "\n".join(text) + f"\n\n{(folder.path / TABLE).resolve()}"


def _class_count(folder: ScoreFolder) -> str:
    count, present = len(folder.images.classes), len(folder.images.labels.unique())
    return f"{count} classes" if present == count else f"{present} of {count} classes"


def ensemble_of(folder: ScoreFolder, names: Sequence[str], kind: Kind, how: Combine, *, held_out: bool) -> Ensemble:
    """Evaluate an ensemble of networks under one protocol.

    With `held_out`, only half of the images are evaluated; learnt weights are fitted on the other half.
    """
    members = [folder.protocol(name, kind) for name in names]
    labels = folder.images.labels
    weights: Tensor | None = None
    if held_out:
        fitted, reported = halves(labels)
        if how == "learnt-weights":
            weights = fit_weights([member[fitted] for member in members], labels[fitted])
        members, labels = [member[reported] for member in members], labels[reported]
    rates = error_rates(combined(members, how, weights), labels)
    rounded = () if weights is None else tuple(round(float(weight), 4) for weight in weights)
    return Ensemble(tuple(names), kind, how, rounded, len(labels), rates)


def baseline(name: str, networks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the baseline of a network: standard BP with the same seed, else standard BP, else the first network.

    Args:
        name: name of the network.
        networks: descriptions by name, from `relaylab.evaluate.trained.describe_run`.
    """
    standard = [other for other, about in networks.items() if about.get("values", {}).get("scheme") == "standard"]
    paired = [other for other in standard if networks[other]["seed"] == networks[name].get("seed")]
    return next(iter(paired or standard or networks))


def _table(
    folder: ScoreFolder, rates: Mapping[Scored, ErrorRates], scores: Mapping[Scored, Tensor], against: str | None
) -> Table:
    labels, tops = folder.images.labels, informative_tops(len(folder.images.classes))
    titles = [f"top-{TOP[name]}" for name in tops]
    header = (
        "network",
        "protocol",
        *titles,
        "mean per class",
        "baseline",
        *(f"{title} difference" for title in titles),
    )
    rows: list[tuple[str, ...]] = []
    for (name, kind), errors in rates.items():
        networks = {other: folder.about(other) for other, protocol in scores if protocol == kind}
        base = against if against in networks else baseline(name, networks)
        scales = [view.removeprefix("dense-") for view in folder.views_of(name, kind) if kind == "dense"]
        protocol = f"{kind} {', '.join(scales)}".rstrip()
        cells = [name, protocol, *_top_texts(errors, tops), f"{errors.mean_per_class:.2f}"]
        differences = ["", *[""] * len(tops)]
        if name != base:
            scheme = networks[base].get("values", {}).get("scheme")
            differences[0] = f"{base} ({SCHEMES[scheme]})" if scheme in SCHEMES else base
            for column, top in enumerate(tops, 1):
                pair = [misses(scores[network, kind], labels, TOP[top]) for network in (name, base)]
                differences[column] = difference(pair[:1], pair[1:]).text(signed=True)
        rows.append((*cells, *differences))
    return Table("Error rates", header, tuple(rows))


def _top_texts(errors: ErrorRates, tops: Sequence[str]) -> list[str]:
    return [getattr(errors, name).text() for name in tops]


def _ensemble_table(ensembles: Sequence[Ensemble], tops: Sequence[str]) -> Table:
    titles = [f"top-{TOP[name]}" for name in tops]
    header = ("members", "protocol", "combination", "images", *titles, "mean per class")
    rows: list[tuple[str, ...]] = []
    for e in ensembles:
        how = e.how + (f" ({', '.join(f'{weight:.2f}' for weight in e.weights)})" if e.weights else "")
        errors = [*_top_texts(e.errors, tops), f"{e.errors.mean_per_class:.2f}"]
        rows.append((", ".join(e.members), e.protocol, how, f"{e.images:,}", *errors))
    return Table("Ensembles", header, tuple(rows))


@dataclass(frozen=True)
class _Results:
    """The entries of evaluation.json that are read again."""

    ensembles: tuple[Ensemble, ...]


def read_ensembles(folder: ScoreFolder) -> list[Ensemble]:
    """Read the ensembles of earlier commands.

    Raises:
        InputError: the file is damaged.
    """
    file = folder.path / RESULTS
    return list(read_json(file, _Results).ensembles) if file.is_file() else []


def _kept(folder: ScoreFolder) -> list[Ensemble]:
    try:
        return read_ensembles(folder)
    except DamagedFileError as error:
        log.warning("%s; it will be overwritten, without earlier ensembles", error)
        return []
