"""Checks that models make, and decisions that are none. (Not in a test: pytest rewrites those.)"""

from __future__ import annotations

import torch
from torch import Tensor


def asserts(x: Tensor) -> None:
    assert x.isfinite().all()


def asserts_what_is_not(x: Tensor) -> None:
    assert not x.isnan().any(), f"nan in {x.shape}"


def asserts_several(x: Tensor) -> None:
    assert x.dim() == 2 and (x > -9).all() and not (x > 9).any()  # noqa: PT018


def asserts_one_of_several(x: Tensor) -> None:
    assert x.shape[0] > 99 or (x < 9).all() or (x > 99).all()
    assert x.dim() < 3


def asserts_of_each(x: Tensor) -> None:
    for part in x.unbind(1):
        assert all((p < 9).all() for p in (part, -part))
        assert not any((p > 9).any() for p in (part, -part))


def asserts_of_numbers(x: Tensor) -> None:
    assert -9 < x.min().item() <= x.max().item() < 9


def raises(x: Tensor) -> None:
    if x.isnan().any() or not bool((x.abs() < 9).all()):
        where = "some" if x.shape[0] > 1 else "one"
        raise ValueError(f"{where} of these is too large")


def raises_with_a_number(x: Tensor) -> None:
    if x.max() > 9:
        raise ValueError(f"{x.max().item()} is too large")


def raises_in_a_region(x: Tensor) -> None:
    with torch.no_grad():
        if (x > 9).any().item():
            raise ValueError("too large")


def raises_at_the_end(x: Tensor) -> Tensor:
    if (x < 9).all():
        return x
    raise ValueError("too large")


def refuses(value: Tensor) -> None:
    if not value:
        raise ValueError("refused")


def has_a_helper(x: Tensor) -> None:
    refuses((x < 9).all())


CHECKS = [
    asserts, asserts_what_is_not, asserts_several, asserts_one_of_several, asserts_of_each,
    asserts_of_numbers, raises, raises_with_a_number, raises_in_a_region, raises_at_the_end,
    has_a_helper,
]  # fmt: skip


def goes_on(x: Tensor) -> Tensor:
    return x.abs() if (x < 0).all() else x


def is_caught(x: Tensor) -> Tensor:
    try:
        assert (x > 0).all()
    except AssertionError:
        return -x
    return x


def changes(x: Tensor) -> Tensor:
    if (x > 1).any():
        x.clamp_(max=1)
    return x


def needs_the_number(x: Tensor) -> Tensor:
    count = (x > 0).sum().item()
    assert count < 99
    return x[:count]


DECISIONS = [goes_on, is_caught, changes, needs_the_number]
