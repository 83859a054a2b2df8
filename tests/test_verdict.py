"""The verdict: its one sentence, and the intervals that it and the tables share."""

import pytest

from relaylab.report.verdict import chance_error, difference_text, interval, mean_text, paired_differences, verdict

STANDARD = {0: 50.0, 1: 52.0, 2: 51.0}


def shifted(*by: float) -> dict[int, float]:
    return {seed: STANDARD[seed] + value for seed, value in enumerate(by)}


def test_differences_are_paired_by_seed_and_have_the_t_interval() -> None:
    assert paired_differences({1: 5.0, 2: 9.0, 3: None, 4: 1.0}, {1: 4.0, 2: 7.0, 3: 1.0}) == [1.0, 2.0]
    ends = interval([1.0, 2.0, 4.5])
    assert ends == pytest.approx((-1.97834, 6.97834), abs=1e-4)  # 2.5 -+ 4.30265 * sqrt(3.25 / 3)
    assert interval([1.0]) is None
    assert difference_text([1.0, 2.0, 4.5]) == "+2.50 [-1.98, +6.98]"
    assert difference_text([-1.0]) == "-1.00 (one seed)"
    assert difference_text([]) == "no common seed"
    assert mean_text([1.0, 2.0]) == "1.50 ± 0.71"
    assert mean_text([1.0]) == "1.00"


def test_relay_is_compared_with_standard_bp_and_with_multi_loss() -> None:
    results = {"standard": STANDARD, "multi_loss": shifted(-1, 1, -2), "relay": shifted(-2.0, -2.1, -1.9)}
    assert verdict(results) == (
        "The top-1 error of Relay BP is 2.00 points lower than that of standard BP (-2.00 [-2.25, -1.75]) and not "
        "distinguishable from that of multi-loss (-1.33 [-5.37, +2.71]); 95 % intervals over 3 paired "
        "seeds (t)."
    )
    worse = verdict({"standard": STANDARD, "relay": shifted(2.0, 2.1, 1.9)})
    assert "2.00 points higher than that of standard BP (+2.00 [+1.75, +2.25])" in worse


def test_one_seed_and_nothing_to_compare_are_said() -> None:
    one = verdict({"standard": {0: 50.0}, "relay": {0: 49.0}})
    assert "1.00 points lower than that of standard BP (one seed); this may be chance" in one
    assert "[" not in one
    assert verdict({"relay": {0: 1.0}}) == "Nothing to compare: Relay BP finished."
    assert verdict({}) == "Nothing to compare: no method finished."
    assert "no seed in common" in verdict({"standard": {0: 1.0}, "relay": {1: 1.0}})
    assert "multi-loss is 1.00 points" in verdict({"standard": {0: 1.0}, "multi_loss": {0: 2.0}})


def test_equal_outcomes_are_said_once_and_single_seeds_are_marked() -> None:
    unclear = verdict({"standard": STANDARD, "multi_loss": shifted(1, -1, 0), "relay": shifted(-1, 1, 0.5)})
    assert "is not distinguishable from that of standard BP (+0.17 [" in unclear
    assert "]) or that of multi-loss (+0.17 [" in unclear
    mixed = verdict({"standard": STANDARD, "multi_loss": {0: 50.0}, "relay": shifted(-2.0, -2.1, -1.9)})
    assert "and 2.00 points lower than" not in mixed
    assert "than that of standard BP (-2.00 [-2.25, -1.75]) and that of multi-loss (one seed)" in mixed
    assert "intervals over 3 paired seeds" in mixed


def test_failed_runs_are_counted_and_left_out() -> None:
    results = {"standard": STANDARD, "multi_loss": {0: 49.0, 1: 53.0, 2: None}, "relay": shifted(-2.0, -2.1, -1.9)}
    text = verdict(results)
    assert "intervals over 3 and 2 paired seeds" in text
    assert text.endswith("; failed runs, left out: 1 of multi-loss.")
    assert verdict({"standard": {0: 1.0}, "relay": {0: None}}) == (
        "Nothing to compare: standard BP finished; failed runs, left out: 1 of Relay BP."
    )


def test_the_error_of_guessing() -> None:
    assert chance_error(10, 1) == pytest.approx(90)
    assert chance_error(401, 5) == pytest.approx(98.753, abs=1e-3)
    assert chance_error(3, 5) == 0


def test_isolated_windows_are_compared_and_ties_are_said() -> None:
    overlap = verdict({"relay": {0: 50.0, 1: 51.0}, "isolated": {0: 52.0, 1: 53.1}})
    assert overlap.startswith("The top-1 error of Relay BP is 2.05 points lower than that of isolated windows")
    tie = verdict({"standard": {0: 50.0}, "relay": {0: 50.0}})
    assert tie.startswith("The top-1 error of Relay BP is the same as that of standard BP (one seed)")
    assert difference_text([-0.001, -0.001]) == "+0.00 [+0.00, +0.00]"
    tiny = verdict({"standard": {0: 1.0, 1: 2.0}, "relay": {0: 0.999, 1: 1.999}})
    assert "not distinguishable from that of standard BP" in tiny
