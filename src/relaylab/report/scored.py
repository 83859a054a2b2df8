"""The report's sections from per-image scores: tables of the paper, example images, confusions, gains per class."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relaylab.errors import InputError
from relaylab.evaluate.error_rates import confusion, per_class_errors
from relaylab.evaluate.images import images_of
from relaylab.evaluate.protocols import Kind
from relaylab.evaluate.scores import ScoreFolder
from relaylab.recipes.schema import SCHEME_NAMES
from relaylab.report.comparison import Run
from relaylab.report.curves import confusion_plot, gain_plot
from relaylab.report.html import image_uri, svg_uri
from relaylab.report.paper_figures import Photo, pick_photos, plain
from relaylab.report.paper_tables import paper_table
from relaylab.report.summary import is_papers_task
from relaylab.report.verdict import compared_scheme
from relaylab.tables import render

PAIRS = 8  # most confused pairs of classes
PAPER_TABLES = ("1", "3", "4", "6", "sampling", "5")


def paper_tables(scores: ScoreFolder, *, papers_rows: bool) -> list[str]:
    """Return the tables of the paper for which there are scores, optionally with the paper's rows.

    Intervals over images are omitted: the report has one interval per difference, over seeds.
    """
    tables: list[str] = []
    for number in PAPER_TABLES:
        with suppress(InputError):
            table = paper_table(number, [scores])
            rows = tuple(row for row in table.rows if papers_rows or "(the paper" not in row[0])
            tables.append(render(replace(table, rows=rows, notes=()), "html"))
    return tables


def scored(by_scheme: Mapping[str, Sequence[Run]], scores: ScoreFolder) -> dict[str, Any]:
    """Return the template values of the report's sections on scores.

    Raises:
        InputError: the folder has no scores of these runs.
    """
    kind: Kind = "single-crop"
    members = {(scheme, run.about["seed"]) for scheme, runs in by_scheme.items() for run in runs}
    networks: dict[str, list[str]] = {}
    for name in scores.names():
        about = scores.about(name)
        scheme = about.get("values", {}).get("scheme")
        if kind in scores.protocols(name) and (scheme, about.get("seed")) in members:
            networks.setdefault(scheme, []).append(name)
    by_method = {scheme: networks[scheme] for scheme in by_scheme if scheme in networks}
    if not by_method:
        raise InputError(f"{scores.path} has no single-crop scores of these runs: run `relaylab eval RUN...`")
    classes, labels = scores.images.classes, scores.images.labels
    shown = compared_scheme(by_method) or next(iter(by_method))
    network, gains = by_method[shown][0], None
    counts = sum(
        (confusion(scores.protocol(name, kind), labels) for name in by_method[shown]), start=np.zeros(1, np.int64)
    )
    photos, missing = _photos(scores, network, kind)

    def errors_of(scheme: str) -> NDArray[np.float64]:
        return np.mean([per_class_errors(scores.protocol(name, kind), labels) for name in by_method[scheme]], axis=0)

    if "standard" in by_method and shown != "standard":
        gains = svg_uri(gain_plot(errors_of("standard") - errors_of(shown), classes))
    return {
        "title": scores.images.title,
        "tables": paper_tables(scores, papers_rows=is_papers_task(next(iter(by_scheme.values()))[0])),
        "method": SCHEME_NAMES[shown],
        "network": network,
        "networks": len(by_method[shown]),
        "photos": photos,
        "missing": missing,
        "confusion": svg_uri(confusion_plot(counts, classes)),
        "pairs": _worst_pairs(counts, classes),
        "gains": gains,
    }


def _photos(scores: ScoreFolder, network: str, kind: Kind) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Return images classified "correctly" and "incorrectly", or the reason why there are none."""
    try:
        source = images_of(scores, network)
    except InputError as error:  # the report is useful without example images
        return {}, str(error)
    classes, log_probabilities = scores.images.classes, scores.protocol(network, kind)
    picked = {
        what: pick_photos(source, classes, log_probabilities, right=what == "correctly")
        for what in ("correctly", "incorrectly")
    }
    return {what: [_photo(photo) for photo in photos] for what, photos in picked.items() if photos}, ""


def _photo(photo: Photo) -> dict[str, Any]:
    guesses = [(f"{100 * share:.0f} %", plain(name), name == photo.truth) for name, share in photo.guesses]
    return {"uri": image_uri(photo.pixels), "truth": plain(photo.truth), "guesses": guesses}


def _worst_pairs(counts: NDArray[np.int64], classes: Sequence[str]) -> list[tuple[str, str, str]]:
    wrong = counts - np.diag(np.diag(counts))
    shares = 100 * wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = np.argsort(shares, axis=None)[::-1][:PAIRS]
    pairs = [np.unravel_index(int(index), shares.shape) for index in order]
    return [(plain(classes[int(i)]), plain(classes[int(j)]), f"{shares[i, j]:.0f}") for i, j in pairs]
