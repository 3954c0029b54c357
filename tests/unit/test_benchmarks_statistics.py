"""What the benchmark computes from what it measured."""

from __future__ import annotations

import pytest

from benchmarks.statistics import (
    Window,
    grown,
    medians,
    paired_ratio,
    percentile,
    steady,
    value_at,
)


@pytest.mark.parametrize(
    ("share", "want"), [(0.0, 1.0), (0.01, 1.0), (0.5, 50.0), (0.99, 99.0), (0.995, 100.0), (1.0, 100.0)]
)
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(share: float, want: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], share) == want


def test_a_percentile_of_nothing_is_zero() -> None:
    assert percentile([], 0.99) == 0.0


def test_the_steady_window_leaves_out_the_start_and_the_stragglers() -> None:
    arrivals = [(0.0, 10), *((10.0 + n, 1) for n in range(80)), (500.0, 10)]
    window = steady(arrivals, (0.1, 0.9))
    assert (window.begin, window.end, window.records) == (0.0, 89.0, 80)
    window = steady(arrivals, (0.2, 0.9))
    assert (window.begin, window.end, window.records) == (19.0, 89.0, 70)
    assert window.rate == 1.0


def test_arrivals_need_not_come_in_order() -> None:
    assert steady([(3.0, 1), (1.0, 1), (2.0, 1)], (0.3, 1.0)) == Window(1.0, 3.0, 2)


@pytest.mark.parametrize(("moment", "want"), [(0.0, 5.0), (1.0, 5.0), (1.5, 6.0), (2.0, 7.0), (9.0, 7.0)])
def test_a_counter_is_read_on_the_line_between_two_samples(moment: float, want: float) -> None:
    assert value_at([(1.0, 5.0), (2.0, 7.0)], moment) == want


def test_growth_is_counted_within_the_window() -> None:
    assert grown([(0.0, 0.0), (10.0, 100.0)], Window(2.0, 4.0, 1)) == 20.0


def test_medians_are_taken_figure_by_figure() -> None:
    assert medians([{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0, "b": 8.0}]) == {"a": 2.0, "b": 8.0}


def test_a_ratio_compares_what_was_measured_in_the_same_round() -> None:
    these = [{"rate": 8.0}, {"rate": 4.0}, {"rate": 1.0}]
    those = [{"rate": 10.0}, {"rate": 5.0}, {"rate": 100.0}]
    assert paired_ratio(these, those, "rate") == 0.8
