"""Hugging Face's Trainer with the example's `RelayTrainer`: updates, checkpoints, tied weights, checkpointing."""

import copy
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracle import assert_same, gradients_of
from relaybackprop import Plan, Relay, RelayLoss, TokenHead, Window
from relaybackprop.reference import reference_gradients

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Trainer warns of what it renames, and of pinned memory

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(8) % 5
WORDS = 31
TIED = "model.bert.embeddings.word_embeddings.weight"


@pytest.fixture
def example() -> ModuleType:
    return importlib.import_module("examples.hf_trainer")


def vit() -> Relay:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    plan = Plan(primary=Window(bottom="vit.layers.1"), auxiliary={"aux": Window(top="vit.layers.2")})
    model = transformers.ViTForImageClassification(config)
    return Relay(model, plan, {"aux": TokenHead(16, 5)}, output="logits").double()


def bert() -> Relay:
    """A masked language model with tied word embeddings and output weights."""
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    plan = Plan(primary=Window(bottom="bert.encoder.layer.1"), auxiliary={"aux": Window(top="bert.encoder.layer.2")})
    model = transformers.BertForMaskedLM(config)
    return Relay(model, plan, {"aux": TokenHead(16, WORDS, pool=None)}, output="logits").double()


def image_rows() -> list[dict[str, Any]]:
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]


def word_rows() -> list[dict[str, Any]]:
    words = torch.randint(3, WORDS, (8, 2, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": word, "labels": label} for word, label in words]


def over_words(scores: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())


def trainer_of(example: ModuleType, relay: Relay, folder: Path, **options: Any) -> Any:
    """Plain SGD with learning rate 1, one step over all rows unless options override it."""
    is_vit = isinstance(relay.model, transformers.ViTForImageClassification)
    defaults = {
        "per_device_train_batch_size": 8, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0,
        "lr_scheduler_type": "constant", "save_strategy": "no", "remove_unused_columns": False,
        "label_names": ["labels"], "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **defaults | options)
    rows = image_rows() if is_vit else word_rows()
    trainer = example.RelayTrainer(relay, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.criterion = RelayLoss(nn.CrossEntropyLoss() if is_vit else over_words)
    return trainer


class Gradients(transformers.TrainerCallback):
    """Return the gradients that the optimizer receives."""

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, *, model: Relay, **_: Any) -> None:
        self.seen = gradients_of(model)


def gradients_in(example: ModuleType, relay: Relay, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of one update."""
    trainer, gradients = trainer_of(example, relay, folder, **options), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.seen


def by_definition(relay: Relay, plan: Plan | None = None) -> dict[str, Tensor]:
    """Return the gradients over all rows in one batch."""
    vision = isinstance(relay.model, transformers.ViTForImageClassification)
    rows, criterion = (image_rows(), nn.functional.cross_entropy) if vision else (word_rows(), over_words)
    inputs = torch.stack([row["pixel_values" if vision else "input_ids"] for row in rows])
    labels = LABELS if vision else torch.stack([row["labels"] for row in rows])
    relay = copy.deepcopy(relay)
    if not vision:  # the reference counts a parameter in a window or out of it: give each use of the tied ones its own
        decoder = relay.model.cls.predictions.decoder
        decoder.weight = nn.Parameter(decoder.weight.detach().clone())

    def losses(outputs: dict[str, Any]) -> dict[str, Tensor]:
        return {name: criterion(getattr(output, "logits", output), labels) for name, output in outputs.items()}

    gradients = reference_gradients(relay.model, plan or relay.plan, dict(relay.heads.items()), losses, inputs)
    if not vision:
        gradients[TIED] += gradients.pop("model.cls.predictions.decoder.weight")
    return gradients


@pytest.mark.parametrize("build", [vit, bert], ids=["vit", "bert"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("accumulated", [1, 4])
def test_gradients_of_an_update(
    example: ModuleType, tmp_path: Path, build: Any, options: dict[str, bool], accumulated: int
) -> None:
    """For any gradient accumulation, and with activation checkpointing, in float64."""
    relay = build()
    expected, otherwise = by_definition(relay), by_definition(relay, relay.plan.multi_loss())
    sizes = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
    got = gradients_in(example, relay, tmp_path, **options, **sizes)
    assert_same(got, expected)
    is_checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in relay.modules())
    assert is_checkpointing == bool(options)
    with pytest.raises(AssertionError, match="relative error"):  # negative control: the windows matter
        assert_same(got, otherwise)


def test_a_model_that_seems_to_average_by_itself_gets_multiplied_gradients(example: ModuleType, tmp_path: Path) -> None:
    """Negative control of accumulation: Trainer without `Relay.accepts_loss_kwargs`."""
    relay = vit()
    relay.accepts_loss_kwargs = True
    expected = by_definition(relay)
    got = gradients_in(example, relay, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same(got, {name: 4 * gradient for name, gradient in expected.items()})


def test_checkpoints_of_tied_weights(example: ModuleType, tmp_path: Path) -> None:
    """Tied weights are saved, resume to the same result, and remain tied."""
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.1}
    torch.manual_seed(0)
    whole = bert()
    start = copy.deepcopy(whole.state_dict())
    trainer_of(example, whole, tmp_path / "a", **options, save_strategy="steps", save_steps=2).train()
    resumed = bert()
    resumed.load_state_dict(start)
    trainer = trainer_of(example, resumed, tmp_path / "a", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    decoder = resumed.model.cls.predictions.decoder.weight
    assert decoder is resumed.model.bert.embeddings.word_embeddings.weight
    assert not torch.equal(decoder, start["model.cls.predictions.decoder.weight"])
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_without_copies_safetensors_refuses_tied_weights(example: ModuleType, tmp_path: Path) -> None:
    """Negative control: if this fails, `RelayTrainer._save` is no longer needed."""

    class Uncured(example.RelayTrainer):
        _save = transformers.Trainer._save

    trainer = trainer_of(example, bert(), tmp_path)
    trainer.__class__ = Uncured
    with pytest.raises(RuntimeError, match="share memory"):
        trainer.save_model(str(tmp_path / "refused"))


def test_evaluation_is_the_plain_models(example: ModuleType, tmp_path: Path) -> None:
    relay = vit()
    trainer = trainer_of(example, relay, tmp_path, per_device_eval_batch_size=3)
    scores = relay.model.eval()(IMAGES).logits.detach()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(nn.functional.cross_entropy(scores, LABELS)))
    torch.testing.assert_close(torch.tensor(trainer.predict(image_rows()).predictions), scores)


@pytest.mark.slow
def test_the_example_learns_and_resumes(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped after an epoch and resumed has bitwise the weights of an uninterrupted run."""
    options = {"epochs": 2, "disable_tqdm": True, "use_cpu": True}
    error = example.main(str(tmp_path / "whole"), **options)
    assert error < 20.0  # per cent; chance is 90
    with monkeypatch.context() as patch:
        patch.setattr(example.RelayTrainer, "training_step", stopping_after(43, example.RelayTrainer.training_step))
        with pytest.raises(KeyboardInterrupt):
            example.main(str(tmp_path / "parts"), **options)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint-43"]
    assert example.main(str(tmp_path / "parts"), **options) == error
    load = transformers.ViTForImageClassification.from_pretrained
    whole, parts = (load(tmp_path / name / "model").state_dict() for name in ("whole", "parts"))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def stopping_after(updates: int, step: Any) -> Any:
    def stopping(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == updates:
            raise KeyboardInterrupt
        return step(trainer, *args, **kwargs)

    return stopping
