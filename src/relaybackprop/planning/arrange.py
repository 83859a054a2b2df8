"""Placement of heads and windows: the paper's rules of thumb (section 4) applied to a model's chain of links.

Note [Suggesting]
1. Heads and ends of windows are placed at the ends of blocks. A block is an item of a list (`nn.Sequential` or
   `nn.ModuleList`) whose class has at least two items in such lists, such as a transformer layer or an inverted
   residual. Items that contain blocks, such as Swin's stages, have places only at the ends of these blocks, unless a
   shortcut bypasses all of them in one of the items. Models without such lists, and layers outside them, have places at
   any link.
2. A segment is a stage of equal map size, as the paper cuts VGGNet-19 after its max pooling layers. A class token, or
   the border that an unpadded convolution removes, does not count. A size change without a weight layer, such as
   pooling, ends the segment below. Layers after the last map (the classifier) belong to the last segment.
3. A head reads the end of a segment, with three exceptions: the last segment, which has the model's own output; the
   first one, which the next window would have to include down to the first layer; and segments within a classifier
   after maps or tokens.
4. No head is in the lowest third of the weight layers, where "the patterns captured lack of sufficient discrimination".
   The paper's lowest head is after layer 8 of 19 (Figure 2).
5. If that leaves too few places, as in a transformer's equal blocks, the longest segments are halved until there are
   2K + 3 of them for K heads: five for one head, as in the paper's networks.
6. Each window includes the whole segment below the next lower head, and nothing below it (Table 2, Figure 2).
7. Heads are placed so that the deepest window is as shallow as possible. Among equal placements the highest is chosen.
8. A window over nearly all layers is not a relay. If one has more than `MAX_SHARE` of them, the longest segments are
   halved further. If that does not help, as in a U-Net with its skip connections, there is no suggestion.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

from torch import nn

from relaybackprop.plan import Plan, Window
from relaybackprop.planning.chain import Link

MAX_SHARE = 0.88  # largest fraction of the weight layers in one window
SAME_SIZE = 1.5  # maps whose numbers of positions differ by this factor or more belong to different stages


@dataclass(frozen=True)
class Segment:
    """Consecutive links.

    Args:
        links: one link for each depth, from lowest to highest.
        start: the depth below the segment, in weight layers.
    """

    links: tuple[Link, ...]
    start: int

    @property
    def end(self) -> int:
        """The depth at the end of the segment."""
        return self.links[-1].depth

    @property
    def layers(self) -> int:
        """The number of weight layers in the segment."""
        return self.end - self.start

    @property
    def name(self) -> str:
        """The name of the module at the end of the segment."""
        return self.links[-1].name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of that module's output."""
        return self.links[-1].shape


@dataclass(frozen=True)
class Arrangement:
    """Heads at the ends of segments.

    Args:
        segments: all segments, from lowest to highest.
        heads: indices of the segments whose ends the heads read, from lowest to highest.
    """

    segments: Sequence[Segment]
    heads: tuple[int, ...]

    @property
    def windows(self) -> list[int]:
        """The number of weight layers of each window, the lowest head's first, the primary one last."""
        tops = [*self.heads, len(self.segments) - 1]
        bottoms = [0, *self.heads]
        return [self.segments[top].end - self.segments[bottom].start for bottom, top in zip(bottoms, tops, strict=True)]

    @property
    def deepest(self) -> int:
        """The number of weight layers of the deepest window."""
        return max(self.windows)

    @property
    def is_too_deep(self) -> bool:
        """Whether a window has more than `MAX_SHARE` of the weight layers (Note [Suggesting] 8)."""
        return self.deepest > MAX_SHARE * self.segments[-1].end

    @property
    def plan(self) -> Plan:
        """The windows as a plan (Note [Suggesting] 6)."""
        ends = [segment.name for segment in self.segments]
        return plan_of([ends[head] for head in self.heads], [ends[head - 1] for head in self.heads])


