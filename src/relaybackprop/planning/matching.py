"""Heads that fit a plan, chosen from the shapes of module outputs in one forward pass of a copy."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from relaybackprop.engine import graph
from relaybackprop.engine.hooks import find_module
from relaybackprop.engine.pytree import paths_in
from relaybackprop.errors import HeadError, PlanError
from relaybackprop.heads import AuxiliaryHead, DenseHead, Gain, Layout, LinearHead, Pool, Select, TokenHead
from relaybackprop.plan import Plan
from relaybackprop.planning.copies import Arguments, run_on_copies
from relaybackprop.planning.layout import Vote, deciding_votes, votes_of

POOLED_SIDE = 4  # rows and columns after the pooling of GoogLeNet's head
MAX_WIDTH = 128  # channels of GoogLeNet's head, for an input of 512 channels

_CLASS_TOKENS = ("cls_token", "class_token")


class Heads(dict[str, nn.Module]):
    """Heads by name of the auxiliary loss, as `Relay` accepts them. `print` shows the choices and their reasons.

    Args:
        heads: the heads by name.
        reasons: one sentence for each head, by name.
    """

    def __init__(self, heads: Mapping[str, nn.Module], reasons: Mapping[str, str]) -> None:
        super().__init__(heads)
        self.reasons = dict(reasons)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {reason}" for name, reason in self.reasons.items())


def head_for(
    model: nn.Module,
    plan: Plan,
    example_input: Any,
    num_classes: int,
    *,
    layout: Layout | None = None,
    pool: Pool | None = None,
    gain: Gain = "default",
) -> Heads:
    """Build a matching head for each auxiliary loss of a plan.

    The model does not change. A meta copy runs in training mode. If that fails, a copy runs on the example's values,
    which takes the memory and the time of one forward pass.

    Args:
        model: any module.
        plan: the windows.
        example_input: an example batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        num_classes: number of classes, or the vocabulary size of a language model.
        layout: layout of the inputs of all heads, see Note [Layouts] in `relaybackprop.heads`. Default: detected (Note
            [Evidence] in `relaybackprop.planning.layout`).
        pool: pooling over tokens, as for `TokenHead`. Default: no pooling if the model scores each token, the first
            token if the model added a class token below the head, otherwise the mean.
        gain: initialisation of each head's last layer, as for `AuxiliaryHead`.

    Returns:
        The heads by name, on the model's device: an `AuxiliaryHead` of at most GoogLeNet's size for a map, a
        `TokenHead` for tokens and channels-last maps, and a `LinearHead` for other features. If the model scores each
        pixel or token, so do the heads.

    Raises:
        HeadError: an output is not a batch of features, or its layout cannot be detected.
        ModuleNameError: the plan names a module that the model does not have.
        PlanError: `plan` is not a plan, or the model does not run on the example.

    Example:
        ```python
        heads = head_for(model, plan, images, num_classes=1000)
        print(heads)
        relay = Relay(model, plan, heads)
        ```
    """
    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(
            f"the second argument is a {type(plan).__name__}", "it must be a plan", "Pass suggestion.plan, or a Plan."
        )
    tops = {name: cast(str, window.top) for name, window in plan.auxiliary.items()}
    for top in tops.values():
        find_module(model, top)
    places = set(tops.values())
    observed = run_on_copies([model], example_input, lambda copies, arguments: _observe(copies[0], arguments, places))
    scores = _scores(observed.output, num_classes)
    if pool is not None and scores is not None and len(scores) == 3:
        scores = scores[::2]  # the caller requests pooling although the model scores each token
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    device = next((parameter.device for parameter in model.parameters()), None)
    heads, reasons = dict[str, nn.Module](), dict[str, str]()
    for name, top in tops.items():
        keys, features = _features(observed, name, top)
        shape = tuple(features.shape)
        order, evidence = (layout, "as given") if layout else _layout(observed, name, top, shape)
        token_pool = pool or ("first" if _has_class_token(observed, features) else "mean")
        head, description = _choose(
            shape, order, scores, num_classes, token_pool, batch_norm, gain, f"{shape}, the output of {top}"
        )
        path = "".join(f"[{key!r}]" for key in keys)
        reasons[name] = (
            f"{type(head).__name__} ({description}) on {shape}, the output{path} of {top}: "
            f"{order.replace('_', ' ')}, {evidence}."
        )
        for key in reversed(keys):
            head = Select(key, head)
        heads[name] = head.to(device=device, dtype=features.dtype)
    return Heads(heads, reasons)


def _choose(
    shape: tuple[int, ...],
    order: Layout,
    scores: tuple[int, ...] | None,
    num_classes: int,
    pool: Pool,
    batch_norm: bool,
    gain: Gain,
    where: str,
) -> tuple[nn.Module, str]:
    """Return a head for features of this shape, and its description.

    Args:
        shape: shape of the features.
        order: layout of the features.
        scores: shape of the model's scores, if known.
        num_classes: number of classes.
        pool: pooling over tokens.
        batch_norm: whether an `AuxiliaryHead` has batch normalisation.
        gain: initialisation of the last layer.
        where: description of the features, for errors.
    """
    channels, spatial = (shape[1], shape[2:]) if order == "channels_first" else (shape[-1], shape[1:-1])
    if scores is not None and len(scores) > 3:
        if len(spatial) != len(scores) - 2:
            raise HeadError(
                f"{where}, is not a map",
                f"the model scores each pixel, {scores}, so the head must read a map",
                "Move the top to a module that returns a map, or write a head that makes one.",
            )
        factors = [big / small for big, small in zip(scores[2:], spatial, strict=True)]
        is_multiple = factors[0].is_integer() and len(set(factors)) == 1
        size = int(factors[0]) if is_multiple else scores[2:]
        description = f"scores of each pixel, {'each side times' if is_multiple else 'interpolated to'} {size}"
        return DenseHead(channels, num_classes, size=size, layout=order, gain=gain), description
    remark = "" if scores else f"; no output of the model has {num_classes} classes"
    if order == "channels_last" and spatial:
        if scores is not None and scores[1:-1] == spatial:
            return TokenHead(channels, num_classes, pool=None, gain=gain), "scores of each token, as the model's own"
        pool = pool if len(spatial) == 1 else "mean"
        description = "mean over all tokens" if pool == "mean" else f"the {pool} token"
        return TokenHead(channels, num_classes, pool=pool, gain=gain), description + remark
    if len(spatial) == 2 and min(spatial) >= POOLED_SIDE:
        width = max(1, min(MAX_WIDTH, channels // 4))
        description = f"GoogLeNet's with {width} and {8 * width} features" + ", batch-normalised" * batch_norm + remark
        sizes = {"width": width, "hidden": 8 * width}
        return AuxiliaryHead(
            channels, num_classes, batch_norm=batch_norm, **sizes, layout=order, gain=gain
        ), description
    description = "global average pooling" if spatial else "features without a map"
    return LinearHead(channels, num_classes, layout=order, gain=gain), description + remark


@dataclass
class _Observations:
    """Observations of a forward pass.

    Args:
        batch: the batch size, if known.
        class_tokens: the model's class tokens.
        output: output of the model.
        tops: outputs of the windows' tops, by module name.
        votes: the layers' votes on layouts.
    """

    batch: int | None
    class_tokens: list[nn.Parameter]
    output: Any = None
    tops: dict[str, Any] = field(default_factory=dict[str, Any])
    votes: list[Vote] = field(default_factory=list[Vote])


def _observe(model: nn.Module, arguments: Arguments, tops: set[str]) -> _Observations:
    args, kwargs = arguments
    first_input = next(iter((*args, *kwargs.values())), None)
    class_tokens = [parameter for name, parameter in model.named_parameters() if name.endswith(_CLASS_TOKENS)]
    observed = _Observations(
        first_input.shape[0] if isinstance(first_input, Tensor) and first_input.ndim else None, class_tokens
    )

    def recorder(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            if name in tops:
                observed.tops[name] = output
            observed.votes.extend(votes_of(name, module, output))

        return hook

    modules = cast(Iterable[tuple[str, nn.Module]], model.named_modules(remove_duplicate=False))
    handles = [module.register_forward_hook(recorder(name)) for name, module in modules]
    try:
        observed.output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return observed


def _layout(observed: _Observations, name: str, top: str, shape: tuple[int, ...]) -> tuple[Layout, str]:
    """Return the layout of a top's output and the evidence for it."""
    if len(shape) == 2:
        return "channels_first", "one row for each example"
    group = deciding_votes(observed.votes, top, shape)
    if len({axis for _, axis in group}) == 1:
        voter, axis = group[-1]
        return ("channels_first" if axis == 1 else "channels_last"), f"as in {voter}"
    conflict = " and ".join(f"{voter} works on dimension {axis}" for axis, voter in {a: v for v, a in group}.items())
    raise HeadError(
        f"the layout of {shape}, the output of {top}, the top of {name!r}, cannot be detected",
        conflict or "no layer shows which dimension is the channel dimension",
        "Pass layout='channels_first' for (N, C, ...), or layout='channels_last' for (N, ..., C).",
    )


