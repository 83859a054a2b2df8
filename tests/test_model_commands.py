"""The commands about networks and recipes, as a user types them."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="needs the lab extra")
pytest.importorskip("torchvision", reason="needs the lab extra")

from PIL import Image

from caffe_files import THIN, random_state, write_pair
from relaylab import cli
from relaylab.recipes import RECIPES
from relaylab.recipes.changes import with_changes
from relaylab.recipes.scales import at_scale
from relaylab.recipes.schema import Scale, value_text

Captured = pytest.CaptureFixture[str]


def run(capsys: Captured, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.mark.parametrize("arguments", [("recipes",), ("recipes", "list")])
def test_recipes_lists_every_one_on_a_line(arguments: tuple[str, ...], capsys: Captured) -> None:
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    for recipe in RECIPES.values():
        (line,) = re.findall(rf"^{recipe.name} .*$", out, re.MULTILINE)
        assert recipe.row in line
        if recipe.reported is not None:
            assert f"{recipe.reported.top1:.2f}" in line
    assert "table5-ensemble" in out


@pytest.mark.parametrize("name", RECIPES)
def test_show_gives_each_value_and_its_source(name: str, capsys: Captured) -> None:
    code, out, _ = run(capsys, "recipes", "show", name, "--scale", "small")
    assert code == 0
    for field, _, source in at_scale(RECIPES[name], "small").fields():
        (line,) = re.findall(rf"^{re.escape(field)} .*$", out, re.MULTILINE)
        assert source[:30] in line


def test_show_an_ensemble(capsys: Captured) -> None:
    code, out, _ = run(capsys, "recipes", "show", "table5-ensemble")
    assert code == 0
    assert out.count("relay") == 5
    assert "ours: the paper says five models" in out


@pytest.mark.parametrize("command", [("recipes", "show"), ("draw",), ("cost",)])
def test_an_unknown_recipe_brings_the_nearest_names(command: tuple[str, ...], capsys: Captured, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "new")) if command == ("draw",) else ()
    code, _, err = run(capsys, *command, "table3-modle-a-relay", *out)
    assert code == 2
    assert err.startswith("relaylab: unknown recipe 'table3-modle-a-relay'; nearest: table3-model-a-relay, ")


@pytest.mark.parametrize("name", ["figure2-vgg19-relay", "table3-model-a-relay", "table6-inception-v3-relay"])
def test_draw_writes_pictures_and_the_table(name: str, capsys: Captured, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "draw", name, "--out", str(tmp_path))
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.{suffix}" for suffix in ("md", "png", "svg")]
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert min(picture.size) > 500
        assert len(picture.convert("RGB").resize((40, 40)).getcolors(1600)) > 20
    svg = (tmp_path / f"{name}.svg").read_text()
    assert (tmp_path / f"{name}.md").read_text() in out
    run(capsys, "draw", name, "--out", str(tmp_path))
    assert (tmp_path / f"{name}.svg").read_text() == svg  # the same text each time


def test_the_table_is_table_2(capsys: Captured, tmp_path: Path) -> None:
    _, out, _ = run(capsys, "draw", "table3-model-b-relay", "--out", str(tmp_path))
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")][2:]
    assert rows == [
        ["224x224", "(2)", "conv 7x7, 128, stride 2; maxpool 2x2, 2"],
        ["56x56", "(2)", "[modified inception, k 64] x 4; maxpool 2x2, 2"],
        ["28x28", "(1)(2)", "[modified inception, k 128] x 4; maxpool 2x2, 2"],
        ["-", "-", "auxiliary classifier (2), weight 0.3, N = 17"],
        ["14x14", "(1)", "[modified inception, k 128] x 4; spp, {7, 3, 2, 1}"],
        ["-", "(1)", "[fc 4096] x 2; fc 401"],
        ["-", "-", "classifier (1), N = 19"],
    ]
    _, out, _ = run(capsys, "draw", "table3-model-b-multi-loss", "--out", str(tmp_path))
    assert out.count("(1)(2)") == 3  # multi-loss reaches the first layer


def test_cost_prints_a_line_for_each_network(capsys: Captured) -> None:
    code, out, _ = run(capsys, "cost", "table3-model-a-relay", "table3-model-a-standard", "table6-resnet50-relay")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert len(lines) == 4  # the two of model A cost the same
    assert "| 175.9 M | 2.6 M |" in lines[2]
    assert "| 1.086 |" in lines[3]
    code, out, _ = run(capsys, "cost", "table3-model-a-relay", "--segments", "--scale", "tiny")
    assert code == 0
    assert "head aux" in out


def test_import_export_predict(capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of the authors' release, with a thin network in its place."""
    monkeypatch.chdir(tmp_path)
    prototxt, caffemodel = write_pair(tmp_path, THIN, random_state(THIN))
    Path("classes.txt").write_text("".join(f"scene{n}\n" for n in range(THIN.num_classes)))
    command = ["import-caffe", str(prototxt), str(caffemodel), "--classes", "classes.txt", "--out", "b.safetensors"]
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert f"Model B, {THIN.num_classes} classes" in out
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "b.safetensors already exists: choose a different --out" in err
    code, out, _ = run(capsys, "export", "b.safetensors", "--format", "safetensors", "pt2", "--out", "e")
    assert code == 0
    assert sorted(path.name for path in Path("e").iterdir()) == ["model.pt2", "model.safetensors"]
    Image.new("RGB", (300, 280), (90, 60, 20)).save("photo.jpg")
    code, out, err = run(capsys, "predict", "e/model.safetensors", "photo.jpg", "absent.jpg")
    assert code == 2
    assert "cannot read absent.jpg" in err
    lines = out.splitlines()
    assert lines[0] == "photo.jpg"
    assert len(lines) == 1 + min(5, THIN.num_classes)
    assert all(re.fullmatch(r" +\d+\.\d %  scene\d+", line) for line in lines[1:])
    code, out, _ = run(capsys, "predict", "e/model.safetensors", "photo.jpg", "absent.jpg", "--format", "json")
    found = json.loads(out)
    assert code == 2
    assert [entry["image"] for entry in found] == ["photo.jpg", "absent.jpg"]
    assert len(found[0]["classes"]) == min(5, THIN.num_classes)
    assert "cannot read" in found[1]["error"]
    code, _, _ = run(capsys, "predict", "e/model.safetensors", "photo.jpg", "--picture", "grid.png")
    assert (code, Path("grid.png").stat().st_size > 3000) == (0, True)
    code, _, err = run(capsys, "predict", "e/model.safetensors", *["photo.jpg"] * 41, "--picture", "grid.png")
    assert (code, "at most 40" in err) == (2, True)
    code, _, err = run(capsys, "predict", "e/model.safetensors", "photo.jpg", "--picture", "grid.gif")
    assert (code, "must end in .svg or .png" in err) == (2, True)