def head_names(count: int) -> list[str]:
    """Return the names of suggested heads, from lowest to highest."""
    return ["aux"] if count == 1 else [f"aux{index}" for index in range(1, count + 1)]


def plan_of(tops: Sequence[str], ends: Sequence[str | None]) -> Plan:
    """Return a plan by module names.

    Args:
        tops: the modules that the heads read, from lowest to highest.
        ends: for each head, the module below the next higher window; None for the model's input.
    """
    ends_below = [None, *ends]
    names = head_names(len(tops))
    windows = {name: Window(top=top, after=end) for name, top, end in zip(names, tops, ends_below, strict=False)}
    return Plan(Window(after=ends_below[-1]), windows)


def outside_blocks(model: nn.Module, links: Sequence[Link]) -> list[Link]:
    """Return the links that are not inside a block (Note [Suggesting] 1)."""
    blocks = _blocks(model)
    crossed = {name for link in links for name in link.names}
    nested = {name for name in blocks if any(_is_in(other, name) for other in blocks.keys() & crossed)}
    # Classes of blocks in which a shortcut bypasses all inner modules of at least one item.
    indivisible = {
        cls
        for name, cls in blocks.items()
        if name in crossed - nested and not any(_is_in(link.name, name) for link in links)
    }
    stages = {name for name in nested if blocks[name] not in indivisible}

    def is_end(link: Link) -> bool:
        enclosing = [name for name in blocks if _is_in(link.name, name)]
        return not enclosing or (stages.issuperset(enclosing) and not blocks.keys().isdisjoint(link.names))

    return [link for link in links if is_end(link)]


