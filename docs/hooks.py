"""MkDocs hooks: pages generated from the code, and pages for linked files outside docs/.

Links in Markdown refer to files in the checkout, so that they work in editors and on code hosts. `site_path` maps a
file to its path in the site; each linked file outside docs/ gets its own page.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.generated import commands, recipe_keys

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = {"<!-- generated: commands -->": commands, "<!-- generated: recipe keys -->": recipe_keys}  # by marker
RENAMED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing/index.md", "CHANGELOG.md": "changelog.md"}
CODE = {".py": "python", ".toml": "toml", ".cff": "yaml", ".yml": "yaml", ".yaml": "yaml", "": "text"}  # by suffix
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
_checkout: dict[str, Path] = {}  # the file or folder in the checkout, by path in the site


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the decisions to the navigation, which contains only their folder."""
    for entry in config.nav or []:
        if "Decisions" in entry:
            decisions = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
            entry["Decisions"] = ["decisions/index.md", *(f"decisions/{name}" for name in decisions)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and a page or copy of each file outside docs/ that a page links to."""
    _checkout.clear()
    files.append(File.generated(config, "decisions/index.md", content=_decisions()))
    waiting = [(path, path.read_text(encoding="utf-8")) for path in sorted(DOCS.rglob("*.md"))]
    waiting += [(ROOT / name, (ROOT / name).read_text(encoding="utf-8")) for name in RENAMED if name != "README.md"]
    waiting += [(path, path.read_text(encoding="utf-8")) for path in sorted((ROOT / "results").glob("*.md"))]
    for path, text in waiting:
        _add(files, config, path)
        for target in _targets(path, text):
            if _add(files, config, target) and target.suffix == ".md":
                waiting.append((target, target.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Replace links to the checkout with links to the site, and markers with generated text."""
    for marker, make in GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    own = _checkout.get(page.file.src_uri, DOCS / page.file.src_uri)

    def replaced(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:") or page.file.src_uri.startswith("source/"):
            return match[0]
        path = Path(os.path.normpath(own.parent / target))
        link = os.path.relpath(site_path(path), PurePosixPath(page.file.src_uri).parent)
        return f"{match[1]}{link}{'#' * bool(anchor)}{anchor}{match[3]}"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


def site_path(path: Path) -> str:
    """Return the path in the site of a file or folder in the checkout."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_relative_to(DOCS):
        name = path.relative_to(DOCS).as_posix()
        return f"{name}/index.md" if path.is_dir() else name
    if path.is_dir():
        return f"source/{name}/index.md"
    if name in RENAMED:
        return RENAMED[name]
    return f"source/{name}.md" if path.suffix in CODE else name


def _add(files: Files, config: MkDocsConfig, path: Path) -> bool:
    """Add a file or folder outside docs/ to the site; return False if it was added before or does not exist."""
    if path.is_relative_to(DOCS) or not path.exists():
        return False
    place = site_path(path)
    if place in _checkout or place == "index.md":
        return False
    _checkout[place] = path
    if path.is_dir():
        content: str | bytes = _listing(path)
        for child in _children(path):
            _add(files, config, child)
    elif place.startswith("source/"):
        language = CODE[path.suffix]
        code = path.read_text(encoding="utf-8").rstrip("\n")
        content = f"{_HIDDEN}# `{path.relative_to(ROOT)}`\n\n``````{language}\n{code}\n``````\n"
    else:
        content = path.read_bytes() if path.suffix != ".md" else path.read_text(encoding="utf-8")
    files.append(File.generated(config, place, content=content))
    return True


_HIDDEN = "---\nsearch: {exclude: true}\nhide: [toc]\n---\n\n"  # exclude code from the search


def _targets(path: Path, text: str) -> Iterator[Path]:
    """Yield the files and folders in the checkout that a page links to."""
    for part in FENCE.split(text):
        if not part.startswith("```"):
            for match in LINK.finditer(part):
                target = match[2].partition("#")[0]
                if target and "://" not in target and not target.startswith("mailto:"):
                    yield Path(os.path.normpath(path.parent / target))


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in CODE and path.suffix and path.is_file())


def _listing(folder: Path) -> str:
    lines = [f"- [`{path.name}`]({path.name}.md)" for path in _children(folder)]
    return f"{_HIDDEN}# `{folder.relative_to(ROOT)}`\n\n" + "\n".join(lines) + "\n"


def _decisions() -> str:
    """Return a page that lists the titles of the decisions."""
    lines: list[str] = []
    for path in sorted((DOCS / "decisions").glob("[0-9]*.md")):
        number, _, title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition(": ")
        lines.append(f"- [{number}]({path.name}): {title}")
    return "# Decisions\n\nDesign decisions and their reasons.\n\n" + "\n".join(lines) + "\n"


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Check that no page loads anything from another host."""
    outside = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//[^"'> ]+""")
    for path in Path(config.site_dir).rglob("*.html"):
        found = [text for text in outside.findall(path.read_text(encoding="utf-8")) if 'rel="canonical"' not in text]
        if found:
            raise RuntimeError(f"{path}: loads {found[0]}; pages must work without a network")
