"""Evaluate networks under each protocol, chunk by chunk, skipping existing chunks.

Note [Evaluation]
1. One loader reads the images of all missing chunks: its processes start once, and read the next chunk while the
   network evaluates the last images of this one.
2. Scores remain on the device until a chunk is complete. Copying each batch would make the host wait for the device
   before it could launch the next batch.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from itertools import chain, groupby, islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models import VGG

from relaylab.data.copying import to_device
from relaylab.data.decode import decode
from relaylab.data.faults import ImageFault
from relaylab.data.geometry import Pixels
from relaylab.data.loader import Workers
from relaylab.data.sources.source import Source
from relaylab.errors import InputError
from relaylab.evaluate.protocols import View, average, cut, mirrored
from relaylab.evaluate.scores import ScoreFolder
from relaylab.models.building import build_meta_network
from relaylab.models.dense import dense
from relaylab.models.export import mean_of
from relaylab.models.file import InputConfig, ModelFile
from relaylab.progress import Task

READ_AT_ONCE = 16  # images per task of a worker
Request = tuple[Sequence[View], Sequence[int]]
Row = tuple[int, list[Pixels]]  # NumPy arrays, since sending a tensor to another process takes a file


class Cuts(Dataset[Row]):
    """A dataset of the crops of images for several views; each image is decoded once."""

    def __init__(self, source: Source, config: InputConfig) -> None:
        self._source, self._config = source, config

    def __getitems__(self, request: Request) -> "list[Row] | InputError":
        """Return the requested images: the index of each, and its crops for each of the requested views.

        Crops are uint8 (n, h, w, 3). Returns an error if an image cannot be read.
        """
        views, indices = request
        rows: list[Row] = []
        for index in indices:
            try:
                pixels = decode(self._source.read(index))
            except (OSError, ImageFault) as error:
                name = self._source.name(index)
                return InputError(
                    f"unreadable image {name}: {error}; `relaylab data check` lists all unreadable images"
                )
            rows.append((index, [cut(pixels, view, self._config).numpy() for view in views]))
        return rows


class Scorer:
    """A trained network in evaluation mode that computes log-probabilities of crops."""

    def __init__(self, model: ModelFile, device: torch.device | str = "cpu") -> None:
        self.config = config = model.input
        self.device = torch.device(device)
        self._mean = mean_of(model).to(self.device)
        self._colour = torch.tensor(config.mean).view(3, 1, 1).to(self.device)
        self._std = None if config.std is None else torch.tensor(config.std).view(3, 1, 1).to(self.device)
        self.network = model.model().to(self.device, memory_format=torch.channels_last)  # pyright: ignore

    @cached_property
    def dense(self) -> nn.Module:
        """The fully convolutional network for larger images; see `check_dense`."""
        return dense(self.network, map_size=_map_size(self.network, self.config.crop))

    @torch.inference_mode()
    def __call__(self, view: View, images: Tensor) -> Tensor:
        """Return the log-probabilities of a view, float32 (batch, classes), without waiting for the device.

        Args:
            view: crops or whole images.
            images: uint8 (batch, n, h, w, 3), n crops of each image.
        """
        x = self.normalised(images.flatten(0, 1))
        inputs = [x, x.flip(3)] if mirrored(view) else [x]
        rows = torch.stack([self._scores(view, batch) for batch in inputs], dim=1).log_softmax(dim=2)
        return average(rows.unflatten(0, (-1, images.shape[1])).flatten(1, 2), 1)

    def _scores(self, view: View, x: Tensor) -> Tensor:
        scores = self.dense(x).mean(dim=(2, 3)) if view.kind == "dense" else self.network(x)
        return scores.float()

    def normalised(self, images: Tensor) -> Tensor:
        """Return the network's input (batch, 3, h, w) for uint8 images (batch, h, w, 3)."""
        x = to_device(images, self.device).permute(0, 3, 1, 2).float()
        x = x.flip(1) if self.config.channels == "BGR" else x
        x = x - (self._mean if x.shape[-2:] == (self.config.crop, self.config.crop) else self._colour)
        x = x if self._std is None else x / self._std
        return x.contiguous(memory_format=torch.channels_last)


