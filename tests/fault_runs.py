"""Trainings in processes of their own, for test_faults.py, forked from one that has imported everything already."""

import multiprocessing
import os
import resource
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["relaylab.train.session", "relaylab.cli", "fault_runs"])


def start(log: Path, arguments: list[str], most_bytes: int | None = None) -> BaseProcess:
    """Run `relaylab` with these arguments.

    Args:
        log: where its stderr goes.
        arguments: of the command line.
        most_bytes: of a file; what goes beyond fails as on a full disk.
    """
    process = CONTEXT.Process(target=_work, args=(log, arguments, most_bytes))
    process.start()
    return process


def _work(log: Path, arguments: list[str], most_bytes: int | None) -> None:
    import torch

    from relaylab import cli

    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    sys.exit(cli.main(arguments))
