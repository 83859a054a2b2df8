"""Windows that fit into a given memory, for early release: Note [Early release] 6 in `relaybackprop.engine.early`.

Note [Fitting]
1. Only ends of blocks with maps or tokens behind them can have heads, but heads may sit as low as memory asks: most of
   what a network keeps is in its low layers, where maps are large.
2. For K heads and an overlap of a given number of links, windows are as equal as can be: the least limit for which each
   window in turn, filled up to the limit from the lowest, leaves a last one that is within the limit too.
3. The fewest heads whose peak, counted by `cost`, is within the budget; and then the deepest overlap
   that is: more overlap costs time and memory, and less of it is further from the paper's plans.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relaybackprop.plan import Plan
from relaybackprop.planning.arrange import plan_of
from relaybackprop.planning.chain import Link

MOST_LINKS = 4  # of an overlap


@dataclass(frozen=True)
class Fit:
    """Windows on a chain of links.

    Args:
        tops: numbers of the links that the heads read, the lowest first.
        overlap: links in each overlap.
    """

    tops: tuple[int, ...]
    overlap: int

    @property
    def bottoms(self) -> list[int]:
        """Of the windows above the heads, the link below each; -1 for the model's input."""
        return [top - self.overlap for top in self.tops]

    def largest(self, kept: Sequence[int]) -> int:
        """Bytes that the largest window keeps."""
        starts = [0, *(bottom + 1 for bottom in self.bottoms)]
        ends = [*(top + 1 for top in self.tops), len(kept)]
        return max(sum(kept[start:end]) for start, end in zip(starts, ends, strict=True))

    def plan(self, links: Sequence[Link]) -> Plan:
        """The same as a plan."""
        return plan_of(
            [links[top].name for top in self.tops], [links[at].name if at >= 0 else None for at in self.bottoms]
        )


def fit(
    links: Sequence[Link], kept: Sequence[int], heads: range, budget: int, peak_of: Callable[[Plan], int]
) -> tuple[Fit | None, int]:
    """The fewest heads, and then the deepest overlap, whose peak is within the budget.

    Args:
        links: of the model, one for each depth.
        kept: what a step keeps up to each link from the one below, in bytes.
        heads: how many there may be.
        budget: in bytes.
        peak_of: counts what a step of a plan needs, in bytes.

    Returns:
        The windows, None if none fit; and the least peak that was found.
    """
    least = -1
    for count in heads:
        found = balance(links, kept, count, 1)
        if found is None:
            break
        largest = found.largest(kept)
        if largest > budget:  # a step needs at least that
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
    """Note [Fitting] 2. None if there is no place for so many heads with so much overlap."""
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
            below = places[:-missing] if missing else places  # the others are for the heads above
            allowed = [at for at in below if at >= lowest and up_to[at + 1] - up_to[start] <= limit]
            if not allowed:
                return None
            tops.append(allowed[-1])
        last = up_to[-1] - up_to[tops[-1] - overlap + 1]
        return Fit(tuple(tops), overlap) if last <= limit else None

    limits = sorted({high - low for high in up_to for low in up_to if high > low})
    best = bisect_left(limits, True, key=lambda limit: fill(limit) is not None)
    return fill(limits[best]) if best < len(limits) else None
