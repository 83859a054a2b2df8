"""The verdict: its sentence for each pair of methods, and the intervals."""

import pytest
from scipy import stats

from relaylab.report.verdict import (
    Cost,
    Difference,
    difference_text,
    differences,
    interval,
    mean_text,
    paired_differences,
    verdict,
)
from relaylab.train.metrics import chance_error

STANDARD = {0: 50.0, 1: 52.0, 2: 51.0}
BASIS = "Points are per cent of top-1 error; 95 % confidence intervals over 3 paired seeds (t); chance level 90.00 %."


def shifted(*by: float) -> dict[int, float]:
    return {seed: STANDARD[seed] + value for seed, value in enumerate(by)}


def test_differences_are_paired_by_seed_and_have_the_t_interval() -> None:
    assert paired_differences({1: 5.0, 2: 9.0, 3: None, 4: 1.0}, {1: 4.0, 2: 7.0, 3: 1.0}) == [1.0, 2.0]
    ends = interval([1.0, 2.0, 4.5])
    assert ends == pytest.approx((-1.97834, 6.97834), abs=1e-4)  # 2.5 -+ 4.30265 * sqrt(3.25 / 3)
    assert interval([1.0]) is None
    assert difference_text([1.0, 2.0, 4.5]) == "+2.50 [-1.98, +6.98]"
    assert difference_text([-1.0]) == "-1.00 (one seed)"
    assert difference_text([]) == "no seed in common"
    assert mean_text([1.0, 2.0]) == "1.50 ± 0.71"
    assert mean_text([1.0]) == "1.00"


def test_every_pair_of_methods_has_a_sentence_and_the_costs_follow() -> None:
    results = {
        "standard": STANDARD,
        "multi_loss": shifted(-1, 1, -2),
        "relay": shifted(-2.0, -2.1, -1.9),
        "isolated": shifted(1.0, 0.9, 1.1),
    }
    costs = {"standard": Cost(10.0, 1.0, 1.0), "relay": Cost(11.0, 1.1, None)}
    relay, other, multi_loss, isolated, basis = verdict(results, 90, costs)
    assert relay == (
        "Relay BP is better than standard BP by 2.00 [1.75, 2.25] points. "
        "Relay BP takes 1.10 x the training time and 1.10 x the FLOPs."
    )
    assert other.startswith("Relay BP vs multi-loss: inconclusive (better by 1.33 [-2.71, 5.37] points); ")
    assert multi_loss.startswith("Multi-loss vs standard BP: inconclusive (better by 0.67 [-3.13, 4.46] points); ")
    assert isolated == "Isolated windows are worse than Relay BP by 3.00 [3.00, 3.00] points."
    assert basis == BASIS


def test_times_that_other_work_has_disturbed_are_left_out() -> None:
    results = {"standard": STANDARD, "relay": shifted(-2.0, -2.1, -1.9)}
    costs = {"standard": Cost(10.0, 1.0, 1.0), "relay": Cost(60.0, 1.1, 1.2)}
    assert verdict(results, 90, costs)[0].endswith(
        "points. Relay BP takes 1.10 x the FLOPs and 1.20 x the peak memory."
    )


def test_a_difference_that_is_certainly_small_is_no_difference() -> None:
    small = verdict({"standard": STANDARD, "relay": shifted(0.1, -0.1, 0.2)}, 90)[0]
    assert small == "Relay BP and standard BP: difference of at most 0.45 points (+0.07 [-0.31, +0.45])."
    wide = Difference("relay", "standard", (1.4, -1.4, 0.3))
    assert wide.decision == "undecided"
    exactly = Difference("relay", "standard", (-0.001, -0.001))
    assert exactly.decision == "equal", "a difference of less than 0.005 points is not one"
    assert exactly.text.endswith("difference of at most 0.00 points (+0.00 [+0.00, +0.00])")


