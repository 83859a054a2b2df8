"""`reach`: a report of the parameters that each loss reaches, from the recorded autograd graph."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from relaybackprop.engine import graph
from relaybackprop.engine.pytree import tensors_in
from relaybackprop.engine.routes import within_window
from relaybackprop.errors import HeadError, PlanError
from relaybackprop.loss import RelayOutput
from relaybackprop.plan import PRIMARY, Plan
from relaybackprop.relay import Relay


@dataclass(frozen=True, repr=False)
class Reach:
    """The parameters that each loss reaches. `print` shows a table.

    Attributes:
        plan: the plan of the relay.
        losses: the names of the parameters that each loss reaches, as in `Relay.named_parameters()`.
        parameters: number of elements of each trainable parameter, by name.
    """

    plan: Plan
    losses: Mapping[str, frozenset[str]]
    parameters: Mapping[str, int]

    def __repr__(self) -> str:  # notebooks show the repr
        return str(self)

    def __str__(self) -> str:
        names = list(self.losses)
        rows = [("parameters", "elements", *names)]
        marks = {p: tuple("x" if p in self.losses[name] else "." for name in names) for p in self.parameters}
        for pattern, group in groupby(self.parameters, key=lambda p: (p.split(".")[0], marks[p])):
            names_in_group = list(group)
            span = names_in_group[0] if len(names_in_group) == 1 else f"{names_in_group[0]} ... {names_in_group[-1]}"
            rows.append((span, f"{sum(self.parameters[p] for p in names_in_group):,}", *pattern[1]))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def reach(relay: Relay, *inputs: Any, **named_inputs: Any) -> Reach:
    """Find the parameters that each loss reaches, from the autograd graph of one training forward pass.

    Gradients, buffers (batch statistics), modes and random number generators do not change.

    Args:
        relay: the model with its plan.
        *inputs: positional arguments of the relay's forward pass: an example batch.
        **named_inputs: keyword arguments of the relay's forward pass.

    Returns:
        A table to print. `.losses["aux"]` is the set of parameter names for one loss.

    Raises:
        PlanError: `relay` is not a `Relay`.
        HeadError: the output of a loss does not depend on any trainable parameter.
        RelayError: any error that `Relay.forward` raises.

    Example:
        ```python
        print(reach(relay, images))
        reach(relay, images).losses["aux"]  # frozenset of parameter names
        ```
    """
    if not isinstance(relay, Relay):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f"reach received a {type(relay).__name__}",
            "its first argument must be a Relay",
            "Write reach(Relay(model, plan, heads), images).",
        )
    parameters = {name: p for name, p in relay.named_parameters() if p.requires_grad}
    with preserved_state(relay), torch.enable_grad():
        output: RelayOutput = relay(*inputs, **named_inputs)
    names_by_id = {id(parameter): name for name, parameter in parameters.items()}
    losses: dict[str, frozenset[str]] = {}
    for name, value in {PRIMARY: output.primary, **output.auxiliary}.items():
        edges = graph.edges_of(tensors_in(value))
        if not edges:
            raise HeadError(
                f"the output of {name!r} does not depend on any trainable parameter",
                "each loss must reach at least one",
                "Unfreeze a layer.",
            )
        reached = graph.walk(edges, within_window(name))
        variables = (getattr(node, "variable", None) for node in reached)
        losses[name] = frozenset(names_by_id[id(variable)] for variable in variables if id(variable) in names_by_id)
    return Reach(relay.plan, losses, {name: p.numel() for name, p in parameters.items()})


@contextmanager
def preserved_state(module: nn.Module) -> Generator[None]:
    """Set training mode and restore modes, buffers and random number generators on exit."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    buffers: list[tuple[Tensor, Tensor]] = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    gpus = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(gpus)):  # pyright: ignore[reportUnknownMemberType]
        try:
            module.train()
            yield
        finally:
            for submodule, mode in modes.items():
                submodule.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
