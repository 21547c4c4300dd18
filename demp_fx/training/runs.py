"""The folder of a run: what `demp-fx train` leaves behind, and how it is taken up again.

recipe.yaml      every field with its value
metrics.jsonl    a line for every so many steps, every epoch, every death check
tensorboard/     the same, where TensorBoard is installed
checkpoints/     the last two
narrow/          the result, as from `demp-fx compile`
result.json      the figures at the end
report.html
"""

from __future__ import annotations

import json
import shutil
import signal
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from demp_fx.compiler import CompileResult
from demp_fx.emit import folder as output
from demp_fx.errors import EmitError, UsageError
from demp_fx.loading import load_model
from demp_fx.training.batches import pipelines
from demp_fx.training.checkpoint import Checkpoint, newest, save
from demp_fx.training.config import RunConfig, steps
from demp_fx.training.datasets import load_data
from demp_fx.training.metrics import METRICS, Metrics
from demp_fx.training.trainer import Trainer

RECIPE, RESULT, NARROW, CHECKPOINTS = "recipe.yaml", "result.json", "narrow", "checkpoints"
Say = Callable[[str], None]
Show = Callable[[int, int, dict[str, Any]], None]
"""Progress: the step, of how many, and the values of the last record."""


class InterruptedRun(KeyboardInterrupt):
    """Ctrl-C; the run can be resumed."""


