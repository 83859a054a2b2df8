"""Errors on the validation images while a network is trained: single centre crop, all processes together."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import distributed, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from relaybackprop import Relay
from relaylab.data.augment import Augmentation
from relaylab.data.batches import Batch
from relaylab.data.parts import InMemory, Part

CPU_BATCH = 64  # images; larger batches fall out of the caches
GPU_PIXELS = 1000 * 64**2  # of a batch: enough to keep a GPU busy, and little beside what a training step needs


def batch_size(part: Part, device: torch.device) -> int:
    """How many images a network is tested on at once.

    Args:
        part: of the data. Batches of images that workers decode are small: several for each worker are in memory.
        device: of the network.
    """
    if device.type == "cpu" or not isinstance(part, InMemory):
        return CPU_BATCH
    return max(CPU_BATCH, GPU_PIXELS // part.view.size**2)


class Validation:
    """The validation images of one process, and the errors on all of them.

    Args:
        part: of the data; every process has all of it, and looks at its share.
        augment: in evaluation mode it normalises.
        criterion: of one output, for the loss.
        num_classes: of the network.
        fabric: the engine.
    """

    def __init__(self, part: Part, augment: Augmentation, criterion: nn.Module, num_classes: int, fabric: Fabric):
        count, ranks = len(part.labels), fabric.world_size
        share = np.arange(fabric.global_rank, count, ranks, dtype=np.int64)
        self._own = len(share)
        # Every process goes through as many images, the last one twice if need be: FSDP gathers parameters as it goes.
        padded = np.concatenate([share, np.zeros(-(-count // ranks) - len(share), np.int64)])
        self._part = part.some(padded) if ranks > 1 else part
        self._augment, self._criterion, self._fabric = augment, criterion, fabric
        self._errors = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, top_k=1, average="micro", validate_args=False),
                "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            }
        ).to(fabric.device)
        self._loss = MeanMetric(nan_strategy="disable").to(fabric.device)  # one that is not a number has to be seen

    def read_all(self) -> None:
        """Look whether all images can be read: before the first step, rather than after the first thousands.

        Raises:
            InputError: one that cannot be; it is named.
        """
        for _ in self._batches():
            pass

    def _batches(self) -> Iterable[Batch]:
        return self._part.evaluation(batch_size(self._part, self._fabric.device))

    def __call__(self, relay: Relay, watch: Callable[[float], None] = lambda _share: None) -> dict[str, float]:
        """The errors, in per cent, and the mean loss. Afterwards the mode is as before.

        Args:
            relay: what is trained.
            watch: is told what share of the images is done.
        """
        was_training = relay.training
        relay.eval()
        self._augment.eval()
        self._errors.reset()
        self._loss.reset()
        _share_buffers(relay, self._fabric)
        done = 0
        try:
            with torch.no_grad(), self._fabric.autocast():
                for batch in self._batches():
                    images = self._augment(batch.images.to(self._fabric.device, non_blocking=True))
                    labels = batch.labels.to(self._fabric.device, non_blocking=True)
                    scores = relay(images).float()
                    some = min(len(labels), self._own - done)
                    if some > 0:
                        self._errors.update(scores[:some], labels[:some])
                        self._loss.update(self._criterion(scores[:some], labels[:some]), some)
                    done += len(labels)
                    watch(done / len(self._part.labels))
        finally:
            relay.train(was_training)
            self._augment.train()
        right = {name: float(value) for name, value in self._errors.compute().items()}
        errors = {name: round(100 * (1 - value), 4) for name, value in right.items()}  # they come in single precision
        return {**errors, "loss": float(self._loss.compute())}


def _share_buffers(module: nn.Module, fabric: Fabric) -> None:
    """The first process's buffers, for all: with local batch normalisation each has statistics of its own."""
    if fabric.world_size > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)