def evaluate(
    scorer: Scorer,
    source: Source,
    folder: ScoreFolder,
    name: str,
    views: Sequence[View],
    *,
    workers: int,
    task: Task,
    batch_size: int = 32,
    order: Sequence[int] | None = None,
    stopped: Callable[[], object] = bool,
) -> bool:
    """Compute and write the missing scores of a network, chunk by chunk.

    Args:
        scorer: the network.
        source: the images of the folder.
        folder: folder of scores.
        name: name of the network in the folder.
        views: views to evaluate.
        workers: number of data-loading processes.
        task: reports progress, in images times views.
        batch_size: crops per batch; whole images are batched up to the same number of pixels.
        order: output index of each class of the folder; None if the order is the same.
        stopped: returns whether to stop before the next chunk.

    Returns:
        Whether all chunks exist.

    Raises:
        InputError: an image cannot be read, or scores are NaN.
    """
    requests: dict[int, list[Request]] = {}  # of each chunk with missing views
    for chunk_index, chunk in enumerate(folder.chunks):
        missing = [view for view in views if not folder.has(name, view.name, chunk_index)]
        task.advance(len(chunk) * (len(views) - len(missing)))
        if missing:
            starts = range(0, len(chunk), READ_AT_ONCE)
            requests[chunk_index] = [(missing, chunk[start : start + READ_AT_ONCE]) for start in starts]
    everything = list(chain.from_iterable(requests.values()))
    with closing(_read(Cuts(source, scorer.config), everything, workers)) as read:
        for chunk_index, of_chunk in requests.items():
            if stopped():
                return False
            missing, _ = of_chunk[0]
            scores: dict[View, list[Tensor]] = {view: [] for view in missing}
            order_of: dict[View, list[int]] = {view: [] for view in missing}
            for rows in islice(read, len(of_chunk)):
                for position, view in enumerate(missing):
                    for indices, images in _batches(
                        [(n, cuts[position]) for n, cuts in rows], scorer.config.crop, batch_size
                    ):
                        scores[view].append(scorer(view, images))
                        order_of[view] += indices
                        task.advance(len(indices), note=f"{name} {view.name}")
            copied = torch.stack([torch.cat(scores[view]) for view in missing]).cpu()  # see Note [Evaluation] 2
            for view, rows_of_view in zip(missing, copied, strict=True):
                in_order = rows_of_view[np.argsort(order_of[view])]
                folder.write(name, view.name, chunk_index, in_order if order is None else in_order[:, order])
    return True


def _read(cuts: Cuts, requests: Sequence[Request], workers: int) -> Generator[list[Row]]:
    if not requests:
        return
    for rows in Workers(count=min(workers, len(requests)), prefetch=2).loader(cuts, requests):
        if isinstance(rows, InputError):
            raise rows
        yield rows


def _batches(
    rows: Iterable[tuple[int, Pixels]], crop: int, batch_size: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield batches of images of equal size; batches of large images are smaller."""
    ordered = sorted(rows, key=lambda row: (*row[1].shape, row[0]))
    for _, group in groupby(ordered, key=lambda row: row[1].shape):
        same = list(group)
        pixels = same[0][1].size // 3
        count = max(1, batch_size * crop**2 // pixels)
        for start in range(0, len(same), count):
            indices, images = zip(*same[start : start + count], strict=True)
            yield indices, torch.from_numpy(np.stack(images))


@torch.no_grad()
def check_dense(model: ModelFile) -> None:
    """Check that a network supports dense evaluation, without its weights.

    Raises:
        InputError: it does not.
    """
    network, size = build_meta_network(model.network), model.input.crop
    convolutional = dense(network, map_size=_map_size(network, size))
    if model.network.is_named:
        try:
            convolutional.eval()(torch.empty(1, 3, size + 32, size + 64, device="meta"))
        except Exception as error:  # from the user's code
            raise InputError(f"{model.network.architecture} only accepts crops of {size} pixels: {error}") from None


def _map_size(model: nn.Module, crop: int) -> int | None:
    """Return the size of the last feature map of a VGGNet; None for other networks."""
    if not isinstance(model, VGG):
        return None
    first = next(model.parameters())
    with torch.inference_mode():
        return model.features(torch.zeros(1, 3, crop, crop, device=first.device)).shape[-1]
