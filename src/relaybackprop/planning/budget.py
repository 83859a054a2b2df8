"""Windows within a memory budget, for early release: Note [Early release] 6 in `relaybackprop.engine.early`.

Note [Fitting]
1. Heads read ends of blocks that return maps or tokens, as low as the budget requires: most saved activations are in
   the low layers, where maps are large.
2. For K heads and an overlap of a given number of links, windows are balanced: from the lowest, each is filled up to a
   limit, the least for which the last window is within it too.
3. The fewest heads whose peak, counted by `cost`, is within the budget; then the deepest overlap whose peak is too.
   More overlap costs time and memory; less is further from the paper's plans.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relaybackprop.plan import Plan
from relaybackprop.planning.arrange import plan_of
from relaybackprop.planning.chain import Link

MOST_LINKS = 4  # in an overlap


@dataclass(frozen=True)
class Fit:
    """Windows on a chain of links.

    Args:
        tops: indices of the links that the heads read, the lowest first.
        overlap: number of links in each overlap.
    """

    tops: tuple[int, ...]
    overlap: int

    @property
    def bottoms(self) -> list[int]:
        """The index of the link below each window above the first; -1 for the model's input."""
        return [top - self.overlap for top in self.tops]

    def largest(self, kept: Sequence[int]) -> int:
        """Return the bytes that the largest window saves."""
        starts = [0, *(bottom + 1 for bottom in self.bottoms)]
        ends = [*(top + 1 for top in self.tops), len(kept)]
        return max(sum(kept[start:end]) for start, end in zip(starts, ends, strict=True))

    def plan(self, links: Sequence[Link]) -> Plan:
        """Return these windows as a plan."""
        return plan_of(
            [links[top].name for top in self.tops], [links[at].name if at >= 0 else None for at in self.bottoms]
        )


def fit(
    links: Sequence[Link], kept: Sequence[int], heads: range, budget: int, peak_of: Callable[[Plan], int]
) -> tuple[Fit | None, int]:
    """Find the fewest heads, and then the deepest overlap, whose peak is within the budget.

    Args:
        links: the model's links, one for each depth.
        kept: the bytes that a step saves between each link and the one below.
        heads: allowed numbers of heads.
        budget: memory budget in bytes.
        peak_of: returns the peak of a step of a plan in bytes.

    Returns:
        The windows, or None if none fit, and the least peak found.
    """
    least = -1
    for count in heads:
        found = balance(links, kept, count, 1)
        if found is None:
            break
        largest = found.largest(kept)
        if largest > budget:  # a lower bound of the peak
            least = largest if least < 0 else min(least, largest)
            continue
        peak = peak_of(found.plan(links))
        least = peak if least < 0 else min(least, peak)
        if peak > budget:
            continue
        for overlap in range(2, MOST_LINKS + 1):
            deeper = balance(links, kept, count, overlap)
            if deeper is None or peak_of(deeper.plan(links)) > budget:
                break
            found = deeper
        return found, least
    return None, least


def balance(links: Sequence[Link], kept: Sequence[int], heads: int, overlap: int) -> Fit | None:
    """Balance the windows (Note [Fitting] 2). None if there are too few places for these heads and this overlap."""
    has_maps = any(len(link.shape) > 2 for link in links)
    places = [at for at, link in enumerate(links[:-1]) if not has_maps or link.area > 1]
    up_to = [0]
    for size in kept:
        up_to.append(up_to[-1] + size)

    def fill(limit: int) -> Fit | None:
        tops: list[int] = []
        for missing in range(heads - 1, -1, -1):
            start = tops[-1] - overlap + 1 if tops else 0
            lowest = tops[-1] + 1 if tops else overlap
            below = places[:-missing] if missing else places  # leaves places for the heads above
            allowed = [at for at in below if at >= lowest and up_to[at + 1] - up_to[start] <= limit]
            if not allowed:
                return None
            tops.append(allowed[-1])
        last = up_to[-1] - up_to[tops[-1] - overlap + 1]
        return Fit(tuple(tops), overlap) if last <= limit else None

    limits = sorted({high - low for high in up_to for low in up_to if high > low})
    best = bisect_left(limits, True, key=lambda limit: fill(limit) is not None)
    return fill(limits[best]) if best < len(limits) else None
