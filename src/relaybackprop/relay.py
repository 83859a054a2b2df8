"""`Relay`: a model in which each loss reaches only its own window of layers."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from relaybackprop.engine.calls import Calls
from relaybackprop.engine.data_parallel import averaging, broadcast_buffers, check_sharded, group_key, is_distributed
from relaybackprop.engine.early import EarlyRelease
from relaybackprop.engine.forward import ForwardPass
from relaybackprop.engine.hooks import boundary_hooks, check_no_transforms, find_module, node_names
from relaybackprop.engine.pytree import item_of, map_tensors
from relaybackprop.engine.routes import make_schedule
from relaybackprop.errors import AppliedTwiceError, EarlyReleaseError, HeadError, PlanError
from relaybackprop.forwarded import FORWARDED, forwarded
from relaybackprop.loss import RelayLoss, RelayOutput, shape_of, types_of
from relaybackprop.plan import PRIMARY, Boundary, Plan

if TYPE_CHECKING:  # missing in some builds of torch
    from torch.distributed import ProcessGroup

MAX_CACHED = 64

Output = Callable[[Any], Any] | str | int
"""Selects the part of the model's output that the primary loss reads: a function, or the key or index of an item."""


class RelayResult(NamedTuple):
    """The result of `Relay.forward_backward`; all tensors are detached.

    Attributes:
        loss: the weighted sum of the losses, a scalar.
        terms: the unweighted losses, by name.
        output: the outputs of the model and of the heads.

    Example:
        ```python
        result = relay.forward_backward(images, target=labels, loss=criterion)
        print(result.loss.item(), result.terms["aux"].item(), result.output.primary.shape)
        ```
    """

    loss: Tensor
    terms: dict[str, Tensor]
    output: RelayOutput


