"""The command `relaylab`. Torch is imported by the command that runs, not by `relaylab --help`."""

import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from relaylab.errors import InputError, LabError

if TYPE_CHECKING:
    from relaylab.config import DemoConfig

LAB_PACKAGES = frozenset({"jinja2", "matplotlib", "numpy", "PIL", "rich", "sklearn", "torchvision", "tyro"})
INTERRUPTED = 130
DESCRIPTION = "Relay backpropagation on real images. 'relaylab --version' says which release this is."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those of the process if None.

    Returns:
        The exit code: 0, 1 for a failed run, 2 for wrong input, 130 for Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"relaylab {metadata.version('relaybackprop')}")
        return 0
    try:
        if "--data" in arguments and _has_no_value(arguments, "--data"):
            raise InputError("--data needs a folder or tar files; leave it out for the handwritten digits")
        config = _parse(arguments or ["--help"])
        report = run_demo(config, shlex.join(["relaylab", *arguments]))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LAB_PACKAGES:
            raise
        return _fail(
            f'{error.name} is not installed. The lab needs: pip install "relaybackprop[lab]"', InputError.exit_code
        )
    except LabError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; no report was written", INTERRUPTED)
    print(f"Report: {report.resolve()}")
    return 0


def run_demo(config: "DemoConfig", command: str) -> Path:
    """Train standard BP, multi-loss and relay on one network, and write the report.

    Args:
        config: options.
        command: as it was typed, for the report.

    Returns:
        The path of the HTML page.

    Raises:
        InputError: wrong options or data, or a folder for the report that is not empty.
        NonFiniteLossError: a training that went out of hand.
    """
    config = config.resolved()
    for path in config.data:  # before torch is imported, which takes seconds
        try:
            path.stat()
        except FileNotFoundError:
            raise InputError(f"no such file or folder: {path}") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
    folder = _make_folder(config)
    try:
        import torch

        from relaylab import demo, demo_data, demo_report
        from relaylab.progress import progress

        if not config.data:
            torch.set_num_threads(
                1
            )  # for images this small, threads cost more than they give, and much more where busy

        data = demo_data.load(config)
        with progress("training", demo.images_to_train_on(data, config)) as task:
            runs = demo.compare(data, config, task)
        return demo_report.write(
            folder, demo_report.collect(data, config, runs, command), demo_data.sample(data, config)
        )
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def _parse(arguments: list[str]) -> "DemoConfig":
    import tyro

    from relaylab.config import DemoConfig

    return tyro.extras.subcommand_cli_from_dict(
        {"demo": DemoConfig},
        prog="relaylab",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _make_folder(config: "DemoConfig") -> Path:
    folder = config.out or Path("runs") / "demo" / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-s{config.seed}"
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; give a new folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # now, and not after minutes of training
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    return folder


def _has_no_value(arguments: list[str], option: str) -> bool:
    """As after `--data $UNSET`, which would mean the digits."""
    following = arguments[arguments.index(option) + 1 :]
    return not following or following[0].startswith("--") or not following[0]


def _fail(message: str, exit_code: int) -> int:
    print(f"relaylab: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
