"""Reports on which loss reaches which parameter, from the recorded autograd graph."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from relaybackprop.engine import graph
from relaybackprop.engine.pytree import tensors_in
from relaybackprop.engine.routes import inside
from relaybackprop.errors import HeadError, PlanError
from relaybackprop.loss import RelayOutput
from relaybackprop.plan import PRIMARY, Plan
from relaybackprop.relay import Relay


@dataclass(frozen=True, repr=False)
class Reach:
    """The parameters that each loss reaches.

    Attributes:
        plan: the plan of the relay.
        losses: by loss, the names of the parameters that it reaches, as in `Relay.named_parameters()`.
        parameters: number of elements of each trainable parameter, by name.
    """

    plan: Plan
    losses: Mapping[str, frozenset[str]]
    parameters: Mapping[str, int]

    def __repr__(self) -> str:  # a notebook shows this
        return str(self)

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
    """Find the parameters that each loss reaches, from the autograd graph of one training forward pass.

    Gradients, buffers (batch statistics), modes and random generators are left unchanged.

    Args:
        relay: the model with its plan.
        inputs: positional arguments of its forward pass, for an example batch.
        named_inputs: keyword arguments of it.

    Returns:
        A table to print; `.losses["aux"]` has the names for one loss.

    Raises:
        PlanError: `relay` is not a `Relay`.
        HeadError: a loss has no output that depends on a trainable parameter.
    """
    if not isinstance(relay, Relay):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError("a Relay", f"a {type(relay).__name__}", "Write reach(Relay(model, plan, heads), images).")
    parameters = {name: p for name, p in relay.named_parameters() if p.requires_grad}
    with undisturbed(relay), torch.enable_grad():
        output: RelayOutput = relay(*inputs, **named_inputs)
    names = {id(parameter): name for name, parameter in parameters.items()}
    losses: dict[str, frozenset[str]] = {}
    for name, value in {PRIMARY: output.primary, **output.auxiliary}.items():
        edges = graph.edges_of(tensors_in(value))
        if not edges:
            raise HeadError(f"an output of {name!r} that depends on a trainable parameter", "none", "Unfreeze a layer.")
        reached = graph.walk(edges, inside(name))
        variables = (getattr(node, "variable", None) for node in reached)
        losses[name] = frozenset(names[id(variable)] for variable in variables if id(variable) in names)
    return Reach(relay.plan, losses, {name: p.numel() for name, p in parameters.items()})


@contextmanager
def undisturbed(module: nn.Module) -> Generator[None]:
    """Set training mode, and restore modes, buffers and random generators on exit."""
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
