"""Replay a network that failed: python -m tests.fuzz "Net(blocks=(...), ...)"."""

from __future__ import annotations

import sys

from tests.fuzz.check import check
from tests.fuzz.network import Net


def main() -> None:
    """Compile and compare the network of the first argument; raises where it differs."""
    net = Net.read(sys.argv[1])
    print(net.build())
    result = check(net)
    print(result.module.code)
    report = result.report
    print(f"the same, with {report.params_after} of {report.params_before} parameters")


if __name__ == "__main__":
    main()
