"""Random networks of all structures, with random channels dead, are narrowed exactly."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.check import check
from tests.fuzz.network import Net
from tests.fuzz.strategies import nets

CASES = 200
LONG = int(os.environ.get("FUZZ_CASES", "5000"))
HEALTH = list(HealthCheck)


@settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=HEALTH)
@given(net=nets)
def test_a_narrow_network_computes_what_the_original_computes(net: Net) -> None:
    check(net)


@pytest.mark.long
@settings(max_examples=LONG, deadline=None, suppress_health_check=HEALTH)
@given(net=nets)
def test_the_same_for_thousands_of_networks(net: Net) -> None:
    check(net)
