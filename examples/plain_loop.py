"""Relay backpropagation in a plain PyTorch loop: `python examples/plain_loop.py [model.safetensors]`.

Learns handwritten digits in seconds, on one core. With a file name as argument, it saves the trained model without the
head. Requires scikit-learn and safetensors; `pip install ".[lab]"` installs both.
"""

import sys

import torch
from safetensors.torch import save_file
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


def train_epoch(relay: Relay, criterion: RelayLoss, optimizer: torch.optim.Optimizer, loader: DataLoader) -> float:
    """Train for one epoch, and return the mean loss."""
    relay.train()
    total = 0.0
    for images, labels in loader:
        loss = criterion(relay(images), labels)  # the weighted sum of both losses
        loss.backward()  # each loss reaches only its own window
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def error_of(model: nn.Module, loader: DataLoader) -> float:
    """Return the error rate in per cent."""
    model.eval()
    wrong = [model(images).argmax(dim=1) != labels for images, labels in loader]
    return 100 * torch.cat(wrong).float().mean().item()


def main(epochs: int = 6, save_to: str | None = None) -> float:
    """Train, and test the plain model. Returns the test error in per cent."""
    torch.manual_seed(0)
    train, test = digits()
    loader = DataLoader(train, batch_size=32, shuffle=True)
    relay = make_relay()
    criterion = RelayLoss(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(relay.parameters(), lr=0.02, momentum=0.9)  # the head's parameters too
    for epoch in range(epochs):
        print(f"epoch {epoch + 1}: loss {train_epoch(relay, criterion, optimizer, loader):.3f}")
    model = relay.model  # the plain network, with its own parameters and names, without the head
    error = error_of(model, DataLoader(test, batch_size=256))
    print(f"test error {error:.1f} %")
    if save_to is not None:
        save_file(model.state_dict(), save_to)
    return error


if __name__ == "__main__":
    main(save_to=sys.argv[1] if len(sys.argv) > 1 else None)
