"""Commands that write pages, tables and figures: `report`, `table` and `figure`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.options import PICTURES, File, Folder, Images, MustExist, Runs, Scores, Sources, Switch, Word, writable

PAGE = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Write a self-contained HTML report of runs.

    It has the verdict, tables, learning curves, windows and gradients; with --scores, also example images and confusion
    matrices.
    """

    runs: Runs = ()
    """Folders of runs or comparisons."""

    scores: Annotated[Folder, MustExist] = None
    """Output folder of `relaylab eval` for these runs (default: none, no example images and confusion matrices)."""

    images: Switch = False
    """Include training images of each class (default: only for the digits of the demo)."""

    out: File = None
    """Output file (default: report.html in the given folder; for several folders, in the current one)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """Reproduce a table of the paper from evaluated runs.

    The paper's results are listed below the new ones.
    """

    number: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE", help_behavior_hint="")]
    """Table: 1 (depth), 3 (single crop), 4 (dense), 5 (ensembles), 6 (ResNet-50 and Inception-v3) or sampling."""

    scores: Scores = ()
    """Output folders of `relaylab eval`, all for the same images."""

    format: Literal["markdown", "latex", "html"] = "markdown"
    """Output format."""

    out: File = None
    """Output file (default: print to stdout)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureOptions:
    """Reproduce a figure of the paper from runs or evaluated runs."""

    number: Annotated[Literal["1", "2", "3", "4"], tyro.conf.Positional, tyro.conf.arg(metavar="FIGURE")]
    """Figure: 1 (gradients per layer), 2 (network and windows), 3 and 4 (images classified correctly, incorrectly)."""

    sources: Sources = ()
    """Runs for figures 1 and 2; an output folder of `relaylab eval` for figures 3 and 4."""

    network: Word = None
    """For figures 3 and 4: network whose predictions are shown (default: the last one)."""

    data: Annotated[Images, MustExist] = ()
    """For figures 3 and 4: images (default: the images of the network's run)."""

    out: File = None
    """Output file, .svg or .png (default: figureN.svg)."""


def main(options: ReportOptions) -> int:
    """Write the report."""
    folder = options.runs[0] if len(options.runs) == 1 else Path()
    out = writable(options.out or folder / PAGE)
    from relaylab.evaluate.scores import ScoreFolder
    from relaylab.report.comparison import open_runs
    from relaylab.report.page import render_page

    comparison = open_runs(options.runs)
    scores = None if options.scores is None else ScoreFolder(options.scores)
    write_text(out, render_page(comparison, scores, images=options.images))
    print(out.resolve())
    return 0


def table(options: TableOptions) -> int:
    """Print or write a table of the paper."""
    from relaylab.evaluate.scores import ScoreFolder
    from relaylab.report.paper_tables import paper_table
    from relaylab.tables import render

    text = render(paper_table(options.number, [ScoreFolder(path) for path in options.scores]), options.format)
    if options.out is None:
        print(text)
    else:
        write_text(options.out, text)
        print(options.out.resolve())
    return 0


def figure(options: FigureOptions) -> int:
    """Draw a figure of the paper."""
    from relaylab.evaluate.images import images_of
    from relaylab.evaluate.scores import ScoreFolder
    from relaylab.report.paper_figures import gradient_figure, photo_figure, pick_photos, window_figure
    from relaylab.report.style import write_figure
    from relaylab.train.records import metrics_of
    from relaylab.train.requests import recipe_of, title_of

    path = writable(options.out or Path(f"figure{options.number}.svg"), suffixes=PICTURES)
    sources = list(options.sources)
    if not sources:
        raise InputError(
            "missing input: figures 1 and 2 take runs, figures 3 and 4 an output folder of `relaylab eval`"
        )
    match options.number:
        case "1":
            made = gradient_figure({title_of(folder): metrics_of(folder) for folder in sources})
        case "2":
            if len(sources) > 1:
                raise InputError(f"figure 2 takes one run, got {len(sources)}")
            made = window_figure(recipe_of(sources[0]), title_of(sources[0]))
        case _:
            folder = ScoreFolder(sources[0])
            names = folder.names()
            name = options.network or names[-1]
            if name not in names:
                raise InputError(f"{folder.path} has no scores of {name}: expected one of {', '.join(names)}")
            is_correct = options.number == "3"
            how = "correctly" if is_correct else "incorrectly"
            scores = folder.protocol(name, folder.protocols(name)[0])
            photos = pick_photos(images_of(folder, name, options.data), folder.images.classes, scores, right=is_correct)
            if not photos:
                raise InputError(f"{name} does not classify any image {how}")
            made = photo_figure(photos, f"Classified {how} by {name}")
    write_figure(made, path)
    print(path.resolve())
    return 0
