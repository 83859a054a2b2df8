"""The `relaylab` command line: dispatch commands, parse options, and turn errors into exit codes.

A command is a function `main(options) -> exit code` in a file of `relaylab.commands`, and a line in `COMMANDS`. The
annotation of `options` is a dataclass, whose docstrings are the help. These files import torch only inside
functions, so that help and option errors appear immediately.
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
    "diagnose information": "diagnose:main",
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
DESCRIPTION = "Train and evaluate networks with relay backpropagation."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    With --debug anywhere among the arguments, exceptions propagate with their traceback.

    Args:
        arguments: the command line without the program's name; None for `sys.argv[1:]`.

    Returns:
        The exit code: 0 for success, 1 for a failed run, 2 for invalid input, 70 for an internal error, 130 for Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    is_debug = DEBUG in arguments
    arguments = [argument for argument in arguments if argument != DEBUG]
    if arguments == ["--version"]:
        print(f"relaylab {metadata.version('relaybackprop')}")
        return 0
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(overview())
            return 0
        if len(arguments) == 2 and arguments[1] in ("-h", "--help") and _group(arguments[0]):
            print(overview(arguments[0]))
            return 0
        run, options = parse(arguments)
        from relaylab.options import check_paths
        from relaylab.outside.showing import Escaping

        with redirect_stdout(Escaping(sys.stdout)), redirect_stderr(Escaping(sys.stderr)):
            check_paths(options)
            return run(options)
    except BrokenPipeError:  # the reader closed the pipe, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python prints an error at exit
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if is_debug:
            raise
        return _fail(*_describe(error))


def _describe(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code for an exception."""
    from relaylab.outside.translating import line_of

    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package and package not in METHOD_PACKAGES:
        assert isinstance(error, ModuleNotFoundError)
        extra = "lab,export" if package in EXPORT_PACKAGES else "lab"
        return f'{error.name} is not installed; run: pip install "relaybackprop[{extra}]"', WRONG_INPUT
    return line_of(error)


def parse(arguments: Sequence[str]) -> tuple[Callable[[Any], int], Any]:
    """Return the function and the parsed options of a non-empty command line.

    Raises:
        InputError: an unknown command, or an option without a value or given twice.
        SystemExit: invalid options, or --help.
    """
    import tyro

    from relaylab.options import given_options, join_help_lines

    count = next((n for n in (2, 1) if " ".join(arguments[:n]) in COMMANDS), 0)
    group = _group(arguments[0])
    is_member = count == 1 and len(arguments) > 1 and not arguments[1].startswith("-")
    if not count or (group and is_member):
        word = " ".join(arguments[:2] if group else arguments[:1])
        raise InputError(f"unknown command '{word}'{nearest(word, group or COMMANDS)}; see 'relaylab --help'")
    name, rest = " ".join(arguments[:count]), list(arguments[count:])
    for word, following in zip(rest, [*rest[1:], "--"], strict=False):
        if word == "--data" and (not following or following.startswith("--")):  # as after `--data $UNSET`
            raise InputError("--data has no value: pass a folder or tar files, or omit the option")
    repeated = [word for word in rest if word.startswith("--") and rest.count(word) > 1]
    if repeated:  # tyro would keep only the last one
        raise InputError(f"{repeated[0]} is given more than once: list all its values after a single {repeated[0]}")
    run, kind = load_command(name)
    join_help_lines(kind)
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    options = tyro.cli(kind, prog=f"relaylab {name}", args=rest, config=config)
    if hasattr(options, "given"):
        object.__setattr__(options, "given", frozenset(given_options(kind, rest)))
    return run, options


def _group(word: str) -> list[str]:
    """Return the two-word commands that begin with a word, such as `data inspect` for "data"."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def overview(group: str = "") -> str:
    """Return the help text that lists the commands, one per line.

    Args:
        group: the first word of two-word commands, to list only these; empty to list all commands.
    """
    names = [name for name in COMMANDS if name != "recipes list"]  # an alias of `recipes`
    names = [name for name in names if not group or name == group or name.startswith(f"{group} ")]
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {(load_command(name)[1].__doc__ or '').splitlines()[0]}" for name in names]
    footer = (
        "'relaylab COMMAND --help' lists the options of a command, 'relaylab --version' prints the version.\n"
        "With --debug, any command prints the traceback of an error."
    )
    usage = f"usage: relaylab {f'{group} ' if group else ''}COMMAND [OPTIONS]"
    if group in COMMANDS:
        usage = f"usage: relaylab {group} [COMMAND] [OPTIONS]"
    return "\n".join([usage, "", DESCRIPTION, "", "commands:", *lines, "", footer])


def load_command(name: str) -> tuple[Callable[[Any], int], type[Any]]:
    """Import a command and return its function and the type of its options."""
    module, _, function = COMMANDS[name].partition(":")
    run = getattr(importlib.import_module(f"relaylab.commands.{module}"), function)
    return run, get_type_hints(run)["options"]


def _fail(message: str, exit_code: int) -> int:
    from relaylab.outside.showing import Escaping

    first, *more = message.splitlines() or [""]  # indent further lines, so that a file name cannot fake a message
    lines = [f"relaylab: {first}", *(line if line.startswith("  ") else f"  {line}" for line in more)]
    print("\n".join(lines), file=Escaping(sys.stderr))
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