class Run:
    """A run of a recipe in a folder.

    Args:
        config: the recipe.
        folder: made if it is not there. One that holds another run is refused, unless the run is
            to be resumed or overwritten.
        resume: go on from the newest checkpoint that is whole; without one, from the beginning.
        say, show: for messages, and for progress.

    Raises `UsageError` for all that is wrong with recipe, model, data and folder.
    """

    def __init__(
        self, config: RunConfig, folder: Path, *, resume: bool = False, overwrite: bool = False,
        say: Say = print, show: Show = lambda step, total, values: None,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.say, self.show = config, folder, say, show
        new, resumed = not folder.exists(), self._claim(resume, overwrite)
        try:
            self._set_up(resume)
            if not resumed:
                self._begin()
        except BaseException:
            if new:  # nothing is in it yet
                with suppress(OSError):
                    folder.rmdir()
            raise

    def _set_up(self, resume: bool) -> None:
        """Load data, model and checkpoint, and find out whether they fit."""
        config, folder, say = self.config, self.folder, self.say
        self.values: dict[str, Any] = {}
        self.stop = False
        device = _device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        train, test = pipelines(
            config.data, *load_data(config.data, config.seed), config.batch, config.seed, device
        )
        torch.manual_seed(config.seed)
        model = load_model(config.model).model
        saved = newest(folder / CHECKPOINTS, say) if resume else None
        if resume:
            say(f"resuming at step {saved.step}" if saved else "no checkpoint: from the beginning")
        self.trainer = Trainer(config, model, train, test, saved)
        every = config.checkpoint_every
        self.every = train.per_epoch if every is None else steps(every, self.trainer.total)
        self.offset = int(saved.state["metrics"]) if saved else 0

    def _claim(self, resume: bool, overwrite: bool) -> bool:
        """Make the folder, or make sure that it is of the same run; whether that is resumed."""
        recipe = self.folder / RECIPE
        if recipe.is_file() and resume:
            if RunConfig.from_yaml(recipe) != self.config:
                raise UsageError(f"{recipe} is not the recipe given: a run is resumed as it began")
            return True
        full = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        if full and not (overwrite and recipe.is_file()):
            raise UsageError(
                f"{self.folder} exists: --resume goes on with the run in it, --overwrite begins "
                "anew (if there is a run in it)"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmitError(f"cannot write {self.folder}: {error}") from error
        return False

    def _begin(self) -> None:
        """Clear the folder of an earlier run, now that nothing is wrong with this one."""
        try:
            for entry in (CHECKPOINTS, NARROW, "tensorboard"):
                shutil.rmtree(self.folder / entry, ignore_errors=True)
            for entry in (METRICS, RESULT, "report.html"):
                (self.folder / entry).unlink(missing_ok=True)
            self.config.to_yaml(self.folder / RECIPE)
        except OSError as error:
            raise EmitError(f"cannot write {self.folder}: {error}") from error

    # -- the run --------------------------------------------------------------------------------

    def go(self) -> dict[str, Any]:
        """Train to the end and write the result; returns its figures.

        Raises `InterruptedRun` after Ctrl-C, with a checkpoint written.
        """
        self.metrics = Metrics(self.folder, self.offset, self.say)
        try:
            with self._until_interrupted():
                done = self.trainer.run(self)
            if not done:
                self._checkpoint(must=True)
                raise InterruptedRun(f"interrupted at step {self.trainer.step}; --resume goes on")
            result = self.trainer.finish(self)
            figures = self._figures(result)
            self.metrics.write("end", self.trainer.step, **figures)
        finally:
            self.metrics.close()
        try:
            if result is not None:
                output.write(result, self.folder / NARROW, overwrite=True)
            (self.folder / RESULT).write_text(json.dumps(figures, indent=1) + "\n")
        except OSError as error:
            raise EmitError(f"cannot write {self.folder}: {error}") from error
        return figures

    def record(self, kind: str, step: int, **values: Any) -> None:
        """Told by the trainer: a line of metrics."""
        self.metrics.write(kind, step, **values)
        self.values |= {k: v for k, v in values.items() if isinstance(v, (int, float))}
        if kind == "event":
            self.values |= values["size"]
            if values["failure"]:
                self.say(f"warning: step {step}: {values['failure']}")

    def after_step(self, step: int) -> bool:
        """Told by the trainer: a step is done."""
        self.show(step, self.trainer.total, self.values)
        if step % self.every == 0 or step == self.trainer.total:
            self._checkpoint()
        return self.stop

    def _checkpoint(self, must: bool = False) -> None:
        """Write one. Where that fails the run goes on, unless it `must` not."""
        checkpoint: Checkpoint = self.trainer.checkpoint()
        checkpoint.state["metrics"] = self.metrics.offset
        try:
            save(checkpoint, self.folder / CHECKPOINTS)
        except OSError as error:
            if must:
                raise EmitError(f"no checkpoint of step {checkpoint.step}: {error}") from error
            self.say(f"warning: no checkpoint of step {checkpoint.step}: {error}")

    @contextmanager
    def _until_interrupted(self) -> Iterator[None]:
        """Ctrl-C ends the run after the step that is being made; a second one, at once."""

        def handle(number: int, frame: types.FrameType | None) -> None:
            if self.stop:
                raise KeyboardInterrupt
            self.stop = True

        try:
            before = signal.signal(signal.SIGINT, handle)
        except ValueError:  # not in the main thread, where signals do not arrive
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _figures(self, result: CompileResult | None) -> dict[str, Any]:
        """What the run came to."""
        # the average is tested on its own; what is handed over are the trained weights
        module = self.trainer.module if result is None else result.module
        loss, accuracy = self.trainer.evaluate(module)
        figures: dict[str, Any] = {
            "steps": self.trainer.step, "test_loss": loss, "test_accuracy": accuracy,
            "seconds": self.trainer.seconds, "cpu_seconds": self.trainer.cpu_seconds,
        }  # fmt: skip
        if result is not None and self.trainer.demon is not None:
            demon = self.trainer.demon
            figures |= {
                "before": demon.dense.size.model_dump(), "after": demon.now.size.model_dump(),
                "seconds_pruning": sum(sum(e.seconds.values()) for e in demon.events),
                "widths": {n.node: [n.width, int(demon.now.kept[n.node].sum())]
                           for n in demon.dense.layers},
                "target": None, "checks": len(demon.events),
                "failures": sum(e.failure is not None for e in demon.events),
            }  # fmt: skip
            control = demon.controller
            if control is not None:
                left = demon.dense.share(demon.now, control.measure)
                figures |= {"target": control.verdict(left),
                            "aimed_at": [control.measure, control.share]}  # fmt: skip
        return figures


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device: {name} is not there: {error}") from error
    return device