def _has_class_token(observed: _Observations, features: Tensor) -> bool:
    """Return whether these features depend on a class token. Some models add theirs only in the last blocks."""
    reached = graph.walk(graph.edges_of([features]), graph.follow_all)
    variables = {id(getattr(node, "variable", None)) for node in reached}
    return any(id(token) in variables for token in observed.class_tokens)


def _features(observed: _Observations, name: str, top: str) -> tuple[tuple[Any, ...], Tensor]:
    """Return the first tensor of a top's output that is a batch of features, after its keys."""
    if top not in observed.tops:
        raise HeadError(
            f"the forward pass does not call {top}, the top of {name!r}",
            "a head reads the output of a module that runs",
            "Name a module inside it, or around it.",
        )
    tensors = list(paths_in(observed.tops[top]))
    candidates = [
        (keys, tensor)
        for keys, tensor in tensors
        if tensor.is_floating_point() and tensor.ndim > 1 and observed.batch in (None, tensor.shape[0])
    ]
    if not candidates:
        raise HeadError(
            f"{top}, the top of {name!r}, returns {[tuple(tensor.shape) for _, tensor in tensors] or 'no tensor'}",
            f"a head must read a batch of features, (N, ...) with N = {observed.batch} as in the example",
            "Move the top to a module that runs on complete examples, or write a head that reads this output.",
        )
    return next((pair for pair in candidates if pair[1].requires_grad), candidates[0])


def _scores(output: Any, num_classes: int) -> tuple[int, ...] | None:
    """Return the shape of the model's first output with this many classes: per example, token or pixel."""
    for _, tensor in paths_in(output):
        if tensor.ndim > 1 and tensor.shape[2 if tensor.ndim == 3 else 1] == num_classes:
            return tuple(tensor.shape)
    return None