def test_commands_on_files_that_are_absent_or_wrong(capsys: Captured, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"{}")
    absent = str(tmp_path / "absent")
    for arguments, message in {
        ("predict", absent, "x.jpg"): "no such file or folder",
        ("export", absent): "no such file or folder",
        ("import-caffe", absent, absent): "no such file or folder",
        ("predict", str(wrong), "x.jpg"): "is not a valid safetensors file",
        ("export", str(wrong), "--out", str(tmp_path / "e")): "is not a valid safetensors file",
    }.items():
        code, _, err = run(capsys, *arguments)
        assert code == 2, arguments
        assert message in err
    assert not (tmp_path / "e").exists()


def test_an_ensemble_and_a_name_that_is_a_folder(capsys: Captured, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "recipes", "show", "table5-ensemble")
    assert "16.87 % on the test images" in out
    code, _, err = run(capsys, "recipes", "show", "table5-ensemble", "--scale", "small")
    assert (code, "use --scale small with its members" in err) == (2, True)
    code, _, err = run(capsys, "draw", "table5-ensembl", "--out", str(tmp_path))
    assert (code, "table5-ensemble" in err) == (2, True)
    (tmp_path / "table3-model-a-relay.svg").mkdir()
    code, _, err = run(capsys, "draw", "table3-model-a-relay", "--scale", "tiny", "--out", str(tmp_path))
    assert code == 2
    assert "cannot read or write" in err
    code, _, err = run(capsys, "predict", str(tmp_path), "x.jpg")
    assert (code, "is not a run" in err) == (2, True)


@pytest.mark.parametrize("scale", ["paper", "small"])
@pytest.mark.parametrize("name", RECIPES)
def test_values_are_printed_as_set_takes_them(name: str, scale: Scale) -> None:
    recipe = at_scale(RECIPES[name], scale)
    shown = [(field, value, value_text(value)) for field, value, _ in recipe.fields()]
    kinds = {field: text for field, _, text in shown if field.endswith(".kind")}
    changed, problems = with_changes(recipe, [f"{k}={text}" for k, _, text in shown if k not in kinds])
    assert not problems
    assert [(field, value) for field, value, _ in changed.fields()] == [(field, value) for field, value, _ in shown]


def test_words_for_values() -> None:
    assert [value_text(v) for v in (True, None, 800_000, (7, 3), 0.3, "x", 256)] == [
        "true", "none", "800000", "7,3", "0.3", "x", "256",
    ]  # fmt: skip
