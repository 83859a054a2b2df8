"""Wrap the prose of Markdown pages at 100 columns, except tables, code, headings and images.

python -m docs.wrap            # rewrites the pages
python -m docs.wrap --check    # lists pages to rewrite; exits with code 1 if there are any
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
WIDTH = 100
FOLDERS = ("docs/**", "examples/**", ".github/**")  # results/ are written by programs
EXCEPT = ("docs/evidence/first-check.md",)  # an appendix that stays as it is
ITEM = re.compile(r"(?P<indent> *)(?P<mark>[-*+]|\d+\.) +(?P<text>.*)")
FIXED = re.compile(r" *(\||#|<|>|!\[|```|---|:::|\[[^]]+\]:)|$")  # lines that are not prose
ATOM = re.compile(  # not split: code, short links, intervals
    r"[(*]*`[^`]+`\S*|\(?\[[^]\s][^]]{0,40}\]\([^)\s]{1,60}\)\S*|\[[-+\d.]+, [-+\d.]+\]\S*|\S+"
)
NEVER_FIRST = re.compile(r"([-*+#>]+|\d+\.|%\S*)$")  # a line must not begin with it: a mark, or the unit of a number


def pages() -> list[Path]:
    """Return the pages to wrap."""
    found = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.md"))]
    return sorted({path for path in found if not path.relative_to(ROOT).as_posix().startswith(EXCEPT)})


def wrapped(text: str) -> str:
    """Return a page with its paragraphs and list items wrapped."""
    lines: list[str] = []
    paragraph: list[str] = []  # its lines
    first = rest = ""  # prefixes of its first line and of its other lines
    is_code = text.startswith("---\n")  # front matter

    def end() -> None:
        lines.extend(_lines(ATOM.findall(" ".join(paragraph)), first, rest))
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
            paragraph.append(item["text"].strip())
        else:
            if not paragraph:
                first = rest = line[: len(line) - len(line.lstrip())]
                if len(first) >= 4 and not (lines and lines[-1] == ""):  # it belongs to the line before it
                    lines.append(line)
                    continue
            paragraph.append(line.strip())
    end()
    return "\n".join(lines) + "\n"


def _lines(words: Sequence[str], first: str, rest: str) -> Iterator[str]:
    """Yield the lines of a paragraph."""
    if not words:
        return
    line = f"{first}{words[0]}"
    for at, word in enumerate(words[1:], 1):
        following = words[at + 1] if at + 1 < len(words) else ""
        needed = f"{word} {following}" if NEVER_FIRST.fullmatch(following) else word
        if len(line) + 1 + len(needed) > WIDTH and not NEVER_FIRST.fullmatch(word):
            yield line
            line = f"{rest}{word}"
        else:
            line = f"{line} {word}"
    yield line


def main(arguments: Sequence[str]) -> int:
    """Wrap the pages, or list those that are not wrapped."""
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
