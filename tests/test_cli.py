"""The command line: start-up time, help, and one-line errors."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="needs the lab extra")

from PIL import Image

from relaylab import cli, progress

Make = Callable[..., Path]


def relaylab(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "relaylab.cli", *arguments], capture_output=True, text=True)


@pytest.fixture
def image_tree(tmp_path: Path) -> Make:
    def make(**files: int) -> Path:
        """Create an image tree, given the number of images by `split__class`."""
        root = tmp_path / "tree"
        for place, count in files.items():
            folder = root / place.replace("__", "/")
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (12, 10), (20 * i, 100, 50)).save(folder / f"{i}.png")
        return root

    return make


def test_help_answers_without_torch_in_half_a_second() -> None:
    code = "import sys; from relaylab.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    seconds: list[float] = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # not the clock: the machine may be busy
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert run.returncode == 0, run.stderr
    assert "demo" in run.stdout
    modules = run.stdout.split()
    heavy = {"torch", "torchvision", "matplotlib", "sklearn", "numpy", "PIL", "relaybackprop"}
    assert not heavy & set(modules)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("arguments", [[], ["--help"], ["demo", "--help"]])
def test_help_lists_what_there_is(arguments: list[str]) -> None:
    run = relaylab(*arguments)
    assert run.returncode == 0, run.stderr
    assert "demo" in run.stdout
    assert ("--epochs" in run.stdout) == ("demo" in arguments)


def test_groups_of_commands_have_a_list_and_nearest_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: relaylab recipes [COMMAND] [OPTIONS]" in out
    assert re.search(r"^  recipes +List the built-in recipes", out, re.MULTILINE)
    assert "recipes show" in out
    assert "demo" not in out
    for words, nearest in {("recipes", "shwo", "digits"): "recipes show", ("data", "chek"): "data check"}.items():
        assert cli.main(list(words)) == 2
        assert f"unknown command '{words[0]} {words[1]}'; nearest: {nearest}" in capsys.readouterr().err


def test_help_texts_have_no_line_breaks_of_the_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "WebDataset shards, Parquet files" in capsys.readouterr().out


def test_options_are_given_in_both_spellings() -> None:
    _, options = cli.parse(["train", "--resume", "run", "--log_every", "20", "--save-every=5"])
    assert options.given == {"resume", "log_every", "save_every"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("relaylab 0.")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the error line of a command that exits with 2."""
    assert cli.main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]  # progress lines may precede it
    assert line.startswith("relaylab: ")
    assert "Traceback" not in captured.err
    return line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, not 0"),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--seeds", "0,0"], "--seeds 0,0: expected integers from 0, separated by commas, each once"),
        (["--schemes", "relay,rely"], "unknown scheme 'rely'; nearest: relay"),
        (["--set", "optimizer.lr=nan"], "optimizer.lr is nan: expected a finite number, above 0"),
        (["--set", "network.classes=3"], "no value network.classes; nearest: "),
        (["--set", "network.image_size=4"], "images of 4 pixels: small_vgg requires at least 8"),
        (["--val-data", "."], "--val-data needs --data"),
        (["--data", "nowhere.tar.xz"], "no such file or folder: nowhere.tar.xz"),
    ],
)
def test_options_out_of_range(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    assert said in refused(capsys, *arguments, "--out", str(folder))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"train__a": 2, "train__b": 2},
            "has no val folder, only train: expected val/CLASS/IMAGE; to validate on a fifth of the training",
        ),
        ({"train__a": 2, "train__b": 2, "test__a": 2}, "; to validate on the test split, set images.val_split=test"),
        ({"val__a": 2, "val__b": 2}, "has no train folder, only val"),
        ({"a": 2, "b": 2}, "has no train folder, nor any other split: expected train/CLASS/IMAGE"),
        ({"train__a": 0, "val__a": 0}, "no images in"),
        ({"train__a": 1, "train__b": 1, "val__a": 1, "val__c": 1}, "classes with train images but no val images: b"),
        ({"train__a": 1, "val__a": 1, "val__c": 1}, "classes with val images but no train images: c"),
        ({"train__a": 2, "val__a": 2}, "only one class (a)"),
    ],
)
def test_folders_that_are_no_data_set(
    files: dict[str, int], said: str, image_tree: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    assert said in refused(capsys, "--data", str(image_tree(**files)), "--out", str(folder))
    assert not folder.exists()


def test_an_unreadable_image_is_named(image_tree: Make, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = image_tree(train__a=1, train__b=1, val__a=1, val__b=1)
    (root / "val/b/broken.jpg").write_bytes(b"no picture")
    said = refused(capsys, "--data", str(root), "--out", str(tmp_path / "report"), "--set", "network.image_size=8")
    assert "unreadable image" in said
    assert "val/b/broken.jpg" in said


def test_a_file_that_is_no_tar(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "data.tar.xz"
    file.write_bytes(b"no archive")
    assert "as a tar file" in refused(capsys, "--data", str(file), "--out", str(tmp_path / "report"))


def test_another_demos_runs_are_not_overwritten(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "standard-s0").mkdir()
    (tmp_path / "standard-s0" / "old.html").write_text("precious")
    assert "is not empty" in refused(capsys, "--out", str(tmp_path), "--seeds", "0", "--schemes", "standard")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["old.html"]


def test_a_missing_package_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "relaylab.options", raising=False)
    assert 'pip install "relaybackprop[lab]"' in refused(capsys, "--out", str(tmp_path / "report"))


def test_an_unknown_option_is_refused() -> None:
    run = relaylab("demo", "--epoch", "3")
    assert run.returncode == 2
    assert "Traceback" not in run.stderr


def interrupt(process: subprocess.Popen[str]) -> str:
    """Send SIGINT repeatedly until the process ends. Python drops one that arrives within a destructor."""
    for _ in range(12):
        process.send_signal(signal.SIGINT)
        try:
            return process.communicate(timeout=5)[1]
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    raise AssertionError(f"still running after Ctrl-C: {process.communicate()[1]}")


def test_ctrl_c_leaves_cleanly(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    command = [sys.executable, "-m", "relaylab.cli", "demo", "--epochs", "1000", "--out", str(folder)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not any(folder.glob("*/config.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    errors = interrupt(process)
    # Python itself may end by the signal where it was raised inside an exec; a shell says 130 to both.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in errors
    assert not list(folder.rglob("failure.json")), "a run that was stopped has not failed"


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{sys.executable} -m relaylab recipes show table3-model-a-relay"
    script = f"set -o pipefail; {command} | true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode in (0, 141), "as fast as the reader goes"


def test_work_of_a_moment_leaves_no_line_in_a_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, lines in ((0.5, []), (1.5, ["decoding: 3/3"]), (6, ["decoding: 1/3", "decoding: 3/3"])):
        clock = iter([0.0, seconds - 0.2, seconds - 0.1, seconds])
        monkeypatch.setattr(progress.time, "monotonic", lambda clock=clock: next(clock))
        with progress.progress("decoding", 3) as task:
            for _ in range(3):
                task.advance()
        assert capsys.readouterr().err.splitlines() == lines


def test_the_command_that_the_documentation_shows_works(
    image_tree: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file and one line."""
    text = (Path(__file__).parents[1] / "docs" / "how-to" / "extending.md").read_text()
    (code,) = re.findall(r"```python\n# src/relaylab/commands/count.py\n(.*?)```", text, re.DOTALL)
    module = types.ModuleType("relaylab.commands.count")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(code, module.__dict__)
    monkeypatch.setitem(cli.COMMANDS, "count", "count:main")
    assert cli.main(["count", str(image_tree(a=2, b=3))]) == 0
    assert capsys.readouterr().out == "5\n"
    assert cli.main(["count", str(tmp_path / "absent")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert "count                 Count the images of a data set." in cli.overview()
