"""Tables of plain values, and their rendering as Markdown, LaTeX and HTML."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from relaylab.outside.showing import html, latex, markdown

Format = Literal["markdown", "latex", "html"]


@dataclass(frozen=True)
class Table:
    """A table. The first column contains the names of the rows; notes are sentences below the table."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that all rows are as long as the header."""
        assert all(len(row) == len(self.header) for row in self.rows), self.rows


def render(table: Table, form: Format) -> str:
    """Render a table as Markdown, as LaTeX (with booktabs), or as an HTML element."""
    return _RENDERERS[form](table)


def markdown_lines(table: Table, *, is_marked: bool = False) -> list[str]:
    """Return the Markdown lines of a table, header and rule first, without title and notes.

    Cells are escaped, unless `is_marked` is true, which means that they are Markdown.
    """
    rule = ["---:" if _is_numeric(column) else "---" for column in zip(*table.rows, strict=True)]
    lines = [table.header, rule or ["---"] * len(table.header), *table.rows]
    cell = _kept if is_marked else markdown
    return [f"| {' | '.join(map(cell, line))} |" for line in lines]


def _kept(text: str) -> str:
    return text.replace("|", "\\|")


def renewed(page: str, tables: Mapping[str, Sequence[str]]) -> str:
    """Return a Markdown page with the lines between its markers <!-- NAME --> and <!-- end --> replaced.

    Raises:
        ValueError: a marker is missing.
    """
    for name, lines in tables.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        text = "".join(f"{line}\n" for line in lines)
        page, count = re.subn(f"{start}.*?{end}", lambda _, new=start + text + end: new, page, flags=re.DOTALL)
        if count != 1:
            raise ValueError(
                f"the page contains {count} markers <!-- {name} -->: expected one, followed by <!-- end -->"
            )
    return page


def _is_numeric(cells: Sequence[str]) -> bool:
    """Return whether a column is right-aligned: it has only numbers, empty cells and dashes."""
    return all(re.match(r"[-+(]*\d|-?$", cell) for cell in cells)


def _markdown(table: Table) -> str:
    notes = [f"\n{markdown(note)}" for note in table.notes]
    return "\n".join([f"**{markdown(table.title)}**\n", *markdown_lines(table), *notes]) + "\n"


def _latex(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(latex, cells)) + r" \\"

    notes = [rf"\\ \footnotesize {latex(note)}" for note in table.notes]
    caption, columns = latex(table.title), "l" + "r" * (len(table.header) - 1)
    head = [r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}"]
    body = [r"\toprule", line(table.header), r"\midrule", *map(line, table.rows), r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*head, *body, *notes, r"\end{table}", ""])


def _unbroken(cell: str) -> str:
    """Allow line breaks in a number's cell only before brackets and after semicolons."""
    if not re.match(r"[-+(]?\d", cell):
        return cell
    return " ".join(part.replace(" ", "\u00a0") for part in re.split(r" (?=[\[(])|(?<=;) ", cell))


def _html(table: Table) -> str:
    head = "".join(f'<th scope="col">{html(cell)}</th>' for cell in table.header)
    labels = [html(cell) for cell in table.header[1:]]  # on narrow screens, each cell is on its own line

    def row_text(row: Sequence[str]) -> str:
        cells = zip(labels, map(_unbroken, row[1:]), strict=True)
        text = "".join(f'<td data-label="{label}">{html(cell)}</td>' for label, cell in cells)
        return f'<tr><th scope="row">{html(row[0])}</th>{text}</tr>'

    notes = "".join(f'<p class="quiet">{html(note)}</p>' for note in table.notes)
    top = [f"<table><caption>{html(table.title)}</caption>", f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    return "\n".join([*top, *map(row_text, table.rows), f"</tbody></table>{notes}", ""])


_RENDERERS: Mapping[Format, Callable[[Table], str]] = {"markdown": _markdown, "latex": _latex, "html": _html}
