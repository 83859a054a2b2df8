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
from relaybackprop.planning.copies import Arguments, on_copies
from relaybackprop.planning.layout import Layer, layers_in, votes

MAP = 4  # rows and columns after the pooling of GoogLeNet's head
WIDTH = 128  # channels of GoogLeNet's head, on an input of 512

_CLASS_TOKENS = ("cls_token", "class_token")


class Heads(dict[str, nn.Module]):
    """Heads by name of the auxiliary loss, as `Relay` accepts them; `print` shows the choices and their reasons.

    Attributes:
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

    The model is not changed. A meta copy runs in training mode; if that fails, a copy runs on the example's values,
    which takes the memory and the time of one forward pass.

    Args:
        model: any module.
        plan: the windows.
        example_input: a batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        num_classes: number of classes, or the vocabulary size of a language model.
        layout: layout of the input of all heads. Default: detected (Note [Evidence] in
            `relaybackprop.planning.layout`).
        pool: pooling over tokens. Default: none if the model scores each token, the first token if the model added a
            class token below, otherwise the mean.
        gain: gain of each head's last layer, see `AuxiliaryHead`.

    Returns:
        An `AuxiliaryHead` of at most GoogLeNet's size for a map, a `TokenHead` for tokens and channels-last maps, a
        `LinearHead` for other features. If the model scores each pixel or token, so do the heads.

    Raises:
        HeadError: an output is not a batch of features, or its layout cannot be detected.
        PlanError: `plan` is not a plan, or the model does not run on the example.

    Example:
        >>> heads = head_for(swin_t(), plan, images, num_classes=1000)  # doctest: +SKIP
        >>> print(heads)  # doctest: +SKIP
        >>> relay = Relay(model, plan, heads)  # doctest: +SKIP
    """
    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError("a plan", f"a {type(plan).__name__}", "Pass suggestion.plan, or a Plan.")
    tops = {name: cast(str, window.top) for name, window in plan.auxiliary.items()}
    for top in tops.values():
        find_module(model, top)
    places = set(tops.values())
    run = on_copies([model], example_input, lambda copies, arguments: _observe(copies[0], arguments, places))
    scores = _scores(run.output, num_classes)
    if pool is not None and scores is not None and len(scores) == 3:
        scores = scores[::2]  # the caller requests pooling although the model scores each token
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    device = next((parameter.device for parameter in model.parameters()), None)
    heads, reasons = dict[str, nn.Module](), dict[str, str]()
    for name, top in tops.items():
        keys, features = _features(run, name, top)
        shape = tuple(features.shape)
        order, why = (layout, "as given") if layout else _layout(run, name, top, shape)
        tokens = pool or ("first" if _has_class_token(run, features) else "mean")
        head, what = _choose(
            shape, order, scores, num_classes, tokens, batch_norm, gain, f"{shape}, the output of {top}"
        )
        item = "".join(f"[{key!r}]" for key in keys)
        reasons[name] = (
            f"{type(head).__name__} ({what}) on {shape}, the output{item} of {top}: {order.replace('_', ' ')}, {why}."
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
    place: str,
) -> tuple[nn.Module, str]:
    """Return a head for features of this shape and its description; `scores` is the shape of the model's scores."""
    channels, sides = (shape[1], shape[2:]) if order == "channels_first" else (shape[-1], shape[1:-1])
    if scores is not None and len(scores) > 3:
        if len(sides) != len(scores) - 2:
            raise HeadError(
                f"a map at the window's top, for scores of each pixel like the model's {scores}",
                place,
                "Move the top to a module that returns a map, or write a head that makes one.",
            )
        factors = [big / small for big, small in zip(scores[2:], sides, strict=True)]
        is_multiple = factors[0].is_integer() and len(set(factors)) == 1
        size = int(factors[0]) if is_multiple else scores[2:]
        what = f"scores of each pixel, {'each side times' if is_multiple else 'interpolated to'} {size}"
        return DenseHead(channels, num_classes, size=size, layout=order, gain=gain), what
    unlike = "" if scores else f"; no output of the model has {num_classes} classes"
    if order == "channels_last" and sides:
        if scores is not None and scores[1:-1] == sides:
            return TokenHead(channels, num_classes, pool=None, gain=gain), "scores of each token, as the model's own"
        pool = pool if len(sides) == 1 else "mean"
        what = "mean over all tokens" if pool == "mean" else f"the {pool} token"
        return TokenHead(channels, num_classes, pool=pool, gain=gain), what + unlike
    if len(sides) == 2 and min(sides) >= MAP:
        width = max(1, min(WIDTH, channels // 4))
        what = f"GoogLeNet's with {width} and {8 * width} features" + ", batch-normalised" * batch_norm + unlike
        sizes = {"width": width, "hidden": 8 * width}
        return AuxiliaryHead(channels, num_classes, batch_norm=batch_norm, **sizes, layout=order, gain=gain), what
    what = "global average pooling" if sides else "features without a map"
    return LinearHead(channels, num_classes, layout=order, gain=gain), what + unlike


@dataclass
class _Run:
    """Observations of a forward pass: the batch size if known, outputs of the model and the tops, votes of layers."""

    batch: int | None
    class_tokens: list[nn.Parameter]
    output: Any = None
    tops: dict[str, Any] = field(default_factory=dict[str, Any])
    layers: list[Layer] = field(default_factory=list[Layer])


def _observe(model: nn.Module, arguments: Arguments, tops: set[str]) -> _Run:
    args, kwargs = arguments
    first = next(iter((*args, *kwargs.values())), None)
    class_tokens = [parameter for name, parameter in model.named_parameters() if name.endswith(_CLASS_TOKENS)]
    run = _Run(first.shape[0] if isinstance(first, Tensor) and first.ndim else None, class_tokens)

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            if name in tops:
                run.tops[name] = output
            run.layers.extend(layers_in(name, module, output))

        return hook

    modules = cast(Iterable[tuple[str, nn.Module]], model.named_modules(remove_duplicate=False))
    handles = [module.register_forward_hook(note(name)) for name, module in modules]
    try:
        run.output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return run


def _layout(run: _Run, name: str, top: str, shape: tuple[int, ...]) -> tuple[Layout, str]:
    """Return the layout of a top's output and the evidence for it."""
    if len(shape) == 2:
        return "channels_first", "one row for each example"
    cast_votes = votes(run.layers, top, shape)
    if len({axis for _, axis in cast_votes}) == 1:
        voter, axis = cast_votes[-1]
        return ("channels_first" if axis == 1 else "channels_last"), f"as in {voter}"
    against = " and ".join(
        f"{voter} works on dimension {axis}" for axis, voter in {a: v for v, a in cast_votes}.items()
    )
    raise HeadError(
        f"a model that tells which dimension of the output of {top}, the top of {name!r}, holds the channels",
        f"{shape}, where {against or 'no layer tells'}",
        "Pass layout='channels_first' for (N, C, ...), or layout='channels_last' for (N, ..., C).",
    )


def _has_class_token(run: _Run, features: Tensor) -> bool:
    """Whether these features depend on a class token. Some models add theirs in the last blocks only."""
    reached = graph.walk(graph.edges_of([features]), graph.everywhere)
    variables = {id(getattr(node, "variable", None)) for node in reached}
    return any(id(token) in variables for token in run.class_tokens)


def _features(run: _Run, name: str, top: str) -> tuple[tuple[Any, ...], Tensor]:
    """Return the first tensor of a top's output that is a batch of features, after its keys."""
    if top not in run.tops:
        raise HeadError(
            f"the forward pass to call {top}, the top of {name!r}", "no call", "Name a module inside it, or around it."
        )
    tensors = list(paths_in(run.tops[top]))
    found = [
        (keys, tensor)
        for keys, tensor in tensors
        if tensor.is_floating_point() and tensor.ndim > 1 and run.batch in (None, tensor.shape[0])
    ]
    if not found:
        raise HeadError(
            f"a batch of features at {top}, the top of {name!r}: (N, ...) with N = {run.batch} as in the example",
            f"{[tuple(tensor.shape) for _, tensor in tensors] or 'no tensor'}",
            "Move the top to a module that the model runs on whole examples, or write a head that reads this output.",
        )
    return next((pair for pair in found if pair[1].requires_grad), found[0])


def _scores(output: Any, num_classes: int) -> tuple[int, ...] | None:
    """Return the shape of the model's first output with this many classes: per example, token or pixel."""
    for _, tensor in paths_in(output):
        if tensor.ndim > 1 and tensor.shape[2 if tensor.ndim == 3 else 1] == num_classes:
            return tuple(tensor.shape)
    return None
