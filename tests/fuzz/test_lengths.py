"""Networks for sequences are narrowed exactly for any length, whatever the example's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import demp_fx
from tests.fuzz.lengths import Sequence, reads, steps

CASES, LONG, HEALTH = 120, 3000, list(HealthCheck)
LENGTHS = (6, 8, 9, 12, 16)


def check(steps: list[str], read: str, tokens: int) -> None:
    net = Sequence(steps, read)
    assume(net.left(tokens))
    narrow = demp_fx.compile(net, torch.randn(2, tokens, 5).double(), cuts="always").module
    for n in filter(net.left, LENGTHS):
        x = torch.randn(3, n, 5).double()
        torch.testing.assert_close(narrow(x), net(x), rtol=1e-10, atol=1e-10)


@settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=HEALTH)
@given(steps=steps, read=reads, tokens=st.sampled_from((8, 9)))
@example(["more in front", "places"], "all", 8)
@example(["more in front", "second half"], "mean", 8)
@example(["stride", "more in front", "turned"], "last", 8)
@example(["attention", "attention"], "all", 8)
@example(["more in front", "stride", "attention"], "all", 8)
@example(["more in front", "one place"], "first", 8)
@example(["more in front", "one and others"], "last", 8)
@example(["apart", "shifted", "last places"], "mean", 9)
@example(["apart", "without the first"], "last", 8)
@example(["apart", "without the first", "without the first"], "all", 8)
@example(["mixed by a layer"], "last", 8)
@example(["late"], "mean", 8)
def test_a_narrow_network_takes_any_number_of_tokens(
    steps: list[str], read: str, tokens: int
) -> None:
    check(steps, read, tokens)


@pytest.mark.long
@settings(max_examples=LONG, deadline=None, suppress_health_check=HEALTH)
@given(steps=steps, read=reads, tokens=st.sampled_from((8, 9)))
def test_the_same_for_thousands_of_networks(steps: list[str], read: str, tokens: int) -> None:
    check(steps, read, tokens)
