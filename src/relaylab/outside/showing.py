"""Escaping of untrusted text (names of files, classes and layers): one function per output format."""

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
# Marks that Markdown would read as code, emphasis, cells or links. Underscores inside words are plain text.
_MARKS = re.compile(r"[|`*]|\\(?=[!-/:-@\[-`{-~]|$)|(?<!\w)_|_(?!\w)|(?<=\])[(\[:]")
_HTML = re.compile(r"[<>]|&(?=#?\w+;)")


def printable(name: str | bytes) -> str:
    """Return a name on one line, with control characters, bidirectional marks and undecodable bytes escaped."""
    text = os.fsdecode(name)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def brief(name: str | bytes, most: int = 300) -> str:
    """Return a name for a message: one line, truncated to `most` characters."""
    text = printable(name[: most + 1])
    return text if len(text) <= most else f"{text[:most]}..."


def reason(error: object) -> str:
    """Return an exception's message on one truncated line, since libraries may quote all that they could not read."""
    return brief(" ".join(str(error).split()))


def terminal(text: str, encoding: str = "utf-8") -> str:
    """Return text with control sequences, and characters that the encoding lacks, escaped. Line breaks are kept."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in "\n\t" or _is_space(c) else _escaped(c) for c in text)
    return text if text.isascii() else text.encode(encoding, errors="backslashreplace").decode(encoding)


def markdown(text: str) -> str:
    """Return text on one line, escaped for a Markdown cell or paragraph."""
    marked = _MARKS.sub(r"\\\g<0>", printable(_spaced(text)))
    return _HTML.sub(lambda match: escape(match[0]), marked)


def latex(text: str) -> str:
    """Return text on one line, escaped for LaTeX."""
    return printable(_spaced(text)).translate(LATEX)


def html(text: str) -> str:
    """Return text escaped for an HTML element or attribute."""
    return escape(terminal(text))


def picture(text: str) -> str:
    """Return text on one line, escaped for Matplotlib, which reads text between dollar signs as mathematics."""
    return printable(_spaced(text)).replace("$", r"\$")


class Escaping(io.TextIOBase):
    """A stream that escapes the text written to it with `terminal`."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str, /) -> int:
        """Write escaped text and return the length of the original."""
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
    """Return the stream without escaping, for writers of control characters such as a progress bar."""
    return stream.stream if isinstance(stream, Escaping) else stream


def _escaped(character: str) -> str:
    code = ord(character) - 0xDC00  # bytes that are not UTF-8 are decoded to U+DC80 to U+DCFF
    return f"\\x{code:02x}" if 0x80 <= code <= 0xFF else ascii(character)[1:-1]


def _is_space(character: str) -> bool:
    return unicodedata.category(character) == "Zs"


def _spaced(text: str) -> str:
    """Return text with every kind of space replaced by a plain one, since the others are not printable."""
    return text if text.isprintable() else "".join(" " if _is_space(c) else c for c in text)
