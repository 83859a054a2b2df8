"""Data parallel training for early release, whose many backward passes `DistributedDataParallel` does not support.

Note [Averaging]
1. Early release runs many backward passes in one step. A gradient is *final* after the last addition to it, often long
   before the step ends. Final gradients are all-reduced in buckets, while layers above run forward or layers below run
   backward.
2. The last addition is forecast: by the number of additions in the step in which the gradient was first seen, the
   maximum over all processes. A bucket contains gradients that become final in one backward pass. All processes send
   buckets in the same order, that of the forecast; an incomplete bucket, and those after it, wait for the end of the
   step.
3. A bucket has zeros where a process has no gradient, and flags that tell all processes whether any of them has one.
   The gradient of a parameter that no process used stays None.
4. A gradient that is added to `.grad` after sending, or is missing from the forecast, is *late*. The last bucket is
   sent at the end of the step, with a flag for each parameter that has a late gradient in any process. Late gradients
   are averaged separately, added, and forecast anew. So a wrong forecast costs time; the mean is always exact. In the
   first step all gradients are late.
5. Sending removes gradients from `.grad`, so that none is stored twice; the means are set at the end of the step.
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
LAST_BUCKET_BYTES = 2**20  # small: no computation overlaps with its all-reduce
BUCKETS = 16  # approximate, for small networks: a bucket is sent only when all its gradients are final


class Final(NamedTuple):
    """When a gradient is final: Note [Averaging] 2. Tuples sort in the order of sending.

    Args:
        backward: number of the backward pass.
        position: among all additions to gradients.
        additions: number of additions that make it final.
    """

    backward: int
    position: int
    additions: int


UNSEEN = Final(2**31, 0, 1)  # accumulated in earlier steps only
Forecast = dict[int, Final]
"""When each gradient is final, by the index of its parameter. The same in all processes."""


def is_parallel(group: "ProcessGroup | None" = None) -> bool:
    """Whether the group has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def identity_of(group: "ProcessGroup | None" = None) -> tuple[str, int]:
    """A name for a group that survives pickling, and its size."""
    return (group or dist.group.WORLD).group_name, dist.get_world_size(group)  # pyright: ignore


def check_sharded(module: nn.Module, boundaries: Iterable[str]) -> None:
    """Raise if `fully_shard` was applied around a boundary, then reshard every module to which it was applied.

    Args:
        module: may contain modules to which `fully_shard` was applied.
        boundaries: names of the modules where backward passes may start or end during its forward pass.

    Raises:
        EarlyReleaseError: `fully_shard` around one of these, or parameters sharded by other means.
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
                "fully_shard on modules between the plan's boundaries, such as single blocks",
                f"fully_shard on {name!r}, around {around[0]!r}" if name else "fully_shard on the whole relay",
                "Shard only the blocks, or use an ordinary forward and backward pass.",
            )
        inner.reshard()  # an evaluation may leave it unsharded, and its parameters would not be DTensors
    for name, parameter in module.named_parameters():
        if _is_divided(parameter) and not any(name.startswith(f"{outer}.") for outer in sharded):
            raise EarlyReleaseError(
                "parameters that are whole, or sharded by fully_shard",
                f"{name!r}, a DTensor that is divided among processes by other means",
                "Use an ordinary forward and backward pass, or do not shard it.",
            )


@contextmanager
def averaging(module: nn.Module, forecast: Forecast, group: "ProcessGroup | None" = None) -> Generator[None]:
    """Average the gradients of backward passes in this context as soon as they are final: Note [Averaging].

    Args:
        module: with the same parameters in all processes. Those that FSDP has sharded are left to it.
        forecast: empty at first; updated on exit. Reuse it while the trained parameters, losses and processes stay the
            same.
        group: of the processes; None for all.

    Raises:
        EarlyReleaseError: a sparse gradient, or one that a hook removed before it was averaged.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    named = {name: parameter for name, parameter in trained.items() if not _is_divided(parameter)}
    if not is_parallel(group) or not named:
        yield
        return
    average = _Average(list(named), list(named.values()), forecast, group)
    with ExitStack() as stack:
        for index, parameter in enumerate(named.values()):
            hook = cast(Any, parameter).register_post_accumulate_grad_hook(partial(average.note, index))
            stack.callback(hook.remove)
        yield
    average.finish()


