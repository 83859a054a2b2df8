"""Suggested plans: `suggest_plan` chooses heads and windows for a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from relaybackprop.errors import PlanError, WindowError, pluralized
from relaybackprop.plan import PRIMARY, Plan
from relaybackprop.planning.arrange import (
    MAX_SHARE,
    Arrangement,
    arrange,
    ends_of,
    one_head_lower,
    outside_blocks,
    places_of,
    stages,
)
from relaybackprop.planning.budget import pack
from relaybackprop.planning.chain import Link, chain, trace
from relaybackprop.planning.cost import early_peak, saved_between


@dataclass(frozen=True)
class Suggestion:
    """A plan for a model, and the reasons for it. `print` shows both.

    Args:
        plan: the windows.
        depths: number of weight layers on the longest path through each window, by loss.
        reasons: a sentence for each decision, in the order they were made.
        head_inputs: shape of each head's input, including the batch, by name of the auxiliary loss. If a module returns
            a tuple, it is the shape of the first tensor with a gradient.
    """

    plan: Plan
    depths: Mapping[str, int]
    reasons: tuple[str, ...]
    head_inputs: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        return "\n".join(
            [self.plan.describe(self.depths), "", *(f"{n}. {reason}" for n, reason in enumerate(self.reasons, 1))]
        )


def suggest_plan(
    model: nn.Module,
    example_input: Any,
    num_auxiliary: int = 1,
    max_layers: int | None = None,
    memory_budget: int | None = None,
) -> Suggestion:
    """Suggest a relay plan for a model by the paper's rules (Note [Suggesting] in `relaybackprop.planning.arrange`).

    The plan is a starting point, not an optimum. The model does not change. The forward pass runs in training mode on a
    copy on the meta device, which takes no memory. If the forward pass depends on values (an attention mask, `item()`),
    a copy runs on the example's values, which takes the memory of one forward pass and the time of two, and more with a
    memory budget.

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments. Values matter only if the forward
            pass depends on them.
        num_auxiliary: number of heads, at least 1. With a memory budget, the minimum number.
        max_layers: maximum number of weight layers in a window (the paper's N). Default: no limit.
        memory_budget: maximum peak memory of `Relay.forward_backward` on a batch like `example_input`, in bytes,
            without parameters, gradients, buffers, the batch and the heads. The windows then follow Note [Packing] in
            `relaybackprop.planning.budget` instead. Such windows can cost accuracy; activation checkpointing
            does not change the gradients. Default: no limit.

    Returns:
        The plan, its reasons and the shapes of the heads' inputs. The heads are named "aux", or "aux1", "aux2", ...,
        from lowest to highest.

    Raises:
        PlanError: an argument has a wrong type or is below 1, the model does not run on the example, or it is not a
            chain of modules.
        WindowError: there are too few positions for the heads; a window has more than 88 % of the layers, as in a
            U-Net; or windows are deeper than `max_layers` or require more than `memory_budget`. The message states a
            valid choice.

    Example:
        ```python
        model = resnet50()
        suggestion = suggest_plan(model, images)
        print(suggestion)
        relay = Relay(model, suggestion.plan, head_for(model, suggestion.plan, images, num_classes=1000))
        ```

    References:
        Shen, Lin, Huang (ECCV 2016), sections 4, 5.1 and 5.2.
    """
    _check_positive("num_auxiliary", num_auxiliary)
    if max_layers is not None:
        _check_positive("max_layers", max_layers)
    links = outside_blocks(model, chain(model, example_input))
    if memory_budget is not None:
        _check_positive("memory_budget", memory_budget)
        return _suggest_within_budget(model, example_input, links, num_auxiliary, max_layers, memory_budget)
    arrangement = arrange(links, num_auxiliary)
    if arrangement is None:
        max_heads = next((k for k in range(min(num_auxiliary, len(links)) - 1, 0, -1) if arrange(links, k)), 0)
        raise WindowError(
            f"{type(model).__name__}, a chain of {len(links)} links, has only "
            f"{pluralized(max_heads, 'valid head position')}; num_auxiliary={num_auxiliary} was requested",
            "all heads must be above the lowest third of the layers",
            f"Pass num_auxiliary={max_heads}."
            if max_heads
            else "Use standard backpropagation, or write a Plan by hand.",
        )
    if arrangement.is_too_deep:
        raise _no_relay_error(model, links, arrangement)
    if max_layers is not None and arrangement.deepest > max_layers:
        raise _too_deep_error(links, num_auxiliary, max_layers, arrangement.deepest)
    tops = [arrangement.segments[index].links[-1] for index in arrangement.heads]
    return _suggestion(model, example_input, arrangement.plan, tops, _reasons(links, arrangement, max_layers))


def _suggestion(
    model: nn.Module, example_input: Any, plan: Plan, tops: Sequence[Link], reasons: Sequence[str]
) -> Suggestion:
    """Run the plan on a copy and return it as a suggestion. `tops` are the links that the heads read."""
    relay = trace(model, plan, example_input)
    plan.check_relay(relay.order)
    shapes = {name: top.shape for name, top in zip(plan.auxiliary, tops, strict=True)}
    inputs = [f"The head {name} reads {shape}." for name, shape in shapes.items()]
    return Suggestion(plan, relay.depths, (*reasons, *inputs), shapes)


def _halfway_module(ends: Sequence[Link], saved_bytes: Sequence[int]) -> str:
    """Return the name of the first link up to which at least half of the bytes are saved."""
    cumulative = accumulate(saved_bytes)
    return next(end.name for end, size in zip(ends, cumulative, strict=True) if 2 * size >= sum(saved_bytes))


def _suggest_within_budget(
    model: nn.Module,
    example_input: Any,
    links: Sequence[Link],
    num_auxiliary: int,
    max_layers: int | None,
    memory_budget: int,
) -> Suggestion:
    """Suggest windows within a memory budget (Note [Packing] in `relaybackprop.planning.budget`)."""
    ends = [end for end, _ in ends_of(links)]
    saved_bytes = saved_between(model, [end.name for end in ends[:-1]], example_input)
    heads = range(num_auxiliary, len(ends))

    def peak_of(plan: Plan) -> int:
        return early_peak(model, plan, example_input)

    packing, smallest_peak = pack(ends, saved_bytes, heads, memory_budget, peak_of)
    if packing is None:
        raise WindowError(
            f"memory_budget={memory_budget:,} bytes is too small for {type(model).__name__} and this batch",
            f"the smallest peak with at least num_auxiliary={num_auxiliary} is {smallest_peak:,} bytes",
            f"Raise the budget to {smallest_peak:,} bytes, reduce the batch size, or use activation checkpointing "
            "inside the windows.",
        )
    plan = packing.plan(ends)
    at_least = f" from {num_auxiliary} up" if num_auxiliary > 1 else ""
    reasons = [
        f"Standard backpropagation saves {sum(saved_bytes):,} bytes for the backward pass on this batch, half of "
        f"them up to {_halfway_module(ends, saved_bytes)}.",
        f"{pluralized(len(packing.tops), 'head')} is the smallest number{at_least} that fits the budget: a step then "
        f"peaks at {peak_of(plan):,} of {memory_budget:,} bytes.",
        "The windows save similar amounts; heads may be lower than the paper's rules allow. Such windows "
        "can cost accuracy.",
        f"Neighbouring windows overlap over {pluralized(packing.overlap, 'link')} of the chain.",
    ]
    suggestion = _suggestion(model, example_input, plan, [ends[top] for top in packing.tops], reasons)
    deepest = max(suggestion.depths.values())
    if max_layers is not None and deepest > max_layers:
        raise WindowError(
            f"a window that fits memory_budget={memory_budget:,} has {deepest} weight layers",
            f"at most max_layers={max_layers} are allowed",
            "Increase num_auxiliary, or set only one of the two limits.",
        )
    return suggestion


def _no_relay_error(model: nn.Module, links: Sequence[Link], arrangement: Arrangement) -> WindowError:
    """Build the error for a window over nearly all layers."""
    windows = dict(zip([*arrangement.plan.auxiliary, PRIMARY], arrangement.windows, strict=True))
    deepest, heads = max(windows, key=lambda name: windows[name]), len(arrangement.heads)
    candidates = (arrange(links, count) for count in range(heads + 1, min(heads + 3, len(links))))
    sufficient = next((a for a in candidates if a is not None and not a.is_too_deep), None)
    remedy = (
        "Write a Plan by hand that ends a window on every path, such as Window(after=('middle', 'encoder.2', "
        "'encoder.1')) for a U-Net, or use standard backpropagation."
    )
    return WindowError(
        f"the window of {deepest!r} has {windows[deepest]} of the {links[-1].depth} weight layers of "
        f"{type(model).__name__}, the fewest found for num_auxiliary={heads}",
        f"a window may have at most {MAX_SHARE:.0%} of them; skip connections and modules that return several tensors "
        "leave too few places",
        f"Pass num_auxiliary={len(sufficient.heads)}." if sufficient else remedy,
    )


def _too_deep_error(links: Sequence[Link], num_auxiliary: int, max_layers: int, deepest: int) -> WindowError:
    """Build the error for windows deeper than `max_layers`, with a sufficient number of heads if there is one."""
    by_count = {count: arrange(links, count) for count in range(num_auxiliary + 1, len(links))}
    depths = {count: arrangement.deepest for count, arrangement in by_count.items() if arrangement is not None}
    sufficient = [count for count, depth in depths.items() if depth <= max_layers]
    if sufficient:
        remedy = f"Pass num_auxiliary={sufficient[0]}, the smallest that suffices, or max_layers={deepest}."
    else:
        remedy = f"No number of heads suffices; this model's smallest max_layers is {min([deepest, *depths.values()])}."
    return WindowError(
        f"the deepest window has {deepest} weight layers, the fewest that num_auxiliary={num_auxiliary} allows",
        f"at most max_layers={max_layers} are allowed",
        remedy,
    )


def _reasons(links: Sequence[Link], arrangement: Arrangement, max_layers: int | None) -> tuple[str, ...]:
    """Explain an arrangement, one sentence for each decision."""
    segments, heads, deepest = arrangement.segments, arrangement.heads, arrangement.deepest
    total, uncut = segments[-1].end, stages(links)
    reasons = [
        f"The {total} weight layers form {pluralized(len(uncut), 'segment')} of equal map size; pooling ends a "
        "segment, and the classifier belongs to the last one."
    ]
    if len(segments) > len(uncut):
        has_too_few = len(places_of(uncut)) < len(heads)
        cause = "There are too few positions for heads" if has_too_few else "The windows would be too deep"
        reasons.append(f"{cause}, so the longest segments were halved, giving {len(segments)}.")
    reasons.append(
        f"From lowest to highest, the segments have {_enumerate([s.layers for s in segments])} weight layers."
    )
    places = [f"{segments[index].name} ({segments[index].end})" for index in places_of(segments)]
    reasons.append(
        "A head may read the end of a segment, except the first and the last, above the lowest third of the layers "
        f"(the paper's lowest is after 8 of 19): after {_enumerate(places)}."
    )
    head_modules = _enumerate([segments[index].name for index in heads])
    heads_after = "the head after" if len(heads) == 1 else "the heads after"
    reasons.append(
        f"With {heads_after} {head_modules}, the deepest window has {deepest} weight layers, the minimum over these "
        "positions."
    )
    ties = [other for other in one_head_lower(arrangement) if other.deepest == deepest]
    if ties:
        names = " or ".join(_enumerate([other.segments[index].name for index in other.heads]) for other in ties)
        reasons.append(
            f"With {heads_after} {names}, the deepest window would be equally deep; ties go to the higher head, whose "
            "features are closer to the output."
        )
    shared = [segments[index] for index in heads]
    overlaps = _enumerate([f"{pluralized(segment.layers, 'layer')} up to {segment.name}" for segment in shared])
    reasons.append(f"Neighbouring windows overlap over the whole segment below the lower head: {overlaps}.")
    if max_layers is not None:
        reasons.append(f"The deepest window is within max_layers={max_layers}.")
    return tuple(reasons)


def _enumerate(parts: Sequence[object]) -> str:
    *first, last = map(str, parts)
    return f"{', '.join(first)} and {last}" if first else last


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(
            f"{name}={value!r} is invalid", "it must be an integer of at least 1", f"Pass an integer, such as {name}=1."
        )
