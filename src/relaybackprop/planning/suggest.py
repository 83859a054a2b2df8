"""Where heads and windows might go: the paper's rules of thumb (section 4) applied to a model's chain of links.

Note [Suggesting]
1. A segment is a stage of equal map size, as the paper cuts VGGNet-19 behind its max pooling layers. What changes the
   size without a weight layer, such as pooling, ends the segment below; what follows once the map is gone (the
   classifier) belongs to the last segment.
2. A head reads the end of a segment. Not of the last one, where the model's own output is, nor within a classifier
   behind maps or tokens. Nor of the first, since the next window would have to reach the first layer to overlap it.
3. Nor in the lowest third of the weight layers, where "the patterns captured lack of sufficient discrimination". The
   paper's lowest head is behind layer 8 of 19 (Figure 2), its others higher.
4. Where that leaves too few places, as in a transformer's equal blocks, the longest segments are halved until there are
   2K + 3 of them for K heads: five for one head, as in the paper's networks.
5. Each window goes down over the whole segment below the next lower head, and no further (Table 2, Figure 2).
6. Heads sit where the deepest window is as shallow as can be; of equally good places the higher ones are taken.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from torch import nn

from relaybackprop.errors import PlanError, WindowError
from relaybackprop.plan import Plan, Window
from relaybackprop.planning.budget import fit, head_names
from relaybackprop.planning.chain import Link, chain, traced
from relaybackprop.planning.cost import early_peak, kept_between


@dataclass(frozen=True)
class Suggestion:
    """A plan for a model and why it is this one.

    Args:
        plan: the windows.
        depths: by loss, the weight layers on the longest path through its window.
        reasons: sentences, in the order of the decisions.
        head_inputs: by name of the auxiliary loss, the shape of what its head reads, the batch included.
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
    """A relay plan for a model, by the rules in Note [Suggesting]. A place to start from, not an optimum.

    The model is left alone, and nothing is computed: a copy without values runs, in training mode.

    Args:
        model: any module that runs on the meta device.
        example_input: a tensor, a tuple of arguments, or a dict of named ones. Only shapes and types matter.
        num_auxiliary: how many heads; with a memory budget the fewest.
        max_layers: the paper's N, the most weight layers that a window may have; None for as few as can be.
        memory_budget: bytes that `Relay.forward_backward` may need at its peak on such a batch, besides parameters,
            gradients, buffers, the batch and the heads. Windows then follow Note [Fitting] in
            `relaybackprop.planning.budget` instead.

    Returns:
        The plan, its reasons, and what the heads read. Heads are named "aux", or "aux1", "aux2", ... from the lowest.

    Raises:
        PlanError: arguments of other types or below 1, a model that does not run on the meta device, or one that is no
            chain of modules.
        WindowError: too few places for so many heads, windows deeper than `max_layers`, or more memory than
            `memory_budget`; the message says how many heads would do, or the least memory.

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
    links = chain(model, example_input)
    if memory_budget is not None:
        _check_count("memory_budget", memory_budget)
        return _fitting(model, example_input, links, num_auxiliary, max_layers, memory_budget)
    arrangement = _arrange(links, num_auxiliary)
    if arrangement is None:
        most = next((k for k in range(min(num_auxiliary, len(links)) - 1, 0, -1) if _arrange(links, k)), 0)
        raise WindowError(
            f"a model with places for {num_auxiliary} heads, all of them above the lowest third of its layers",
            f"{type(model).__name__} with {len(links)} links in a row, which has room for {most}",
            f"Ask for num_auxiliary={most}." if most else "Train it by standard backpropagation, or write a plan.",
        )
    if max_layers is not None and arrangement.deepest > max_layers:
        raise _too_deep(links, num_auxiliary, max_layers, arrangement.deepest)
    plan = _plan(arrangement)
    relay = traced(model, plan, example_input)
    plan.check_relay(relay.order)
    shapes = {name: arrangement.segments[at].shape for name, at in zip(plan.auxiliary, arrangement.heads, strict=True)}
    reads = [f"The head {name} reads {shape}." for name, shape in shapes.items()]
    return Suggestion(plan, relay.depths, (*_reasons(links, arrangement, max_layers), *reads), shapes)


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
    ends = [end for end, _ in _ends(links)]
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
    relay = traced(model, plan, example_input)
    plan.check_relay(relay.order)
    deepest = max(relay.depths.values())
    if max_layers is not None and deepest > max_layers:
        raise WindowError(
            f"windows of at most max_layers={max_layers} weight layers",
            f"{deepest} in the windows that fit memory_budget={memory_budget:,}",
            "Ask for more heads (num_auxiliary), or for one of the two limits.",
        )
    shapes = {name: ends[top].shape for name, top in zip(plan.auxiliary, found.tops, strict=True)}
    reasons = [
        f"Standard backpropagation keeps {sum(kept):,} bytes for the backward pass of such a batch, half of them up to "
        f"{_half(ends, kept)}.",
        f"A step with {_count(len(found.tops), 'head')}, the fewest from {num_auxiliary} up that will do, needs "
        f"{early_peak(model, plan, example_input):,} bytes at its peak; the budget is {memory_budget:,}.",
        "Windows keep about as much each; heads may sit lower than the paper would have them.",
        f"Neighbouring windows overlap over {_count(found.overlap, 'link')} of the chain.",
        *(f"The head {name} reads {shape}." for name, shape in shapes.items()),
    ]
    return Suggestion(plan, relay.depths, tuple(reasons), shapes)


@dataclass(frozen=True)
class _Segment:
    """A run of links.

    Args:
        links: one for each depth, from the lowest up.
        start: the depth below it, in weight layers.
    """

    links: tuple[Link, ...]
    start: int

    @property
    def end(self) -> int:
        return self.links[-1].depth

    @property
    def layers(self) -> int:
        return self.end - self.start

    @property
    def name(self) -> str:
        """Of the module at its end."""
        return self.links[-1].name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.links[-1].shape


@dataclass(frozen=True)
class _Arrangement:
    """Heads on the ends of segments: `heads` are numbers of segments, the lowest head first."""

    segments: Sequence[_Segment]
    heads: tuple[int, ...]

    @property
    def windows(self) -> list[int]:
        """Weight layers of each window, from the lowest head's to the primary one."""
        tops = [*self.heads, len(self.segments) - 1]
        bottoms = [0, *self.heads]
        return [self.segments[top].end - self.segments[bottom].start for bottom, top in zip(bottoms, tops, strict=True)]

    @property
    def deepest(self) -> int:
        return max(self.windows)