def _blocks(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Return each block's class, by name: list items with weight layers whose class occurs at least twice."""
    blocks: dict[str, type[nn.Module]] = {}
    modules = cast(Iterable[tuple[str, nn.Module]], model.named_modules())
    for name, module in modules:
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            items = cast(Iterable[tuple[str, nn.Module]], module.named_children())
            blocks |= {f"{name}.{key}".lstrip("."): type(item) for key, item in items if _is_block(item)}
    counts = Counter(blocks.values())
    return {name: cls for name, cls in blocks.items() if counts[cls] > 1}


def _is_block(module: nn.Module) -> bool:
    """Return whether a module has weight layers and is neither a plain list nor a leaf."""
    is_list = isinstance(module, nn.ModuleList) or (
        isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward  # pyright: ignore
    )
    is_leaf = next(module.children(), None) is None
    return not is_list and not is_leaf and any(parameter.ndim > 1 for parameter in module.parameters())


def _is_in(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def ends_of(links: Sequence[Link]) -> list[tuple[Link, int]]:
    """Return for each depth the link where a segment may end, and the map size after its weight layer.

    Normalisation, activation and pooling belong to the layer before them, except a norm that opens the next block.
    Therefore, among the links from the smallest map upwards, the last of the least nested ones is chosen.
    """
    ends: list[tuple[Link, int]] = []
    for _, group in groupby(links, key=lambda link: link.depth):
        same_depth = list(group)
        areas = [link.area for link in same_depth]
        from_pool = same_depth[areas.index(min(areas)) :]
        end = min(reversed(from_pool), key=lambda link: link.name.count("."))
        ends.append((end, areas[0]))
    return ends


def stages(links: Sequence[Link]) -> list[Segment]:
    """Divide a chain into stages of equal map size (Note [Suggesting] 2)."""
    groups: list[list[Link]] = []
    size = 1
    for link, area in ends_of(links):
        if not groups or (area > 1 and max(area, size) >= SAME_SIZE * min(area, size)):
            groups.append([])
            size = area
        groups[-1].append(link)
    starts = [0, *(group[-1].depth for group in groups)]
    return [Segment(tuple(group), start) for group, start in zip(groups, starts, strict=False)]


def places_of(segments: Sequence[Segment]) -> list[int]:
    """Return the indices of the segments whose ends a head may read (Note [Suggesting] 3 and 4)."""
    total = segments[-1].end
    has_maps = any(len(segment.shape) > 2 for segment in segments)
    return [
        index
        for index in range(1, len(segments) - 1)
        if 3 * segments[index].end >= total and (len(segments[index].shape) > 2 or not has_maps)
    ]


def arrange(links: Sequence[Link], num_auxiliary: int) -> Arrangement | None:
    """Find the best arrangement, within `MAX_SHARE` if possible. None if there are too few places.

    See Note [Suggesting] 5, 7 and 8.
    """
    best: Arrangement | None = None
    for segments in _segmentations(links, num_auxiliary):
        if len(places_of(segments)) >= num_auxiliary:
            candidate = _best(segments, num_auxiliary)
            best = candidate if best is None or candidate.deepest < best.deepest else best
            if not best.is_too_deep:
                break
    return best


def _segmentations(links: Sequence[Link], num_auxiliary: int) -> Iterator[list[Segment]]:
    """Yield the stages, then finer and finer segments."""
    segments: list[Segment] | None = stages(links)
    has_places = len(places_of(segments)) >= num_auxiliary
    while segments is not None:
        halves = _halve_longest(segments)
        if has_places or len(segments) >= 2 * num_auxiliary + 3 or halves is None:
            yield segments
        segments = halves


def _best(segments: Sequence[Segment], num_auxiliary: int) -> Arrangement:
    """Return the arrangement whose deepest window is the shallowest (Note [Suggesting] 7)."""
    # Binary search: any limit above the smallest feasible one is feasible, too.
    limits = range(segments[-1].end + 1)
    best = bisect_left(limits, True, key=lambda limit: _highest_heads(segments, num_auxiliary, limit) is not None)
    heads = _highest_heads(segments, num_auxiliary, best)
    assert heads is not None, "a window over all layers is always possible"
    return Arrangement(segments, heads)


def _halve_longest(segments: Sequence[Segment]) -> list[Segment] | None:
    """Halve the longest divisible segment at the link nearest its middle, but not within a classifier on maps."""
    longest = max(range(len(segments)), key=lambda i: segments[i].layers if len(segments[i].links) > 1 else 0)
    links, start = segments[longest].links, segments[longest].start
    if len(links) == 1:
        return None
    middle = (start + segments[longest].end) / 2
    cuts = range(1, len(links))
    cuts_on_maps = [cut for cut in cuts if links[cut - 1].area > 1]
    cut = min(cuts_on_maps or cuts, key=lambda cut: abs(links[cut - 1].depth - middle))
    halves = Segment(links[:cut], start), Segment(links[cut:], links[cut - 1].depth)
    return [*segments[:longest], *halves, *segments[longest + 1 :]]


def _highest_heads(segments: Sequence[Segment], num_auxiliary: int, limit: int) -> tuple[int, ...] | None:
    """Place heads as high as windows of at most `limit` layers allow. None if the last window exceeds the limit.

    The greedy choice is optimal: the higher a head, the higher the end of the next window.
    """
    places, heads, start = places_of(segments), list[int](), 0
    for heads_above in range(num_auxiliary - 1, -1, -1):
        allowed = [i for i in places if segments[i].end - start <= limit and (not heads or i > heads[-1])]
        if heads_above:  # leave places for the heads above
            allowed = [i for i in allowed if i in places[:-heads_above]]
        if not allowed:
            return None
        heads.append(allowed[-1])
        start = segments[heads[-1]].start
    return tuple(heads) if segments[-1].end - start <= limit else None


def one_head_lower(arrangement: Arrangement) -> list[Arrangement]:
    """Return the arrangements that differ by one head, which is one place lower."""
    places, heads, lower = places_of(arrangement.segments), arrangement.heads, list[Arrangement]()
    for position, index in enumerate(heads):
        if index - 1 in places and index - 1 not in heads:
            lower.append(Arrangement(arrangement.segments, (*heads[:position], index - 1, *heads[position + 1 :])))
    return lower
