"""Random networks with random plans: the gradients are exact, or there is a real leak. float64."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from oracle import assert_same, by_loss, expected_gradients, gradients_of, losses_of, relay_gradients, seed_generators
from relaybackprop import Plan, Relay, Window
from relaybackprop.errors import LeakError
from relaybackprop.plan import PRIMARY
from relaybackprop.reference import reference_gradients

WIDTH = 4


class Plain(nn.Module):
    """One layer, with an in-place activation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.act = nn.LeakyReLU(0.3, inplace=True)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.act(self.inner(x)), y


class Shortcut(Plain):
    """A residual branch, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.dropout(torch.tanh(self.inner(x))), y


class Split(Plain):
    """Reads and returns both tensors that cross a boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(self.inner(x) + y), self.act(self.other(y)) * x


BLOCKS = {"plain": Plain, "shortcut": Shortcut, "split": Split}


class Net(nn.Module):
    """A chain of blocks. `skips[b]` has the earlier blocks whose outputs are added to the input of block b."""

    def __init__(self, kinds: list[str], skips: dict[int, set[int]]) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.side = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(BLOCKS[kind]() for kind in kinds)
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.stem(x), self.side(x)
        outputs: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            for source in self.skips.get(number, ()):
                x = x + 0.5 * outputs[source]
            x, y = block(x, y)
            outputs.append(x.clone())  # the next block may modify it in place
        return x + 0.1 * y


class Head(nn.Module):
    """Reads one tensor, or both tensors of a boundary."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, value: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return self.fc(value if isinstance(value, Tensor) else value[0] + 2 * value[1])


@dataclass(frozen=True)
class Example:
    kinds: list[str]
    skips: dict[int, set[int]]
    plan: Plan
    tops: dict[str, int]  # for each loss, the block whose output, or inner layer's output, its head reads
    ends: dict[str, int]  # for each loss, the index of the lowest block in its window
    seed: int

    def leaks(self, loss: str) -> bool:
        """Whether a skip leads from below the window's end to a block in the window."""
        window, end, top = self.plan.windows[loss], self.ends[loss], self.tops[loss]
        # `bottom=e` ends after the skips into block e have been added; `after=e-1` before that.
        lowest, highest_source = (end + 1, end - 1) if window.bottom else (end, end - 2)
        return bool(window.ends) and any(
            source <= highest_source and lowest <= target <= top
            for target, sources in self.skips.items()
            for source in sources
        )


@st.composite
def examples(draw: st.DrawFn) -> Example:
    count = draw(st.integers(3, 7))
    kinds = draw(st.lists(st.sampled_from(list(BLOCKS)), min_size=count, max_size=count))
    skips: dict[int, set[int]] = {}
    for target in range(2, count):
        if draw(st.integers(0, 4)) == 0:
            skips[target] = {draw(st.integers(0, target - 2))}
    windows: dict[str, Window] = {}
    tops: dict[str, int] = {PRIMARY: count}
    ends: dict[str, int] = {}
    for number in range(draw(st.integers(0, 4)) + 1):
        loss = f"aux{number}" if number else PRIMARY
        top = draw(st.integers(0, count - 1)) if number else count
        tops[loss] = top
        kind = draw(st.sampled_from(["first layer", "bottom", "after"]))
        ends[loss] = 0
        window: dict[str, str] = {}
        if number:
            inner = draw(st.booleans())
            window["top"] = f"blocks.{top}.inner" if inner else f"blocks.{top}"
        highest = min(top, count - 1)
        if kind == "bottom":
            ends[loss] = draw(st.integers(0, highest))
            window["bottom"] = f"blocks.{ends[loss]}"
        elif kind == "after" and top > 0:
            ends[loss] = draw(st.integers(1, highest))
            window["after"] = f"blocks.{ends[loss] - 1}"
        windows[loss] = Window(**window, weight=draw(st.sampled_from([0.3, 1.0, 2.5])))
    plan = Plan(windows.pop(PRIMARY), windows)
    return Example(kinds, skips, plan, tops, ends, draw(st.integers(0, 10**6)))


def build(example: Example) -> tuple[Relay, Tensor]:
    seed_generators(example.seed)
    heads = {name: Head() for name in example.plan.auxiliary}
    relay = Relay(Net(example.kinds, example.skips), example.plan, heads).double()
    return relay, torch.randn(3, WIDTH, dtype=torch.float64)


def for_random(check: Callable[[Example], None], count: int) -> None:
    """Run a check on `count` random examples, the same ones in each run."""
    options = settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    options(given(examples())(check))()


def mended(example: Example) -> Example:
    """Return the same network with windows that also end at the sources of the skips that bypass their ends."""

    def mend(loss: str) -> Window:
        window, end = example.plan.windows[loss], example.ends[loss]
        if not window.ends or not end:
            return window
        targets = [target for target in example.skips if end <= target <= example.tops[loss]]
        into = [source for target in targets for source in example.skips[target] if source <= end - 2]
        after = tuple(dict.fromkeys(f"blocks.{number}" for number in (end - 1, *into)))
        return Window(top=window.top, after=after, weight=window.weight)

    windows = {loss: mend(loss) for loss in example.plan.windows}
    return dataclasses.replace(example, plan=Plan(windows.pop(PRIMARY), windows))


COUNTS = {"exact": 0, "leak": 0, "several": 0}


def check_random_network(example: Example) -> None:
    relay, x = build(example)
    if any(example.leaks(loss) for loss in example.plan.windows):
        COUNTS["leak"] += 1
        with pytest.raises(LeakError):
            relay(x)
        return
    COUNTS["exact"] += 1
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))
    for loss in example.plan.windows:  # all (loss, parameter) pairs
        relay.zero_grad(set_to_none=True)
        seed_generators(7)
        value = losses_of(by_loss(relay(x)))[loss]
        (example.plan.weights[loss] * value).backward()
        seed_generators(7)
        only = reference_gradients(
            relay.model,
            relay.plan,
            dict(relay.heads.items()),
            lambda outputs, loss=loss: {loss: losses_of(outputs)[loss]},
            x,
        )
        assert_same(gradients_of(relay), only)


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_random_networks(count: int) -> None:
    COUNTS.update(exact=0, leak=0, several=0)
    for_random(check_random_network, count)
    assert COUNTS["exact"] >= count // 2, COUNTS
    assert COUNTS["leak"] >= count // 30, COUNTS


def check_mended_network(example: Example) -> None:
    """With several ends the gradients are exact where one end leaks. Without the others, they differ or raise."""
    example = mended(example)
    relay, x = build(example)
    several = {loss: window for loss, window in example.plan.windows.items() if len(window.ends) > 1}
    COUNTS["several"] += bool(several)
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))
    assert_same(relay_gradients(relay, x), expected_gradients(relay, x))  # with the cached schedule
    for loss, window in several.items():
        one = Window(top=window.top, after=window.ends[0].module, weight=window.weight)
        windows = {**example.plan.windows, loss: one}
        plan = Plan(windows.pop(PRIMARY), windows)
        with pytest.raises(LeakError):
            Relay(relay.model, plan, dict(relay.heads.items()))(x)


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_random_networks_with_several_ends(count: int) -> None:
    COUNTS.update(exact=0, leak=0, several=0)
    for_random(check_mended_network, count)
    assert COUNTS["several"] >= count // 30, COUNTS
