"""What users train: `Relay` around any model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from relaybackprop.errors import AppliedTwiceError, HeadError, PlanError, StepError
from relaybackprop.loss import RelayLoss, RelayOutput, kinds_of, shape_of
from relaybackprop.parallel import average_gradients, share_buffers
from relaybackprop.passage import Passage, boundaries, find_module, modified_error, node_names, refuse_tracing
from relaybackprop.plan import PRIMARY, Binding, Boundary, Plan
from relaybackprop.release import Release
from relaybackprop.schedule import Schedule, make_schedule
from relaybackprop.structure import map_tensors

if TYPE_CHECKING:  # not every torch has it
    from torch.distributed import ProcessGroup

SCHEDULES_KEPT = 64  # by what is frozen; training that freezes layers at random sees ever new ones


class RelayStep(NamedTuple):
    """What `Relay.step` returns. All of it is detached.

    Attributes:
        loss: the weighted sum, a scalar.
        terms: by name, the losses before weighting.
        output: of the model and of the heads.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    output: RelayOutput


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

    # transformers' Trainer takes **kwargs in forward for a model that averages over accumulation steps by itself, and
    # then leaves that division out: gradients would be multiplied by the number of steps, silently.
    accepts_loss_kwargs = False

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
        # The same for `step`: what has been searched for leaks, and which heads go on in place.
        self._released: dict[Any, Binding] = {}
        self._head_copies: dict[Boundary, bool] = {}

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
        passage = Passage(self.plan, self._copies)
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

    def step(
        self,
        *args: Any,
        target: Any,
        loss: RelayLoss,
        scale: Callable[[Tensor], Tensor] | None = None,
        sync: "bool | ProcessGroup" = True,
        **kwargs: Any,
    ) -> RelayStep:
        """Forward and backward pass in one, in the memory of the largest window: see `relaybackprop.release`.

        Each auxiliary loss goes down as soon as its head has been met, and what its window alone has kept is freed
        before the layers above run. The gradients in `.grad` are those of `loss(relay(images), labels).backward()`, at
        no more operations; dropout in heads draws in another order. Every way down has to pass the end of each window,
        also for the other losses. If anything raises, part of the gradients may be there already.

        In a job of several processes gradients are averaged over them at the end, and buffers (batch statistics) are
        the first one's, as with `DistributedDataParallel`, which must not be asked to do so itself: give it no forward
        pass, call `step` on the relay. The processes have to start with equal parameters.

        Args:
            *args: of the model.
            target: handed to each criterion as it is.
            loss: of this plan. Its weights count.
            scale: what each weighted loss goes through before its backward pass: `scaler.scale`, or
                `lambda loss: loss / parts` where gradients are accumulated.
            sync: whether to average over all processes, or over those of a group. False in all but the last part of an
                accumulated batch.
            **kwargs: of the model, by name.

        Returns:
            The losses and outputs, detached.

        Raises:
            StepError: in evaluation mode, where no gradients are recorded, for parameters that are divided among
                processes, or if a way leads around the end of a window.
            RelayError: all that the forward pass, or `loss`, raises.

        Example:
            >>> optimizer.zero_grad()  # doctest: +SKIP
            >>> result = relay.step(images, target=labels, loss=criterion)  # doctest: +SKIP
            >>> optimizer.step()  # doctest: +SKIP
            >>> print(result.loss.item())  # doctest: +SKIP
        """
        self._check_step(loss)
        group = None if isinstance(sync, bool) else sync
        if sync:
            share_buffers(self, group)
        outputs, terms = dict[str, Any](), dict[str, Tensor]()

        def compute(name: str, value: Any) -> Tensor:
            output = value if name == PRIMARY else self._run_head(name, value)
            term = loss.term(name, output, target)
            outputs[name], terms[name] = map_tensors(Tensor.detach, output), term.detach()
            weighted = loss.plan.weights[name] * term
            return weighted if scale is None else scale(weighted)

        frozen = tuple(parameter.requires_grad for parameter in self.model.parameters())
        is_new = (self.plan, frozen) not in self._released
        with node_names(self.model, is_new) as names:
            release = Release(self.plan, self._head_copies, compute, names if is_new else None)
            try:
                with boundaries(self.model, release):
                    primary = self.model(*args, **kwargs)
                release.finish(primary)
            finally:
                for boundary, changed in release.changes.items():
                    self._head_copies[boundary] = changed or self._head_copies.get(boundary, False)
        if is_new:
            if len(self._released) == SCHEDULES_KEPT:
                self._released.pop(next(iter(self._released)))
            depths = {name: release.depths[name] for name in self.plan.windows}
            self._released[self.plan, frozen] = Binding(tuple(release.order), depths)
        binding = self._released[self.plan, frozen]
        if self.plan.binding is not binding:
            self.plan = dataclasses.replace(self.plan, binding=binding)
        output = RelayOutput(outputs.pop(PRIMARY), {name: outputs[name] for name in self.plan.auxiliary})
        loss.check_fits(output)
        if sync:
            average_gradients(self, group)
        terms = {name: terms[name] for name in self.plan.windows}
        total = torch.stack([loss.plan.weights[name] * term for name, term in terms.items()]).sum()
        return RelayStep(total, terms, output)

    def _check_step(self, loss: RelayLoss) -> None:
        if not isinstance(loss, RelayLoss):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HeadError(
                "loss to be a RelayLoss", kinds_of(loss), "Write loss=RelayLoss(nn.CrossEntropyLoss(), relay.plan)."
            )
        if loss.plan.windows.keys() != self.plan.windows.keys():
            raise HeadError(
                f"a loss for {list(self.plan.windows)}",
                f"one for {list(loss.plan.windows)}",
                "Build Relay and RelayLoss with the same plan.",
            )
        if not self.training or not torch.is_grad_enabled():
            raise StepError(
                "training mode, and gradients to be recorded",
                "a relay in evaluation mode" if not self.training else "torch.no_grad()",
                "Call relay.train() before, or relay(images) for outputs alone.",
            )
        if any(hasattr(parameter, "full_tensor") for parameter in self.parameters()):  # a DTensor
            raise StepError(
                "whole parameters on each device",
                "parameters that are divided among processes, as by FSDP",
                "Use an ordinary forward and backward pass, or leave out the division: step needs no wrapper.",
            )
        refuse_tracing("a step of Relay")

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
                raise modified_error(who, boundary)


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
