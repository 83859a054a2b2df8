"""Wraps the prose of Markdown pages at 100 columns; tables, code, headings and pictures stay as they are.

python -m docs.wrap            # rewrites the pages
python -m docs.wrap --check    # names those that it would change; the exit code is then 1
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 100
FOLDERS = ("docs/**", "examples/**", ".github/**")  # results/ are written by programs
EXCEPT = ("docs/evidence/", "CHANGELOG.md")
ITEM = re.compile(r"(?P<indent> *)(?P<mark>[-*+]|\d+\.) +(?P<text>.*)")
FIXED = re.compile(r" *(\||#|<|>|!\[|```|---|:::|\[[^]]+\]:)|$")  # lines that are not prose
ATOM = re.compile(r"\*{0,2}`[^`]+`\S*|\S+")  # code keeps its spaces
LIKE_A_MARK = re.compile(r"([-*+#>]+|\d+\.)$")  # a line must not begin with it


def pages() -> list[Path]:
    """Return the pages that are wrapped."""
    found = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md"))]
    return sorted({path for path in found if not path.relative_to(ROOT).as_posix().startswith(EXCEPT)})


def wrapped(text: str) -> str:
    """Return a page with its paragraphs and list items wrapped."""
    lines: list[str] = []
    paragraph: list[str] = []  # its words
    first = rest = ""  # what its first line and its other lines begin with
    is_code = text.startswith("---\n")  # front matter

    def end() -> None:
        lines.extend(_lines(paragraph, first, rest))
        paragraph.clear()

    for number, line in enumerate(text.splitlines()):
        if line.lstrip().startswith("```") or (is_code and number and line == "---"):
            end()
            is_code = not is_code
            lines.append(line)
        elif is_code or FIXED.match(line):
            end()
            lines.append(line)
        elif item := ITEM.fullmatch(line):
            end()
            first = line[: item.start("text")]
            rest = " " * len(first)
            paragraph += _words(item["text"])
        else:
            if not paragraph:
                first = rest = line[: len(line) - len(line.lstrip())]
                if len(first) >= 4 and not (lines and lines[-1] == ""):  # it belongs to the line before it
                    lines.append(line)
                    continue
            paragraph += _words(line)
    end()
    return "\n".join(lines) + "\n"


def _words(text: str) -> list[str]:
    return ATOM.findall(text)


def _lines(words: Sequence[str], first: str, rest: str) -> Iterator[str]:
    """Yield the lines of a paragraph."""
    if not words:
        return
    line = f"{first}{words[0]}"
    for at, word in enumerate(words[1:], 1):
        following = words[at + 1] if at + 1 < len(words) else ""
        needed = f"{word} {following}" if LIKE_A_MARK.fullmatch(following) else word
        if len(line) + 1 + len(needed) > WIDTH and not LIKE_A_MARK.fullmatch(word):
            yield line
            line = f"{rest}{word}"
        else:
            line = f"{line} {word}"
    yield line


def main(arguments: Sequence[str]) -> int:
    """Wrap the pages, or name those that are not."""
    changed = [
        path for path in pages() if wrapped(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")
    ]
    for path in changed:
        print(path.relative_to(ROOT))
        if "--check" not in arguments:
            path.write_text(wrapped(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 1 if changed and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
