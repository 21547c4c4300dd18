"""What a run is set up with: the optimizer, the learning rate, and whether all of it fits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from demp_fx.errors import UsageError
from demp_fx.training.batches import Pipeline
from demp_fx.training.config import OptimizerConfig, ScheduleConfig, steps


def make_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe; the decay of SGD is left to the trainer."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(
            parameters, config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
    return torch.optim.SGD(
        parameters, config.lr, momentum=config.momentum, nesterov=config.nesterov
    )


def rate(config: ScheduleConfig, step: int, total: int) -> float:
    """The factor of the learning rate at a step, counted from 0."""
    warmup = 0 if config.warmup == 0 else steps(config.warmup, total)
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    if config.name == "step":
        return float(config.factor ** (step // steps(config.every, total)))
    if config.name == "cosine":
        return (1 + math.cos(math.pi * share)) / 2
    if config.name == "onecycle":
        if share < 0.3:
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * share / 0.3)) / 2
        return (1 + math.cos(math.pi * (share - 0.3) / 0.7)) / 2
    return 1.0


def check_fit(model: nn.Module, example: Tensor, test: Pipeline) -> None:
    """That the model takes the images, and names as many classes as there are."""
    modes = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except Exception as error:
        shape = "x".join(map(str, example.shape))
        raise UsageError(f"the model does not take the images ({shape}): {error}") from error
    finally:
        for m, mode in modes.items():
            m.training = mode
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UsageError("the model must return logits of shape (batch, classes)")
    labels = test.split.take(torch.arange(len(test.split)))[1] if len(test.split) < 20_000 else None
    if labels is not None and int(labels.max()) >= logits.shape[1]:
        raise UsageError(
            f"the model has {logits.shape[1]} outputs, the data has label {int(labels.max())}"
        )
