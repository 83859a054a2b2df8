"""The custom network example: its recipe, and the commands of its README."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("lightning_fabric", reason="needs the lab extra")

from relaylab import cli
from relaylab.models.building import build_relay
from relaylab.models.named import allow
from relaylab.recipes.files import read_recipe
from relaylab.recipes.schema import SCHEME_NAMES
from relaylab.report.verdict import Difference, mean_text, paired_differences

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "your_model"
SHORTER = (  # of the README's commands
    ("--epochs 20", "--epochs 1 --batch-size 20"),
    ("--epochs 5", "--epochs 1 --batch-size 20"),
    ("0.0003,0.001,0.003,0.01,0.03", "0.001,0.003"),
    ("0.00003,0.0001,0.0003", "0.0001,0.0003"),
    ("standard,multi-loss,relay,isolated", "standard,relay"),
    ("--seeds 0,1,2", "--seeds 0"),
)


def test_the_recipe_is_what_recipes_new_writes(tiny_images: Path, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "network.py", tmp_path)
    network = f"{tmp_path / 'network.py'}:small_resnet"
    out = tmp_path / "recipe.toml"
    options = ["--optimizer", "adamw", "--epochs", "20", "--batch-size", "128", "--size", "32"]
    assert cli.main(["recipes", "new", network, "--data", str(tiny_images), "--out", str(out), *options]) == 0
    committed, fresh = read_recipe(EXAMPLE / "recipe.toml"), read_recipe(out)
    assert committed.plan == fresh.plan
    assert committed.loss == fresh.loss
    assert committed.augmentation == fresh.augmentation
    same = ("algorithm", "lr", "betas", "weight_decay", "decay_norms_and_biases", "clip_norm", "schedule")
    assert [getattr(committed.optimizer, name) for name in same] == [getattr(fresh.optimizer, name) for name in same]
    assert committed.optimizer.iterations == 20 * (5000 // 128)
    allow(committed.network)
    assert list(build_relay(committed).heads) == ["aux"]


def test_the_results_are_those_of_the_record() -> None:
    found = json.loads((ROOT / "results" / "your-model.json").read_text())
    page = (ROOT / "results" / "your-model.md").read_text()
    assert all(f"- {line}\n" in page for line in found["verdict"])
    errors = {
        scheme: {run["seed"]: run["validations"][-1]["top1"] for run in found["runs"] if run["scheme"] == scheme}
        for scheme in SCHEME_NAMES
    }
    for scheme, own in errors.items():
        assert f"| {SCHEME_NAMES[scheme]} | 3 seeds | {mean_text(list(own.values()))} |" in page
    for pair in found["differences"]:
        values = paired_differences(errors[pair["ours"]], errors[pair["base"]])
        assert Difference(pair["ours"], pair["base"], tuple(values)).text == pair["text"]
    lines = {trial["point"][0]: trial["error"] for trial in found["tuning"]["choices"]["relay"]["trials"]}
    assert all(f"| Relay BP | {rate} | {error:.2f} |" in page for rate, error in lines.items())
    assert "4.44 [3.18, 5.71] points worse than" in " ".join((ROOT / "README.md").read_text().split())


@pytest.mark.slow
def test_the_commands_of_the_readme_lead_to_a_verdict(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(EXAMPLE / "network.py", tmp_path)
    (tmp_path / "images").symlink_to(tiny_images)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert [command.split()[1] for command in commands] == ["recipes", "compare", "report", "recipes", "compare"]
    for command in commands:
        for old, new in SHORTER:
            command = command.replace(old, new)
        if "--pretrained" in command:
            shutil.copy("comparison/relay-s0/model.safetensors", "weights.safetensors")
        assert cli.main(command.split()[1:]) == 0, command
    assert "Relay BP vs standard BP" in capsys.readouterr().out
    assert '<h2 id="tuning">Tuning</h2>' in Path("comparison/report.html").read_text()
    assert "averaged weights, top-1" in next(Path("runs").rglob("comparison.md")).read_text()
