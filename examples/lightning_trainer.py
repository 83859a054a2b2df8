"""Relay backpropagation with Lightning: `python examples/lightning_trainer.py`, after `pip install lightning`.

Learns handwritten digits in seconds, on one core. Only the two steps differ from ordinary code: in training the relay
returns one output per loss, in validation the plain output. Also requires scikit-learn.
"""

import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from relaybackprop import Plan, Relay, RelayLoss, Window


def digits() -> list[Subset]:
    """Return training and test data: 1797 images of 8x8 pixels in ten classes, a quarter of them for testing."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return random_split(TensorDataset(images, torch.tensor(labels)), [0.75, 0.25])


def make_relay() -> Relay:
    """Build a plain network with the windows of its two losses and the head of the auxiliary loss."""
    sizes = [(1, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    convs = [nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU()) for i, o in sizes]
    for conv, _ in convs:
        nn.init.kaiming_normal_(conv.weight)  # without batch norm, PyTorch's default initialisation learns slowly
    model = nn.Sequential(*convs[:3], nn.MaxPool2d(2), *convs[3:], nn.Flatten(), nn.Linear(64 * 4 * 4, 10))
    # The auxiliary loss alone trains layers 0 and 1, the primary loss alone 5 to 7, and both train 2 to 4.
    plan = Plan(primary=Window(bottom="2"), auxiliary={"aux": Window(top="4")})
    return Relay(model, plan, heads={"aux": nn.Sequential(nn.Flatten(), nn.Linear(64 * 4 * 4, 10))})


class LitDigits(lightning.LightningModule):
    """A module with automatic optimization: there is one loss, with one `backward()`."""

    def __init__(self) -> None:
        super().__init__()
        self.relay = make_relay()
        self.criterion = RelayLoss(nn.CrossEntropyLoss())

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the weighted loss. In training mode the relay returns the outputs of all losses."""
        images, labels = batch
        output = self.relay(images)
        with torch.no_grad():
            terms = self.criterion.terms(output, labels)  # unweighted
        self.log_dict({f"loss_{name}": term for name, term in terms.items()}, prog_bar=True)
        return self.criterion(output, labels)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Log the error rate in per cent. In evaluation mode the relay is the plain model."""
        images, labels = batch
        wrong = self.relay(images).argmax(dim=1) != labels
        self.log("error", 100 * wrong.float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer for all parameters, including the head's."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main(epochs: int = 6) -> float:
    """Train and test. Returns the test error in per cent."""
    warnings.filterwarnings("ignore", ".*does not have many workers")  # workers are not needed: the data is in memory
    torch.manual_seed(0)
    train, test = digits()
    # With several processes and a sampler that divides its stream itself, such as relaylab.data's, also set
    # use_distributed_sampler=False. Otherwise Lightning would divide each process's share again.
    trainer = lightning.Trainer(max_epochs=epochs, gradient_clip_val=5.0, logger=False, enable_checkpointing=False)
    trainer.fit(LitDigits(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=256))
    error = float(trainer.callback_metrics["error"])
    print(f"test error {error:.1f} %")
    return error


if __name__ == "__main__":
    main()
