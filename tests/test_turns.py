"""Several threads at once: they take turns, and torch is as it was afterwards."""

from __future__ import annotations

import gc
import threading

import torch
from torch import nn

import demp_fx


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight[:5] = 0
        model[0].bias[:5] = 0
    return model


def test_threads_may_compile_at_the_same_time() -> None:
    # made before: what other threads do with torch meanwhile is not waited for
    model, x, widths = network(), torch.randn(2, 4), list[int]()

    def work() -> None:
        for _ in range(3):
            result = demp_fx.compile(model, x)
            widths.append(result.module.get_parameter("0.weight").size(0))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert widths == [3] * 12
    assert torch.get_default_dtype() == torch.float32
    assert gc.isenabled()
    assert network()(x).shape == (2, 3)
