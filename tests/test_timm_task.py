"""The example for timm: its task trains the relay, and tests, averages and saves the plain model."""

import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracle import assert_same, gradients_of
from relaybackprop import Plan
from relaybackprop.errors import CompiledOverlapError
from relaybackprop.reference import reference_gradients

timm = pytest.importorskip("timm", minversion="1.0.27", reason="timm is not installed, or has no tasks with a state")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

SIZES = {"in_chans": 1, "num_classes": 10, "pretrained_cfg_overlay": {"input_size": (1, 8, 8)}}
IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)

# The calls of timm's train.py, in its order, on one batch.
SCRIPT = """
import sys

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver

folder, images, labels = sys.argv[1], *torch.load(sys.argv[2])
sizes = {"in_chans": 1, "num_classes": 10, "pretrained_cfg_overlay": {"input_size": (1, 8, 8)}}
model = timm.create_model("test_resnet", **sizes)
device = torch.device("cpu")
task = ClassificationTask(model=model, criterion=LabelSmoothingCrossEntropy(0.1), device=device, dtype=None)
model, eval_model = task.get_trainable_module(), task.get_eval_model()
optimizer = create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=0.05, layer_decay=0.75)
task.setup_ema(decay=0.5)
saver = CheckpointSaver(model=model, optimizer=optimizer, checkpoint_dir=folder, recovery_dir=folder, task=task)
for update in range(3):
    model.train()
    with task.no_sync():
        (task(images, labels)["loss"] / 2).backward()
    (task(images, labels)["loss"] / 2).backward()
    torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    task.update_ema(step=update)
saver.save_checkpoint(0)
models = {"state_dict": eval_model, "state_dict_ema": task.get_eval_model(ema=True)}
with torch.no_grad():
    torch.save({name: model.eval()(images) for name, model in models.items()}, folder + "/scores")
"""


@pytest.fixture
def example() -> ModuleType:
    return importlib.import_module("examples.timm_task")


def test_the_example_learns(example: ModuleType) -> None:
    assert example.main(epochs=2) < 20.0  # per cent; chance is 90


@pytest.mark.parametrize(("name", "options"), [("test_resnet", {}), ("test_vit", {"img_size": 8, "patch_size": 2})])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_of_the_task(example: ModuleType, name: str, options: dict[str, int], checkpointing: bool) -> None:
    """Also with train.py's --grad-checkpointing, which it turns on before the task is built."""
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    model = timm.create_model(name, **SIZES, **options)
    model.set_grad_checkpointing(enable=checkpointing)
    task = example.RelayTask(model, criterion).double()
    task.get_trainable_module().train()
    relay, images = task.get_trainable_module(), IMAGES.double()

    def losses(outputs: dict[str, Any]) -> dict[str, Tensor]:
        return {name: criterion(scores, LABELS) for name, scores in outputs.items()}

    def by_definition(plan: Plan) -> dict[str, Tensor]:
        return reference_gradients(relay.model, plan, dict(relay.heads.items()), losses, images)

    result = task(images, LABELS)
    result["loss"].backward()
    got = gradients_of(relay)
    assert_same(got, by_definition(relay.plan))
    with pytest.raises(AssertionError, match="relative error"):  # negative control: the windows matter
        assert_same(got, by_definition(relay.plan.multi_loss()))
    assert torch.equal(result["output"], relay.model(images))  # batch normalisation uses the batch in training


def test_timms_script_trains_a_relay_and_saves_the_plain_model(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python examples/timm_task.py SCRIPT ...`, with a script that calls what timm's train.py calls."""
    script, batch = tmp_path / "train.py", tmp_path / "batch"
    script.write_text(SCRIPT)
    torch.save((IMAGES, LABELS), batch)
    monkeypatch.setattr(timm.task, "ClassificationTask", timm.task.ClassificationTask)  # puts it back afterwards
    monkeypatch.setattr(sys, "argv", [example.__file__, str(script), str(tmp_path), str(batch)])
    runpy.run_path(str(example.__file__), run_name="__main__")

    checkpoint, scores = (torch.load(tmp_path / name) for name in ("last.pth.tar", "scores"))
    for name, expected in scores.items():
        plain = timm.create_model("test_resnet", **SIZES).eval()
        plain.load_state_dict(checkpoint[name])  # strict: the plain model's names, and no heads
        assert torch.equal(plain(IMAGES), expected)
    assert not torch.equal(scores["state_dict"], scores["state_dict_ema"])

    resumed = example.RelayTask(timm.create_model("test_resnet", **SIZES))
    resumed.setup_ema()
    timm.task.resume_task_checkpoint(resumed, str(tmp_path / "last.pth.tar"))
    timm.task.load_task_ema_checkpoint(resumed, str(tmp_path / "last.pth.tar"))
    for ema, key in ((False, "task_state"), (True, "task_state_ema")):
        state = resumed.get_checkpoint_state(ema=ema)
        torch.testing.assert_close(state, {name: checkpoint[name] for name in state}, rtol=0, atol=0)
        assert state[key]["heads"]


def test_the_scripts_option_to_compile_is_refused(example: ModuleType) -> None:
    task = example.RelayTask(timm.create_model("test_resnet", **SIZES))
    task.compile(backend="eager")
    task.get_trainable_module().train()
    with pytest.raises(CompiledOverlapError, match="Compile modules outside overlaps"):
        task(IMAGES, LABELS)
