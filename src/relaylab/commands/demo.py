"""`relaylab demo`: standard BP, multi-loss and relay on handwritten digits or on the user's images."""

import shlex
import sys

from relaylab.errors import InputError
from relaylab.files import ROOT, new_folder, timestamp
from relaylab.options import DemoConfig, path_problems


def main(options: DemoConfig) -> int:
    """Train standard BP, multi-loss and relay on one network, and write the report."""
    options = options.resolved()
    for problem in path_problems(options.data):
        raise InputError(problem)
    with new_folder(options.out, ROOT / "demo" / f"{timestamp()}-s{options.seed}") as folder:
        import torch

        from relaylab import demo, demo_data, demo_report
        from relaylab.progress import progress

        if not options.data:
            torch.set_num_threads(1)  # at this size, threads slow training down, especially on a shared machine
        data = demo_data.load(options)
        with progress("training", demo.images_to_train_on(data, options)) as task:
            runs = demo.compare(data, options, task)
        figures = demo_report.collect(data, options, runs, shlex.join(["relaylab", *sys.argv[1:]]))
        path = demo_report.write(folder, figures, demo_data.sample(data, options), data.training_images)
    print(f"Report: {path.resolve()}")
    return 0
