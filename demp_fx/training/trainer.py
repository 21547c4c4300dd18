"""One run: train, prune, test, checkpoint; from a recipe to a folder."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demp_fx.compiler import CompileResult
from demp_fx.errors import DivergedError, UsageError
from demp_fx.training.batches import Pipeline, Probes, seed_of
from demp_fx.training.checkpoint import Checkpoint
from demp_fx.training.config import RunConfig
from demp_fx.training.demon import Demon
from demp_fx.training.events import Event
from demp_fx.training.setup import check_fit, make_optimizer, rate

_EMA = "ema/"
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Listener(Protocol):
    """Is told what happens in a run."""

    def record(self, kind: str, step: int, **values: Any) -> None:
        """A line of metrics."""

    def after_step(self, step: int) -> bool:
        """After every step; True where the run is to break off here."""


class Trainer:
    """A model in training: everything that a checkpoint holds, and the loop.

    Raises `UsageError` where model, data and recipe do not fit.
    """

    def __init__(
        self, config: RunConfig, model: nn.Module, train: Pipeline, test: Pipeline,
        saved: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        self.config, self.train, self.test = config, train, test
        self.device = train.device
        self.total = config.epochs * train.per_epoch
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        model = model.to(self.device, memory_format=layout).train()  # type: ignore[call-overload]
        self.example = train.plain(torch.arange(min(2, len(train.split))))[0]
        check_fit(model, self.example, test)
        self.optimizer = make_optimizer(config.optimizer, model)
        fp16 = config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.step = 0 if saved is None else saved.step
        self.seconds = self.cpu_seconds = 0.0
        self.tally = Tally()
        self.typical = 0.0  # seconds of a step
        self.stale: Event | None = None  # narrowed the module that has to be compiled anew
        self.demon: Demon | None = None
        if config.demon is not None:
            state = None
            if saved is not None:
                state = saved.state["demon"] | {"generator": saved.optimizer["generator"]}
            recipe = config.demon.model_copy(update={"accumulate": config.accumulate})
            self.demon = Demon(
                model, self.optimizer, self.example, recipe,
                Probes(train, config.probe.batches, config.probe.size),
                total_steps=self.total, scaler=self.scaler if fp16 else None, state=state,
            )  # fmt: skip
        self.module: nn.Module = model if self.demon is None else self.demon.module
        self.ema = None
        if config.ema is not None:
            self.ema = copy.deepcopy(self.module).requires_grad_(False)
            if self.demon is not None:
                self.demon.register(self.ema)
        if saved is not None:
            self._restore(saved)
        self.forward: Callable[[Tensor], Any] = (
            torch.compile(self.module) if config.compile else self.module
        )

    # -- the loop -------------------------------------------------------------------------------

    def run(self, listener: Listener) -> bool:
        """Train to the end, or until the listener breaks it off. Whether the end was reached."""
        if self.demon is not None and self.step == 0:
            for first in self.demon.events:
                self._tell(listener, first)
        while self.step < self.total:
            start, busy = time.perf_counter(), time.process_time()
            value, hits, count = self._step()
            event: Event | None = None if self.demon is None else self.demon.step()
            self._average()
            self.step += 1
            self.tally.add(value, hits, count)
            if self.step % self.config.log_every == 0 or self.device.type == "cpu":
                _check_finite(float(value), self.step)
            taken = time.perf_counter() - start
            self.seconds += taken
            self.cpu_seconds += time.process_time() - busy
            pruning = 0.0 if event is None else sum(event.seconds.values())
            self._compiled(listener, event, taken - pruning)
            if self.step % self.config.log_every == 0:
                self._log(listener, float(value), taken, event)
            if event is not None:
                self._tell(listener, event)
            if self.step % self.train.per_epoch == 0:
                self._epoch(listener)
            if listener.after_step(self.step):
                return False
        return True

    def _step(self) -> tuple[Tensor, Tensor, int]:
        """One optimizer step: the loss, how many were named right, of how many."""
        self.module.train()
        x, y = self.train.batch(self.step)
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        torch.manual_seed(seed_of(self.config.seed, 3, self.step))  # of dropout and its like
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * rate(
                self.config.schedule, self.step, self.total
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        parts = self.config.accumulate
        for images, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with self._precision():
                logits = self.forward(images)
                part = F.cross_entropy(
                    logits, labels, label_smoothing=self.config.label_smoothing
                ) * (len(labels) / len(y))  # fmt: skip
            self.scaler.scale(part).backward()
            loss += part.detach()
            right += (logits.detach().argmax(1) == labels).sum()
        if self.config.clip is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.clip)
        self._decay()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, right, len(y)

    @torch.no_grad()
    def _decay(self) -> None:
        """Decoupled weight decay, which AdamW does itself."""
        config = self.config.optimizer
        if config.name == "sgd" and config.weight_decay > 0:
            for group in self.optimizer.param_groups:
                torch._foreach_mul_(group["params"], 1 - group["lr"] * config.weight_decay)

    def _average(self) -> None:
        if self.ema is not None and self.config.ema is not None:
            with torch.no_grad():
                for old, new in zip(self.ema.parameters(), self.module.parameters(), strict=True):
                    old.lerp_(new, 1 - self.config.ema)
                buffers = zip(self.ema.buffers(), self.module.buffers(), strict=True)
                for kept, now in buffers:
                    kept.detach().copy_(now)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        dtype = _PRECISIONS.get(self.config.precision)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            yield

    @torch.no_grad()
    def evaluate(self, module: nn.Module | None = None) -> tuple[float, float]:
        """Mean loss and accuracy on the test split."""
        module = module or self.ema or self.module
        modes = {m: m.training for m in module.modules()}
        module.eval()
        loss, right = 0.0, 0
        with self._precision():
            for index in torch.arange(len(self.test.split)).split(512):
                x, y = self.test.plain(index)
                logits = module(x).float()
                loss += float(F.cross_entropy(logits, y, reduction="sum"))
                right += int((logits.argmax(1) == y).sum())
        for m, mode in modes.items():
            m.training = mode
        return loss / len(self.test.split), right / len(self.test.split)

    def finish(self, listener: Listener) -> CompileResult | None:
        """The last pruning; None for a dense run."""
        if self.demon is None:
            return None
        start, busy = time.perf_counter(), time.process_time()
        checks = len(self.demon.events)
        result = self.demon.finish()
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += time.process_time() - busy
        for event in self.demon.events[checks:]:
            self._tell(listener, event)
        return result

    # -- telling --------------------------------------------------------------------------------

    def _log(self, listener: Listener, loss: float, taken: float, event: Event | None) -> None:
        values: dict[str, Any] = {
            "loss": loss, "lr": self.optimizer.param_groups[0]["lr"],
            "step_seconds": taken - (sum(event.seconds.values()) if event else 0.0),
        }  # fmt: skip
        if self.demon is not None:
            values |= {"penalty": self.demon.penalty, "noise_std": self.demon.noise_std,
                       **self.demon.now.size.model_dump()}  # fmt: skip
        listener.record("step", self.step, **values)

    def _compiled(self, listener: Listener, event: Event | None, taken: float) -> None:
        """How long the module was compiled anew, in the first step after a narrowing."""
        if self.stale is not None:
            again = max(0.0, taken - self.typical)
            self.stale.seconds["compile"] = again
            listener.record("compile", self.step, seconds=again)
        self.typical = taken if self.stale is None else self.typical
        narrowed = event is not None and event.total_removed > 0
        self.stale = event if narrowed and self.config.compile else None

    def _epoch(self, listener: Listener) -> None:
        loss, accuracy = self.tally.means()
        _check_finite(loss, self.step)
        self.tally = Tally()
        start = time.perf_counter()
        test_loss, test_accuracy = self.evaluate()
        listener.record(
            "epoch", self.step, epoch=self.step // self.train.per_epoch, loss=loss,
            accuracy=accuracy, test_loss=test_loss, test_accuracy=test_accuracy,
            seconds=self.seconds, cpu_seconds=self.cpu_seconds,
            test_seconds=time.perf_counter() - start,
        )  # fmt: skip

    def _tell(self, listener: Listener, event: Event) -> None:
        listener.record("event", **event.model_dump(mode="json"))

    # -- checkpoints ----------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """Everything that there is to go on from here."""
        weights = dict(self.module.state_dict())
        if self.ema is not None:
            weights |= {_EMA + key: value for key, value in self.ema.state_dict().items()}
        state: dict[str, Any] = {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "tally": self.tally.state(),
        }
        optimizer = {
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        if self.demon is not None:
            state["demon"] = self.demon.state_dict()
            optimizer["generator"] = state["demon"].pop("generator")
        return Checkpoint(self.step, weights, state, optimizer)

    def _restore(self, saved: Checkpoint) -> None:
        try:
            ours = {k: v for k, v in saved.weights.items() if not k.startswith(_EMA)}
            self.module.load_state_dict(ours)
            if self.ema is not None:
                theirs = {k.removeprefix(_EMA): v for k, v in saved.weights.items()
                          if k.startswith(_EMA)}  # fmt: skip
                self.ema.load_state_dict(theirs)
            self.optimizer.load_state_dict(saved.optimizer["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UsageError(f"the checkpoint is of another model: {error}") from error
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved.optimizer["scaler"])
        self.seconds = float(saved.state["seconds"])
        self.cpu_seconds = float(saved.state["cpu_seconds"])
        self.tally = Tally(*saved.state["tally"])


@dataclass
class Tally:
    """Sums over the steps of an epoch; on the device, so that nothing waits for them."""

    loss: Tensor | float = 0.0
    right: Tensor | int = 0
    samples: int = 0

    def add(self, loss: Tensor, right: Tensor, samples: int) -> None:
        self.loss, self.right = self.loss + loss.double() * samples, self.right + right
        self.samples += samples

    def means(self) -> tuple[float, float]:
        """Loss and accuracy."""
        return float(self.loss) / self.samples, int(self.right) / self.samples

    def state(self) -> list[float]:
        """Plain numbers, to make it anew from."""
        return [float(self.loss), int(self.right), self.samples]


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise DivergedError(
            f"the loss is {loss} at step {step}: the training has diverged. Lower the learning "
            "rate (or the penalty), or clip the gradient; checkpoints, if any, are from before"
        )
