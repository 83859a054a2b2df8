"""Data parallel training for early release, whose many backward passes `DistributedDataParallel` does not support.

Note [Averaging]
1. Early release runs many backward passes in one step. A gradient is *final* after the last addition to it, often long
   before the step ends. Final gradients are all-reduced in buckets, while the layers above run forward or the layers
   below run backward.
2. A forecast predicts the last addition: it is the number of additions in the step in which the gradient was first
   seen, the maximum over all processes. A bucket contains gradients that become final in one backward pass. All
   processes send buckets in the order of the forecast. An incomplete bucket, and those after it, wait for the end of
   the step.
3. A bucket has zeros where a process has no gradient, and flags that tell all processes whether any of them has one.
   The gradient of a parameter that no process used stays None.
4. A gradient that is added to `.grad` after its bucket was sent, or that the forecast does not include, is *late*. The
   last bucket is sent at the end of the step, with a flag for each parameter that has a late gradient in any process.
   Late gradients are averaged separately, added to the means, and forecast again. So a wrong forecast costs time, and
   the mean is always exact. In the first step all gradients are late.
5. Sending removes gradients from `.grad`, so that none is stored twice. The means are set at the end of the step.
"""

import sys
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from relaybackprop.errors import EarlyReleaseError

if TYPE_CHECKING:  # missing in some builds of torch
    from torch.distributed import ProcessGroup, Work

BUCKET_BYTES = 25 * 2**20  # maximum, as in DistributedDataParallel
LAST_BUCKET_BYTES = 2**20  # small, because no computation overlaps with its all-reduce
BUCKETS = 16  # approximate number in small networks, so that buckets are sent before the step ends


class Final(NamedTuple):
    """The forecast of one gradient: when it becomes final (Note [Averaging] 2). Sorts in the order of sending.

    Args:
        backward: index of the backward pass within the step.
        position: index of the last addition among all additions to gradients in the step.
        additions: number of additions after which the gradient is final.
    """

    backward: int
    position: int
    additions: int


UNSEEN = Final(2**31, 0, 1)  # a gradient that this step did not add to, accumulated in earlier steps; sorts last
Forecast = dict[int, Final]
"""When each gradient becomes final, by the index of its parameter. The same in all processes."""


def is_distributed(group: "ProcessGroup | None" = None) -> bool:
    """Return whether the group has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def group_key(group: "ProcessGroup | None" = None) -> tuple[str, int]:
    """Return a name for a process group that survives pickling, and the group's size."""
    return (group or dist.group.WORLD).group_name, dist.get_world_size(group)  # pyright: ignore


def check_sharded(module: nn.Module, boundaries: Iterable[str]) -> None:
    """Check that `fully_shard` was not applied around a boundary, and reshard every module to which it was applied.

    Args:
        module: a module that may contain modules with `fully_shard`.
        boundaries: names of the modules where backward passes may start or end during the forward pass.

    Raises:
        EarlyReleaseError: `fully_shard` was applied around a boundary, or a parameter is a `DTensor` that was not
            sharded by `fully_shard`.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import; without it nothing is sharded
    sharded: dict[str, Any] = {}
    if fsdp is not None:
        modules = cast(Iterator[tuple[str, nn.Module]], module.named_modules())
        sharded = {name: inner for name, inner in modules if isinstance(inner, fsdp.FSDPModule)}
    for name, inner in sharded.items():
        around = [boundary for boundary in boundaries if not name or boundary.startswith(f"{name}.")]
        if around:
            raise EarlyReleaseError(
                f"fully_shard on {name!r}, around {around[0]!r}" if name else "fully_shard on the whole relay",
                "early release supports it only on modules between the plan's boundaries, such as single blocks",
                "Shard only the blocks, or use an ordinary forward and backward pass.",
            )
        inner.reshard()  # an evaluation may leave it unsharded, so that its parameters would not be DTensors
    for name, parameter in module.named_parameters():
        if _is_sharded(parameter) and not any(name.startswith(f"{outer}.") for outer in sharded):
            raise EarlyReleaseError(
                f"{name!r} is a DTensor that was not sharded by fully_shard",
                "early release supports parameters that are unsharded or sharded by fully_shard",
                "Use an ordinary forward and backward pass, or do not shard it.",
            )


@contextmanager
def averaging(module: nn.Module, forecast: Forecast, group: "ProcessGroup | None" = None) -> Generator[None]:
    """Average the gradients of the backward passes in this context as soon as they are final: Note [Averaging].

    Args:
        module: a module with the same parameters in all processes. FSDP averages the parameters that it has sharded.
        forecast: empty at first; updated on exit. Reuse it while the trained parameters, losses and processes stay the
            same.
        group: the process group; None for all processes.

    Raises:
        EarlyReleaseError: a gradient is sparse, or a hook removed it before it was averaged.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    averaged = {name: parameter for name, parameter in trained.items() if not _is_sharded(parameter)}
    if not is_distributed(group) or not averaged:
        yield
        return
    average = _Average(list(averaged), list(averaged.values()), forecast, group)
    with ExitStack() as stack:
        for index, parameter in enumerate(averaged.values()):
            hook = cast(Any, parameter).register_post_accumulate_grad_hook(partial(average.record, index))
            stack.callback(hook.remove)
        yield
    average.finish()


