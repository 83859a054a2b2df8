"""Suggested plans: heads and windows for a model, by Note [Suggesting] in `relaybackprop.planning.arrange`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import nn

from relaybackprop.errors import PlanError, WindowError
from relaybackprop.plan import PRIMARY, Plan
from relaybackprop.planning.arrange import (
    MOST,
    Arrangement,
    arrange,
    ends_of,
    one_lower,
    places_of,
    stages,
    without_insides,
)
from relaybackprop.planning.budget import fit
from relaybackprop.planning.chain import Link, chain, traced
from relaybackprop.planning.cost import early_peak, kept_between


@dataclass(frozen=True)
class Suggestion:
    """A plan for a model and why it is this one.

    Args:
        plan: the windows.
        depths: by loss, the weight layers on the longest path through its window.
        reasons: sentences, in the order of the decisions.
        head_inputs: by name of the auxiliary loss, the shape of what its head reads, the batch included. Where a
            module returns a tuple, the shape is that of the first tensor with a gradient.
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
    """A relay plan for a model, by the rules in Note [Suggesting] in `relaybackprop.planning.arrange`.

    A place to start from, not an optimum. The model is left alone: a copy runs in training mode, without values, which
    takes no memory. A model that looks at values (an attention mask, `item()`) runs on a copy with the example's values
    instead; that takes the memory of a forward pass and the time of two, and more with a memory budget.

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a dict of named ones. Values matter only where the model
            looks at them.
        num_auxiliary: how many heads; with a memory budget the fewest.
        max_layers: the paper's N, the most weight layers that a window may have; None for as few as can be.
        memory_budget: bytes that `Relay.forward_backward` may need at its peak on such a batch, besides parameters,
            gradients, buffers, the batch and the heads. Windows then follow Note [Fitting] in
            `relaybackprop.planning.budget` instead.

    Returns:
        The plan, its reasons, and what the heads read. Heads are named "aux", or "aux1", "aux2", ... from the lowest.

    Raises:
        PlanError: arguments of other types or below 1, a model that does not run on the example, or one that is not
            a chain of modules.
        WindowError: too few places for so many heads; a window over nearly all layers (more than 88 %), as in a U-Net;
            windows deeper than `max_layers`; or more memory than `memory_budget`. The message says what would do.

    Example:
        >>> suggestion = suggest_plan(resnet50(), images)  # doctest: +SKIP
        >>> print(suggestion)  # doctest: +SKIP
        >>> relay = Relay(model, suggestion.plan, {"aux": AuxiliaryHead(1024, 1000)})  # doctest: +SKIP

    References:
        Shen, Lin, Huang (ECCV 2016), sections 4, 5.1 and 5.2.
    """
    _check_count("num_auxiliary", num_auxiliary)
    if max_layers is not None:
        _check_count("max_layers", max_layers)
    links = without_insides(model, chain(model, example_input))
    if memory_budget is not None:
        _check_count("memory_budget", memory_budget)
        return _fitting(model, example_input, links, num_auxiliary, max_layers, memory_budget)
    arrangement = arrange(links, num_auxiliary)
    if arrangement is None:
        most = next((k for k in range(min(num_auxiliary, len(links)) - 1, 0, -1) if arrange(links, k)), 0)
        raise WindowError(
            f"a model with places for {num_auxiliary} heads, all of them above the lowest third of its layers",
            f"{type(model).__name__} with {len(links)} links in a row, which has room for {most}",
            f"Ask for num_auxiliary={most}." if most else "Train it by standard backpropagation, or write a plan.",
        )
    if arrangement.is_too_deep:
        raise _no_relay(model, links, arrangement)
    if max_layers is not None and arrangement.deepest > max_layers:
        raise _too_deep(links, num_auxiliary, max_layers, arrangement.deepest)
    tops = [arrangement.segments[at].links[-1] for at in arrangement.heads]
    return _suggestion(model, example_input, arrangement.plan, tops, _reasons(links, arrangement, max_layers))


def _suggestion(
    model: nn.Module, example_input: Any, plan: Plan, tops: Sequence[Link], reasons: Sequence[str]
) -> Suggestion:
    """A plan whose heads read these links, tried out."""
    relay = traced(model, plan, example_input)
    plan.check_relay(relay.order)
    shapes = {name: top.shape for name, top in zip(plan.auxiliary, tops, strict=True)}
    reads = [f"The head {name} reads {shape}." for name, shape in shapes.items()]
    return Suggestion(plan, relay.depths, (*reasons, *reads), shapes)


def _half(ends: Sequence[Link], kept: Sequence[int]) -> str:
    """The name of the link up to which half of all that is kept is kept."""
    so_far = accumulate(kept)
    return next(end.name for end, size in zip(ends, so_far, strict=True) if 2 * size >= sum(kept))


