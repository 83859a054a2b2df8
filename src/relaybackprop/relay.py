"""`Relay`: a model whose losses each reach only their own window of layers."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from relaybackprop.engine.calls import Calls
from relaybackprop.engine.data_parallel import averaging, check_sharded, identity_of, is_parallel, share_buffers
from relaybackprop.engine.early import EarlyRelease
from relaybackprop.engine.forward import ForwardPass
from relaybackprop.engine.hooks import boundaries, find_module, node_names, refuse_transforms
from relaybackprop.engine.pytree import item_of, map_tensors
from relaybackprop.engine.routes import make_schedule
from relaybackprop.errors import AppliedTwiceError, EarlyReleaseError, HeadError, PlanError
from relaybackprop.forwarded import FORWARDED, forwarded
from relaybackprop.loss import RelayLoss, RelayOutput, kinds_of, shape_of
from relaybackprop.plan import PRIMARY, Boundary, Plan

if TYPE_CHECKING:  # missing in some builds of torch
    from torch.distributed import ProcessGroup

MAX_CACHED = 64

Output = Callable[[Any], Any] | str | int
"""Selects the primary loss's part of the model's output: a function of it, or the key or index of one item."""


class RelayResult(NamedTuple):
    """The result of `Relay.forward_backward`; all tensors are detached.

    Attributes:
        loss: the weighted sum, a scalar.
        terms: the unweighted losses, by name.
        output: the outputs of the model and of the heads.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    output: RelayOutput


