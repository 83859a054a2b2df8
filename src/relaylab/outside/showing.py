"""Text from outside (names of files, classes and layers), escaped for the medium that shows it: a function for each."""

import io
import os
import re
import unicodedata
from html import escape
from typing import Any, TextIO

LATEX = str.maketrans(
    {
        **{c: f"\\{c}" for c in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
    }
)
# Where Markdown would see code, emphasis, cells or links. Underscores inside of words are text.
_MARKS = re.compile(r"[|`*]|\\(?=[!-/:-@\[-`{-~]|$)|(?<!\w)_|_(?!\w)|(?<=\])[(\[:]")
_HTML = re.compile(r"[<>]|&(?=#?\w+;)")


def printable(name: str | bytes) -> str:
    """Return a name on one line, with unprintable characters escaped: controls, bidirectional marks, odd bytes."""
    text = os.fsdecode(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def brief(name: str | bytes, most: int = 300) -> str:
    """Return a name for a message: on one line that is not too long."""
    text = printable(name[: most + 1])
    return text if len(text) <= most else f"{text[:most]}..."


def reason(error: object) -> str:
    """Return an exception's text on one line that is not too long: libraries repeat what they could not read."""
    return brief(" ".join(str(error).split()))


def terminal(text: str, encoding: str = "utf-8") -> str:
    """Return text of several lines with what a terminal would obey, or its encoding lacks, escaped."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in "\n\t" or _is_space(c) else _escaped(c) for c in text)
    return text if text.isascii() else text.encode(encoding, errors="backslashreplace").decode(encoding)


def markdown(text: str) -> str:
    """Return text on one line for Markdown, in a cell or a paragraph."""
    marked = _MARKS.sub(r"\\\g<0>", printable(_spaced(text)))
    return _HTML.sub(lambda match: escape(match[0]), marked)


def latex(text: str) -> str:
    """Return text on one line for LaTeX."""
    return printable(_spaced(text)).translate(LATEX)


def html(text: str) -> str:
    """Return text for HTML, in an element or in quotes."""
    return escape(terminal(text))


def picture(text: str) -> str:
    """Return text on one line for Matplotlib, which would take what is between dollar signs for mathematics."""
    return printable(_spaced(text)).replace("$", r"\$")


class Escaping(io.TextIOBase):
    """A stream to a terminal or a log that escapes what is written to it; see `terminal`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str, /) -> int:
        """Write text, escaped; return its length."""
        self.stream.write(terminal(text, self.stream.encoding or "utf-8"))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        return self.stream.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def direct(stream: TextIO) -> TextIO:
    """Return the stream itself, for what writes control characters of its own, such as a progress bar."""
    return stream.stream if isinstance(stream, Escaping) else stream


def _escaped(character: str) -> str:
    code = ord(character) - 0xDC00  # bytes that are not UTF-8 are decoded to U+DC80 and further
    return f"\\x{code:02x}" if 0x80 <= code <= 0xFF else ascii(character)[1:-1]


def _is_space(character: str) -> bool:
    return unicodedata.category(character) == "Zs"


def _spaced(text: str) -> str:
    """Return text with plain spaces: others are not printable."""
    return text if text.isprintable() else "".join(" " if _is_space(c) else c for c in text)