def _fitting(
    model: nn.Module,
    example_input: Any,
    links: Sequence[Link],
    num_auxiliary: int,
    max_layers: int | None,
    memory_budget: int,
) -> Suggestion:
    """Note [Fitting] in `relaybackprop.planning.budget`."""
    ends = [end for end, _ in ends_of(links)]
    kept = kept_between(model, [end.name for end in ends[:-1]], example_input)
    heads = range(num_auxiliary, len(ends))
    found, least = fit(ends, kept, heads, memory_budget, lambda plan: early_peak(model, plan, example_input))
    if found is None:
        raise WindowError(
            f"windows of {type(model).__name__} that need at most memory_budget={memory_budget:,} bytes in a step",
            f"{least:,} bytes as the least, with at least num_auxiliary={num_auxiliary}",
            "Allow that much, take a smaller batch, or use activation checkpointing inside of the windows.",
        )
    plan = found.plan(ends)
    reasons = [
        f"Standard backpropagation keeps {sum(kept):,} bytes for the backward pass of such a batch, half of them up to "
        f"{_half(ends, kept)}.",
        f"A step with {_count(len(found.tops), 'head')}, the fewest from {num_auxiliary} up that will do, needs "
        f"{early_peak(model, plan, example_input):,} bytes at its peak; the budget is {memory_budget:,}.",
        "Windows keep about as much each; heads may sit lower than the paper would have them.",
        f"Neighbouring windows overlap over {_count(found.overlap, 'link')} of the chain.",
    ]
    suggestion = _suggestion(model, example_input, plan, [ends[top] for top in found.tops], reasons)
    deepest = max(suggestion.depths.values())
    if max_layers is not None and deepest > max_layers:
        raise WindowError(
            f"windows of at most max_layers={max_layers} weight layers",
            f"{deepest} in the windows that fit memory_budget={memory_budget:,}",
            "Ask for more heads (num_auxiliary), or for one of the two limits.",
        )
    return suggestion


def _no_relay(model: nn.Module, links: Sequence[Link], arrangement: Arrangement) -> WindowError:
    """For a model whose windows would hold nearly all of it."""
    windows = dict(zip([*arrangement.plan.auxiliary, PRIMARY], arrangement.windows, strict=True))
    deepest, heads = max(windows, key=lambda name: windows[name]), len(arrangement.heads)
    more = (arrange(links, count) for count in range(heads + 1, min(heads + 3, len(links))))
    enough = next((found for found in more if found is not None and not found.is_too_deep), None)
    remedy = (
        "Write a plan by hand that ends a window on every path, such as Window(after=('middle', 'encoder.2', "
        "'encoder.1')) for a U-Net, or train by standard backpropagation."
    )
    return WindowError(
        f"windows of at most {MOST:.0%} of the weight layers of {type(model).__name__} each",
        f"{windows[deepest]} of {links[-1].depth} in the window of {deepest!r}, the least found for "
        f"num_auxiliary={heads}; skip connections and modules that return several tensors leave too few places",
        f"Ask for num_auxiliary={len(enough.heads)}." if enough else remedy,
    )


def _too_deep(links: Sequence[Link], num_auxiliary: int, max_layers: int, deepest: int) -> WindowError:
    """For windows that are too deep: with how many heads they would not be."""
    by_number = {more: arrange(links, more) for more in range(num_auxiliary + 1, len(links))}
    least = {more: found.deepest for more, found in by_number.items() if found is not None}
    enough = [more for more, layers in least.items() if layers <= max_layers]
    if enough:
        remedy = f"Ask for num_auxiliary={enough[0]}, the smallest that will do, or for max_layers={deepest}."
    else:
        remedy = f"No number of heads will do; the least max_layers of this model is {min([deepest, *least.values()])}."
    return WindowError(
        f"windows of at most max_layers={max_layers} weight layers",
        f"{deepest} as the least that num_auxiliary={num_auxiliary} allows",
        remedy,
    )


def _reasons(links: Sequence[Link], arrangement: Arrangement, max_layers: int | None) -> tuple[str, ...]:
    segments, heads, deepest = arrangement.segments, arrangement.heads, arrangement.deepest
    total, uncut = segments[-1].end, stages(links)
    reasons = [
        f"The {total} weight layers form {_count(len(uncut), 'segment')} of equal map size; pooling ends a segment and "
        "the classifier belongs to the last one."
    ]
    if len(segments) > len(uncut):
        why = "have too few ends for heads" if len(places_of(uncut)) < len(heads) else "would make windows too deep"
        reasons.append(f"These {why}, so the longest were halved: now {len(segments)}.")
    reasons.append(f"From the lowest up, the segments have {_sentence([s.layers for s in segments])} weight layers.")
    places = [f"{segments[at].name} ({segments[at].end})" for at in places_of(segments)]
    reasons.append(
        "A head may sit at the end of a segment, neither the first nor the last, above the lowest third of the layers "
        f"(the paper's lowest is behind 8 of 19): behind {_sentence(places)}."
    )
    chosen = _sentence([segments[at].name for at in heads])
    reasons.append(
        f"Behind {chosen} the deepest window has {deepest} weight layers, the least that these places allow."
    )
    ties = [other for other in one_lower(arrangement) if other.deepest == deepest]
    if ties:
        names = " or ".join(_sentence([other.segments[at].name for at in other.heads]) for other in ties)
        reasons.append(f"Behind {names} it would be as deep; higher heads read what is closer to the goal.")
    shared = _sentence([f"{_count(segments[at].layers, 'layer')} up to {segments[at].name}" for at in heads])
    reasons.append(f"Neighbouring windows overlap over the whole segment below the lower head: {shared}.")
    if max_layers is not None:
        reasons.append(f"The deepest window is within max_layers={max_layers}.")
    return tuple(reasons)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _sentence(parts: Sequence[object]) -> str:
    *most, last = map(str, parts)
    return f"{', '.join(most)} and {last}" if most else last


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{name} as a whole number of at least 1", f"{name}={value!r}", "Give such a number.")
