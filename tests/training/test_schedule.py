"""The one-cycle schedule, against what the paper says of it."""

from __future__ import annotations

import math

import pytest

from demp_fx.training.schedule import OneCycle


def test_it_starts_peaks_and_ends_where_the_paper_says() -> None:
    cycle = OneCycle(peak=0.5, span=1000)
    assert cycle(0) == pytest.approx(0.5 / 25)
    assert cycle(300) == pytest.approx(0.5)
    assert cycle(1000) == pytest.approx(0.5 / 25e4)
    assert cycle(5000) == cycle(1000)


@pytest.mark.parametrize("step", [1, 77, 150, 299, 301, 650, 999])
def test_it_is_half_a_cosine_on_either_side(step: int) -> None:
    peak, span = 2.0, 1000
    if step < 300:  # from low to peak
        low, phase = peak / 25, step / 300
        expected = peak - (peak - low) * math.cos(math.pi * phase / 2) ** 2
    else:
        low, phase = peak / 25e4, (step - 300) / 700
        expected = low + (peak - low) * math.cos(math.pi * phase / 2) ** 2
    assert OneCycle(peak, span)(step) == pytest.approx(expected, rel=1e-12)


def test_a_span_of_one_step_is_over_at_once() -> None:
    assert OneCycle(1.0, 1)(0) == pytest.approx(1.0)
    assert OneCycle(1.0, 1)(1) == pytest.approx(1 / 25e4)
