"""The command `relaylab`: finds the command's function, reads its options, and turns errors into exit codes.

A command is a function `main(options) -> exit code` in a file of `relaylab.commands`, and a line in `COMMANDS`. The
annotation of `options` names a dataclass, whose docstrings are the help. These files import torch inside functions
only, so that help and errors about options and paths are immediate.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from typing import Any, get_type_hints

from relaylab.errors import BROKEN_PIPE, INTERRUPTED, WRONG_INPUT, InputError, nearest

COMMANDS = {  # module of relaylab.commands : function
    "demo": "demo:main",
    "train": "train:main",
    "compare": "compare:main",
    "eval": "evaluate:main",
    "predict": "evaluate:predict",
    "submit": "evaluate:submit",
    "report": "report:main",
    "table": "report:table",
    "figure": "report:figure",
    "diagnose": "diagnose:main",
    "data inspect": "data:inspect",
    "data check": "data:check",
    "recipes": "recipes:list_recipes",
    "recipes list": "recipes:list_recipes",
    "recipes show": "recipes:show",
    "recipes new": "new:main",
    "recipes allow": "recipes:allow_network",
    "draw": "networks:draw",
    "cost": "networks:cost",
    "export": "networks:export",
    "import-caffe": "networks:import_caffe",
}
EXPORT_PACKAGES = frozenset({"onnx", "onnxscript"})
METHOD_PACKAGES = frozenset({"relaybackprop", "relaylab", "torch"})
DEBUG = "--debug"
USAGE = "usage: relaylab COMMAND [OPTIONS]\n\nRelay backpropagation on real images.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, that of the process by default.

    Returns:
        The exit code: 0, 1 for a failed run, 2 for invalid input, 70 for an error of this program, 130 for Ctrl-C.

    With --debug anywhere among the arguments, errors leave with their traceback.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    is_debugged = DEBUG in arguments
    arguments = [argument for argument in arguments if argument != DEBUG]
    if arguments == ["--version"]:
        print(f"relaylab {metadata.version('relaybackprop')}")
        return 0
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(overview())
            return 0
        if len(arguments) == 2 and arguments[1] in ("-h", "--help") and _listed(f"{arguments[0]} "):
            print(overview(f"{arguments[0]} "))
            return 0
        run, options = parse(arguments)
        from relaylab.options import check_paths
        from relaylab.outside.showing import Escaping

        with redirect_stdout(Escaping(sys.stdout)), redirect_stderr(Escaping(sys.stderr)):
            check_paths(options)
            return run(options)
    except BrokenPipeError:  # the reader closed the pipe, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if is_debugged:
            raise
        return _fail(*_line_of(error))


def _line_of(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code of an error."""
    from relaylab.outside.translating import line_of

    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package and package not in METHOD_PACKAGES:
        assert isinstance(error, ModuleNotFoundError)
        extra = "lab,export" if package in EXPORT_PACKAGES else "lab"
        return f'{error.name} is not installed; run: pip install "relaybackprop[{extra}]"', WRONG_INPUT
    return line_of(error)


def parse(arguments: Sequence[str]) -> tuple[Callable[[Any], int], Any]:
    """Return the function of a command line, which is not empty, and its options.

    Raises:
        InputError: an unknown command.
        SystemExit: options that are not the command's, or --help.
    """
    import tyro

    from relaylab.options import given_options

    count = next((n for n in (2, 1) if " ".join(arguments[:n]) in COMMANDS), 0)
    group = _listed(f"{arguments[0]} ")
    is_member = count == 1 and len(arguments) > 1 and not arguments[1].startswith("-")
    if not count or (group and is_member):
        word = " ".join(arguments[:2] if group else arguments[:1])
        raise InputError(f"unknown command '{word}'{nearest(word, group or COMMANDS)}; see 'relaylab --help'")
    name, rest = " ".join(arguments[:count]), list(arguments[count:])
    for word, following in zip(rest, [*rest[1:], "--"], strict=False):
        if word == "--data" and (not following or following.startswith("--")):  # as after `--data $UNSET`
            raise InputError("--data has no value: give a folder or tar files, or leave it out")
    repeated = [word for word in rest if word.startswith("--") and rest.count(word) > 1]
    if repeated:  # tyro would take the last one alone
        raise InputError(f"{repeated[0]} is given more than once: put all its values after one {repeated[0]}")
    run, kind = _function(name)
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    options = tyro.cli(kind, prog=f"relaylab {name}", args=rest, config=config)
    if hasattr(options, "given"):
        object.__setattr__(options, "given", frozenset(given_options(kind, rest)))
    return run, options


def _listed(start: str = "") -> list[str]:
    """Return the commands that begin with a text, except `recipes list`, which is the same as `recipes`."""
    return [name for name in COMMANDS if name.startswith(start) and name != "recipes list"]


def overview(start: str = "") -> str:
    """Return the list of the commands that begin with a text, a line for each."""
    width, names = max(map(len, COMMANDS)), _listed(start)
    lines = [f"  {name:<{width}}  {(_function(name)[1].__doc__ or '').splitlines()[0]}" for name in names]
    footer = (
        "'relaylab COMMAND --help' lists the options of a command, 'relaylab --version' prints the version.\n"
        "--debug, with any command, shows where an error is from."
    )
    return "\n".join([USAGE, "commands:", *lines, "", footer])


def _function(name: str) -> tuple[Callable[[Any], int], type[Any]]:
    """Import a command's function; its options are the type of its parameter."""
    module, _, function = COMMANDS[name].partition(":")
    run = getattr(importlib.import_module(f"relaylab.commands.{module}"), function)
    return run, get_type_hints(run)["options"]


def _fail(message: str, exit_code: int) -> int:
    from relaylab.outside.showing import Escaping

    first, *more = message.splitlines() or [""]  # further lines are indented: names cannot forge a line
    lines = [f"relaylab: {first}", *(line if line.startswith("  ") else f"  {line}" for line in more)]
    print("\n".join(lines), file=Escaping(sys.stderr))
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