class Relay(nn.Module):
    """A model in which each loss reaches only its own window of layers.

    In training mode the forward pass returns a `RelayOutput`. One `backward()` call propagates the gradients of the
    losses on it, each to the end of its window. In evaluation mode, output and cost are exactly the same as for the
    plain model. The model is not copied, and it has hooks only while a training forward pass runs. At any other time
    `relay.model` is the plain model, with its own state-dict keys, and can be used, saved or exported.

    An overlap of G losses with different lower ends costs G input-gradient passes and one weight-gradient pass. All
    other layers cost as much as in standard backpropagation (docs/method/index.md). Full-backward hooks of modules in
    an overlap fire once per input-gradient pass; hooks of parameters always fire once. A relay has the methods that
    timm and transformers call on a model, such as `no_weight_decay`, if its model has them
    (`relaybackprop.forwarded`).

    Args:
        model: any module. It must call each boundary module once per training forward pass, except for modules that
            layer drop skips (Note [Skipped modules] in `relaybackprop.engine.hooks`).
        plan: where the heads attach, and how far down each loss reaches.
        heads: the head of each auxiliary loss, by name: a module that maps a copy of the output of the window's `top`,
            of any type, to the input of the criterion. Default: none.
        output: selects the part of the model's output that the primary loss reads: a function of the output, or the key
            or index of an item. The relay returns the selection in both modes. Default: the entire output.

    Attributes:
        order: the boundaries from low to high; empty before the first training forward pass.
        depths: the number of weight layers on the longest path through the window of each loss, without its head (the
            paper's N). Trainable convolutions, linear layers and embeddings count. Weights that are recomputed in each
            pass (such as those of weight_norm) and fused recurrent layers do not.

    Raises:
        PlanError: the arguments have wrong types or are in the wrong order.
        ModuleNameError: the plan names a module that the model does not have.
        HeadError: a window has no head, a head has no window, or a head is not a module.
        CompiledOverlapError: a boundary is inside a compiled module.
        TransformError: a boundary is in a model compiled by torch.jit.
        AppliedTwiceError: the model or a head is a `Relay` or contains one.

    Example:
        ```python
        plan = Plan(primary=Window(bottom="layer3.0"), auxiliary={"aux": Window(top="layer3.3")})
        relay = Relay(resnet50(), plan, heads={"aux": AuxiliaryHead(1024, 1000)})
        output = relay(images)  # images: (8, 3, 224, 224)
        output.primary.shape, output.auxiliary["aux"].shape  # (8, 1000), (8, 1000)
        print(plan.describe(relay.depths))
        ```

    References:
        Shen, Lin, Huang: Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks. ECCV
        2016, section 4.
    """

    # If forward accepts **kwargs, transformers' Trainer assumes that the model averages over accumulation steps and
    # does not divide. Gradients would silently be multiplied by the number of steps.
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
                f"Relay received {types_of(model, plan)}",
                "its first arguments must be a model and a plan, in this order",
                "Pass suggestion.plan." if hasattr(plan, "plan") else "Write Relay(model, plan, heads={...}).",
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise PlanError(
                "the model is a DistributedDataParallel",
                "Relay requires a plain model, since DistributedDataParallel would not average the gradients of heads",
                "Wrap the relay instead: DistributedDataParallel(Relay(model, plan, heads)).",
            )
        _check_plain("the model", model, "Relay requires a plain model, and one plan for it")
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
        """Return a parameter, buffer or module, or a method of the model if it is one of `FORWARDED`."""
        return forwarded(self.model, name) if name in FORWARDED else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output in evaluation mode, and a `RelayOutput` in training mode.

        Args:
            *args: positional arguments of the model.
            **kwargs: keyword arguments of the model.

        Raises:
            BoundaryError: a boundary module never ran, ran twice, or ran without recording gradients; or its value is
                modified in place through another tensor that shares its memory.
            WindowError: the top of a window runs before its lower end.
            LeakError: a path bypasses the end of a window. The search runs in the first pass with a new order of
                boundaries or a new set of frozen parameters.
            CompiledOverlapError: compiled code runs where windows overlap, or around a boundary.
            TransformError: the call is inside a `torch.func` transform.

        Example:
            ```python
            output = relay.train()(images)
            criterion(output, labels).backward()
            scores = relay.eval()(images)
            ```
        """
        if not self.training:
            return self._select_output(self.model(*args, **kwargs))
        check_no_transforms("a training forward pass of Relay")
        key = self._cache_key()
        calls = Calls(self.plan, self._missed)
        engine = ForwardPass(calls)
        is_new = not self._schedules.has_prefix(key)
        with boundary_hooks(self.model, self.plan, engine), node_names(self.model, calls, is_new) as names:
            primary = self._select_output(self.model(*args, **kwargs))
        calls.check()
        primary = engine.finish(primary)
        auxiliary = {name: self._run_head(name, engine.head_inputs.pop(name)) for name in calls.losses()[1:]}
        if torch.is_grad_enabled():
            # Routes depend on the shape of the graph only, so passes of the same shape share them.
            shape = tuple(calls.places.items()), tuple(junction.boundary for junction in engine.junctions)
            cached = self._schedules.get((key, shape))
            if cached is None:
                schedule = make_schedule(engine.junctions, engine.paths({PRIMARY: primary, **auxiliary}), names)
                cached = self._schedules.add((key, shape), (schedule, tuple(calls.order), schedule.depths))
            schedule, self.order, self.depths = cached
            schedule.apply(engine.junctions, engine.edges)
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
        """Run the forward and backward passes together, with the peak memory of the largest window (early release).

        The backward pass of each auxiliary loss runs as soon as the forward pass reaches its head. It frees the
        activations that no later loss needs before the layers above run (`relaybackprop.engine.early`). `.grad` equals
        that of `loss(relay(images), labels).backward()`, without additional operations; only dropout in heads draws
        random numbers in a different order. At the end of each window, every backward path must cross that boundary,
        including the paths of losses whose own windows extend further down. After an error, some of the gradients may
        already have been computed.

        With several processes, gradients are averaged as soon as they are final, while the layers above run forward or
        the layers below run backward (Note [Averaging] in `relaybackprop.engine.data_parallel`). The first step
        averages at its end. Buffers (batch statistics) are those of the first process, as with
        `DistributedDataParallel`. Do not wrap the relay in `DistributedDataParallel`, which would average again. Apply
        `fully_shard` to modules between the plan's boundaries, such as blocks, not to the relay. All processes must
        start with equal parameters. Hooks of parameters see local gradients, and `.grad` is a new tensor after each
        averaged step.

        Args:
            *args: positional arguments of the model.
            target: passed to each criterion unchanged.
            loss: the criteria. The plan's weights apply.
            scale: a function applied to each weighted loss before its backward pass, such as `scaler.scale`, or
                `lambda loss: loss / steps` for gradient accumulation.
            sync: whether to average gradients over all processes, or the process group to average over. Pass False in
                all but the last step of an accumulated batch. If the model itself communicates (SyncBatchNorm), pass a
                separate group, `dist.new_group()`: the collectives of one group run in order, and hang if processes
                skip different layers.
            **kwargs: keyword arguments of the model.

        Returns:
            The losses and outputs, detached.

        Raises:
            EarlyReleaseError: the relay is in evaluation mode, or gradients are not recorded; a criterion does not
                return a scalar; `fully_shard` was applied around a boundary, or a parameter is a `DTensor` that was
                not sharded by `fully_shard`; a gradient to average is sparse, or a hook removed it; a window has
                several ends; a reentrant checkpoint is in a window; or a path bypasses the end of a window.
            RelayError: any error of the forward pass or of `loss`.

        Example:
            ```python
            optimizer.zero_grad()
            result = relay.forward_backward(images, target=labels, loss=criterion)
            optimizer.step()
            print(result.loss.item())
            ```
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

        key = self._cache_key()
        is_new = key not in self._released
        calls = Calls(self.plan, self._missed)
        with self._averaging(sync), node_names(self.model, calls, is_new) as names:
            release = EarlyRelease(calls, compute, names if is_new else None)
            with boundary_hooks(self.model, self.plan, release):
                primary = self._select_output(self.model(*args, **kwargs))
            release.finish(primary)
            cached = self._released.get(key, (tuple(calls.order), release.depths))
            # If a module was skipped, the search saw a different graph: do not cache its result.
            if is_new and all(boundary == place for boundary, place in calls.places.items()):
                self._released.add(key, cached)
            self.order, self.depths = cached
            auxiliary = {name: outputs[name] for name in self.plan.auxiliary if name in outputs}
            output = RelayOutput(outputs[PRIMARY], auxiliary, self.plan.weights)
            loss.check_fits(output)
        terms = {name: terms[name] for name in output.losses}
        total = torch.stack([output.weights[name] * term for name, term in terms.items()]).sum()
        return RelayResult(total, terms, output)

    def step(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise an error: `forward_backward` had this name before 0.2."""
        raise PlanError(
            "relay.step was renamed in 0.2",
            "relay.forward_backward replaces it",
            "Rename the call; the arguments are the same.",
        )

    def _select_output(self, output: Any) -> Any:
        """Select the part of the model's output that the primary loss reads."""
        if self.output is None:
            return output
        if callable(self.output):
            return self.output(output)
        # Some models return one tensor in evaluation mode.
        return output if isinstance(output, Tensor) else item_of(output, self.output)

    def _cache_key(self) -> tuple[Any, ...]:
        """Return the cache key of the routes: the plan, the model, and which parameters are frozen."""
        return self.plan, id(self.model), tuple(parameter.requires_grad for parameter in self.model.parameters())

    def _averaging(self, sync: "bool | ProcessGroup") -> AbstractContextManager[None]:
        """Broadcast buffers, then average gradients in the returned context. No-op in a single process."""
        group = None if isinstance(sync, bool) else sync
        if not sync or not is_distributed(group):
            return nullcontext()
        broadcast_buffers(self, group)
        trained = tuple(parameter.requires_grad for parameter in self.parameters())
        key = self.plan, trained, group_key(group)
        return averaging(self, self._forecasts.get(key) or self._forecasts.add(key, {}), group)

    def _check_early(self, loss: RelayLoss) -> None:
        if not isinstance(loss, RelayLoss):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HeadError(
                f"loss is {types_of(loss)}", "it must be a RelayLoss", "Write loss=RelayLoss(nn.CrossEntropyLoss())."
            )
        loss.check_names(self.plan.windows)
        if not self.training or not torch.is_grad_enabled():
            raise EarlyReleaseError(
                "the relay is in evaluation mode" if not self.training else "gradients are disabled by torch.no_grad()",
                "forward_backward requires training mode and recorded gradients",
                "Call relay.train() first, or relay(images) for outputs only.",
            )
        several = [name for name, window in self.plan.windows.items() if len(window.ends) > 1]
        if several:
            raise EarlyReleaseError(
                f"the window of {several[0]!r} has several ends",
                "early release supports windows with one end each",
                "Use an ordinary forward and backward pass.",
            )
        check_sharded(self, [f"model.{boundary.module}" for boundary in self.plan.boundaries])
        check_no_transforms("an early release of Relay")

    def _run_head(self, name: str, value: Any) -> Any:
        top = self.plan.auxiliary[name].upper
        try:
            return self.heads[name](value)
        except HeadError as error:
            problem = f"in the head of the auxiliary loss {name!r}, on the {top}, {error.problem}"
            raise HeadError(problem, error.requirement, error.remedy) from error
        except Exception as error:
            error.add_note(f"Raised by the head {name!r}, which read {shape_of(value)}, the {top}.")
            raise


def _check_scalar(name: str, term: Any) -> None:
    if not isinstance(term, Tensor) or term.numel() != 1:
        raise EarlyReleaseError(
            f"the criterion of the loss {name!r} returns "
            + (f"the shape {shape_of(term)}" if isinstance(term, Tensor) else f"a {shape_of(term)}"),
            "it must return a scalar tensor",
            "Reduce it: reduction='mean', or lambda output, target: criterion(output, target).mean().",
        )


class _Cache(dict[Any, Any]):
    """A bounded first-in, first-out cache, because training that freezes layers at random keeps adding keys."""

    def add(self, key: Any, value: Any) -> Any:
        if len(self) == MAX_CACHED:
            self.pop(next(iter(self)))
        self[key] = value
        return value

    def has_prefix(self, first: Any) -> bool:
        """Return whether any cached key has this first item."""
        return any(key[0] == first for key in self)


def _check_plain(title: str, module: nn.Module, requirement: str) -> None:
    if any(isinstance(part, Relay) for part in module.modules()):
        remedy = "Pass relay.model instead."
        raise AppliedTwiceError(f"{title} is, or contains, a Relay", requirement, remedy)


def _check_heads(plan: Plan, heads: Mapping[str, nn.Module]) -> None:
    if not isinstance(heads, (Mapping, nn.ModuleDict)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise HeadError(
            f"heads is {types_of(heads)}",
            "it must be a mapping from names to modules",
            "Write heads={'aux': AuxiliaryHead(...)}.",
        )
    missing = [name for name in plan.auxiliary if name not in heads]
    unknown = [name for name in heads if name not in plan.auxiliary]
    if missing or unknown:
        raise HeadError(
            f"heads and auxiliary windows differ (without a head: {missing or 'none'}; "
            f"without a window: {unknown or 'none'})",
            f"the plan requires one head for each of its auxiliary windows, {list(plan.auxiliary) or 'none'}",
            "Make the names of heads and windows agree.",
        )
    for name, head in heads.items():
        if not isinstance(head, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise HeadError(
                f"the head {name!r} is a {type(head).__name__}", "it must be an nn.Module", "Wrap it in a module."
            )
        _check_plain(f"the head {name!r}", head, "a head must be a plain module, since a relay returns several outputs")
