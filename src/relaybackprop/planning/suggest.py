"""Suggested plans: `suggest_plan` chooses heads and windows for a model."""

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
    """A plan for a model and the reasons for it.

    Args:
        plan: the windows.
        depths: the number of weight layers on the longest path through each window, by loss.
        reasons: sentences, in the order of the decisions.
        head_inputs: shape of each head's input, batch included, by name of the auxiliary loss. If a module returns a
            tuple, it is the shape of the first tensor with a gradient.
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

    The plan is a starting point, not an optimum. The model is not changed: a meta copy runs in training mode, which
    takes no memory. If the forward pass depends on values (an attention mask, `item()`), a copy runs on the example's
    values, which takes the memory of a forward pass and the time of two, and more with a memory budget.

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments, or a dict of keyword arguments. Values matter only where the
            forward pass depends on them.
        num_auxiliary: number of heads; with a memory budget the minimum.
        max_layers: the paper's N, the maximum number of weight layers in a window. Default: no limit.
        memory_budget: maximum peak memory of `Relay.forward_backward` on such a batch in bytes, without parameters,
            gradients, buffers, the batch and the heads. Windows then follow Note [Fitting] in
            `relaybackprop.planning.budget` instead.

    Returns:
        The plan, its reasons and the shapes of the heads' inputs. Heads are named "aux", or "aux1", "aux2", ... with
        the lowest first.

    Raises:
        PlanError: arguments have other types or are below 1, or the model does not run on the example or is not a
            chain of modules.
        WindowError: there are too few places for the heads; a window has more than 88 % of the layers, as in a U-Net;
            windows are deeper than `max_layers`, or need more than `memory_budget`. The message names a valid choice.

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
    """Run the plan whose heads read these links, and return it as a suggestion."""
    relay = traced(model, plan, example_input)
    plan.check_relay(relay.order)
    shapes = {name: top.shape for name, top in zip(plan.auxiliary, tops, strict=True)}
    reads = [f"The head {name} reads {shape}." for name, shape in shapes.items()]
    return Suggestion(plan, relay.depths, (*reasons, *reads), shapes)


def _half(ends: Sequence[Link], kept: Sequence[int]) -> str:
    """Return the name of the first link by which half of the bytes are saved."""
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
    """Suggest windows within a memory budget (Note [Fitting] in `relaybackprop.planning.budget`)."""
    ends = [end for end, _ in ends_of(links)]
    kept = kept_between(model, [end.name for end in ends[:-1]], example_input)
    heads = range(num_auxiliary, len(ends))
    found, least = fit(ends, kept, heads, memory_budget, lambda plan: early_peak(model, plan, example_input))
    if found is None:
        raise WindowError(
            f"windows of {type(model).__name__} that need at most memory_budget={memory_budget:,} bytes in a step",
            f"{least:,} bytes as the least, with at least num_auxiliary={num_auxiliary}",
            "Raise the budget to that, use a smaller batch, or use activation checkpointing inside the windows.",
        )
    plan = found.plan(ends)
    reasons = [
        f"Standard backpropagation saves {sum(kept):,} bytes for the backward pass of such a batch, half of them up to "
        f"{_half(ends, kept)}.",
        f"A step with {_count(len(found.tops), 'head')}, the fewest from {num_auxiliary} up that fit, needs "
        f"{early_peak(model, plan, example_input):,} bytes at its peak; the budget is {memory_budget:,}.",
        "Windows save similar amounts; heads may be lower than the paper's rules allow.",
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
    """Build the error for a window over nearly all layers."""
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
    """Build the error for windows deeper than `max_layers`, with a number of heads that suffices if there is one."""
    by_number = {more: arrange(links, more) for more in range(num_auxiliary + 1, len(links))}
    least = {more: found.deepest for more, found in by_number.items() if found is not None}
    enough = [more for more, layers in least.items() if layers <= max_layers]
    if enough:
        remedy = f"Ask for num_auxiliary={enough[0]}, the smallest that suffices, or for max_layers={deepest}."
    else:
        remedy = f"No number of heads suffices; this model's least max_layers is {min([deepest, *least.values()])}."
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
        "A head may read the end of a segment, except the first and the last, above the lowest third of the layers "
        f"(the paper's lowest is after 8 of 19): after {_sentence(places)}."
    )
    chosen = _sentence([segments[at].name for at in heads])
    reasons.append(f"After {chosen} the deepest window has {deepest} weight layers, the least that these places allow.")
    ties = [other for other in one_lower(arrangement) if other.deepest == deepest]
    if ties:
        names = " or ".join(_sentence([other.segments[at].name for at in other.heads]) for other in ties)
        reasons.append(f"After {names} it would be as deep; higher heads read features closer to the output.")
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
