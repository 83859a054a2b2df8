"""The program of each process in test_lightning.py, started by torchrun: Lightning's DDP, twice."""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples.lightning_trainer import LitDigits
from relaylab.data.sampling import ClassAwareSampler

BATCH, EPOCHS = 8, 2
LABELS = torch.arange(10).repeat_interleave(torch.arange(1, 11))  # 55 images, from 1 to 10 of a class


class Recorded(LitDigits):
    """The example, on class-aware batches of synthetic images, which are numbered."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.double()
        self.draws: list[Tensor] = []

    def train_dataloader(self) -> DataLoader:
        rank, replicas = self.trainer.global_rank, self.trainer.world_size
        images = torch.rand(len(LABELS), 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        data = TensorDataset(images, LABELS, torch.arange(len(LABELS)))
        sampler = ClassAwareSampler(LABELS, seed=0, rank=rank, num_replicas=replicas, num_samples=48 // replicas)
        return DataLoader(data, BATCH // replicas, sampler=sampler)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels, numbers = batch
        self.draws.append(numbers)
        return self.criterion(self.relay(images), labels)


def train(folder: Path, **options: Any) -> dict[str, Any]:
    """The images that this process has seen, in order, and the weights in the end."""
    warnings.simplefilter("ignore")
    module = Recorded()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module)
    return {"draws": torch.cat(module.draws), "weights": module.relay.state_dict()}


def main(folder: Path) -> None:
    for name in ("own", "replaced"):
        result = train(folder, devices=2, strategy="ddp", use_distributed_sampler=name == "replaced")
        torch.save(result, folder / f"{name}-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
