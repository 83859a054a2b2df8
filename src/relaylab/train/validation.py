"""Validation during training: errors on single centre crops, by all processes together."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, distributed, nn

from relaybackprop import Relay
from relaylab.data.augment import Augmentation
from relaylab.data.batches import Batch
from relaylab.data.datasets import ImageDataset, InMemoryDataset
from relaylab.train.metrics import MAP, MAP_ERROR, TOP, average_precision, label_ranks

CPU_BATCH = 64  # images; larger batches exceed the caches
GPU_PIXELS = 1000 * 64**2  # of a batch: enough to keep a GPU busy, and less memory than a training step


def batch_size(dataset: ImageDataset, device: torch.device) -> int:
    """Return the batch size for validation: small where workers decode, with several batches for each in memory."""
    if device.type == "cpu" or not isinstance(dataset, InMemoryDataset):
        return CPU_BATCH
    return max(CPU_BATCH, GPU_PIXELS // dataset.crop_spec.size**2)


class Validation:
    """Distributed validation: each process evaluates a share of the images; the results are those of all of them.

    Every process opens all images, and evaluates its share; `criterion` is the mean loss of a batch. Top-k errors are
    means over images. Average precision, where images have several labels, needs all scores in every process.
    """

    def __init__(self, dataset: ImageDataset, augment: Augmentation, criterion: nn.Module, fabric: Fabric):
        self._labels, ranks = dataset.labels, fabric.world_size
        count = len(self._labels)
        share = np.arange(fabric.global_rank, count, ranks, dtype=np.int64)
        self._own, self._count = len(share), count
        # Every process has as many images, padded with the first: FSDP gathers parameters in each forward pass.
        padded = np.concatenate([share, np.zeros(-(-count // ranks) - len(share), np.int64)])
        self._dataset = dataset.subset(padded) if ranks > 1 else dataset
        self._augment, self._criterion, self._fabric = augment, criterion, fabric

    def read_all(self) -> None:
        """Read all images before the first step, rather than fail after thousands of them.

        Raises:
            InputError: an image that cannot be read; it is named.
        """
        for _ in self._batches():
            pass

    def _batches(self) -> Iterable[Batch]:
        return self._dataset.evaluation(batch_size(self._dataset, self._fabric.device))

    def __call__(self, relay: Relay, watch: Callable[[float], None] = lambda _share: None) -> dict[str, float]:
        """Return the errors in per cent, and the mean loss over all images. The mode is restored.

        The errors are top-1 and top-5, or 100 minus the mean average precision, with that itself.
        `watch` is called with the share of images done.
        """
        was_training = relay.training
        relay.eval()
        self._augment.eval()
        _share_buffers(relay, self._fabric)
        done = 0
        sums: Tensor | float = 0.0  # of errors and losses over images; one synchronisation, at the end
        has_several, kept = self._labels.ndim == 2, list[Tensor]()
        try:
            with torch.no_grad(), self._fabric.autocast():
                for batch in self._batches():
                    images = self._augment(batch.images.to(self._fabric.device, non_blocking=True))
                    labels = batch.labels.to(self._fabric.device, non_blocking=True)
                    scores = relay(images).float()
                    own = min(len(labels), self._own - done)
                    if own > 0:
                        loss = self._criterion(scores[:own], labels[:own]) * own
                        wrong = [] if has_several else _wrong(scores[:own], labels[:own])
                        sums = sums + torch.stack([*wrong, loss]).double()
                    kept += [scores] if has_several else []
                    done += len(labels)
                    watch(done / -(-self._count // self._fabric.world_size))
        finally:
            relay.train(was_training)
            self._augment.train()
        if not isinstance(sums, Tensor):  # more processes than images
            counted = 1 if has_several else len(TOP) + 1
            sums = torch.zeros(counted, dtype=torch.float64, device=self._fabric.device)
        *wrong, loss = (cast(Tensor, self._fabric.all_reduce(sums, reduce_op="sum")) / self._count).tolist()
        if has_several:
            share = average_precision(self._gathered(kept), torch.from_numpy(np.array(self._labels)))
            return {MAP_ERROR: round(100 * (1 - share), 4), MAP: round(100 * share, 4), "loss": loss}
        return {**{name: round(100 * share, 4) for name, share in zip(TOP, wrong, strict=True)}, "loss": loss}

    def _gathered(self, kept: Sequence[Tensor]) -> Tensor:
        """Return the scores of all images in order, (n, classes) on the CPU, from those of each process's share."""
        scores, ranks = torch.cat(list(kept)), self._fabric.world_size
        if ranks > 1:  # row j of process r is image j * ranks + r
            scores = cast(Tensor, self._fabric.all_gather(scores)).transpose(0, 1).flatten(0, 1)
        return scores[: self._count].cpu()


def _wrong(scores: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the numbers of top-1 and of top-5 errors."""
    ranks = label_ranks(scores, labels)
    return [(ranks >= top).sum() for top in TOP.values()]


def _share_buffers(module: nn.Module, fabric: Fabric) -> None:
    """Broadcast the first process's buffers: with local batch normalisation each has its own statistics."""
    if fabric.world_size > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)
