"""`relaylab diagnose information`: from runs to the page."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from relaylab.files import ROOT, new_folder, timestamp
from relaylab.options import Folder, Images, MustExist, Runs


@dataclass(frozen=True, slots=True, kw_only=True)
class InformationOptions:
    """Measure how much each layer reveals about an image's class.

    Loads the newest checkpoint of each run, with its auxiliary heads, and fits a linear probe per layer on one half of
    the images. Its predictions on the other half give a lower bound on the information, in bits.
    """

    what: Annotated[Literal["information"], tyro.conf.Positional]
    """Diagnosis to make."""

    runs: Runs = ()
    """Folders of runs, or of comparisons, which hold runs."""

    images: int = 2000
    """Number of validation images, the same number from each class."""

    data: Annotated[Images, MustExist] = ()
    """Images (default: those of the first run)."""

    seed: int = 0
    """Seed of the projection and of the halves."""

    out: Folder = None
    """Folder for the page, its picture and the figures; it must be new or empty. (default: runs/information/TIME)."""


def main(options: InformationOptions) -> int:
    """Measure, write the page and print where it is."""
    with new_folder(options.out, ROOT / "information" / timestamp()) as folder:
        from relaylab.diagnose import page
        from relaylab.diagnose.runs import read_runs

        readings, about = read_runs(options.runs, options.data, options.images, options.seed)
        print(page.write(folder, readings, about).resolve())
    return 0
