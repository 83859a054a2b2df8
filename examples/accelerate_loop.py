"""Relay backpropagation with Hugging Face Accelerate: `python examples/accelerate_loop.py`, or `accelerate launch`.

Learns handwritten digits in seconds, on one core, with gradients accumulated over two batches. Accelerate prepares the
relay like any model. Requires scikit-learn and `pip install accelerate`.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
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


def train_epoch(accelerator: Accelerator, relay: nn.Module, criterion: RelayLoss, optimizer, loader) -> float:
    """Train for one epoch, and return the mean loss."""
    relay.train()
    total = 0.0
    for images, labels in loader:
        with accelerator.accumulate(relay):
            loss = criterion(relay(images), labels)  # the weighted sum of both losses
            accelerator.backward(loss)  # each loss reaches only its own window
            optimizer.step()  # no-ops until enough batches are accumulated
            optimizer.zero_grad()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def error_of(accelerator: Accelerator, relay: nn.Module, loader: DataLoader) -> float:
    """Return the error rate over all processes, in per cent."""
    relay.eval()  # in evaluation mode the relay is the plain model
    wrong = [accelerator.gather_for_metrics(relay(images).argmax(dim=1) != labels) for images, labels in loader]
    return 100 * torch.cat(wrong).float().mean().item()


def main(epochs: int = 6) -> float:
    """Train and test. Returns the test error in per cent."""
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    train, test = digits()
    relay = make_relay()
    criterion = RelayLoss(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(relay.parameters(), lr=0.02, momentum=0.9)  # the head's parameters too
    loaders = DataLoader(train, batch_size=16, shuffle=True), DataLoader(test, batch_size=256)
    relay, optimizer, train_loader, test_loader = accelerator.prepare(relay, optimizer, *loaders)
    for epoch in range(epochs):
        loss = train_epoch(accelerator, relay, criterion, optimizer, train_loader)
        accelerator.print(f"epoch {epoch + 1}: loss {loss:.3f}")
    error = error_of(accelerator, relay, test_loader)
    accelerator.print(f"test error {error:.1f} %")
    return error


if __name__ == "__main__":
    main()
