"""Random networks out of all the structures that people build, with random channels dead.

A few hundred are part of the tests. Thousands, drawn anew each time:

    FUZZ_CASES=5000 python -m pytest tests/fuzz -m long

What fails is shrunk and printed as a `Net(...)`, which runs again with

    python -m tests.fuzz "Net(blocks=(Conv(),), kills=('zero',))"
"""
