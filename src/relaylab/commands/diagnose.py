"""`relaylab diagnose information`: linear probes of activations and gradients."""

from dataclasses import dataclass
from typing import Annotated

from relaylab.files import ROOT, new_folder, timestamp
from relaylab.options import Folder, Images, MustExist, Runs


@dataclass(frozen=True, slots=True, kw_only=True)
class InformationOptions:
    """Measure the class information in each layer's activations and gradients.

    Loads the newest checkpoint of each run, with its auxiliary heads, and fits a linear probe per layer on half of the
    images. Its predictions on the other half give a lower bound on the information, in bits.
    """

    runs: Runs = ()
    """Folders of runs or comparisons."""

    images: int = 2000
    """Number of validation images, the same number of each class."""

    data: Annotated[Images, MustExist] = ()
    """Images (default: the validation images of the first run)."""

    seed: int = 0
    """Random seed for the projections and for the split of the images."""

    out: Folder = None
    """Folder for the page, its figure and its data; must be new or empty (default: runs/information/TIME)."""


def main(options: InformationOptions) -> int:
    """Fit the probes, write the page and print its path."""
    with new_folder(options.out, ROOT / "information" / timestamp()) as folder:
        from relaylab.diagnose import page
        from relaylab.diagnose.runs import read_runs

        readings, about = read_runs(options.runs, options.data, options.images, options.seed)
        print(page.write(folder, readings, about).resolve())
    return 0
