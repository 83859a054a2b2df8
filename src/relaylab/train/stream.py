"""The training batches of a run, fetched ahead of their use.

Note [Stream]
1. A GPU executes the kernels of a step while the host prepares the next batch: `Stream.fetch` collates it and starts
   its copy to the device, before the host waits for the step's metrics (Note [Loop] in `relaylab.train.loop`).
2. The position that checkpoints store is the one after the last batch *used*. A batch that was fetched but not used is
   fetched again when the run resumes.
3. An error in a fetch is raised when the batch is to be used: the update before it, and its checkpoint, are not lost.
"""

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from relaylab.data.batches import Batch
from relaylab.data.crops import Crops
from relaylab.data.datasets import ImageDataset
from relaylab.data.sampling import KeyedSampler
from relaylab.errors import LabError

log = logging.getLogger("relaylab.train")

DEATHS = 3  # consecutive deaths of worker processes that are tolerated


class Stream:
    """An iterator over training batches on a device, which restarts dead worker processes. See Note [Stream].

    Example::

        batch = next(stream)
        launch_kernels(batch)
        stream.fetch()             # in the meantime
        print(loss.item())         # waits for the device

    Args:
        dataset: the training images.
        sampler: selects the images; the stream starts at its position.
        batch_size: images per batch of this process.
        seed: seed of the crops.
        crops: settings of the crops.
        device: device that the batches are copied to.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: KeyedSampler,
        batch_size: int,
        seed: int,
        crops: Crops,
        device: torch.device | str = "cpu",
    ) -> None:
        self._make = partial(dataset.training, sampler, batch_size, seed, crops)
        self._loader = self._make()
        self._device = torch.device(device)
        self._rewind()

    def _rewind(self) -> None:
        self._batches = self._restarting()
        self._ahead: Batch | Exception | None = None
        self._used = self._loader.state_dict()

    def fetch(self) -> None:
        """Collate the next batch and start its copy to the device, unless this has been done. Raises no error."""
        if self._ahead is not None:
            return
        try:
            self._ahead = next(self._batches).to(self._device)
        except Exception as error:  # including StopIteration; see Note [Stream] 3
            self._ahead = error

    def __iter__(self) -> Iterator[Batch]:
        """Return the stream itself."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch. Raises a `LabError` for unreadable images and repeated deaths of workers."""
        self.fetch()
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, Exception):
            try:
                raise ahead
            finally:
                del ahead  # breaks the cycle of error and frame, which would delay the workers' exit
        assert ahead is not None
        self._used = self._loader.state_dict()
        return ahead

    def _restarting(self) -> Iterator[Batch]:
        deaths = 0
        while True:
            try:
                for batch in self._loader:
                    yield batch
                    deaths = 0
                return
            except RuntimeError as error:
                deaths += 1
                if "DataLoader worker" not in str(error):
                    raise
                if deaths > DEATHS:
                    raise LabError(f"worker processes keep dying: {str(error).partition('. ')[0]}") from None
                log.warning("%s: restarting the workers", str(error).partition("\n")[0])
                state = self._loader.state_dict()  # after the batches fetched, not those used
                self._loader = self._make()
                self._loader.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the number of batches used. See Note [Stream] 2."""
        return self._used

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the position of another stream. A batch that was fetched ahead is dropped.

        Raises:
            InputError: the other stream had different images or another batch size.
        """
        self._loader.load_state_dict(state)
        self._rewind()
