"""What users train: `Relay` around any model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import Node

from relaybackprop.errors import AppliedTwiceError, BoundaryError, HeadError, PlanError
from relaybackprop.loss import RelayOutput, kinds_of, shape_of
from relaybackprop.passage import Passage, boundaries, find_module, node_names, refuse_tracing
from relaybackprop.plan import PRIMARY, Binding, Boundary, Plan
from relaybackprop.schedule import Schedule, make_schedule

SCHEDULES_KEPT = 64  # by what is frozen; training that freezes layers at random sees ever new ones


class Relay(nn.Module):
    """A model whose losses each reach only their own window of layers.

    In training mode the forward pass returns a `RelayOutput`; the gradients of losses on it go as far as the plan
    says, in one `backward()`. In evaluation mode the output and the cost are exactly the plain model's. The model is
    held, not copied, and it is changed only while a training forward pass runs: `relay.model` is the plain model at
    any other time, with its own state-dict keys, and can be taken out, saved or exported as it is.

    A window of D layers that G losses with different lower ends share costs G input-gradient passes and one
    weight-gradient pass there; everything else costs what standard backpropagation costs (docs/method.md).
    Full-backward hooks of modules in an overlap fire once per pass; parameters' hooks always fire once.

    Args:
        model: any module. Boundaries must be called once in each training forward pass.
        plan: where heads attach and how far down each loss reaches. `relay.plan` is bound to the model by the first
            training forward pass and from then on prints each window's depth.
        heads: by name of the auxiliary loss, the module that turns the output of the window's `top` into what the
            criterion takes. It is called with that output, whatever its type.

    Raises:
        PlanError: arguments of other types, or in another order.
        ModuleNameError: the plan names a module that the model does not have.
        HeadError: a window without a head, a head without a window, or a head that is no module.
        AppliedTwiceError: the model is, or contains, a `Relay`.

    Example:
        >>> relay = Relay(resnet50(), plan, heads={"aux": AuxiliaryHead(1024, 1000)})  # doctest: +SKIP
        >>> output = relay(images)  # doctest: +SKIP
        >>> output.primary.shape, output.auxiliary["aux"].shape  # doctest: +SKIP

    References:
        Shen, Lin, Huang: Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks. ECCV
        2016, section 4.
    """

    def __init__(self, model: nn.Module, plan: Plan, heads: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                "a model and a plan, in this order",
                f"{kinds_of(model, plan)}",
                "Write Relay(model, plan, heads={...}).",
            )
        for module in model.modules():
            if isinstance(module, Relay):
                raise AppliedTwiceError(
                    "a plain model", "a Relay, or a model with a Relay in it", "Pass relay.model, with a new plan."
                )
        heads = {} if heads is None else heads
        _check_heads(plan, heads)
        for boundary in plan.boundaries:
            find_module(model, boundary.module)
        self.plan = plan
        self.model = model
        self.heads = nn.ModuleDict({name: heads[name] for name in plan.auxiliary})
        self._schedules: dict[Any, tuple[Schedule, Binding]] = {}
        self._copies: dict[Boundary, bool] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output in evaluation mode; in training mode a `RelayOutput`.

        Raises:
            BoundaryError: a boundary module ran never, twice, or where no gradients are recorded; or what crosses it
                is changed in place by another name.
            WindowError: a window whose top the forward pass meets before its lower end.
            LeakError: a path around the end of a window (looked for when the order of boundaries, or what is frozen,
                is seen for the first time).
            CompiledOverlapError: compiled code where windows overlap, or around a boundary.
        """
        if not self.training:
            return self.model(*args, **kwargs)
        refuse_tracing("a training forward pass of Relay")
        frozen = tuple(parameter.requires_grad for parameter in self.model.parameters())
        # Until a boundary has been seen once, its heads get memory of their own: the trunk may go on in place.
        passage = Passage(self.plan, lambda boundary: self._copies.get(boundary, True))
        is_new = not any(key[:2] == (self.plan, frozen) for key in self._schedules)
        with boundaries(self.model, passage), node_names(self.model, is_new) as names:
            primary = self.model(*args, **kwargs)
        passage.check()
        self._note_modified(passage, "the layers after")
        passage.check_in_place()
        if any(window.lower is not None for window in self.plan.windows.values()):
            primary = passage.leave(primary)
        auxiliary = {name: self._run_head(name, passage.head_inputs.pop(name)) for name in self.plan.auxiliary}
        self._note_modified(passage, "a head on")
        if torch.is_grad_enabled():
            self._set_routes(passage, {PRIMARY: primary, **auxiliary}, frozen, names)
        return RelayOutput(primary, auxiliary)

    def _run_head(self, name: str, value: Any) -> Any:
        try:
            return self.heads[name](value)
        except Exception as error:
            error.add_note(f"in the head {name!r}, which read {shape_of(value)}, the {self.plan.auxiliary[name].upper}")
            raise

    def _set_routes(
        self, passage: Passage, outputs: dict[str, Any], frozen: tuple[bool, ...], names: dict[Node, str]
    ) -> None:
        # The routes depend on the graph's shape only. Two passes of the same shape share them.
        live = tuple(junction.boundary for junction in passage.junctions)
        key = self.plan, frozen, tuple(passage.order), live
        if key not in self._schedules:
            schedule = make_schedule(passage.junctions, passage.paths(outputs), names)
            if len(self._schedules) == SCHEDULES_KEPT:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[key] = schedule, Binding(tuple(passage.order), schedule.depths)
        schedule, binding = self._schedules[key]
        schedule.apply(passage.junctions, passage.edges)
        if self.plan.binding is not binding:
            self.plan = dataclasses.replace(self.plan, binding=binding)

    def _note_modified(self, passage: Passage, who: str) -> None:
        for boundary, modified in passage.modified().items():
            self._copies[boundary] = modified or self._copies.get(boundary, False)
            if modified and boundary not in passage.copied:
                raise BoundaryError(
                    f"{who} the {boundary} to leave it alone, as in the first forward pass",
                    "a change in place of memory that others read too",
                    "Use inplace=False there. The next forward pass will copy.",
                )


def _check_heads(plan: Plan, heads: Mapping[str, nn.Module]) -> None:
    if not isinstance(heads, (Mapping, nn.ModuleDict)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise HeadError("heads by name", kinds_of(heads), "Write heads={'aux': AuxiliaryHead(...)}.")
    missing = [name for name in plan.auxiliary if name not in heads]
    unknown = [name for name in heads if name not in plan.auxiliary]
    if missing or unknown:
        raise HeadError(
            f"one head for each auxiliary window: {list(plan.auxiliary) or 'none'}",
            f"{list(heads) or 'none'}; without a head: {missing or 'none'}; without a window: {unknown or 'none'}",
            "Make the names of heads and windows agree.",
        )
    for name, head in heads.items():
        if not isinstance(head, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HeadError(f"the head {name!r} as an nn.Module", type(head).__name__, "Wrap it in a module.")
