"""Relay backpropagation in MONAI: `python examples/monai_segmentation.py`, after `pip install monai`.

Trains a deeply supervised U-Net to segment balls in small noisy volumes, in half a minute on one core. Its skip
connections enter the primary window from the side, so this window has several ends. MONAI's `DeepSupervisionLoss`
accepts both inputs of the criterion: the list of the network's outputs, and the output of the auxiliary head.
"""

import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.metrics import compute_dice
from monai.networks.nets import SegResNetDS
from torch.utils.data import DataLoader, TensorDataset

from relaybackprop import Plan, Relay, RelayLoss, Window, head_for


def balls(count: int, side: int = 16) -> TensorDataset:
    """Return noisy volumes (1, D, H, W) with one ball each, and their labels."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij"))
    centres, radii = torch.randint(4, side - 4, (count, 3, 1, 1, 1)), torch.randint(2, 6, (count, 1, 1, 1))
    labels = ((grid - centres).square().sum(dim=1) < radii**2).unsqueeze(1).float()
    return TensorDataset(labels + 0.7 * torch.randn(labels.shape), labels)


def make_relay() -> Relay:
    """Build a network of three levels with a dense head on the lower level of its decoder."""
    model = SegResNetDS(in_channels=1, out_channels=2, init_filters=8, blocks_down=(1, 2, 2), dsdepth=2)
    # The primary loss trains the decoder. Its window ends at all outputs of the encoder that the decoder reads. The
    # auxiliary loss trains the encoder and the lower level of the decoder.
    levels = tuple(f"encoder.layers.{level}.blocks" for level in (2, 1, 0))
    plan = Plan(primary=Window(after=levels), auxiliary={"aux": Window(top="up_layers.0.blocks")})
    return Relay(model, plan, head_for(model, plan, torch.empty(2, 1, 16, 16, 16), num_classes=2))


def train_epoch(relay: Relay, criterion: RelayLoss, optimizer: torch.optim.Optimizer, loader: DataLoader) -> float:
    """Train for one epoch, and return the mean loss."""
    relay.train()
    total = 0.0
    for volumes, labels in loader:
        loss = criterion(relay(volumes), labels)  # the weighted sum of both losses
        loss.backward()  # each loss reaches only its own window
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / len(loader)


@torch.no_grad()
def dice_of(relay: Relay, test: TensorDataset) -> float:
    """Return the mean Dice coefficient."""
    volumes, labels = test.tensors
    prediction = relay.eval()(volumes).argmax(dim=1, keepdim=True)  # the plain network: one output
    return compute_dice(prediction, labels).mean().item()


def main(epochs: int = 6) -> float:
    """Train and test. Returns the mean Dice coefficient."""
    torch.manual_seed(0)
    train, test = balls(128), balls(32)
    relay = make_relay()
    criterion = RelayLoss(DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True)))
    optimizer = torch.optim.AdamW(relay.parameters(), lr=3e-3)
    for epoch in range(epochs):
        loss = train_epoch(relay, criterion, optimizer, DataLoader(train, batch_size=8, shuffle=True))
        print(f"epoch {epoch + 1}: loss {loss:.3f}")
    dice = dice_of(relay, test)
    print(f"Dice {dice:.3f}")
    return dice


if __name__ == "__main__":
    main()