def test_the_seeds_that_would_tell_are_those_of_the_t_interval() -> None:
    pair = Difference("relay", "standard", (-1.4, 0.6, -0.7))
    needed = pair.seeds_needed
    assert needed is not None
    halves = [stats.t.ppf(0.975, n - 1) * 1.0149 / n**0.5 for n in (needed - 1, needed)]
    assert halves[0] > 0.5 > halves[1], "the mean is 0.5: half-way between none and a relevant one"
    assert f"); {needed} seeds needed" in pair.text
    hopeless = Difference("relay", "standard", (60.0, -60.0))
    assert hopeless.seeds_needed is None
    assert hopeless.text.endswith("more than 100 seeds needed")


def test_one_seed_and_nothing_to_compare_are_said() -> None:
    one, basis = verdict({"standard": {0: 50.0}, "relay": {0: 49.0}}, 90)
    assert one == (
        "Relay BP vs standard BP: better by 1.00 points with one seed, which may be noise; "
        "use several, such as --seeds 0,1,2."
    )
    assert "interval" not in basis
    assert verdict({"relay": {0: 1.0}}, 90) == ["No verdict: Relay BP is the only finished method."]
    assert verdict({}, 90) == ["No verdict: no method has finished."]
    assert "no seed in common" in verdict({"standard": {0: 1.0}, "relay": {1: 1.0}}, 90)[0]
    tie = verdict({"standard": {0: 50.0}, "relay": {0: 50.0}}, 90)[0]
    assert tie.startswith("Relay BP vs standard BP: no difference with one seed")


def test_failed_and_collapsed_runs_are_counted() -> None:
    results = {"standard": STANDARD, "multi_loss": {0: 89.0, 1: 53.0, 2: None}, "relay": shifted(-2.0, -2.1, -1.9)}
    lines = verdict(results, 90)
    assert "intervals over 3 and 2 paired seeds" in lines[3]
    assert lines[4:] == ["Runs at chance level: 1 of multi-loss.", "Failed runs, excluded: 1 of multi-loss."]
    assert verdict({"standard": {0: 1.0}, "relay": {0: None}}, 90) == [
        "No verdict: standard BP is the only finished method.",
        "Failed runs, excluded: 1 of Relay BP.",
    ]


def test_isolated_windows_are_compared_with_relay_or_else_with_the_others() -> None:
    isolated = {0: 52.0, 1: 53.1}
    with_relay = differences({"standard": STANDARD, "relay": {0: 50.0, 1: 51.0}, "isolated": isolated}, 90)
    assert [(each.ours, each.base) for each in with_relay] == [("relay", "standard"), ("isolated", "relay")]
    without = differences({"standard": STANDARD, "multi_loss": STANDARD, "isolated": isolated}, 90)
    assert [(each.ours, each.base) for each in without] == [
        ("multi_loss", "standard"), ("isolated", "standard"), ("isolated", "multi_loss"),
    ]  # fmt: skip


def test_the_error_of_guessing() -> None:
    assert chance_error(10, 1) == pytest.approx(90)
    assert chance_error(401, 5) == pytest.approx(98.753, abs=1e-3)
    assert chance_error(3, 5) == 0


def test_runs_that_have_learnt_nothing_give_no_verdict() -> None:
    guessed = {0: 75.0, 1: 75.0}
    results = {"standard": guessed, "multi_loss": {0: 75.0, 1: 60.0}, "relay": {**guessed, 2: None}}
    relay, other, multi_loss, *_ = differences(results, 75)
    assert relay.decision == "no verdict"
    assert relay.text == (
        "Relay BP vs standard BP: no verdict; all runs are at chance level: train longer or change the learning rate"
    )
    assert (other.decision, multi_loss.decision) == ("undecided", "undecided"), "one run of multi-loss has learnt"
    assert verdict(results, 75)[0] == f"{relay.text}."
    assert verdict({"standard": {0: 75.0}, "relay": {0: 74.9}}, 75)[0] == f"{relay.text}.", "also with one seed"
    learnt = differences({"standard": {0: 50.0, 1: 50.0}, "relay": {0: 50.0, 1: 50.0}}, 75)[0]
    assert learnt.decision == "equal", "equal errors below chance level are a result"
