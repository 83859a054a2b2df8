"""`relaylab data inspect` and `relaylab data check`: summarise a data set and find its unreadable images."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from relaylab.errors import FAILED, InputError, raise_all
from relaylab.files import ROOT, new_folder, timestamp, write_text
from relaylab.options import File, Folder, Number, Sources, Split, too_small

if TYPE_CHECKING:
    from relaylab.data.sources.index import IndexedImages

SHOWN = 5  # bad images printed; bad-images.txt lists all


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """Options of both commands."""

    paths: Sources
    """Folders, tar or zip files with CLASS/IMAGE, optionally under train/, val/ and test/; WebDataset shards or Parquet
    files, or a folder of them; a list of images (NAME LABEL lines, a CSV file with a header, COCO JSON) and its image
    folder; Places365, iNaturalist or Tiny ImageNet as distributed; or ImageNet's validation images with their
    development kit."""

    split: Split = None
    """Split to read, if the data set has splits (default: all of them)."""

    categories: File = None
    """For a list of images: file with a NAME LABEL line per class (default: categories*.txt next to the list)."""

    cache: Folder = None
    """Folder for indexes and extracted archives (default: $RELAYLAB_CACHE or, if not set, the user's cache folder)."""

    workers: Number = None
    """Data-loading processes (default: one per core)."""

    out: Folder = None
    """Folder for the results; must be new or empty (default: runs/data/TIME)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions(DataOptions):
    """Summarise a data set: classes, balance, sizes and formats."""

    sample: Annotated[int, tyro.conf.arg(metavar="N")] = 2000
    """Number of evenly spaced images to decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckOptions(DataOptions):
    """Decode every image of a data set and list unreadable and damaged ones."""


def inspect(options: InspectOptions) -> int:
    """Print and write a summary of each split."""
    raise_all(too_small(options, sample=1))
    _scan(options, options.sample)
    return 0


def check(options: CheckOptions) -> int:
    """Decode every image of each split. The exit code is 1 if some are unreadable or damaged."""
    return FAILED if _scan(options, None) else 0


def _scan(options: DataOptions, limit: int | None) -> int:
    """Scan each split and write summary.json, balance.svg and bad-images.txt; return the bad images."""
    if not options.paths:
        raise InputError("no images given: pass a folder, tar, zip or Parquet files, or a list of images")
    raise_all(too_small(options, workers=0))
    bad = 0
    with new_folder(options.out, ROOT / "data" / timestamp()) as folder:
        from relaylab.data.scan import ScanResults, scan, spread, summary
        from relaylab.progress import progress

        for split, source in _sources(options):
            indices, results = spread(len(source), limit), ScanResults()
            try:
                with progress("decoding", len(indices)) as task:
                    scan(source, results, limit=limit, workers=options.workers, task=task)
            finally:  # keep the results of an interrupted scan, which may have taken hours
                facts = summary(source, results)
                here = folder / split if split else folder
                _write(here, facts, split)
                print(f"{describe(facts, split)}\nFiles: {here.resolve()}\n")
            bad += len(results.unreadable) + len(results.damaged)
    return bad


def _sources(options: DataOptions) -> Iterator[tuple[str | None, "IndexedImages"]]:
    from relaylab.data.sources.listing import SplitNeededError
    from relaylab.data.sources.opening import open_source
    from relaylab.progress import progress

    shared: dict[str, Any] = {"categories": options.categories, "cache": options.cache, "watch": progress}
    try:
        first = open_source(options.paths, split=options.split, **shared)
    except SplitNeededError as error:
        for split in error.splits:
            yield split, open_source(options.paths, split=split, **shared)
    else:
        yield options.split, first


def describe(facts: dict[str, Any], split: str | None = None) -> str:
    """Format a summary as lines of text."""
    import numpy as np

    names = [name for name, _ in facts["classes"]]
    sizes = np.array([count for _, count in facts["classes"]])
    lines = [f"{facts['title']}{f', {split}' if split else ''}: {facts['images']:,} images in {len(names):,} classes"]
    lines += [f"  note                {note}" for note in facts["notes"]]
    if facts["several_labels"] is not None:
        lines.append(f"  multi-label         {facts['several_labels']:,}")
    if facts["unlabelled"]:
        lines.append(f"  unlabelled          {facts['unlabelled']:,}")
    if facts["unlabelled"] < facts["images"]:
        least, most = int(sizes.argmin()), int(sizes.argmax())
        ends = f"{sizes[least]:,} ({names[least]}) to {sizes[most]:,} ({names[most]})"
        per_class = f"{sizes[most]:,}" if sizes[least] == sizes[most] else f"{ends}, median {np.median(sizes):,.0f}"
        lines.append(f"  images per class    {per_class}")
        empty = [names[label] for label in np.flatnonzero(sizes == 0)]
        if empty:
            more = "..." if len(empty) > SHOWN else ""
            lines.append(f"  empty classes       {len(empty)}: {', '.join(empty[:SHOWN])}{more}")
    ignored = facts["ignored_files"]
    if ignored:
        kinds = ", ".join(f"{count:,} {extension or 'without extension'}" for extension, count in ignored.items())
        lines.append(f"  skipped files       {kinds}")
    folders = facts["ignored_folders"]
    if folders:
        names_there = ", ".join(name if count == 1 else f"{name} ({count:,})" for name, count in folders.items())
        lines.append(f"  skipped folders     {names_there}")
    part = "all" if facts["examined"] == facts["images"] else f"{facts['examined']:,} sampled images, summarised below"
    lines.append(f"  decoded             {part}")
    for key, name in {
        "short_side": "shorter side",
        "width": "width",
        "height": "height",
        "file_bytes": "file size",
    }.items():
        if values := facts[key]:
            unit = "bytes" if key == "file_bytes" else "pixels"
            low, high, median = (f"{values[bound]:,}" for bound in ("least", "most", "median"))
            lines.append(f"  {name:<19} {low if low == high else f'{low} to {high}, median {median}'} {unit}")
    kinds = ", ".join(f"{name} {100 * count / facts['examined']:.4g} %" for name, count in facts["kinds"].items())
    lines.append(f"  formats             {kinds or 'none'}")
    for key, what in (("unreadable", "unreadable"), ("damaged", "damaged (readable)")):
        faults = facts[key]
        lines.append(f"  {what:<19} {len(faults):,}")
        lines += [f"    {name}: {reason}" for name, reason in faults[:SHOWN]]
        if len(faults) > SHOWN:
            lines.append(f"    and {len(faults) - SHOWN:,} more in bad-images.txt")
    return "\n".join(lines)


def _write(folder: Path, facts: dict[str, Any], split: str | None) -> None:
    from relaylab.report.balance import balance_plot

    files = {"summary.json": json.dumps(facts, indent=1, ensure_ascii=False) + "\n"}
    if facts["images"] > facts["unlabelled"]:
        names, counts = zip(*facts["classes"], strict=True)
        title = f"{facts['title']}{f', {split}' if split else ''}: images per class"
        files["balance.svg"] = balance_plot({"images": counts}, names, title=title, unit="images")
    bad = [(kind, *fault) for kind in ("unreadable", "damaged") for fault in facts[kind]]
    files["bad-images.txt"] = "".join(f"{kind}\t{name}\t{reason}\n" for kind, name, reason in bad)
    try:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