def share_buffers(module: nn.Module, group: "ProcessGroup | None" = None) -> None:
    """Broadcast the first process's buffers, such as the running statistics of batch normalisation."""
    if not is_parallel(group):
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for buffer in module.buffers():
        kinds.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    for buffers in kinds.values():  # one message per dtype and device
        total = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(total, group_src=0, group=group)
        for buffer, shared in zip(buffers, _split(total, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(shared.view_as(buffer))


@dataclass
class _Sent:
    """A bucket in flight: gradients, a flag for each that tells whether it exists, and `more` further flags."""

    members: Sequence[int]
    has: Sequence[bool]
    total: Tensor
    more: int
    work: "Work"


@dataclass(eq=False)
class _Average:
    """The averaging of one step in one process."""

    names: Sequence[str]
    parameters: Sequence[nn.Parameter]
    forecast: Forecast
    group: "ProcessGroup | None"
    _additions: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # parameter, backward pass
    _sent: list[_Sent] = field(default_factory=list[_Sent])
    _means: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def __post_init__(self) -> None:
        self._buckets = self._in_buckets(self.forecast) or [[]]
        self._bucket_of = {index: number for number, bucket in enumerate(self._buckets) for index in bucket}
        self._to_come = {index: final.additions for index, final in self.forecast.items()}
        self._missing = [sum(self._to_come[index] for index in bucket) for bucket in self._buckets]
        self._lock = threading.Lock()  # autograd runs one thread per device

    def note(self, index: int, parameter: Tensor) -> None:
        """Record an addition to a gradient, and send the buckets that it completes, except the last one."""
        if parameter.grad is None:
            raise EarlyReleaseError(
                "gradients to stay in .grad until they have been averaged",
                f"none for {self.names[index]!r}, which a hook of that parameter has set to None",
                "Step the optimizer after forward_backward, or pass sync=False.",
            )
        with self._lock:
            self._additions.append((index, torch._C._current_graph_task_id()))  # pyright: ignore[reportPrivateUsage]
            if self._to_come.get(index, 0) == 0:
                return  # late
            self._to_come[index] -= 1
            self._missing[self._bucket_of[index]] -= 1
            while len(self._sent) < len(self._buckets) - 1 and self._missing[len(self._sent)] == 0:
                self._sent.append(self._send(self._buckets[len(self._sent)]))

    def finish(self) -> None:
        """Send the remaining buckets, wait for all of them, and set `.grad` to the means."""
        *early, last = self._buckets
        self._sent += [self._send(bucket) for bucket in early[len(self._sent) :]]
        self._sent.append(self._send(last, self._are_late))
        late = [index for index, flag in enumerate(_values(self._receive())) if flag]
        if late:
            self._learn(late)
            self._sent = [self._send(bucket) for bucket in self._in_buckets(late)]
            self._receive()
        for index, mean in self._means.items():
            self.parameters[index].grad = mean

    def _in_buckets(self, indices: Collection[int]) -> list[list[int]]:
        """Group parameters by dtype, device and backward pass, in the order of sending. The last bucket is small."""
        size = sum(self.parameters[index].nbytes for index in indices) // BUCKETS
        size = min(max(size, LAST_BUCKET_BYTES), BUCKET_BYTES)
        buckets: list[list[int]] = []
        room: list[int] = []  # bytes left in each bucket
        current: dict[tuple[torch.dtype, torch.device, int], int] = {}
        for index in sorted(indices, key=lambda index: (self.forecast[index], index), reverse=True):
            parameter = self.parameters[index]
            kind = _type_of(parameter), parameter.device, self.forecast[index].backward
            if kind not in current or room[current[kind]] <= 0:
                current[kind] = len(buckets)
                room.append(size if buckets else LAST_BUCKET_BYTES)
                buckets.append([])
            buckets[current[kind]].append(index)
            room[current[kind]] -= parameter.nbytes
        return buckets[::-1]

    def _send(self, members: Sequence[int], more: Callable[[], Sequence[bool]] = lambda: ()) -> _Sent:
        """Remove gradients from `.grad` and start their all-reduce, with the flags that `more` then returns."""
        parameters = [self.parameters[index] for index in members]
        gradients = [parameter.grad for parameter in parameters]
        flags = torch.ones(len(members), device=(parameters or self.parameters)[0].device)
        for number, gradient in enumerate(gradients):
            if gradient is None:
                flags[number].zero_()  # no copy from the host, which would synchronise
            elif gradient.layout != torch.strided:
                raise EarlyReleaseError(
                    "dense gradients, to average them over processes",
                    f"a sparse one, of {self.names[members[number]]!r}",
                    "Build the layer with sparse=False, or pass sync=False and average the gradients yourself.",
                )
        flat = [
            (torch.zeros_like(p) if gradient is None else gradient).flatten()
            for p, gradient in zip(parameters, gradients, strict=True)
        ]
        for parameter in parameters:
            parameter.grad = None
        rest = more()
        kind = _type_of((parameters or self.parameters)[0])
        own = [flags, torch.tensor(rest, device=flags.device)] if rest else [flags]
        total = torch.cat([piece.to(kind) for piece in (*flat, *own)]).div_(dist.get_world_size(self.group))
        has = [gradient is not None for gradient in gradients]
        work = dist.all_reduce(total, group=self.group, async_op=True)
        assert work is not None
        return _Sent(members, has, total, len(rest), work)

    def _receive(self) -> Tensor:
        """Wait for all buckets, store their means, and return the further flags of the last one."""
        while True:
            sent = self._sent.pop(0)  # each bucket is freed before the next one is unpacked
            sent.work.wait()
            parameters = [self.parameters[index] for index in sent.members]
            *means, flags, more = _split(sent.total, [*(p.numel() for p in parameters), len(parameters), sent.more])
            used = sent.has if all(sent.has) else _values(flags)  # rarely synchronises
            for index, parameter, mean, is_used in zip(sent.members, parameters, means, used, strict=True):
                if is_used:
                    early = self._means.get(index)
                    own = torch.empty_like(parameter, dtype=mean.dtype, requires_grad=False)
                    own.copy_(mean.view_as(parameter))
                    self._means[index] = own if early is None else own.add_(early)
            if not self._sent:
                return more

    def _are_late(self) -> list[bool]:
        """Whether each parameter has a gradient in `.grad` after all buckets have been sent."""
        return [parameter.grad is not None for parameter in self.parameters]

    def _learn(self, late: Iterable[int]) -> None:
        """Forecast gradients that were late in any process, from when they became final in this step."""
        numbers: dict[int, int] = {}
        found = {index: [0, -1, -1] for index in late}
        for position, (index, backward) in enumerate(self._additions):
            number = numbers.setdefault(backward, len(numbers))
            if index in found:
                found[index] = [found[index][0] + 1, number, position]
        table = torch.tensor(list(found.values()), device=self.parameters[0].device)
        dist.all_reduce(table, dist.ReduceOp.MAX, group=self.group)
        for index, (additions, backward, position) in zip(found, _values(table), strict=True):
            self.forecast[index] = Final(backward, position, additions) if additions else UNSEEN


def _split(total: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(torch.split(total, sizes))  # pyright: ignore[reportUnknownMemberType]


def _values(tensor: Tensor) -> list[Any]:
    return cast(Any, tensor).tolist()


def _is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, sharded over processes."""
    return hasattr(tensor, "full_tensor")


def _type_of(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's gradient."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
