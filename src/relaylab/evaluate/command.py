"""`relaylab eval`: from trained networks to scores, and from scores to tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relaylab.cores import available_cores
from relaylab.data.sources.opening import open_source
from relaylab.data.sources.source import UNLABELLED, Source
from relaylab.errors import InputError
from relaylab.evaluate.ensembles import COMBINE, Combine, combined, fit_weights, halves
from relaylab.evaluate.error_rates import ErrorRates, Interval, difference, error_rates, misses
from relaylab.evaluate.options import EvalConfig
from relaylab.evaluate.protocols import PROTOCOLS, Kind, passes_of
from relaylab.evaluate.scores import ScoreFolder, describe_images
from relaylab.evaluate.testing import Scorer, evaluate
from relaylab.evaluate.trained import Trained, find_trained
from relaylab.files import write_text
from relaylab.models.file import ModelFile, read_model
from relaylab.progress import progress
from relaylab.train.options import nearest
from relaylab.train.runs import ROOT
from relaylab.train.signals import stopping

INTERRUPTED = 130
TABLE, FIGURES = "evaluation.md", "evaluation.json"


@dataclass(frozen=True)
class Ensemble:
    """Several networks, tested together.

    Attributes:
        members: their names.
        protocol: of all of them.
        how: their probabilities are combined.
        weights: of each, if they were learnt.
        images: how many it was tested on.
        errors: its error rates.
    """

    members: tuple[str, ...]
    protocol: Kind
    how: Combine
    weights: tuple[float, ...]
    images: int
    errors: ErrorRates


def run(config: EvalConfig) -> int:
    """Test what was named, as far as it has not been tested yet, and print the table.

    Returns:
        The exit code: 0, or 130 if somebody stopped it; the same command then goes on.

    Raises:
        InputError: wrong options, runs or images.
    """
    kinds, ways, scales = _listed(config)
    if config.batch_size < 1 or (config.workers is not None and config.workers < 0):
        raise InputError(f"--batch-size {config.batch_size}, --workers {config.workers}: expected at least 1 and 0")
    networks = find_trained(config.runs)
    if ways and len(networks) < 2:
        raise InputError("an ensemble needs at least two networks")
    device = _device(config.accelerator)
    models = {each.name: read_model(each.file) for each in networks}
    passes = {
        each.name: [
            p
            for kind in kinds
            for p in passes_of(kind, models[each.name].input, scales or each.scales, flip=config.flip)
        ]
        for each in networks
    }
    source = open_images(config.data, config.split, networks, models)
    folder = ScoreFolder(config.out or ROOT / "eval" / config.runs[0].resolve().name, describe_images(source))
    total = len(source) * sum(map(len, passes.values()))
    workers = available_cores() if config.workers is None else config.workers
    with stopping() as stop, progress("test", total) as task:
        for each in networks:
            folder.add(each.name, {"sha256": each.sha256(), "file": str(each.file.absolute()), **each.about})
            if all(folder.has(each.name, p.name, i) for p in passes[each.name] for i in range(len(folder.chunks))):
                task.advance(len(source) * len(passes[each.name]))
                continue
            model = models[each.name]
            scorer = Scorer(model, device)
            done = evaluate(
                scorer,
                source,
                folder,
                each.name,
                passes[each.name],
                model.input,
                workers=workers,
                task=task,
                batch_size=config.batch_size,
                stopped=lambda: bool(stop),
            )
            if not done:
                print(f"stopped; what is done is in {folder.path}, and the same command goes on")
                return INTERRUPTED
    if (folder.images.labels == UNLABELLED).any():
        print(f"{folder.path.resolve()}: scores of {len(source):,} images, not all with a label. Next: relaylab submit")
        return 0
    found = [_ensemble(folder, list(models), kind, how, "learnt-weights" in ways) for kind in kinds for how in ways]
    print(write(folder, found))
    return 0


def open_images(
    data: Sequence[Path], split: str, networks: Sequence[Trained], models: Mapping[str, ModelFile]
) -> Source:
    """The images, with labels in the order of the networks' classes.

    Args:
        data: where they are; empty for those of the first run.
        split: train, val, test or all.
        networks: that are tested.
        models: their model files, by name.

    Raises:
        InputError: networks of different classes, or images that cannot be used.
    """
    first = models[networks[0].name]
    for name, model in models.items():
        if model.classes != first.classes:
            raise InputError(
                f"{networks[0].name} and {name} have different classes ({len(first.classes)} and "
                f"{len(model.classes)}): they cannot stand in one table"
            )
    part = None if split == "all" else split
    own, own_val = networks[0].data
    if not data and not own:
        raise InputError("which images? A model file does not say; give them with --data")
    if not data and own_val and split == "val":
        data, part = own_val, None
    source = open_source(data or own, split=part, classes=class_order(first.classes), watch=progress)
    if len(source.classes) != len(first.classes):
        raise InputError(
            f"{source.title} has {len(source.classes)} classes, and {networks[0].name} {len(first.classes)}"
        )
    return source


def class_order(classes: Sequence[str]) -> Sequence[str] | None:
    """In which order a data set's classes shall be; None, its own, where a network knows only their numbers."""
    return None if all(name.isdecimal() for name in classes) else classes


