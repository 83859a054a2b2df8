"""Early release: `python examples/early_release.py`, or `torchrun --nproc-per-node 2 examples/early_release.py`.

Learns handwritten digits in seconds, with the peak memory of the largest window: a deep network with as many branches
as a memory budget requires, and `Relay.forward_backward`, which also averages gradients over processes. Requires
scikit-learn.
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset, random_split

from relaybackprop import LinearHead, Plan, Relay, RelayLoss, cost, suggest_plan


class Residual(nn.Module):
    """A residual block of two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape, (batch, channels, height, width)."""
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def digits() -> list[Subset]:
    """Return training and test data: 1797 images of 8x8 pixels in ten classes, a quarter of them for testing."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return random_split(TensorDataset(images, torch.tensor(labels)), [0.75, 0.25])


def make_relay(budget: float = 0.4, batch: int = 32) -> Relay:
    """Build forty layers with windows that keep the peak within `budget` times that of standard backpropagation."""
    blocks = [Residual(16) for _ in range(20)]
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(16, 10))
    images = torch.empty(batch, 1, 8, 8)
    peak = cost(model, Plan(), images).peaks["standard"]
    suggestion = suggest_plan(model, images, memory_budget=int(budget * peak))
    return Relay(model, suggestion.plan, {name: LinearHead(16, 10) for name in suggestion.head_inputs})


def main(epochs: int = 6) -> float:
    """Train, and test the plain model. Returns the test error in per cent."""
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    torch.manual_seed(0)  # the same network and the same split in all processes
    train, test = digits()
    sampler = DistributedSampler(train) if dist.is_initialized() else None
    loader = DataLoader(train, 32, shuffle=sampler is None, sampler=sampler, drop_last=True)
    relay = make_relay()
    criterion = RelayLoss(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(relay.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)  # batch statistics settle at small rates
    for epoch in range(epochs):
        losses = []
        for images, labels in loader:
            losses.append(relay.forward_backward(images, target=labels, loss=criterion).loss)  # forward and backward
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.3f}, {len(relay.heads)} branches")
    model = relay.model.eval()
    with torch.no_grad():
        wrong = [model(images).argmax(dim=1) != labels for images, labels in DataLoader(test, batch_size=256)]
    error = 100 * torch.cat(wrong).float().mean().item()
    print(f"test error {error:.1f} %")
    if dist.is_initialized():
        dist.destroy_process_group()
    return error


if __name__ == "__main__":
    main()
