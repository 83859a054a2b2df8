"""The documentation is true: code blocks run, or say why not; commands have their options; outputs are right.

A block that does not run has a comment on the line before it: `<!-- not run: reason -->`. A block after
`<!-- file: NAME -->` is a file that later blocks use; one after `<!-- output -->` is what the block before it prints.
RENEW_DOCS=1 writes these outputs into the pages.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torchvision", reason="needs the lab extra")

import browser
import relaybackprop
from docs import generated, wrap
from relaylab import cli
from relaylab.recipes import RECIPES, find_recipe
from relaylab.recipes.changes import with_changes
from relaylab.recipes.files import to_toml

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
)
LANGUAGES = ("python", "bash")
BLOCK = re.compile(
    r"(?:^ *<!-- (?P<kind>not run|output|file)(?:: (?P<note>[^\n]+?))? -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
RUN_ELSEWHERE = {
    "README.md": "tests/test_house.py",
    "CONTRIBUTING.md": "tests/test_cli.py",
    "docs/how-to/augmentation.md": "tests/test_house.py",
}
SMALLER: Mapping[str, tuple[tuple[str, str], ...]] = {
    "docs/how-to/loaders.md": (("batch_size=256, workers=8", "batch_size=4, workers=0"),),
    "docs/tutorials/command-line.md": (
        ("--epochs 20", "--epochs 1 --batch-size 20"),
        ("--tune optimizer.lr=0.01,0.03,0.1", "--schemes standard,relay --seeds 0"),
        ("daisy/1.jpg", "class0/0.png"),
    ),
}
PLACEHOLDER = re.compile(r"[A-Z]{2,}(\.\.\.)?|\.\.\.")  # RUN..., DATA: what stands for the reader's own


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None  # why it does not run
    file: str | None  # to save it in, instead of running it
    is_output: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    blocks: list[Block] = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        kind, note = match["kind"], match["note"]
        assert note or kind in (None, "output"), f"{page}:{line}: {kind} without a reason or a name"
        reason, file = (note if kind == wanted else None for wanted in ("not run", "file"))
        blocks.append(Block(page, line, match["language"], match["code"], reason, file, kind == "output"))
    return blocks


def commands_of(block: Block) -> Iterator[list[str]]:
    """The commands of a block, without comments."""
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        start = words.index("|") + 1 if "|" in words else 0  # cat FILE | relaylab ...
        end = words.index(">") if ">" in words else len(words)
        if words[start:end]:
            yield words[start:end]


ALL = [block for page in PAGES for block in blocks_of(page)]
RUN = sorted({block.page for block in ALL if block.language in LANGUAGES and not block.reason} - RUN_ELSEWHERE.keys())


def test_every_block_runs_or_says_why_not() -> None:
    shown = [block for block in ALL if block.language in LANGUAGES]
    assert len(shown) > 50
    for block in shown:
        if block.reason is None and block.language == "bash":
            for words in commands_of(block):
                assert words[0] == "relaylab", (
                    f"{block}: only relaylab's commands run here; mark it <!-- not run: why -->"
                )
    fences = sum((ROOT / page).read_text().count("```") for page in PAGES)
    assert fences == 2 * len(ALL), "a fence that is not closed, or inside another block"


@pytest.mark.filterwarnings("default")  # what libraries warn of is theirs
@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(
    page: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Top to bottom, in one namespace and one folder, and what it prints is what the page shows."""
    monkeypatch.chdir(world)
    if "init_process_group" in (ROOT / page).read_text():
        for name, value in torchrun_environment().items():
            monkeypatch.setenv(name, value)
    namespace: dict[str, Any] = {"__name__": "page"}
    module = ModuleType("page")  # for pickle
    module.__dict__.update(namespace)
    monkeypatch.setitem(sys.modules, "page", module)
    printed = ""
    renewed = text = (ROOT / page).read_text()
    for block in blocks_of(page):
        if block.is_output:
            if os.environ.get("RENEW_DOCS"):
                old = f"<!-- output -->\n```{block.language}\n{block.code}```"
                renewed = renewed.replace(old, f"<!-- output -->\n```{block.language}\n{printed}```", 1)
            else:
                assert printed.splitlines() == block.code.splitlines(), f"{block}; RENEW_DOCS=1 rewrites it"
        elif block.file is not None:
            Path(block.file).write_text(block.code)
        elif block.language in LANGUAGES and block.reason is None:
            run(block, module.__dict__)
            printed = "".join(f"{line.rstrip()}\n" for line in capsys.readouterr().out.splitlines())
    if renewed != text:
        (ROOT / page).write_text(renewed)


def run(block: Block, namespace: dict[str, Any]) -> None:
    code = block.code
    for old, new in SMALLER.get(block.page, ()):
        code = code.replace(old, new)
    if block.language == "python":
        exec(compile("\n" * block.line + code, ROOT / block.page, "exec"), namespace)
        return
    for words in commands_of(replace(block, code=code)):
        assert cli.main(words[1:]) == 0, f"{block}: {shlex.join(words)}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_do_not_run_have_these_options(page: str) -> None:
    for block in blocks_of(page):
        if block.language == "bash" and block.reason is not None:
            for words in commands_of(block):
                if words[0] == "relaylab" and len(words) > 1 and not PLACEHOLDER.fullmatch(words[1]):
                    cli.parse([word for word in words[1:] if word != "..."])  # an unknown option exits


