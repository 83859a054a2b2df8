"""The options of the commands about trained networks. No torch in here; see `relaylab.options`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from relaylab.options import File, Folder, Images, Number, Sources, Switch

Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
Scores = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SCORES [SCORES ...]", help_behavior_hint="")
]
Listed = Annotated[str, tyro.conf.arg(metavar="A,B,...")]
Optional = Annotated[str, tyro.conf.arg(metavar="A,B,...", help_behavior_hint="")]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Test trained networks: class scores of every image to disk, and from these error rates with intervals.

    It can be stopped at any time; the same command goes on. What is there is not computed again, so that other
    ensembles of the same networks cost nothing.
    """

    runs: Runs = ()
    """Folders of finished runs, or of comparisons, which hold runs; or model files."""

    protocol: Listed = "single-crop"
    """single-crop (the centre), ten-crop (corners, centre, and their mirror images) and dense (whole images at several
    scales, the network slid over them)."""

    scales: Optional = ""
    """Shorter sides of the images in dense testing, in pixels (default: the recipe's; else the paper's
    224,256,320,384,448 for networks trained on images of 256 pixels, others in proportion)."""

    flip: Switch = False
    """In dense testing, look at mirror images too."""

    ensemble: Optional = ""
    """Combine the probabilities of all the networks named: average, product, learnt-weights. The latter are learnt on
    one half of the images; all ensembles of the command are then tested on the other half."""

    data: Images = ()
    """Images, as for `relaylab train` (default: those of the first run)."""

    split: Literal["val", "test", "train", "all"] = "val"
    """Which part of them; all where they have no parts."""

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""

    workers: Number = None
    """Processes that decode images (default: one on each core)."""

    batch_size: int = 32
    """Crops at once; of whole images as many as have so many pixels."""

    out: Folder = None
    """Folder for scores and tables; it may hold those of other networks on the same images. (default: runs/eval/NAME)."""  # noqa: E501


@dataclass(frozen=True, slots=True, kw_only=True)
class TableConfig:
    """Make a table of the paper from evaluated runs: 1, 3, 4, 5, 6, or "sampling"; the paper's figures beside ours."""

    number: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE", help_behavior_hint="")]
    """1 (depth), 3 (single crop), 4 (dense), 5 (ensembles), 6 (ResNet-50 and Inception-v3) or sampling."""

    scores: Scores = ()
    """Folders that `relaylab eval` has written, all of the same images."""

    format: Literal["markdown", "latex", "html"] = "markdown"
    """Of the table."""

    out: File = None
    """Where to write. (default: to the terminal)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureConfig:
    """Make a figure of the paper: 1 and 2 from runs, 3 and 4 from evaluated runs."""

    number: Annotated[Literal["1", "2", "3", "4"], tyro.conf.Positional, tyro.conf.arg(metavar="FIGURE")]
    """1 (gradients by layer), 2 (network and windows), 3 and 4 (photos classified rightly and wrongly)."""

    sources: Sources = ()
    """Runs for figures 1 and 2; a folder that `relaylab eval` has written for figures 3 and 4."""

    network: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Whose predictions figures 3 and 4 show (default: the last one's)."""

    data: Images = ()
    """Images of figures 3 and 4 (default: those of the network's run)."""

    out: File = None
    """Where to write, .svg or .png. (default: figureN.svg)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitConfig:
    """Write a challenge's submission file: five labels for each test image, in the official order."""

    scores: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SCORES", help_behavior_hint="")]
    """Folder that `relaylab eval --split test` has written."""

    list: Annotated[Path, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
    """The challenge's list of test images, one on each line."""

    network: Optional = ""
    """Whose scores; of several, the ensemble (default: all of the folder)."""

    protocol: Literal["single-crop", "ten-crop", "dense"] = "dense"
    """Which of their scores."""

    combine: Literal["average", "product"] = "product"
    """How several networks' probabilities become one."""

    format: Literal["ilsvrc", "places2"] = "places2"
    """Of which challenge."""

    out: File = None
    """Where to write. (default: submission.txt)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """Write one self-contained HTML page about runs: what was run, tables, curves, windows, gradients, photos."""

    runs: Runs = ()
    """Folders of runs, or of comparisons, which hold runs."""

    scores: Folder = None
    """Folder that `relaylab eval` has written about them (default: none: no photos, intervals and confusions)."""

    out: File = None
    """Where to write. (default: report.html)."""


EvaluateConfig = EvalConfig | TableConfig | FigureConfig | SubmitConfig | ReportConfig
