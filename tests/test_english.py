"""The countable part of the style of code and documents: summaries and words; docs/wrap.py checks the width."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "benchmarks", "experiments", "examples", "docs", "results")
FILES = [
    *sorted(path for folder in FOLDERS for kind in ("py", "md") for path in (ROOT / folder).rglob(f"*.{kind}")),
    *sorted(ROOT.glob("*.md")),
]

# A summary is a noun phrase or an imperative verb, not a clause.
CLAUSE = re.compile(r"(?:What|Who|Whose|Whom|How|Of|Where|When|Which|Why|All that|Their|Its)\b")
BANNED = {
    r"\b(?:some|no|every)body\b": "name the actor: the user, the caller, the process",
    r"\bwho(?:so)?ever\b": "name the actor: the user, the caller, the process",
    r"(?<![Tt]here )\b(?:is|was) no(?:ne)? (?!longer|more|less|better|worse)": "'is not a' or 'has no'",
    r"\b(?:goes|went) (?:on|down)\b": "runs resume; gradients propagate or flow",
    r"\blets? go\b": "tensors are freed",
    r"\bpassages?\b": "forward pass",
    r"\bother than in\b": "unlike in",
    r"\bso many\b": "give the number",
    r"\bof SGD\b": "with SGD",
    r"\boutside of\b": "outside",
}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """The docstrings of a file, with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The comments and strings of a file of code, or the lines of a document outside code blocks, with their lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        kinds = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in kinds:
                yield token.start[0], " ".join(token.string.split())
        return
    in_code = False
    for number, line in enumerate(text.splitlines(), 1):
        in_code ^= line.lstrip().startswith("```")
        if not in_code:
            yield number, line


def faults(path: Path) -> list[str]:
    """What the style forbids in a file, a line each."""
    found: list[str] = []
    name = path.relative_to(ROOT)
    for line, text in prose(path):
        for pattern, remedy in BANNED.items():
            for match in re.finditer(pattern, text):
                phrase = text[max(0, match.start() - 20) : match.end() + 20]
                found.append(f"{name}:{line}: {phrase!r}: {remedy}")
    for line, text in docstrings(path) if path.suffix == ".py" else ():
        summary = text.split("\n", 1)[0]
        if CLAUSE.match(summary):
            found.append(f"{name}:{line}: {summary!r}: begin with a noun or an imperative verb")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_style(path: Path) -> None:
    assert not (found := faults(path)), "\n".join(found)


def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text('"""What a run is."""\n\nx = f"{1} is no tensor"  # somebody\n')
    assert [fault.split(":")[1] for fault in faults(file)] == ["3", "3", "1"]
    document = tmp_path / "page.md"
    document.write_text("A run goes on.\n\n```bash\nwhoever\n```\n")
    assert len(faults(document)) == 1
