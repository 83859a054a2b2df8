"""The commands that make pages, tables and figures: `report`, `table` and `figure`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relaylab.errors import InputError
from relaylab.files import write_text
from relaylab.options import PICTURES, File, Folder, Images, MustExist, Runs, Scores, Sources, Switch, Word, writable


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """Write a self-contained HTML page about runs.

    It has the verdict, tables, curves, windows, gradients, and with --scores photos and confusions.
    """

    runs: Runs = ()
    """Folders of runs, or of comparisons, which hold runs."""

    scores: Annotated[Folder, MustExist] = None
    """Folder that `relaylab eval` has written about them (default: none: no photos and confusions)."""

    images: Switch = False
    """Show training images of each class (default: only the lab's own digits)."""

    out: File = None
    """File to write. (default: report.html)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOptions:
    """Make a table of the paper from evaluated runs.

    The paper's numbers are printed below ours.
    """

    number: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE", help_behavior_hint="")]
    """1 (depth), 3 (single crop), 4 (dense), 5 (ensembles), 6 (ResNet-50 and Inception-v3) or sampling."""

    scores: Scores = ()
    """Folders that `relaylab eval` has written, all of the same images."""

    format: Literal["markdown", "latex", "html"] = "markdown"
    """Output format."""

    out: File = None
    """File to write. (default: print to the terminal)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureOptions:
    """Make a figure of the paper from runs or evaluated runs."""

    number: Annotated[Literal["1", "2", "3", "4"], tyro.conf.Positional, tyro.conf.arg(metavar="FIGURE")]
    """1 (gradients by layer), 2 (network and windows), 3 and 4 (photos classified correctly and incorrectly)."""

    sources: Sources = ()
    """Runs for figures 1 and 2; a folder that `relaylab eval` has written for figures 3 and 4."""

    network: Word = None
    """Network whose predictions figures 3 and 4 show (default: the last one)."""

    data: Annotated[Images, MustExist] = ()
    """Images of figures 3 and 4 (default: those of the network's run)."""

    out: File = None
    """File to write, .svg or .png. (default: figureN.svg)."""


def main(options: ReportOptions) -> int:
    """Write the page."""
    out = writable(options.out or Path("report.html"))
    from relaylab.evaluate.scores import ScoreFolder
    from relaylab.report.comparison import open_runs
    from relaylab.report.page import render_page

    comparison = open_runs(options.runs)
    scores = None if options.scores is None else ScoreFolder(options.scores)
    write_text(out, render_page(comparison, scores, images=options.images))
    print(out.resolve())
    return 0


def table(options: TableOptions) -> int:
    """Print or write one of the paper's tables."""
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
    """Draw one of the paper's figures."""
    from relaylab.evaluate.images import images_of
    from relaylab.evaluate.scores import ScoreFolder
    from relaylab.report.paper_figures import gradient_figure, photo_figure, pick_photos, window_figure
    from relaylab.report.style import write_figure
    from relaylab.train.records import metrics_of
    from relaylab.train.requests import recipe_of, title_of

    path = writable(options.out or Path(f"figure{options.number}.svg"), suffixes=PICTURES)
    sources = list(options.sources)
    if not sources:
        raise InputError("missing input: figures 1 and 2 take runs, figures 3 and 4 a folder of scores")
    match options.number:
        case "1":
            made = gradient_figure({title_of(folder): metrics_of(folder) for folder in sources})
        case "2":
            if len(sources) > 1:
                raise InputError("figure 2 shows one run; give one")
            made = window_figure(recipe_of(sources[0]), title_of(sources[0]))
        case _:
            folder = ScoreFolder(sources[0])
            names = folder.names()
            name = options.network or names[-1]
            if name not in names:
                raise InputError(f"{folder.path}: no scores of {name}: expected one of {', '.join(names)}")
            right = options.number == "3"
            scores = folder.protocol(name, folder.protocols(name)[0])
            photos = pick_photos(images_of(folder, name, options.data), folder.images.classes, scores, right=right)
            if not photos:
                raise InputError(f"{name} classifies no image {'rightly' if right else 'wrongly'}")
            made = photo_figure(photos, f"{'Rightly' if right else 'Wrongly'} classified by {name}")
    write_figure(made, path)
    print(path.resolve())
    return 0