def broadcast_buffers(module: nn.Module, group: "ProcessGroup | None" = None) -> None:
    """Broadcast the buffers of the first process, such as the running statistics of batch normalisation."""
    if not is_distributed(group):
        return
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for buffer in module.buffers():
        by_kind.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    for buffers in by_kind.values():  # one message per dtype and device
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(flat, group_src=0, group=group)
        for buffer, shared in zip(buffers, _split(flat, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(shared.view_as(buffer))


@dataclass
class _Sent:
    """A bucket in flight: gradients, one flag for each (whether it exists), and `num_extra` further flags."""

    members: Sequence[int]
    present: Sequence[bool]
    message: Tensor
    num_extra: int
    work: "Work"


@dataclass(eq=False)
class _Average:
    """The averaging of one step in one process."""

    names: Sequence[str]
    parameters: Sequence[nn.Parameter]
    forecast: Forecast
    group: "ProcessGroup | None"
    _additions: list[tuple[int, int]] = field(
        default_factory=list[tuple[int, int]]
    )  # index of the parameter, id of the backward pass
    _sent: list[_Sent] = field(default_factory=list[_Sent])
    _means: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def __post_init__(self) -> None:
        self._buckets = self._in_buckets(self.forecast) or [[]]
        self._bucket_of = {index: position for position, bucket in enumerate(self._buckets) for index in bucket}
        self._remaining = {index: final.additions for index, final in self.forecast.items()}
        self._remaining_in_bucket = [sum(self._remaining[index] for index in bucket) for bucket in self._buckets]
        self._lock = threading.Lock()  # autograd runs one thread per device

    def record(self, index: int, parameter: Tensor) -> None:
        """Record an addition to a gradient, and send the buckets that it completes, except the last one."""
        if parameter.grad is None:
            raise EarlyReleaseError(
                f"a hook of the parameter {self.names[index]!r} has set its .grad to None",
                "gradients must stay in .grad until they are averaged",
                "Step the optimizer after forward_backward, or pass sync=False.",
            )
        with self._lock:
            self._additions.append((index, torch._C._current_graph_task_id()))  # pyright: ignore[reportPrivateUsage]
            if self._remaining.get(index, 0) == 0:
                return  # not forecast: averaged in `finish` (Note [Averaging] 4)
            self._remaining[index] -= 1
            # Send complete buckets in their fixed order, which all processes share: collectives must match.
            self._remaining_in_bucket[self._bucket_of[index]] -= 1
            while len(self._sent) < len(self._buckets) - 1 and self._remaining_in_bucket[len(self._sent)] == 0:
                self._sent.append(self._send(self._buckets[len(self._sent)]))

    def finish(self) -> None:
        """Send the remaining buckets, wait for all of them, and set `.grad` to the means."""
        *early, last = self._buckets
        self._sent += [self._send(bucket) for bucket in early[len(self._sent) :]]
        self._sent.append(self._send(last, self._are_late))
        # The flags of the last bucket agree in all processes, so all of them average the same late gradients.
        late = [index for index, flag in enumerate(_to_list(self._receive())) if flag]
        if late:
            self._update_forecast(late)
            self._sent = [self._send(bucket) for bucket in self._in_buckets(late)]
            self._receive()
        for index, mean in self._means.items():
            self.parameters[index].grad = mean

    def _in_buckets(self, indices: Collection[int]) -> list[list[int]]:
        """Group parameters into buckets in the order of sending, by dtype, device and backward pass."""
        size = sum(self.parameters[index].nbytes for index in indices) // BUCKETS
        size = min(max(size, LAST_BUCKET_BYTES), BUCKET_BYTES)
        buckets: list[list[int]] = []
        free_bytes: list[int] = []  # bytes left in each bucket
        open_bucket: dict[tuple[torch.dtype, torch.device, int], int] = {}
        # From the last to be sent, so that the last bucket can be small.
        for index in sorted(indices, key=lambda index: (self.forecast[index], index), reverse=True):
            parameter = self.parameters[index]
            kind = _gradient_dtype(parameter), parameter.device, self.forecast[index].backward
            if kind not in open_bucket or free_bytes[open_bucket[kind]] <= 0:
                open_bucket[kind] = len(buckets)
                free_bytes.append(size if buckets else LAST_BUCKET_BYTES)
                buckets.append([])
            buckets[open_bucket[kind]].append(index)
            free_bytes[open_bucket[kind]] -= parameter.nbytes
        return buckets[::-1]

    def _send(self, members: Sequence[int], extra_flags: Callable[[], Sequence[bool]] = lambda: ()) -> _Sent:
        """Remove gradients from `.grad` and start their all-reduce, with the flags that `extra_flags` then returns."""
        parameters = [self.parameters[index] for index in members]
        gradients = [parameter.grad for parameter in parameters]
        flags = torch.ones(len(members), device=(parameters or self.parameters)[0].device)
        for position, gradient in enumerate(gradients):
            if gradient is None:
                flags[position].zero_()  # does not copy from the host, which would synchronise
            elif gradient.layout != torch.strided:
                raise EarlyReleaseError(
                    f"the gradient of {self.names[members[position]]!r} is sparse",
                    "early release averages only dense gradients over processes",
                    "Build the layer with sparse=False, or pass sync=False and average the gradients yourself.",
                )
        flat = [
            (torch.zeros_like(p) if gradient is None else gradient).flatten()
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
        for parameter in parameters:
            parameter.grad = None
        extra = extra_flags()
        dtype = _gradient_dtype((parameters or self.parameters)[0])
        all_flags = [flags, torch.tensor(extra, device=flags.device)] if extra else [flags]
        message = torch.cat([tensor.to(dtype) for tensor in (*flat, *all_flags)]).div_(dist.get_world_size(self.group))
        present = [gradient is not None for gradient in gradients]
        work = dist.all_reduce(message, group=self.group, async_op=True)
        assert work is not None
        return _Sent(members, present, message, len(extra), work)

    def _receive(self) -> Tensor:
        """Wait for all buckets, store their means, and return the extra flags of the last one."""
        while True:
            sent = self._sent.pop(0)  # frees each bucket before the next one is unpacked
            sent.work.wait()
            parameters = [self.parameters[index] for index in sent.members]
            *means, flags, extra = _split(
                sent.message, [*(p.numel() for p in parameters), len(parameters), sent.num_extra]
            )
            # Reading flags synchronises with the device. A process that has all gradients knows them without reading.
            used = sent.present if all(sent.present) else _to_list(flags)
            for index, parameter, mean, is_used in zip(sent.members, parameters, means, used, strict=True):
                if is_used:
                    previous = self._means.get(index)
                    result = torch.empty_like(parameter, dtype=mean.dtype, requires_grad=False)
                    result.copy_(mean.view_as(parameter))
                    self._means[index] = result if previous is None else result.add_(previous)
            if not self._sent:
                return extra

    def _are_late(self) -> list[bool]:
        """Return whether each parameter has a gradient in `.grad` after all buckets have been sent."""
        return [parameter.grad is not None for parameter in self.parameters]

    def _update_forecast(self, late: Iterable[int]) -> None:
        """Update the forecast of gradients that were late in any process, from when they were final in this step."""
        pass_index: dict[int, int] = {}
        stats = {index: [0, -1, -1] for index in late}
        for position, (index, backward) in enumerate(self._additions):
            index_of_pass = pass_index.setdefault(backward, len(pass_index))
            if index in stats:
                stats[index] = [stats[index][0] + 1, index_of_pass, position]
        table = torch.tensor(list(stats.values()), device=self.parameters[0].device)
        dist.all_reduce(table, dist.ReduceOp.MAX, group=self.group)
        for index, (additions, backward, position) in zip(stats, _to_list(table), strict=True):
            self.forecast[index] = Final(backward, position, additions) if additions else UNSEEN


def _split(total: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(torch.split(total, sizes))  # pyright: ignore[reportUnknownMemberType]


def _to_list(tensor: Tensor) -> list[Any]:
    return cast(Any, tensor).tolist()


def _is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a `DTensor`, sharded over processes."""
    return hasattr(tensor, "full_tensor")


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's gradient."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
