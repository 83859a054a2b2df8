"""The command `relaylab`. Torch is imported by the command that runs, not by `relaylab --help`."""

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from relaylab.errors import InputError, LabError

if TYPE_CHECKING:
    from relaylab.diagnose.options import InformationConfig
    from relaylab.evaluate.options import EvaluateConfig
    from relaylab.model_config import ModelConfig
    from relaylab.options import CheckConfig, DemoConfig, InspectConfig
    from relaylab.train.options import CompareConfig, TrainConfig

    Training = TrainConfig | CompareConfig | EvaluateConfig | InformationConfig
    Config = DemoConfig | InspectConfig | CheckConfig | ModelConfig | Training

LAB_PACKAGES = frozenset(
    {
        *("google", "jinja2", "matplotlib", "numpy", "PIL", "platformdirs", "psutil", "rich"),
        *("lightning_fabric", "safetensors", "scipy", "simplejpeg", "sklearn", "tensorboard"),
        *("torchmetrics", "torchvision", "tyro"),
    }
)
EXPORT_PACKAGES = frozenset({"onnx", "onnxscript"})
INTERRUPTED, BROKEN_PIPE = 130, 141
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
        return _run(_parse(arguments or ["--help"]), arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in LAB_PACKAGES | EXPORT_PACKAGES:
            raise
        extra = "lab" if package in LAB_PACKAGES else "lab,export"
        what = "The lab" if package in LAB_PACKAGES else "ONNX"
        return _fail(
            f'{error.name} is not installed. {what} needs: pip install "relaybackprop[{extra}]"', InputError.exit_code
        )
    except LabError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # whoever read what we print has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _run(config: "Config", arguments: list[str]) -> int:
    from relaylab.diagnose.options import InformationConfig
    from relaylab.evaluate.options import EvaluateConfig
    from relaylab.options import CheckConfig, DemoConfig, InspectConfig, check_data_config
    from relaylab.train.options import CompareConfig, TrainConfig

    if isinstance(config, DemoConfig):
        print(f"Report: {run_demo(config, shlex.join(['relaylab', *arguments])).resolve()}")
        return 0
    if isinstance(config, TrainConfig):
        return _train(config, arguments)
    if isinstance(config, InformationConfig):
        _check_paths((*config.runs, *config.data))
        folder = make_folder(config.out, Path("runs") / "information" / _now())
        from relaylab.diagnose import command as diagnosing

        with _removed_if_empty(folder):
            return diagnosing.run(config, folder)
    if isinstance(config, CompareConfig):
        from relaylab.train.compare import compare

        return compare(config)
    if not isinstance(config, InspectConfig | CheckConfig):
        try:
            return _evaluate(config) if isinstance(config, EvaluateConfig) else _run_model_command(config)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(f"cannot read or write {error.filename2 or error.filename}: {error.strerror}") from None
    check_data_config(config)
    _check_paths(config.paths)
    folder = make_folder(config.out, Path("runs") / "data" / _now())
    from relaylab import data_commands

    with _removed_if_empty(folder):
        return data_commands.run(config, folder)


def _train(config: "TrainConfig", arguments: list[str]) -> int:
    from relaylab.train import options, runs
    from relaylab.train import torchrun as launched

    if launched.restart_count() and launched.noted_failure() is not None:
        return 0  # what has failed would fail again; the command that has started us knows
    try:
        request = runs.understand(config, options.given_options(arguments))
        if request.config.devices > 1 and not launched.is_launched():
            from relaylab.train import engine

            return engine.launch(request.config, arguments)
        from relaylab.train import session

        outcome = session.train(request)
    except LabError as error:
        if launched.note_failure(error):
            raise
        return error.exit_code
    return 0 if outcome.finished or launched.is_launched() else INTERRUPTED


def _evaluate(config: "EvaluateConfig") -> int:
    from relaylab.evaluate import options as given

    match config:
        case given.EvalConfig():
            _check_paths((*config.runs, *config.data))
            from relaylab.evaluate import command

            return command.run(config)
        case given.TableConfig():
            _check_paths(config.scores)
            from relaylab.report import command as reporting

            return reporting.table(config)
        case given.FigureConfig():
            _check_paths((*config.sources, *config.data))
            from relaylab.report import command as reporting

            return reporting.figure(config)
        case given.SubmitConfig():
            _check_paths((config.scores, config.list))
            from relaylab.report import command as reporting

            return reporting.submit(config)
        case given.ReportConfig():
            _check_paths(config.runs)
            from relaylab.report import page

            return page.run(config)


def _run_model_command(config: "ModelConfig") -> int:
    from relaylab import model_commands
    from relaylab import model_config as given

    match config:
        case given.ListConfig():
            return model_commands.list_recipes()
        case given.ShowConfig():
            return model_commands.show(config)
        case given.CostConfig():
            return model_commands.costs(config)
        case given.DrawConfig():
            folder = config.out or Path("runs") / "draw"
            make_folder(folder, folder, may_hold=True)
            return model_commands.draw(config, folder)
        case given.ImportCaffeConfig():
            _check_paths([path for path in (config.prototxt, config.caffemodel, config.classes) if path is not None])
            return model_commands.import_caffe(config)
        case given.ExportConfig():
            _check_paths([config.model])
            folder = make_folder(config.out, Path("runs") / "export" / _now())
            with _removed_if_empty(folder):
                return model_commands.export(config, folder)
        case given.PredictConfig():
            _check_paths([config.model])
            return model_commands.predict(config)


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
    _check_paths(config.data)
    folder = make_folder(config.out, Path("runs") / "demo" / f"{_now()}-s{config.seed}")
    with _removed_if_empty(folder):
        import torch

        from relaylab import demo, demo_data, demo_report
        from relaylab.progress import progress

        if not config.data:
            torch.set_num_threads(1)  # threads cost more than they give, and much more where others work too
        data = demo_data.load(config)
        with progress("training", demo.images_to_train_on(data, config)) as task:
            runs = demo.compare(data, config, task)
        figures = demo_report.collect(data, config, runs, command)
        return demo_report.write(folder, figures, demo_data.sample(data, config), data.training_images)


def make_folder(given: Path | None, default: Path, *, may_hold: bool = False) -> Path:
    """A new or empty folder that can be written to.

    Args:
        given: by the user.
        default: without one.
        may_hold: whether it may hold something.

    Raises:
        InputError: it holds something, or cannot be written to.
    """
    folder = given or default
    try:
        if not may_hold and folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty; give a new folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # now, and not after minutes of work
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    return folder


@contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def _check_paths(paths: Sequence[Path]) -> None:
    """Before torch is imported, which takes seconds."""
    for path in paths:
        try:
            path.stat()
        except FileNotFoundError:
            raise InputError(f"no such file or folder: {path}") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None


def _now() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"


def _parse(arguments: list[str]) -> "Config":
    import tyro

    from relaylab import model_config as given
    from relaylab.diagnose.options import InformationConfig
    from relaylab.evaluate import options as evaluating
    from relaylab.options import CheckConfig, DemoConfig, InspectConfig
    from relaylab.train.options import CompareConfig, TrainConfig

    kinds = (
        Annotated[InspectConfig, tyro.conf.subcommand("inspect")]
        | Annotated[CheckConfig, tyro.conf.subcommand("check")]
    )

    def data(what: tyro.conf.OmitSubcommandPrefixes[kinds]) -> InspectConfig | CheckConfig:  # pyright: ignore
        """Look at images on disk: what there is, and whether all of it can be read."""
        return what

    listed = (
        Annotated[given.ListConfig, tyro.conf.subcommand("list")]
        | Annotated[given.ShowConfig, tyro.conf.subcommand("show")]
    )

    def recipes(what: tyro.conf.OmitSubcommandPrefixes[listed] = given.ListConfig()) -> object:  # pyright: ignore # noqa: B008
        """The rows of the paper's tables as typed recipes: list them, or show one."""
        return what

    return tyro.extras.subcommand_cli_from_dict(  # pyright: ignore[reportReturnType]
        {
            "demo": DemoConfig,
            "train": TrainConfig,
            "compare": CompareConfig,
            "eval": evaluating.EvalConfig,
            "table": evaluating.TableConfig,
            "figure": evaluating.FigureConfig,
            "submit": evaluating.SubmitConfig,
            "report": evaluating.ReportConfig,
            "diagnose": InformationConfig,
            "data": data,
            "recipes": recipes,
            "draw": given.DrawConfig,
            "cost": given.CostConfig,
            "import-caffe": given.ImportCaffeConfig,
            "export": given.ExportConfig,
            "predict": given.PredictConfig,
        },
        prog="relaylab",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
    )


def _has_no_value(arguments: list[str], option: str) -> bool:
    """As after `--data $UNSET`, which would mean the digits."""
    following = arguments[arguments.index(option) + 1 :]
    return not following or following[0].startswith("--") or not following[0]


def _fail(message: str, exit_code: int) -> int:
    print(f"relaylab: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