def torchrun_environment() -> dict[str, str]:
    """The environment variables that `init_process_group` reads, for one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


@pytest.fixture
def world(tmp_path: Path, tiny_images: Path) -> Path:
    """A folder with what the pages' code reads: images/, flowers/ places2/, arrays/ and my.toml."""
    from PIL import Image

    for name in ("images", "flowers"):
        (tmp_path / name).symlink_to(tiny_images)
    for number in range(16):
        folder = tmp_path / "places2" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (340, 260), (9 * number, 90, 30)).save(folder / f"{number}.jpg")
    for split in ("train", "val"):
        folder = tmp_path / "arrays" / split
        folder.mkdir(parents=True)
        np.save(folder / "images.npy", np.arange(40 * 10 * 10 * 3, dtype=np.uint8).reshape(40, 10, 10, 3))
        np.save(folder / "labels.npy", np.arange(40) % 2)
    recipe, problems = with_changes(find_recipe("digits"), ["network.num_classes=2", "optimizer.iterations=2"])
    assert not problems
    (tmp_path / "my.toml").write_text(to_toml(recipe))
    return tmp_path


# Links and the site


def headings(path: Path) -> set[str]:
    """The anchors of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_anchors_of_links_exist(page: str) -> None:
    """Also on code hosts; files are checked in tests/test_house.py."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.suffix != ".md" or anchor in headings(path), f"{page}: {target}#{anchor}"


def test_the_reference_is_complete() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    named = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    for name in relaybackprop.__all__:
        assert {f"relaybackprop.{name}", f"relaybackprop.{name}.{name}"} & set(named), name


def test_options_of_all_commands_are_generated() -> None:
    text = generated.commands()
    for name in cli.COMMANDS.keys() - {"recipes list"}:
        assert f"## relaylab {name}\n" in text
    for option in ("`--early-release`", "`--tune KEY=A,B,... [KEY=A,B,... ...]`", "`--hold-out N`"):
        assert option in text


def test_keys_of_recipes_are_generated() -> None:
    """Every value that a recipe has, with its default and meaning."""
    text = generated.recipe_keys()
    for recipe in RECIPES.values():
        for name, *_ in recipe.fields():
            key = re.sub(r"^(plan\.auxiliary|optimizer\.segment_lr|network\.options)\.[^.]+", r"\1.NAME", name)
            assert f"`{key}`" in text or f"### {key}" in text or key.endswith(".kind"), name
    assert "`optimizer.momentum`\n:   number; default `0.9`. SGD only." in text


def test_pages_are_wrapped() -> None:
    assert not [path for path in wrap.pages() if wrap.wrapped(path.read_text()) != path.read_text()], (
        "run: python -m docs.wrap"
    )


def test_wrapping_keeps_what_a_page_says() -> None:
    text = (
        f"# A title\n\nWords {'word ' * 30}`code with spaces` - 1. and\n\n- an item {'item ' * 30}\n    - one inside\n"
    )
    new = wrap.wrapped(text)
    assert new.split() == text.split()
    assert wrap.wrapped(new) == new
    assert max(map(len, new.splitlines())) <= wrap.WIDTH
    assert [line[:6] for line in new.splitlines() if line.startswith(("-", " "))] == ["- an i", "  item", "    - "]
    for kept in ("46.1 %", "[-2.0, +1.3]"):
        assert all(kept in wrap.wrapped(f"{'x ' * count}{kept} of all\n") for count in range(60))
    assert wrap.wrapped("| a | b |\n```\n" + "x " * 90 + "\n```\n").splitlines()[2] == "x " * 90


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site. --strict checks links and anchors, and docs/hooks.py that pages load nothing from elsewhere."""
    pytest.importorskip("mkdocstrings", reason="needs the docs extra")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_pages_of_linked_files(site: Path) -> None:
    for page in ("index", "reference/commands", "results/engine", "source/examples/plain_loop.py"):
        assert (site / f"{page}.html").is_file(), page


browsers = pytest.mark.skipif(browser.chromium() is None, reason="no Chromium")


@pytest.mark.slow
@browsers
def test_the_site_can_be_searched_from_files(site: Path, tmp_path: Path) -> None:
    url = f"{(site / 'index.html').as_uri()}?q=suggest_plan"
    command = [browser.chromium() or "", "--headless", "--no-sandbox", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", url]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    count = re.search(r'md-search-result__meta">(\d+) matching', shown)
    assert count is not None
    assert int(count[1]) >= 5


@pytest.mark.slow
@browsers
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_can_be_read_on_a_phone(site: Path, dark: bool) -> None:
    pages = [path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html"))]
    pages = [page for page in pages if not page.startswith(("source/", "frames", "404"))]
    for found in browser.framed(site, pages, dark=dark):
        assert found["scheme"] == ("slate" if dark else "default")
        assert found["wide"] == found["width"] == 390, found
        assert found["missing"] == 0, found
        assert found["contrast"] >= 4.5, found


def test_ci_runs_the_documented_commands() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.search(r"run: \.ci/run$", workflow, re.MULTILINE)
    commands = (ROOT / ".ci" / "run").read_text()
    made = {word for line in re.findall(r"^make (.+)$", commands, re.MULTILINE) for word in line.split()}
    for target in ("lint", "types", "docs", "test"):
        assert target in made
        assert re.search(rf"^{target}: ", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_notes_that_pages_name_exist() -> None:
    folders = ("src", "benchmarks", "experiments")
    code = "\n".join(path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py"))
    notes = set(re.findall(r"^(Note \[[^\]]+\])$", code, re.MULTILINE))
    for page in PAGES:
        for name in re.findall(r"Note\s\[[A-Z][^\].]+\]", (ROOT / page).read_text()):
            assert " ".join(name.split()) in notes, f"{page} names {name}"