class Relay(nn.Module):
    """A model whose losses each reach only their own window of layers.

    In training mode the forward pass returns a `RelayOutput`; one `backward()` propagates the gradients of losses on it
    as far as the plan says. In evaluation mode output and cost are exactly the plain model's. The model is not copied,
    and has hooks only while a training forward pass runs: at any other time `relay.model` is the plain model, with its
    own state-dict keys, and can be used, saved or exported.

    An overlap of G losses with different lower ends costs G input-gradient passes and one weight-gradient pass;
    everything else costs what standard backpropagation costs (docs/method/index.md). Full-backward hooks of modules in
    an overlap fire once per pass; parameters' hooks always fire once. A relay has the methods that timm and
    transformers call on a model, such as `no_weight_decay`, if its model has them (`relaybackprop.forwarded`).

    Args:
        model: any module. It must call each boundary module once per training forward pass, except for modules that
            layer drop skips (Note [Skipped modules] in `relaybackprop.engine.hooks`).
        plan: where heads attach and how far down each loss reaches.
        heads: the module of each auxiliary loss, by name. It maps a copy of the output of the window's `top`, whatever
            its type, to the criterion's input.
        output: selects the primary loss's part of the model's output, for models that return more: a function, or the
            key or index of an item. The relay returns this part in both modes.

    Attributes:
        order: the boundaries from low to high; empty before the first training forward pass.
        depths: by loss, the number of weight layers on the longest path through its window, without its head: the
            paper's N. Trainable convolutions, linear layers and embeddings count; weights that are recomputed in each
            pass (such as weight_norm's) and fused recurrent layers do not. `print(plan.describe(depths))`.

    Raises:
        PlanError: arguments of the wrong types, or in the wrong order.
        ModuleNameError: the plan names a module that the model does not have.
        HeadError: a window without a head, a head without a window, or a head that is not a module.
        TransformError: a boundary in a model compiled by torch.jit.
        AppliedTwiceError: the model is, or contains, a `Relay`.

    Example:
        >>> relay = Relay(resnet50(), plan, heads={"aux": AuxiliaryHead(1024, 1000)})  # doctest: +SKIP
        >>> output = relay(images)  # doctest: +SKIP
        >>> output.primary.shape, output.auxiliary["aux"].shape  # doctest: +SKIP

    References:
        Shen, Lin, Huang: Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks. ECCV
        2016, section 4.
    """

    # transformers' Trainer takes **kwargs in forward as a sign that the model averages over accumulation steps, and
    # then does not divide: gradients would silently be multiplied by the number of steps.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        heads: Mapping[str, nn.Module] | None = None,
        *,
        output: Output | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlanError(
                "a model and a plan, in this order",
                f"{kinds_of(model, plan)}",
                "Pass suggestion.plan." if hasattr(plan, "plan") else "Write Relay(model, plan, heads={...}).",
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise PlanError(
                "a plain model",
                "a DistributedDataParallel, which would not average the gradients of heads",
                "Wrap the relay instead: DistributedDataParallel(Relay(model, plan, heads)).",
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
        self.output = output
        self.order: tuple[Boundary, ...] = ()
        self.depths: Mapping[str, int] = {}
        self._schedules = _Cache()
        self._released = _Cache()
        self._forecasts = _Cache()
        self._missed: dict[Boundary, int] = {}

    def __getattr__(self, name: str) -> Any:
        """Return a parameter, buffer or module; or a method of the model, if it is one of `FORWARDED`."""
        return forwarded(self.model, name) if name in FORWARDED else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output in evaluation mode, and a `RelayOutput` in training mode.

        Raises:
            BoundaryError: a boundary module never ran, ran twice, or ran without recording gradients; or its value is
                modified in place through another tensor that shares its memory.
            WindowError: a window whose top runs before its lower end.
            LeakError: a path leads around the end of a window (searched for in the first pass with a new order
                of boundaries or a new set of frozen parameters).
            CompiledOverlapError: compiled code where windows overlap, or around a boundary.
            TransformError: a `torch.func` transform.
        """
        if not self.training:
            return self._read(self.model(*args, **kwargs))
        refuse_transforms("a training forward pass of Relay")
        key = self._key()
        run = ForwardPass(Calls(self.plan, self._missed))
        with boundaries(self.model, self.plan, run), node_names(self.model, not self._schedules.knows(key)) as names:
            primary = self._read(self.model(*args, **kwargs))
        run.calls.check()
        primary = run.leave(primary)
        auxiliary = {name: self._run_head(name, run.head_inputs.pop(name)) for name in run.calls.losses()[1:]}
        if torch.is_grad_enabled():
            # Routes depend on the shape of the graph only, so passes of the same shape share them.
            shape = tuple(run.calls.places.items()), tuple(junction.boundary for junction in run.junctions)
            found = self._schedules.get((key, shape))
            if found is None:
                schedule = make_schedule(run.junctions, run.paths({PRIMARY: primary, **auxiliary}), names)
                found = self._schedules.add((key, shape), (schedule, tuple(run.calls.order), schedule.depths))
            schedule, self.order, self.depths = found
            schedule.apply(run.junctions, run.edges)
        return RelayOutput(primary, auxiliary, self.plan.weights)

    def forward_backward(
        self,
        *args: Any,
        target: Any,
        loss: RelayLoss,
        scale: Callable[[Tensor], Tensor] | None = None,
        sync: "bool | ProcessGroup" = True,
        **kwargs: Any,
    ) -> RelayResult:
        """Run the forward and backward pass in one, in the memory of the largest window (`relaybackprop.engine.early`).

        The backward pass of each auxiliary loss runs as soon as the forward pass reaches its head, and frees the
        activations that no later loss needs, before the layers above run. `.grad` is that of
        `loss(relay(images), labels).backward()`, at no more operations; dropout in heads draws in another order. Every
        backward path must cross the end of each window, also for the other losses. After an error, part of the
        gradients may have been computed.

        With several processes, gradients are averaged as soon as they are final, while layers above run forward or
        layers below run backward (Note [Averaging] in `relaybackprop.engine.data_parallel`; the first step averages at
        its end). Buffers (batch statistics) are the first process's, as with `DistributedDataParallel`. Do not wrap
        the relay in `DistributedDataParallel`, which would average again. Apply `fully_shard` to modules between the
        plan's boundaries, such as blocks, not to the relay. All processes must start with equal parameters. Hooks of
        parameters see local gradients, and `.grad` is a new tensor after each averaged step.

        Args:
            *args: positional arguments of the model.
            target: passed to each criterion unchanged.
            loss: the criteria. The plan's weights apply.
            scale: applied to each weighted loss before its backward pass: `scaler.scale`, or
                `lambda loss: loss / parts` for gradient accumulation.
            sync: whether to average over all processes, or the group to average over. Pass False in all but the last
                part of an accumulated batch. If the model communicates itself (SyncBatchNorm), pass a separate group,
                `dist.new_group()`: collectives of one group run in order, and hang if processes skip different layers.
            **kwargs: keyword arguments of the model.

        Returns:
            The losses and outputs, detached.

        Raises:
            EarlyReleaseError: in evaluation mode or without gradient recording; for a criterion that does not return a
                scalar; for `fully_shard` around a boundary or
                parameters sharded by other means; for gradients to average that are sparse or that a hook removed; for
                windows with several ends; for reentrant checkpointing in a window; or if a path leads around the end
                of one.
            RelayError: any error of the forward pass or of `loss`.

        Example:
            >>> optimizer.zero_grad()  # doctest: +SKIP
            >>> result = relay.forward_backward(images, target=labels, loss=criterion)  # doctest: +SKIP
            >>> optimizer.step()  # doctest: +SKIP
            >>> print(result.loss.item())  # doctest: +SKIP
        """
        self._check_early(loss)
        outputs, terms = dict[str, Any](), dict[str, Tensor]()

        def compute(name: str, value: Any) -> Tensor:
            output = value if name == PRIMARY else self._run_head(name, value)
            term = loss.term(name, output, target)
            _check_scalar(name, term)
            outputs[name], terms[name] = map_tensors(Tensor.detach, output), term.detach()
            weighted = self.plan.weights[name] * term
            return weighted if scale is None else scale(weighted)

        key = self._key()
        is_new = key not in self._released
        with self._averaging(sync), node_names(self.model, is_new) as names:
            release = EarlyRelease(Calls(self.plan, self._missed), compute, names if is_new else None)
            with boundaries(self.model, self.plan, release):
                primary = self._read(self.model(*args, **kwargs))
            release.finish(primary)
            found = self._released.get(key, (tuple(release.calls.order), release.depths))
            # With a skipped module, the search saw a different graph: do not cache its result.
            if is_new and all(boundary == place for boundary, place in release.calls.places.items()):
                self._released.add(key, found)
            self.order, self.depths = found
            auxiliary = {name: outputs[name] for name in self.plan.auxiliary if name in outputs}
            output = RelayOutput(outputs[PRIMARY], auxiliary, self.plan.weights)
            loss.check_fits(output)
        terms = {name: terms[name] for name in output.losses}
        total = torch.stack([output.weights[name] * term for name, term in terms.items()]).sum()
        return RelayResult(total, terms, output)

    def step(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """The name of `forward_backward` before 0.2."""
        raise PlanError("relay.forward_backward(...)", "relay.step(...)", "Rename it; arguments are the same.")

    def _read(self, output: Any) -> Any:
        """The primary loss's part of the model's output."""
        if self.output is None:
            return output
        if callable(self.output):
            return self.output(output)
        # Some models return one tensor in evaluation mode.
        return output if isinstance(output, Tensor) else item_of(output, self.output)

    def _key(self) -> tuple[Any, ...]:
        """Cache key of the routes: the plan, the model, and which parameters are frozen."""
        return self.plan, id(self.model), tuple(parameter.requires_grad for parameter in self.model.parameters())

    def _averaging(self, sync: "bool | ProcessGroup") -> AbstractContextManager[None]:
        """Broadcast buffers, then average gradients as they become final. No-op in a single process."""
        group = None if isinstance(sync, bool) else sync
        if not sync or not is_parallel(group):
            return nullcontext()
        share_buffers(self, group)
        trained = tuple(parameter.requires_grad for parameter in self.parameters())
        key = self.plan, trained, identity_of(group)
        return averaging(self, self._forecasts.get(key) or self._forecasts.add(key, {}), group)

    def _check_early(self, loss: RelayLoss) -> None:
        if not isinstance(loss, RelayLoss):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HeadError("loss to be a RelayLoss", kinds_of(loss), "Write loss=RelayLoss(nn.CrossEntropyLoss()).")
        loss.check_names(self.plan.windows)
        if not self.training or not torch.is_grad_enabled():
            raise EarlyReleaseError(
                "training mode, and gradients to be recorded",
                "a relay in evaluation mode" if not self.training else "torch.no_grad()",
                "Call relay.train() first, or relay(images) for outputs only.",
            )
        if any(len(window.ends) > 1 for window in self.plan.windows.values()):
            raise EarlyReleaseError(
                "windows with one end each", "a window with several ends", "Use an ordinary forward and backward pass."
            )
        check_sharded(self, [f"model.{boundary.module}" for boundary in self.plan.boundaries])
        refuse_transforms("an early release of Relay")

    def _run_head(self, name: str, value: Any) -> Any:
        try:
            return self.heads[name](value)
        except Exception as error:
            error.add_note(f"in the head {name!r}, which read {shape_of(value)}, the {self.plan.auxiliary[name].upper}")
            raise


def _check_scalar(name: str, term: Any) -> None:
    if not isinstance(term, Tensor) or term.numel() != 1:
        raise EarlyReleaseError(
            f"a criterion that returns a scalar for the loss {name!r}",
            f"the shape {shape_of(term)}" if isinstance(term, Tensor) else shape_of(term),
            "Reduce it: reduction='mean', or lambda output, target: criterion(output, target).mean().",
        )


class _Cache(dict[Any, Any]):
    """A bounded first-in, first-out cache: training that freezes layers at random keeps adding keys."""

    def add(self, key: Any, value: Any) -> Any:
        if len(self) == MAX_CACHED:
            self.pop(next(iter(self)))
        self[key] = value
        return value

    def knows(self, first: Any) -> bool:
        """Whether any cached key has this first item."""
        return any(key[0] == first for key in self)


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
