"""Distributed validation during training: errors on single centre crops."""

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
GPU_PIXELS = 1000 * 64**2  # per batch: keeps a GPU busy, with less memory than a training step


def batch_size(dataset: ImageDataset, device: torch.device) -> int:
    """Return the batch size for validation: small if workers decode images, which prefetch several batches each."""
    if device.type == "cpu" or not isinstance(dataset, InMemoryDataset):
        return CPU_BATCH
    return max(CPU_BATCH, GPU_PIXELS // dataset.crop_spec.size**2)


class Validation:
    """Distributed validation: each process evaluates a share of the images, and all return the same results.

    Top-k errors are means over images. For multi-label images, all scores are gathered in every process to compute the
    mean average precision.

    Args:
        dataset: all validation images.
        augment: augmentation, used in evaluation mode.
        criterion: mean loss of a batch.
        fabric: the Fabric object of this process.
    """

    def __init__(self, dataset: ImageDataset, augment: Augmentation, criterion: nn.Module, fabric: Fabric):
        self._labels, ranks = dataset.labels, fabric.world_size
        count = len(self._labels)
        share = np.arange(fabric.global_rank, count, ranks, dtype=np.int64)
        self._share, self._count = len(share), count
        # All processes have the same number of images, padded with the first one, since FSDP forward passes are
        # collective.
        padded = np.concatenate([share, np.zeros(-(-count // ranks) - len(share), np.int64)])
        self._dataset = dataset.subset(padded) if ranks > 1 else dataset
        self._augment, self._criterion, self._fabric = augment, criterion, fabric

    def read_all(self) -> None:
        """Read all images before the first step, to fail early.

        Raises:
            InputError: an image cannot be read; the message states which.
        """
        for _ in self._batches():
            pass

    def _batches(self) -> Iterable[Batch]:
        return self._dataset.evaluation(batch_size(self._dataset, self._fabric.device))

    def __call__(self, relay: Relay, watch: Callable[[float], None] = lambda _share: None) -> dict[str, float]:
        """Evaluate a network and restore its mode.

        Args:
            relay: the network.
            watch: called with the fraction of images done.

        Returns:
            In per cent, "top1" and "top5", or "map" and "map_error" for multi-label images; and "loss", the mean over
            images.
        """
        was_training = relay.training
        relay.eval()
        self._augment.eval()
        _share_buffers(relay, self._fabric)
        done = 0
        sums: Tensor | float = 0.0  # of errors and losses, on the device: one synchronisation, at the end
        has_several, all_scores = self._labels.ndim == 2, list[Tensor]()
        try:
            with torch.no_grad(), self._fabric.autocast():
                for batch in self._batches():
                    images = self._augment(batch.images.to(self._fabric.device, non_blocking=True))
                    labels = batch.labels.to(self._fabric.device, non_blocking=True)
                    scores = relay(images).float()
                    count = min(len(labels), self._share - done)  # without padding
                    if count > 0:
                        loss = self._criterion(scores[:count], labels[:count]) * count
                        wrong = [] if has_several else _wrong(scores[:count], labels[:count])
                        sums = sums + torch.stack([*wrong, loss]).double()
                    all_scores += [scores] if has_several else []
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
            share = average_precision(self._gathered(all_scores), torch.from_numpy(np.array(self._labels)))
            return {MAP_ERROR: round(100 * (1 - share), 4), MAP: round(100 * share, 4), "loss": loss}
        return {**{name: round(100 * share, 4) for name, share in zip(TOP, wrong, strict=True)}, "loss": loss}

    def _gathered(self, parts: Sequence[Tensor]) -> Tensor:
        """Gather the scores of all images in order, (n, classes) on the CPU."""
        scores, ranks = torch.cat(list(parts)), self._fabric.world_size
        if ranks > 1:  # row j of process r is image j * ranks + r
            scores = cast(Tensor, self._fabric.all_gather(scores)).transpose(0, 1).flatten(0, 1)
        return scores[: self._count].cpu()


def _wrong(scores: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the numbers of top-1 and top-5 errors."""
    ranks = label_ranks(scores, labels)
    return [(ranks >= top).sum() for top in TOP.values()]


def _share_buffers(module: nn.Module, fabric: Fabric) -> None:
    """Broadcast the buffers of the first process, since local batch statistics differ between processes."""
    if fabric.world_size > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)
