"""The house's own rules: one direction of imports, no surprises at import, documents that name what exists."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = ROOT / "src" / "relaybackprop"

# Who may import whom inside the method: each module only from those before it. Rooms: the front, engine, planning.
ORDER = [
    "errors", "plan", "engine", "engine.pytree", "engine.graph", "engine.junction", "engine.memory", "engine.routes",
    "engine.calls", "engine.hooks", "engine.forward", "engine.early", "engine.data_parallel", "loss", "heads",
    "forwarded", "relay", "reference", "reach", "planning", "planning.copies", "planning.layout", "planning.storages",
    "planning.chain", "planning.matching", "planning.profile", "planning.cost", "planning.arrange", "planning.budget",
    "planning.suggest", "__init__",
]  # fmt: skip


def imported_modules(path: Path) -> set[str]:
    """Full names of all modules that a file imports anywhere, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_imports_go_one_way() -> None:
    files = {name_in_method(path): path for path in METHOD.rglob("*.py")}
    assert set(files) == set(ORDER)
    for name, path in files.items():
        inner = {other.removeprefix("relaybackprop.") for other in imported_modules(path)} & set(ORDER)
        earlier = {*ORDER[: ORDER.index(name)], "engine", "planning"}
        assert inner <= earlier, f"{name} imports {sorted(inner - earlier)}, which come after it"


def name_in_method(path: Path) -> str:
    name = ".".join(path.relative_to(METHOD).with_suffix("").parts)
    return name if name == "__init__" else name.removesuffix(".__init__")


def test_the_method_imports_torch_and_nothing_else() -> None:
    for path in METHOD.rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        outside = roots - set(sys.stdlib_module_names) - {"relaybackprop"}
        assert outside <= {"torch"}, f"{path.name} imports {sorted(outside)}"


def test_the_lab_is_not_imported_by_the_method_nor_tests_by_either() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & {"tests", "benchmarks", "nets", "oracle"}, path


# The lab's rooms, from the ground up: each imports only itself and those before it.
GROUND = ["errors", "outside", "files", "options", "progress", "tables"]
ROOMS = [
    *GROUND, "recipes", "data.sources", "data", "models", "models.caffe", "train", "evaluate", "report", "diagnose",
    "commands", "cli", "__main__",
]  # fmt: skip
LOOSE_FILES = 8


def room_of(module: str) -> str:
    """The room of one of the lab's modules: a folder, or a file at the top."""
    parts = module.split(".")[1:]
    return next(room for room in (".".join(parts[:2]), parts[0]) if room in ROOMS)


def test_the_labs_rooms_import_only_what_is_below_them() -> None:
    lab = ROOT / "src" / "relaylab"
    files = {".".join(path.relative_to(ROOT / "src").with_suffix("").parts): path for path in lab.rglob("*.py")}
    known = {name.removesuffix(".__init__") for name in files} - {"relaylab"}
    for name, path in files.items():
        if name == "relaylab.__init__":
            continue
        own = room_of(name)
        for other in imported_modules(path) & known:
            assert ROOMS.index(room_of(other)) <= ROOMS.index(own), f"{name} ({own}) imports {other}"


def test_the_lab_has_no_import_cycles() -> None:
    lab = ROOT / "src" / "relaylab"
    files = {".".join(path.relative_to(ROOT / "src").with_suffix("").parts): path for path in lab.rglob("*.py")}
    imports = {name: imported_modules(path) & files.keys() for name, path in files.items()}
    tuple(graphlib.TopologicalSorter(imports).static_order())  # raises on a cycle


def test_few_files_are_loose() -> None:
    loose = sorted(path.stem for path in (ROOT / "src" / "relaylab").glob("*.py"))
    assert len(loose) <= LOOSE_FILES, loose


def test_importing_the_method_brings_in_nothing_unplanned() -> None:
    code = "import torch, sys; a = set(sys.modules); import relaybackprop; print(*sorted(set(sys.modules) - a))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    outside = [name for name in run.stdout.split() if not name.startswith(("relaybackprop", "torch"))]
    assert {name.split(".")[0] for name in outside} <= set(sys.stdlib_module_names)


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "results").rglob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_files_that_exist(path: Path) -> None:
    text = path.read_text()
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)(?:#[^)]*)?\)", text)
    names = re.findall(r"`((?:src|tests|docs|results|benchmarks|examples)/[\w./-]+)`", text)
    for name in (*(path.parent / link for link in links), *(ROOT / name for name in names)):
        assert Path(name).exists(), f"{path.name} names {name}, which does not exist"


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_python_runs() -> None:
    """All blocks from top to bottom, on a stand-in for the reader's own data and model."""
    blocks = readme_blocks("python")
    assert len(blocks) >= 2
    setup = """
import torch
from torch import nn
from torchvision.models import resnet50
loader = [(torch.randn(2, 3, 64, 64), torch.tensor([1, 3]))]
model, heads = resnet50(), {"aux": nn.Identity()}
"""
    pytest.importorskip("torchvision")
    exec(setup + "\n".join(blocks), {"__name__": "readme"})


def test_the_data_pages_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On sixteen small photographs, with smaller batches and no workers."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for number in range(16):
        folder = tmp_path / "places2" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (340, 260), (9 * number, 90, 30)).save(folder / f"{number}.jpg")
    pages = [(ROOT / "docs" / "how-to" / name).read_text() for name in ("loaders.md", "augmentation.md")]
    first, mixed = (re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0] for page in pages)
    show = "\nprint(images.shape, images.dtype)\n"
    code = (first + show + mixed + show + "print(targets.shape)").replace(
        "batch_size=256, workers=8", "batch_size=4, workers=0"
    )
    assert code.count("batch_size=4") == 2
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "page"})
    shown = "torch.Size([4, 3, 224, 224]) torch.float32"
    assert capsys.readouterr().out.splitlines() == [shown, shown, "torch.Size([4, 2])"]


def test_readme_shell_commands_are_real() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    blocks = readme_blocks("bash")
    assert blocks
    for line in "\n".join(blocks).splitlines():
        command = line.split("#")[0].split()
        if command[:1] == ["make"]:
            assert set(command[1:]) <= targets, line
        elif command[:2] == ["python", "-m"]:
            assert (ROOT / (command[2].replace(".", "/") + ".py")).exists(), line
        elif command:
            assert command[0] in {*scripts, "pip", "git", "cd"}, line