def write(folder: ScoreFolder, ensembles: Sequence[Ensemble] = ()) -> str:
    """Write all figures that a folder's scores give, and return their table."""
    labels = folder.images.labels
    scores: dict[tuple[str, Kind], Tensor] = {}
    for name in folder.names():
        scores |= {(name, kind): folder.protocol(name, kind) for kind in folder.protocols(name)}
    rates = {key: error_rates(values, labels) for key, values in scores.items()}
    together = {(e.members, e.protocol, e.how, e.images): e for e in (*_kept(folder), *ensembles)}
    text = [
        f"# {folder.images.title}: {len(labels):,} images, {len(folder.images.classes)} classes\n",
        "Error rates in per cent. In brackets, 95 % intervals over images (bootstrap).\n",
        *_table(folder, rates, scores),
        *(_ensemble_table(list(together.values())) if together else []),
    ]
    figures = {
        "images": {"title": folder.images.title, "count": len(labels), "fingerprint": folder.images.fingerprint},
        "networks": {name: folder.about(name) for name in folder.names()},
        "errors": [{"network": name, "protocol": kind, **asdict(found)} for (name, kind), found in rates.items()],
        "ensembles": [asdict(ensemble) for ensemble in together.values()],
    }
    write_text(folder.path / FIGURES, json.dumps(figures, indent=1, allow_nan=False) + "\n")
    write_text(folder.path / TABLE, "\n".join(text) + "\n")
    return "\n".join(text) + f"\n\n{(folder.path / TABLE).resolve()}"


def _table(
    folder: ScoreFolder, rates: Mapping[tuple[str, Kind], ErrorRates], scores: Mapping[tuple[str, Kind], Tensor]
) -> list[str]:
    labels = folder.images.labels
    header = ["network", "protocol", "top-1", "top-5", "mean per class", "top-1 minus the first", "top-5 likewise"]
    lines = [_line(header), _line(["---", "---", *["---:"] * 5])]
    first: dict[Kind, str] = {}
    for (name, kind), found in rates.items():
        base = first.setdefault(kind, name)
        scales = [each.removeprefix("dense-") for each in folder.passes_of(name, kind) if kind == "dense"]
        what = f"{kind} {', '.join(scales)}".rstrip()
        cells = [name, what, found.top1.text(), found.top5.text(), f"{found.mean_per_class:.2f}"]
        for top in (1, 5):
            pair = [misses(scores[each, kind], labels, top) for each in (name, base)]
            cells.append("" if name == base else difference(pair[:1], pair[1:]).text(signed=True))
        lines.append(_line(cells))
    return lines


def _ensemble_table(ensembles: Sequence[Ensemble]) -> list[str]:
    header = ["ensemble of", "protocol", "combined by", "images", "top-1", "top-5", "mean per class"]
    lines = ["\n## Ensembles\n", _line(header), _line(["---", "---", "---", *["---:"] * 4])]
    for e in ensembles:
        how = e.how + (f" ({', '.join(f'{weight:.2f}' for weight in e.weights)})" if e.weights else "")
        figures = [e.errors.top1.text(), e.errors.top5.text(), f"{e.errors.mean_per_class:.2f}"]
        lines.append(_line([", ".join(e.members), e.protocol, how, f"{e.images:,}", *figures]))
    return lines


def _ensemble(folder: ScoreFolder, names: Sequence[str], kind: Kind, how: Combine, held_out: bool) -> Ensemble:
    members = [folder.protocol(name, kind) for name in names]
    labels = folder.images.labels
    weights: Tensor | None = None
    if held_out:
        fitted, reported = halves(labels)
        if how == "learnt-weights":
            weights = fit_weights([member[fitted] for member in members], labels[fitted])
        members, labels = [member[reported] for member in members], labels[reported]
    rates = error_rates(combined(members, how, weights), labels)
    kept = () if weights is None else tuple(round(float(weight), 4) for weight in weights)
    return Ensemble(tuple(names), kind, how, kept, len(labels), rates)


def _kept(folder: ScoreFolder) -> list[Ensemble]:
    """The ensembles of earlier commands."""
    file = folder.path / FIGURES
    if not file.is_file():
        return []
    found: list[Ensemble] = []
    for entry in json.loads(file.read_text(encoding="utf-8"))["ensembles"]:
        errors: dict[str, Any] = entry["errors"]
        top1, top5 = Interval(**errors["top1"]), Interval(**errors["top5"])
        members, weights = tuple(entry["members"]), tuple(entry["weights"])
        rates = ErrorRates(top1, top5, errors["mean_per_class"])
        found.append(Ensemble(members, entry["protocol"], entry["how"], weights, entry["images"], rates))
    return found


def _listed(config: EvalConfig) -> tuple[list[Kind], list[Combine], list[int]]:
    problems: list[str] = []

    def parts(text: str, known: Sequence[str], what: str) -> list[Any]:
        names = [part.strip() for part in text.split(",") if part.strip()]
        problems.extend(f"unknown {what} {name!r}{nearest(name, known)}" for name in names if name not in known)
        return list(dict.fromkeys(names))

    kinds = parts(config.protocol, PROTOCOLS, "protocol")
    ways = parts(config.ensemble, COMBINE, "way to combine")
    scales = [part.strip() for part in config.scales.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in scales):
        problems.append(f"--scales {config.scales}: expected pixels, separated by commas")
        scales = []
    if not kinds and not problems:
        problems.append(f"--protocol is empty: expected one or more of {', '.join(PROTOCOLS)}")
    if (scales or config.flip) and "dense" not in kinds:
        problems.append("--scales and --flip are for dense testing, and --protocol does not have it")
    if problems:
        raise InputError("; ".join(problems))
    return kinds, ways, [int(part) for part in scales]


def _device(accelerator: str) -> torch.device:
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise InputError("--accelerator cuda: there is no GPU that PyTorch can use")
    return torch.device("cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "cuda")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
