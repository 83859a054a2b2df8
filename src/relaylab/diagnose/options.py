"""The options of `relaylab diagnose`. No torch in here; see `relaylab.options`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from relaylab.evaluate.options import Runs
from relaylab.options import Folder, Images


@dataclass(frozen=True, slots=True, kw_only=True)
class InformationConfig:
    """Measure how much of an image's class can be read from each layer's activations, and from its gradients.

    Takes the newest checkpoint of each run, which holds the auxiliary heads too, and fits a linear probe for each layer
    on one half of the images; what it says of the other half bounds the information from below, in bits.
    """

    what: Annotated[Literal["information"], tyro.conf.Positional]
    """What to look for."""

    runs: Runs = ()
    """Folders of runs, or of comparisons, which hold runs."""

    images: int = 2000
    """How many validation images, spread evenly over them."""

    data: Images = ()
    """Images (default: those of the first run)."""

    seed: int = 0
    """Of the projection and of the halves."""

    out: Folder = None
    """Folder for the page, its picture and the figures; it must be new or empty. (default: runs/information/TIME)."""
