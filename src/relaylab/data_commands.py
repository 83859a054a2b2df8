"""`relaylab data inspect` and `relaylab data check`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from relaylab.data.sources.index import IndexedImages
from relaylab.data.sources.listing import SplitNeededError
from relaylab.data.sources.opening import open_source
from relaylab.data.survey import Survey, spread, summary, survey
from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.options import CheckConfig, DataConfig, InspectConfig
from relaylab.progress import progress
from relaylab.report.balance import balance_picture

SHOWN = 5  # bad images on the terminal; the files name all
BAD_IMAGES_FOUND = 1


def run(config: InspectConfig | CheckConfig, folder: Path) -> int:
    """Look at one split after another, print what there is and write it to files.

    Args:
        config: options.
        folder: for summary.json, balance.svg and bad-images.txt; with several splits, one folder for each.

    Returns:
        The exit code: 1 where `check` has found bad images.

    Raises:
        InputError: paths that are no data set.
    """
    limit = config.sample if isinstance(config, InspectConfig) else None
    bad = 0
    for split, source in _sources(config):
        numbers, findings = spread(len(source), limit), Survey()
        try:
            with progress("decoding", len(numbers)) as task:
                survey(source, findings, limit=limit, workers=config.workers, task=task)
        finally:  # Ctrl-C, after hours perhaps: what was found by then is not lost
            facts = summary(source, findings)
            here = folder / split if split else folder
            _write(here, facts, split)
            print(f"{describe(facts, split)}\nFiles: {here.resolve()}\n")
        bad += len(findings.unreadable) + len(findings.damaged)
    return BAD_IMAGES_FOUND if bad and isinstance(config, CheckConfig) else 0


def _sources(config: DataConfig) -> Iterator[tuple[str | None, IndexedImages]]:
    options: dict[str, Any] = {"categories": config.categories, "cache": config.cache, "watch": progress}
    try:
        first = open_source(config.paths, split=config.split, **options)
    except SplitNeededError as error:
        for split in error.splits:
            yield split, open_source(config.paths, split=split, **options)
    else:
        yield config.split, first


def describe(facts: dict[str, Any], split: str | None = None) -> str:
    """A summary in lines for the terminal."""
    names = [name for name, _ in facts["classes"]]
    sizes = np.array([count for _, count in facts["classes"]])
    lines = [f"{facts['title']}{f', {split}' if split else ''}: {facts['images']:,} images in {len(names):,} classes"]
    if facts["unlabelled"]:
        lines.append(f"  without a label     {facts['unlabelled']:,}")
    if facts["unlabelled"] < facts["images"]:
        least, most = int(sizes.argmin()), int(sizes.argmax())
        lines.append(
            f"  images per class    {sizes[least]:,} ({names[least]}) to {sizes[most]:,} ({names[most]}), "
            f"median {np.median(sizes):,.0f}"
        )
        empty = [names[label] for label in np.flatnonzero(sizes == 0)]
        if empty:
            lines.append(
                f"  empty classes       {len(empty)}: {', '.join(empty[:SHOWN])}{'...' * (len(empty) > SHOWN)}"
            )
    ignored = facts["ignored_files"]
    if ignored:
        kinds = ", ".join(f"{count:,} {extension or 'without extension'}" for extension, count in ignored.items())
        lines.append(f"  passed over         {kinds}")
    part = "all" if facts["examined"] == facts["images"] else f"{facts['examined']:,}, of them"
    lines.append(f"  decoded             {part}")
    for key, unit in (("short_side", "pixels"), ("width", "pixels"), ("height", "pixels"), ("file_bytes", "bytes")):
        if facts[key]:
            values = facts[key]
            name = {"short_side": "shorter side", "file_bytes": "file size"}.get(key, key)
            lines.append(f"  {name:<19} {values['least']:,} to {values['most']:,}, median {values['median']:,} {unit}")
    kinds = ", ".join(f"{name} {100 * count / facts['examined']:.4g} %" for name, count in facts["kinds"].items())
    lines.append(f"  formats             {kinds or 'none'}")
    for key, what in (("unreadable", "unreadable"), ("damaged", "damaged, yet read")):
        faults = facts[key]
        lines.append(f"  {what:<19} {len(faults):,}")
        lines += [f"    {name}: {reason}" for name, reason in faults[:SHOWN]]
        if len(faults) > SHOWN:
            lines.append(f"    and {len(faults) - SHOWN:,} more in bad-images.txt")
    return "\n".join(lines)


def _write(folder: Path, facts: dict[str, Any], split: str | None) -> None:
    files = {"summary.json": json.dumps(facts, indent=1, ensure_ascii=False) + "\n"}
    if facts["images"] > facts["unlabelled"]:
        picture = balance_picture(
            {"images": [count for _, count in facts["classes"]]},
            [name for name, _ in facts["classes"]],
            title=f"{facts['title']}{f', {split}' if split else ''}: images of each class",
            unit="images",
        )
        files["balance.svg"] = picture
    bad = [("unreadable", *fault) for fault in facts["unreadable"]] + [
        ("damaged", *fault) for fault in facts["damaged"]
    ]
    files["bad-images.txt"] = "".join(f"{kind}\t{name}\t{reason}\n" for kind, name, reason in bad)
    try:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
