"""What users train: `Relay` around any model, and `RelayLoss` around any criterion."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from relaybackprop.errors import AppliedTwiceError, BoundaryError, HeadError, PlanError
from relaybackprop.passage import Passage, boundaries, find_module, node_names, refuse_tracing
from relaybackprop.plan import PRIMARY, Binding, Boundary, Plan
from relaybackprop.schedule import Schedule, make_schedule

Criterion = Callable[[Any, Any], Tensor]
SCHEDULES_KEPT = 64  # by what is frozen; training that freezes layers at random sees ever new ones


class RelayOutput(NamedTuple):
    """What `Relay` returns in training mode.

    Attributes:
        primary: the model's own output.
        auxiliary: by name, the heads' outputs.
    """

    primary: Any
    auxiliary: dict[str, Any]


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
                "a model and a plan, in this order", f"{_kinds(model, plan)}", "Write Relay(model, plan, heads={...})."
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
            error.add_note(f"in the head {name!r}, which read {_shape(value)}, the {self.plan.auxiliary[name].upper}")
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


class RelayLoss(nn.Module):
    """The weighted sum of all losses of a plan.

    Args:
        criterion: one for all losses, or by name one for each (`"primary"` and the plan's auxiliary names). It is
            called with an output and the target and returns a scalar.
        plan: whose weights are used.

    Raises:
        PlanError: arguments of other types, or in another order.
        HeadError: criteria whose names are not those of the plan's losses.
    """

    def __init__(self, criterion: Criterion | Mapping[str, Criterion], plan: Plan) -> None:
        super().__init__()
        if not isinstance(plan, Plan) or isinstance(criterion, type):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                "a criterion (an instance or a function) and a plan, in this order",
                f"{_kinds(criterion, plan)}",
                "Write RelayLoss(nn.CrossEntropyLoss(), plan).",
            )
        self.plan = plan
        self.criterion: nn.Module
        # Modules, so that class weights in a criterion move to the device with this one.
        if isinstance(criterion, (Mapping, nn.ModuleDict)):
            criteria = dict(cast(Mapping[str, Criterion], criterion).items())
            if set(criteria) != set(plan.windows):
                raise HeadError(
                    f"one criterion for each of {list(plan.windows)}",
                    f"criteria for {list(criteria)}",
                    "Add the missing ones and remove the others, or give a single criterion for all.",
                )
            self.criterion = nn.ModuleDict({name: _as_module(each) for name, each in criteria.items()})
        else:
            self.criterion = _as_module(criterion)

    def forward(self, output: Any, target: Any) -> Tensor:
        """The weighted sum, a scalar. A plain output, as in evaluation mode, has the primary loss only.

        Args:
            output: what `Relay` returned, in training or evaluation mode.
            target: handed to each criterion as it is.

        Raises:
            HeadError: a head's output does not fit the target, or differs in shape from the model's output where one
                criterion serves both.
        """
        weighted = [self.plan.weights[name] * term for name, term in self.terms(output, target).items()]
        return sum(weighted[1:], start=weighted[0])

    def terms(self, output: Any, target: Any) -> dict[str, Tensor]:
        """The losses by name, not yet weighted. Same arguments and errors as `forward`."""
        if not isinstance(output, RelayOutput):
            return {PRIMARY: self._criterion_of(PRIMARY)(output, target)}
        if set(output.auxiliary) != set(self.plan.auxiliary):
            raise HeadError(
                f"the outputs of the plan's heads, {list(self.plan.auxiliary)}",
                f"those of {list(output.auxiliary)}",
                "Build Relay and RelayLoss with the same plan.",
            )
        terms = {PRIMARY: self._criterion_of(PRIMARY)(output.primary, target)}
        for name, scores in output.auxiliary.items():
            if not isinstance(self.criterion, nn.ModuleDict):
                _check_same_shape(name, scores, output.primary)
            try:
                terms[name] = self._criterion_of(name)(scores, target)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except (ValueError, IndexError, RuntimeError) as error:
                raise HeadError(
                    f"the head {name!r} to give what its criterion takes with this target ({_shape(target)})",
                    f"{_shape(scores)}, for which the criterion said: {error}",
                    "Give the head as many classes as the target has, or give each loss a criterion of its own.",
                ) from error
        return terms

    def _criterion_of(self, name: str) -> nn.Module:
        return self.criterion[name] if isinstance(self.criterion, nn.ModuleDict) else self.criterion


class _Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Criterion) -> None:
        super().__init__()
        self.function = function

    def forward(self, output: Any, target: Any) -> Tensor:
        return self.function(output, target)


def _as_module(criterion: Criterion) -> nn.Module:
    return criterion if isinstance(criterion, nn.Module) else _Function(criterion)


def _check_heads(plan: Plan, heads: Mapping[str, nn.Module]) -> None:
    if not isinstance(heads, (Mapping, nn.ModuleDict)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise HeadError("heads by name", f"{_kinds(heads)}", "Write heads={'aux': AuxiliaryHead(...)}.")
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


def _check_same_shape(name: str, scores: Any, primary: Any) -> None:
    if isinstance(scores, Tensor) and isinstance(primary, Tensor) and scores.shape != primary.shape:
        raise HeadError(
            f"the head {name!r} to give the shape of the model's output, {_shape(primary)}, "
            "since one criterion compares both with the target",
            _shape(scores),
            "Give the head as many classes as the model has, or give each loss a criterion of its own.",
        )


def _kinds(*values: Any) -> str:
    return " and ".join(f"the class {v.__name__}" if isinstance(v, type) else f"a {type(v).__name__}" for v in values)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
