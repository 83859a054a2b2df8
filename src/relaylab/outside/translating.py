"""Error messages: convert any exception to one line for the user and an exit code."""

import errno
import lzma
import os
import sys
import tarfile
import traceback
import zipfile
import zlib
from pathlib import Path

from relaylab.errors import FAILED, INTERNAL, WRONG_INPUT, LabError
from relaylab.outside.showing import reason

NO_MEMORY = ("alloc", "out of memory")  # text of torch's RuntimeErrors


def line_of(error: Exception) -> tuple[str, int]:
    """Return the message and the exit code for an exception raised by a command."""
    match error:
        case LabError():
            return str(error), error.exit_code
        case OSError():
            return _system(error), FAILED if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else WRONG_INPUT
        case RecursionError():
            return "the input is nested too deeply to be read", WRONG_INPUT
        case UnicodeError():
            return f"text that is not UTF-8: {reason(error)}", WRONG_INPUT
        case zlib.error() | lzma.LZMAError() | tarfile.TarError() | zipfile.BadZipFile() | EOFError():
            return f"an archive is damaged or cut short: {reason(error)}", WRONG_INPUT
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_memory(error)):
        return f"not enough memory{f': {reason(error)}' if str(error) else ''}", FAILED
    if _is_of("relaybackprop.errors", "RelayError", error):
        return str(error), WRONG_INPUT
    if _is_of("safetensors", "SafetensorError", error):
        return f"cannot read or write a safetensors file: {reason(error)}", FAILED
    place = _place(error)
    message = f"internal error: {type(error).__name__}: {reason(error)} ({place}); --debug shows the traceback"
    return message, INTERNAL


def _system(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename2, error.filename) if isinstance(name, str | bytes)]
    where = names[0] if names else "a file"
    return f"cannot read or write {where}: {error.strerror or reason(error)}"


def _is_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(word in text for word in NO_MEMORY)


def _is_of(module: str, name: str, error: Exception) -> bool:
    """Return whether an error is an instance of a library's class, without importing the library."""
    kind = getattr(sys.modules.get(module), name, ())
    return isinstance(error, kind)


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "relaylab" in frame.filename or "relaybackprop" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else "no traceback"
