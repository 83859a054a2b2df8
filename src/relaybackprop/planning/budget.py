"""Windows within a memory budget, for early release: Note [Early release] 6 in `relaybackprop.engine.early`.

Note [Packing]
1. Heads read the ends of blocks that return maps or tokens, as low as the budget requires: most saved activations are
   in the low layers, where maps are large.
2. For K heads and an overlap of a given number of links, windows are balanced. From the lowest, each window is filled
   up to a limit, the smallest limit for which the last window is also within it.
3. The fewest heads are chosen whose peak, counted by `cost`, is within the budget, and then the deepest overlap whose
   peak is, too. More overlap costs time and memory; less is further from the paper's plans.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relaybackprop.plan import Plan
from relaybackprop.planning.arrange import plan_of
from relaybackprop.planning.chain import Link

MAX_OVERLAP = 4  # maximum number of links in an overlap


@dataclass(frozen=True)
class Packing:
    """Windows on a chain of links.

    Args:
        tops: indices of the links that the heads read, from lowest to highest.
        overlap: number of links in each overlap.
    """

    tops: tuple[int, ...]
    overlap: int

    @property
    def bottoms(self) -> list[int]:
        """The index of the link below each window except the first; -1 for the model's input."""
        return [top - self.overlap for top in self.tops]

    def largest_window(self, saved_bytes: Sequence[int]) -> int:
        """Return the size of the largest window, in saved bytes."""
        starts = [0, *(bottom + 1 for bottom in self.bottoms)]
        ends = [*(top + 1 for top in self.tops), len(saved_bytes)]
        return max(sum(saved_bytes[start:end]) for start, end in zip(starts, ends, strict=True))

    def plan(self, links: Sequence[Link]) -> Plan:
        """Return these windows as a plan."""
        return plan_of(
            [links[top].name for top in self.tops],
            [links[index].name if index >= 0 else None for index in self.bottoms],
        )


def pack(
    links: Sequence[Link], saved_bytes: Sequence[int], heads: range, budget: int, peak_of: Callable[[Plan], int]
) -> tuple[Packing | None, int]:
    """Find the fewest heads, and then the deepest overlap, whose peak is within the budget.

    Args:
        links: the model's links, one for each depth.
        saved_bytes: the bytes that a step saves between each link and the one below.
        heads: allowed numbers of heads.
        budget: memory budget, in bytes.
        peak_of: a function that returns the peak of a step of a plan, in bytes.

    Returns:
        The windows, or None if the budget is too small, and the smallest peak found, in bytes.
    """
    smallest_peak = -1
    for num_heads in heads:
        packing = balance(links, saved_bytes, num_heads, 1)
        if packing is None:
            break
        largest_window = packing.largest_window(saved_bytes)
        if largest_window > budget:  # a lower bound of the peak
            smallest_peak = largest_window if smallest_peak < 0 else min(smallest_peak, largest_window)
            continue
        peak = peak_of(packing.plan(links))
        smallest_peak = peak if smallest_peak < 0 else min(smallest_peak, peak)
        if peak > budget:
            continue
        for overlap in range(2, MAX_OVERLAP + 1):
            deeper = balance(links, saved_bytes, num_heads, overlap)
            if deeper is None or peak_of(deeper.plan(links)) > budget:
                break
            packing = deeper
        return packing, smallest_peak
    return None, smallest_peak


def balance(links: Sequence[Link], saved_bytes: Sequence[int], num_heads: int, overlap: int) -> Packing | None:
    """Balance the windows (Note [Packing] 2). None if there are too few places for these heads and this overlap."""
    has_maps = any(len(link.shape) > 2 for link in links)
    candidates = [index for index, link in enumerate(links[:-1]) if not has_maps or link.area > 1]
    cumulative = [0]
    for size in saved_bytes:
        cumulative.append(cumulative[-1] + size)

    def fill(limit: int) -> Packing | None:
        """Fill windows from the lowest, each with at most `limit` bytes. None if the last window exceeds the limit."""
        tops: list[int] = []
        for heads_above in range(num_heads - 1, -1, -1):
            first = tops[-1] - overlap + 1 if tops else 0
            lowest = tops[-1] + 1 if tops else overlap
            below = candidates[:-heads_above] if heads_above else candidates  # leaves places for the heads above
            allowed = [i for i in below if i >= lowest and cumulative[i + 1] - cumulative[first] <= limit]
            if not allowed:
                return None
            tops.append(allowed[-1])
        last = cumulative[-1] - cumulative[tops[-1] - overlap + 1]
        return Packing(tuple(tops), overlap) if last <= limit else None

    # The smallest limit that can be met is a difference of two cumulative sizes; any larger one can be met, too.
    limits = sorted({high - low for high in cumulative for low in cumulative if high > low})
    best = bisect_left(limits, True, key=lambda limit: fill(limit) is not None)
    return fill(limits[best]) if best < len(limits) else None
