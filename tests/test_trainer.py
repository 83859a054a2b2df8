"""Hugging Face's Trainer, unmodified but for `compute_loss`: the same update however the batch is accumulated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from relaybackprop import Plan, Relay, RelayLoss, Window

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
PLAN = Plan(primary=Window(bottom="vit.layers.1"), auxiliary={"aux": Window(top="vit.layers.2")})


class MeanHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(tokens.mean(1))


class RelayTrainer(transformers.Trainer):
    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        def loss_of(output: Any, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(getattr(output, "logits", output), labels)

        loss = RelayLoss(loss_of)(model(pixel_values=inputs["pixel_values"]), inputs["labels"])
        return (loss, None) if return_outputs else loss


def updates(folder: Path, accumulated: int, *, averages_itself: bool = False) -> dict[str, Tensor]:
    """The first update of each parameter by plain SGD of rate 1, for a batch of 8."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    relay = Relay(transformers.ViTForImageClassification(config), PLAN, {"aux": MeanHead()})
    if averages_itself:
        relay.accepts_loss_kwargs = True
    before = {name: parameter.detach().clone() for name, parameter in relay.named_parameters()}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8 // accumulated, gradient_accumulation_steps=accumulated, max_steps=1,
        optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0, remove_unused_columns=False,
        label_names=["labels"], use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, data_seed=1,
    )  # fmt: skip
    images = torch.rand(8, 3, 16, 16)
    data = [{"pixel_values": image, "labels": label % 5} for label, image in enumerate(images)]
    RelayTrainer(model=relay, args=arguments, train_dataset=data).train()
    return {name: parameter.detach() - before[name] for name, parameter in relay.named_parameters()}


@pytest.mark.filterwarnings("ignore")
def test_accumulated_batches_give_the_update_of_one_batch(tmp_path: Path) -> None:
    once, in_parts = updates(tmp_path, 1), updates(tmp_path, 4)
    for name, update in once.items():
        torch.testing.assert_close(in_parts[name], update, rtol=1e-4, atol=1e-6, msg=name)
    multiplied = updates(tmp_path, 4, averages_itself=True)  # negative control: as Trainer does without being told
    name = "model.classifier.weight"
    assert multiplied[name].norm() > 3 * once[name].norm()