def _ends(links: Sequence[Link]) -> list[tuple[Link, tuple[int, ...]]]:
    """For each depth the link where a segment may end, and the size of the map behind the weight layer.

    Normalisation, activation and pooling belong to the layer that they follow. A norm that opens the next block does
    not: nothing within a block comes after the end of the block before, unless it makes the map smaller.
    """
    ends: list[tuple[Link, tuple[int, ...]]] = []
    for _, group in groupby(links, key=lambda link: link.depth):
        run = list(group)
        areas = [math.prod(link.shape[2:]) for link in run]
        run_from_pool = run[areas.index(min(areas)) :]
        end = min(reversed(run_from_pool), key=lambda link: link.name.count("."))
        ends.append((end, run[0].shape[2:]))
    return ends


def _stages(links: Sequence[Link]) -> list[_Segment]:
    """Note [Suggesting] 1."""
    groups: list[list[Link]] = []
    size = ()
    for link, area in _ends(links):
        if not groups or (area != size and math.prod(area) > 1):
            groups.append([])
            size = area
        groups[-1].append(link)
    starts = [0, *(group[-1].depth for group in groups)]
    return [_Segment(tuple(group), start) for group, start in zip(groups, starts, strict=False)]


def _places(segments: Sequence[_Segment]) -> list[int]:
    """Note [Suggesting] 2 and 3: the segments at whose ends a head may sit."""
    total = segments[-1].end
    has_maps = any(len(segment.shape) > 2 for segment in segments)
    return [
        number
        for number in range(1, len(segments) - 1)
        if 3 * segments[number].end >= total and (len(segments[number].shape) > 2 or not has_maps)
    ]


def _segments(links: Sequence[Link], num_auxiliary: int) -> list[_Segment] | None:
    """Note [Suggesting] 4. None if there is no place for so many heads."""
    segments = _stages(links)
    if len(_places(segments)) >= num_auxiliary:
        return segments
    while len(segments) < 2 * num_auxiliary + 3 or len(_places(segments)) < num_auxiliary:
        halves = _halve_longest(segments)
        if halves is None:
            break
        segments = halves
    return segments if len(_places(segments)) >= num_auxiliary else None


def _halve_longest(segments: Sequence[_Segment]) -> list[_Segment] | None:
    """Cut the longest segment that can be cut at the link nearest its middle, but not within a classifier on maps."""
    at = max(range(len(segments)), key=lambda n: segments[n].layers if len(segments[n].links) > 1 else 0)
    links, start = segments[at].links, segments[at].start
    if len(links) == 1:
        return None
    middle = (start + segments[at].end) / 2
    cuts = range(1, len(links))
    on_maps = [cut for cut in cuts if math.prod(links[cut - 1].shape[2:]) > 1]
    cut = min(on_maps or cuts, key=lambda cut: abs(links[cut - 1].depth - middle))
    halves = _Segment(links[:cut], start), _Segment(links[cut:], links[cut - 1].depth)
    return [*segments[:at], *halves, *segments[at + 1 :]]


