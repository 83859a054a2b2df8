"""The command line of the experiments."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.packed import train_packed
from experiments.report import write_report
from experiments.studies import GROUPS, SHARED
from experiments.training import Place, train_missing
from relaylab.errors import InputError, LabError

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, or write down what has been found.

    Returns:
        The exit code: 0, 130 if somebody stopped it, or that of an error.
    """
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("--size", choices=SHARED, default="32px", help="of networks, images and schedules")
    parser.add_argument("--data", type=Path, nargs="+", default=(), help="training and validation images")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/evidence-SIZE)")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, help="groups of runs")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="train nothing; write tables and pictures there")
    parser.add_argument("--precision", choices=("32", "bf16"), default="bf16", help="of the arithmetic")
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="train N runs at once, on one GPU; those under way begin anew after a stop",
    )
    given = parser.parse_args(arguments)
    out = given.out or Path("runs") / f"evidence-{given.size}"
    place = Place(size=given.size, out=out, data=tuple(given.data), precision=given.precision)
    try:
        if given.report is not None:
            print(write_report(place, given.report))
            return 0
        if not given.data:
            raise InputError("--data is missing: training and validation images")
        if given.at_once is not None:
            if given.at_once < 1:
                raise InputError(f"--at-once {given.at_once}: expected at least 1")
            train_packed(given.only, place, given.at_once)
            return 0
        return 0 if train_missing(given.only, place) else INTERRUPTED
    except torch.OutOfMemoryError:
        print("experiments: the GPU's memory is full: take fewer runs with --at-once", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("experiments: stopped; say the same again to go on", file=sys.stderr)
        return INTERRUPTED
    except LabError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
