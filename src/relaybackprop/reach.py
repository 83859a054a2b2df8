"""Read-only: which loss reaches which parameter, measured on the real graph."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from relaybackprop.errors import HeadError
from relaybackprop.plan import Plan
from relaybackprop.relay import PRIMARY, Relay, RelayOutput
from relaybackprop.structure import tensors_in


@dataclass(frozen=True)
class Reach:
    """Which loss reaches which parameter.

    Attributes:
        plan: bound to the model.
        losses: by loss, the names of the parameters that it reaches, as in `Relay.named_parameters()`.
        parameters: all trainable parameters' names in their order, with their numbers of elements.
    """

    plan: Plan
    losses: Mapping[str, frozenset[str]]
    parameters: Mapping[str, int]

    def __str__(self) -> str:
        names = list(self.losses)
        rows = [("parameters", "elements", *names)]
        marks = {p: tuple("x" if p in self.losses[name] else "." for name in names) for p in self.parameters}
        for pattern, group in groupby(self.parameters, key=lambda p: (p.split(".")[0], marks[p])):
            run = list(group)
            span = run[0] if len(run) == 1 else f"{run[0]} ... {run[-1]}"
            rows.append((span, f"{sum(self.parameters[p] for p in run):,}", *pattern[1]))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def reach(relay: Relay, *inputs: Any, **named_inputs: Any) -> Reach:
    """Measure which loss reaches which parameter: one training forward pass and one backward pass per loss.

    Nothing changes: gradients, buffers (batch statistics) and random generators are as before.

    Args:
        relay: the model with its plan.
        inputs: an example batch for its forward pass.
        named_inputs: likewise, by name.

    Returns:
        The table; `print` it, or look at `.losses["aux"]`.

    Raises:
        HeadError: a loss has no output that depends on a trainable parameter.
    """
    parameters = {name: p for name, p in relay.named_parameters() if p.requires_grad}
    losses: dict[str, frozenset[str]] = {}
    with _undisturbed(relay), torch.enable_grad():
        output: RelayOutput = relay(*inputs, **named_inputs)
        for name, value in {PRIMARY: output.primary, **output.auxiliary}.items():
            tensors = [tensor for tensor in tensors_in(value) if tensor.requires_grad]
            if not tensors:
                raise HeadError(
                    f"an output of {name!r} that depends on a trainable parameter", "none", "Unfreeze a layer."
                )
            losses[name] = frozenset(_reached([tensor.sum() for tensor in tensors], parameters))
    return Reach(relay.plan, losses, {name: p.numel() for name, p in parameters.items()})


def _reached(scalars: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> Iterator[str]:
    found = torch.autograd.grad(scalars, list(parameters.values()), retain_graph=True, allow_unused=True)
    gradients = cast(Sequence[Tensor | None], found)
    return (name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None)


@contextmanager
def _undisturbed(module: nn.Module) -> Generator[None]:
    """Training mode for a while; afterwards mode, buffers and random generators are as before."""
    modes = {part: part.training for part in module.modules()}
    buffers: list[tuple[Tensor, Tensor]] = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    gpus = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(gpus)):  # pyright: ignore[reportUnknownMemberType]
        try:
            module.train()
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
