"""Relay backpropagation in timm: `python examples/timm_task.py train.py --data-dir DATA --model resnet50 ...`.

timm's unmodified training script, from timm's repository, trains a relay: this example replaces its
`ClassificationTask` before it runs. EMA, DDP, AMP, accumulation, mixup, layer decay and checkpoints are timm's. Without
a script, a small network learns handwritten digits in seconds. Requires scikit-learn and `pip install "timm>=1.0.27"`.
"""

import runpy
import sys
from typing import Any

import timm.task
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from relaybackprop import Relay, RelayLoss, head_for, suggest_plan


def make_relay(model: nn.Module) -> Relay:
    """Build a relay for any timm classifier, with suggested windows for its input size and matching heads."""
    images = torch.empty(2, *model.pretrained_cfg["input_size"], device=next(model.parameters()).device)
    plan = suggest_plan(model, images).plan
    return Relay(model, plan, head_for(model, plan, images, model.num_classes))


class RelayTask(timm.task.ClassificationTask):
    """Trains the relay. Tests and saves the plain model and its EMA, with the heads as the task's state."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(make_relay(model), *args, **kwargs)
        self.criterion = RelayLoss(self.criterion)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the weighted sum of all losses, and the model's output."""
        output = self.trainable_module(input)
        return {"loss": self.criterion(output, target), "output": output.primary}

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the plain model."""
        module = module or self.get_trainable_module(ema)
        return module and unwrap_model(module).model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the heads' weights, for resuming."""
        return {"heads": unwrap_model(module or self.get_trainable_module(ema)).heads.state_dict()}

    def load_task_state(self, state: Any, strict: bool = True, module: Any = None, ema: bool = False) -> None:
        """Load the heads' weights, if the checkpoint has any."""
        if state:
            unwrap_model(module or self.get_trainable_module(ema)).heads.load_state_dict(state["heads"], strict)


def main(epochs: int = 4) -> float:
    """Train on three quarters of 1797 images, and test the plain model. Returns the test error in per cent."""
    torch.manual_seed(0)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
    train, test = random_split(TensorDataset(images, labels), [0.75, 0.25])
    task = RelayTask(timm.create_model("test_resnet", num_classes=10), nn.CrossEntropyLoss())
    optimizer = create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.02, weight_decay=1e-4)
    for _ in range(epochs):
        task.train()
        for batch in DataLoader(train, batch_size=32, shuffle=True):
            task(*batch)["loss"].backward()  # each loss reaches only its own window
            optimizer.step()
            optimizer.zero_grad()
    images, labels = test[:]
    return 100 * (task.get_eval_model().eval()(images).argmax(dim=1) != labels).float().mean().item()


if __name__ == "__main__":
    timm.task.ClassificationTask = RelayTask  # train.py looks it up there
    if len(sys.argv) > 1:
        runpy.run_path(sys.argv.pop(1), run_name="__main__")
    else:
        print(f"test error {main():.1f} %")