def _arrange(links: Sequence[Link], num_auxiliary: int) -> _Arrangement | None:
    """Note [Suggesting] 6."""
    segments = _segments(links, num_auxiliary)
    if segments is None:
        return None
    # Any limit above the best one can be met, too.
    limits = range(segments[-1].end + 1)
    best = bisect_left(limits, True, key=lambda limit: _highest_heads(segments, num_auxiliary, limit) is not None)
    heads = _highest_heads(segments, num_auxiliary, best)
    assert heads is not None, "a window over all layers is always possible"
    return _Arrangement(segments, heads)


def _highest_heads(segments: Sequence[_Segment], num_auxiliary: int, limit: int) -> tuple[int, ...] | None:
    """Heads as high as windows of at most `limit` layers allow, from the lowest up; None if they do not reach the top.

    The higher a head, the higher the next window ends: as high as possible is best for all that follow.
    """
    places, heads, start = _places(segments), list[int](), 0
    for missing in range(num_auxiliary - 1, -1, -1):
        allowed = [at for at in places if segments[at].end - start <= limit and (not heads or at > heads[-1])]
        if missing:  # keep places for the heads above
            allowed = [at for at in allowed if at in places[:-missing]]
        if not allowed:
            return None
        heads.append(allowed[-1])
        start = segments[heads[-1]].start
    return tuple(heads) if segments[-1].end - start <= limit else None


def _plan(arrangement: _Arrangement) -> Plan:
    """Note [Suggesting] 5."""
    segments, heads = arrangement.segments, arrangement.heads
    names = head_names(len(heads))
    ends = [None, *(segments[at - 1].name for at in heads)]
    windows = {
        name: Window(top=segments[at].name, after=end) for name, at, end in zip(names, heads, ends[:-1], strict=True)
    }
    return Plan(Window(after=ends[-1]), windows)


def _too_deep(links: Sequence[Link], num_auxiliary: int, max_layers: int, deepest: int) -> WindowError:
    """For windows that are too deep: with how many heads they would not be."""
    by_number = {more: _arrange(links, more) for more in range(num_auxiliary + 1, len(links))}
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


def _reasons(links: Sequence[Link], arrangement: _Arrangement, max_layers: int | None) -> tuple[str, ...]:
    segments, heads, deepest = arrangement.segments, arrangement.heads, arrangement.deepest
    total, stages = segments[-1].end, len(_stages(links))
    reasons = [
        f"The {total} weight layers form {_count(stages, 'segment')} of equal map size; pooling ends a segment and the "
        "classifier belongs to the last one."
    ]
    if len(segments) > stages:
        reasons.append(f"These have too few ends for heads, so the longest were halved: now {len(segments)}.")
    reasons.append(f"From the lowest up, the segments have {_sentence([s.layers for s in segments])} weight layers.")
    places = [f"{segments[at].name} ({segments[at].end})" for at in _places(segments)]
    reasons.append(
        "A head may sit at the end of a segment, neither the first nor the last, above the lowest third of the layers "
        f"(the paper's lowest is behind 8 of 19): behind {_sentence(places)}."
    )
    chosen = _sentence([segments[at].name for at in heads])
    reasons.append(f"Behind {chosen} the deepest window has {deepest} weight layers, the least possible.")
    ties = [other for other in _one_lower(arrangement) if other.deepest == deepest]
    if ties:
        names = " or ".join(_sentence([other.segments[at].name for at in other.heads]) for other in ties)
        reasons.append(f"Behind {names} it would be as deep; higher heads read what is closer to the goal.")
    shared = _sentence([f"{_count(segments[at].layers, 'layer')} up to {segments[at].name}" for at in heads])
    reasons.append(f"Neighbouring windows overlap over the whole segment below the lower head: {shared}.")
    if max_layers is not None:
        reasons.append(f"The deepest window is within max_layers={max_layers}.")
    return tuple(reasons)


def _one_lower(arrangement: _Arrangement) -> list[_Arrangement]:
    """The same with one of the heads a place lower."""
    places, heads, found = _places(arrangement.segments), arrangement.heads, list[_Arrangement]()
    for position, at in enumerate(heads):
        if at - 1 in places and at - 1 not in heads:
            found.append(_Arrangement(arrangement.segments, (*heads[:position], at - 1, *heads[position + 1 :])))
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _sentence(parts: Sequence[object]) -> str:
    *most, last = map(str, parts)
    return f"{', '.join(most)} and {last}" if most else last


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanError(f"{name} as a whole number of at least 1", f"{name}={value!r}", "Give such a number.")
