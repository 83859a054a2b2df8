"""Names from outside are shown escaped, and errors of libraries are one line and an exit code."""

import errno
import io
import lzma
import tarfile
import types
import zlib
from collections.abc import Callable

import pytest

pytest.importorskip("tyro", reason="needs the lab extra")

from relaybackprop import Plan, Window
from relaylab import cli
from relaylab.outside.showing import Escaping, direct, html, latex, markdown, picture, printable, terminal
from relaylab.tables import Table, render

HOSTILE = "\x1b]0;t\x07\u202eRED\n| <script>x</script> `ls` [a](http://b) $\\frac$ \\input{/etc} ^ \ud800\udcff"


@pytest.mark.parametrize("show", [printable, markdown, latex, picture])
def test_a_name_is_one_printable_line_in_every_medium(show: Callable[[str], str]) -> None:
    assert show(HOSTILE).isprintable()
    assert show("Änderung 漢字 a_b").replace("\\", "") == "Änderung 漢字 a_b"


def test_terminal_output_has_no_control_or_unencodable_characters() -> None:
    shown = terminal(HOSTILE, "ascii")
    assert shown.isascii()
    assert "\x1b" not in shown
    assert "\n" in shown, "text of several lines stays so"
    assert "\\x1b]0;t\\x07\\u202eRED" in shown
    assert "\\xff" in terminal(HOSTILE)
    assert terminal("1\u00a0000 ± 漢字\n") == "1\u00a0000 ± 漢字\n"


def test_markdown_shows_pipes_code_tags_and_links() -> None:
    assert markdown("a|b `c` <i> &lt; x & y [z](u) d_e _f_ 1*2") == (
        "a\\|b \\`c\\` &lt;i&gt; &amp;lt; x & y [z]\\(u) d_e \\_f\\_ 1\\*2"
    )
    assert markdown("\\|") == "\\\\\\|", "a backslash does not undo the escape"
    assert markdown("12.3 [11.0, 13.5] (a)") == "12.3 [11.0, 13.5] (a)"


def test_untrusted_text_cannot_inject_latex_commands() -> None:
    text = render(Table(r"\input/etc/passwd ", ("a",), (("x^2 \\write18",),)), "latex")
    assert r"\textbackslash{}input/etc/passwd" in text
    assert r"x\textasciicircum{}2 \textbackslash{}write18" in text
    assert latex("50 % ± 1") == r"50 \% $\pm$ 1"


def test_titles_and_notes_of_tables_are_escaped_too() -> None:
    table = Table("<b>|\nforged", ("a",), (("x",),), ("<script>",))
    text = render(table, "markdown")
    assert "<" not in text
    assert "**&lt;b&gt;\\|\\nforged**" in text
    assert "<script>" not in render(table, "html")
    assert html("\x1b<") == "\\x1b&lt;"


def test_a_picture_shows_dollar_signs() -> None:
    style = pytest.importorskip("relaylab.report.style")
    for name in ("$\\frac$", "$x^2$", "a$b", "\x1b[31m", "\u202e", "漢字"):
        svg = style.plot(lambda axes, name=name: axes.set_xticks([0], [picture(name)]), name, name, size=(2, 2))
        assert svg.startswith("<?xml")
        assert "\x1b" not in svg


def test_output_of_commands_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    escaping = Escaping(stream)
    print("\x1b[31m ü \ud800", file=escaping, flush=True)
    assert stream.buffer.getvalue() == b"\\x1b[31m \\xfc \\ud800\n"  # pyright: ignore[reportAttributeAccessIssue]
    assert direct(escaping) is stream
    assert direct(stream) is stream


def ending_with(error: Exception, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """The exit code of a command that ends with an error."""

    def main(options: object) -> int:
        raise error

    command = lambda name: (main, types.SimpleNamespace)  # noqa: E731
    monkeypatch.setattr(cli, "parse", lambda arguments: (main, types.SimpleNamespace()))
    monkeypatch.setattr("relaylab.options.check_paths", command)
    return cli.main(["demo", *more])


ERRORS: dict[str, tuple[Callable[[], Exception], int, str]] = {
    "method": (
        lambda: caught(lambda: Plan(primary=Window(top="x"))),
        2,
        "the primary window has top='x': it must not have a `top`",
    ),
    "no file": (lambda: FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, "cannot read or write x: No such"),
    "nameless": (lambda: OSError(errno.EINVAL, "Invalid argument"), 2, "cannot read or write a file: Invalid"),
    "disk full": (lambda: OSError(errno.ENOSPC, "No space left on device"), 1, "a file: No space left on device"),
    "memory": (MemoryError, 1, "not enough memory"),
    "torch's memory": (lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), 1, "not enough"),
    "nesting": (RecursionError, 2, "nested too deeply"),
    "encoding": (lambda: caught(lambda: "\ud800".encode()), 2, "text that is not UTF-8"),
    "zlib": (lambda: zlib.error("Error -3"), 2, "damaged or cut short: Error -3"),
    "lzma": (lambda: lzma.LZMAError("Corrupt"), 2, "damaged or cut short: Corrupt"),
    "tar": (lambda: tarfile.ReadError("bad"), 2, "damaged or cut short: bad"),
    "a bug": (lambda: caught(lambda: [][1]), 70, "internal error: IndexError: list index out of range (cli.py, line"),
}


def caught(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011
        call()
    return found.value


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_one_line_and_an_exit_code(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, code, said = ERRORS[kind]
    assert ending_with(make(), monkeypatch) == code
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert said in told
    with pytest.raises(type(make())):
        ending_with(make(), monkeypatch, "--debug")


def test_safetensors_errors_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    safetensors = pytest.importorskip("safetensors")
    assert ending_with(safetensors.SafetensorError("I/O error"), monkeypatch) == 1
    assert "cannot read or write a safetensors file: I/O error" in capsys.readouterr().err


def test_a_name_in_an_error_cannot_forge_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from relaylab.errors import InputError

    assert ending_with(InputError("bad\nrelaylab: all is well\x1b[2K"), monkeypatch) == 2
    assert capsys.readouterr().err == "relaylab: bad\n  relaylab: all is well\\x1b[2K\n"
