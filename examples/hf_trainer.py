"""Relay backpropagation with Hugging Face's Trainer: `python examples/hf_trainer.py [FOLDER]`.

Trains a small ViT on handwritten digits, in half a minute on one core. It evaluates and saves after each epoch, and
resumes from the last checkpoint in FOLDER. `RelayTrainer` supports any model, including models with tied weights.
Requires scikit-learn and `pip install transformers accelerate`.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed
from transformers.trainer_utils import get_last_checkpoint

from relaybackprop import Relay, RelayLoss, head_for, suggest_plan


class RelayTrainer(Trainer):
    """A Trainer that computes a relay's loss, and supports tied weights in checkpoints."""

    criterion = RelayLoss(nn.CrossEntropyLoss())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """Return the weighted sum of all losses in training; in evaluation the primary loss, and the model's output."""
        output = model(**{name: value for name, value in inputs.items() if name != "labels"})
        loss = self.criterion(output, inputs["labels"])
        return (loss, {"logits": output}) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save a copy of each tensor, since safetensors rejects tied weights, which share memory."""
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: tensor.clone() for name, tensor in state_dict.items()})


def digits() -> tuple[list[dict], list[dict]]:
    """Return training and test data: 1797 images of 8x8 pixels in ten classes, a quarter of them for testing."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    return rows[450:], rows[:450]


def make_relay() -> Relay:
    """Build a ViT of six blocks with suggested windows and a matching head."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1, **sizes)
    model, example = ViTForImageClassification(config), {"pixel_values": torch.empty(2, 1, 8, 8)}
    plan = suggest_plan(model, example).plan
    return Relay(model, plan, head_for(model, plan, example, num_classes=10), output="logits")


def error_of(prediction: EvalPrediction) -> dict[str, float]:
    """Return the error rate in per cent."""
    return {"error": 100 * float((prediction.predictions.argmax(axis=1) != prediction.label_ids).mean())}


def main(folder: str, epochs: int = 4, **options: Any) -> float:
    """Train or resume, and save the plain model. Returns the test error in per cent."""
    set_seed(0)
    arguments = TrainingArguments(
        folder, num_train_epochs=epochs, per_device_train_batch_size=16, gradient_accumulation_steps=2,
        learning_rate=2e-3, eval_strategy="epoch", save_strategy="epoch", save_total_limit=1, report_to="none",
        remove_unused_columns=False,  # a relay accepts any argument, so Trainer cannot infer the used columns
        label_names=["labels"], **options,  # or the labels
    )  # fmt: skip
    train, test = digits()
    trainer = RelayTrainer(make_relay(), arguments, train_dataset=train, eval_dataset=test, compute_metrics=error_of)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).is_dir() else None)
    trainer.model.model.save_pretrained(Path(folder, "model"))  # the plain model, for from_pretrained()
    return trainer.evaluate()["eval_error"]


if __name__ == "__main__":
    print(f"test error {main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()):.1f} %")
