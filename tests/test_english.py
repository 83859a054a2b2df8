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
    r"\bgo on\b": "runs resume; gradients propagate or flow",
}
# Records of the past keep their words: decisions, results, the evidence and the changelog.
RECORDS = ("docs/decisions/", "docs/evidence/", "results/", "CHANGELOG.md")
BANNED_NOW = {
    r"\bof (?:your|its|their|one's|our|my) own\b(?! (?:size|modules))": "'your own loop'",
    r"\bis an experiment\b": "an empirical question",
    r"\banew\b": "again, or re-tune",
    r"\bbesides\b": "excluding, or in addition to",
    r"\bHence\b": "consequently, or so",
    r"\bthe (?:\w+est|\w+most|primary one) first\b": "from lowest to highest",
}
# The text of an argument or attribute does not finish its name ("folder: of the run").
FINISHES_NAME = re.compile(r"\s+[*\w]+: (?:of|as|on|by|from|with|in|to|its|their)\b")


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """The docstrings of a file, with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def after_code(path: Path) -> Iterator[tuple[int, str]]:
    """The first line of text after each code block of a document, with its line number."""
    in_code = follows = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            in_code = not in_code
            follows = not in_code
        elif not in_code and line.strip() and not line.startswith("<!--"):
            if follows:
                yield number, line
            follows = False


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
    """The style faults of a file, one per line."""
    found: list[str] = []
    name = path.relative_to(ROOT).as_posix()
    banned = BANNED if name.startswith(RECORDS) else BANNED | BANNED_NOW
    for line, text in prose(path):
        for pattern, remedy in banned.items():
            for match in re.finditer(pattern, text):
                phrase = text[max(0, match.start() - 20) : match.end() + 20]
                found.append(f"{name}:{line}: {phrase!r}: {remedy}")
    for line, text in docstrings(path) if path.suffix == ".py" else ():
        summary = text.split("\n", 1)[0]
        if CLAUSE.match(summary):
            found.append(f"{name}:{line}: {summary!r}: begin with a noun or an imperative verb")
        for entry in text.splitlines():
            if FINISHES_NAME.match(entry):
                found.append(f"{name}:{line}: {entry.strip()!r}: begin with a noun")
    for line, text in after_code(path) if path.suffix == ".md" else ():
        if text[0].islower():
            found.append(f"{name}:{line}: {text[:40]!r}: begin a sentence after a code block")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_style(path: Path) -> None:
    assert not (found := faults(path)), "\n".join(found)


def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text('"""What a run is."""\n\nx = f"{1} is no tensor"  # somebody\n')
    assert [fault.split(":")[1] for fault in faults(file)] == ["3", "3", "1"]
    file.write_text(
        'class Run:\n    """A run.\n\n    Args:\n        folder: of the run.\n        seed: the seed.\n    """\n'
    )
    assert [fault.split(":")[1] for fault in faults(file)] == ["1"]
    document = tmp_path / "page.md"
    document.write_text("A run goes on.\n\n```bash\nwhoever\n```\n\ntrains a loop of your own.\n")
    assert [fault.split(":")[1] for fault in faults(document)] == ["1", "7", "7"]
    record = tmp_path / "CHANGELOG.md"
    record.write_text("A loop of your own goes on.\n")
    assert len(faults(record)) == 1
