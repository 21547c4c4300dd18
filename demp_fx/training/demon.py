"""The demon: watches a network while it trains, and narrows it wherever neurons have died."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from demp_fx.compiler import CompileResult
from demp_fx.errors import DempError, UsageError
from demp_fx.inputs import ExampleInputs
from demp_fx.passes.instrument import instrument, to_penalise
from demp_fx.passes.observe import batches
from demp_fx.passes.outcome import Verification
from demp_fx.passes.strip import strip
from demp_fx.passes.summary import summarize
from demp_fx.recipe import Recipe
from demp_fx.trace import trace
from demp_fx.tracing.module import TracedModule
from demp_fx.training.choose import Choice
from demp_fx.training.compare import compare, first, tolerance
from demp_fx.training.controller import Controller
from demp_fx.training.deaths import Dead, death_test
from demp_fx.training.dense import Dense, Narrowing
from demp_fx.training.events import Event
from demp_fx.training.optimizer import check
from demp_fx.training.pressure import Pressure
from demp_fx.training.schedule import OneCycle
from demp_fx.training.transfer import Snapshot, Transfer, install
from demp_fx.turns import in_turn


class Demon:
    """Dense-to-sparse training: penalty and noise until neurons die, death checks, narrowing.

        demon = Demon(model, optimizer, example_inputs, recipe, calibration=loader)
        for x, y in data:
            optimizer.zero_grad()
            loss_of(demon.module(x), y).backward()
            optimizer.step()
            demon.step()
        result = demon.finish()

    Args:
        model: any module that can be traced; parameters are shared until the first narrowing.
        optimizer: of the model's parameters; it is re-pointed whenever they get narrower. Lists of
            parameters held elsewhere go stale then: ask `demon.module` for them anew.
        example_inputs: a tensor, or a tuple or dict of the forward's arguments.
        recipe: what to do when.
        calibration: the probe batches of the death test, inputs or (input, target) pairs.
        total_steps: the length of the run in optimizer steps, where the recipe asks for it.
        copies: deep copies of `demon.module` to be narrowed along; more with `register`.
        scaler: the gradient scaler that the loss goes through, if any.
        state: `state_dict()` of an earlier demon, to go on from there.

    Attributes:
        module: the instrumented module to train. It stays the same object.
        events: the record, one entry for every death check.
    """

    @in_turn
    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None,
        example_inputs: ExampleInputs, recipe: Recipe, calibration: Iterable[Any], *,
        total_steps: int | None = None, copies: Sequence[nn.Module] = (),
        scaler: torch.amp.GradScaler | None = None, state: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.optimizer, self.scaler = recipe, optimizer, scaler
        once = isinstance(calibration, Iterator)
        self.calibration = list(calibration) if once else calibration
        graph = trace(model, example_inputs)
        if optimizer is not None:
            check(optimizer, graph)
        self.dense = Dense(graph, recipe)
        if not self.dense.layers:
            raise UsageError("nothing to prune: no activation of a layer that takes part was found")
        self.penalised = to_penalise(graph, recipe, self.dense.layers)
        self.now = self.dense.whole()
        self.module = self._instrumented(graph, self.now)
        span = recipe.steps(total_steps)
        self.penalty_at = OneCycle(recipe.penalty, span)
        self.noise_at = OneCycle(recipe.noise_std, span)
        self.controller: Controller | None = None
        for measure, share in (recipe.target or {}).items():
            self.controller = Controller(measure, share, span, recipe.penalty)
        self.events: list[Event] = []
        self.copies: list[fx.GraphModule] = []
        self.steps = self.samples = 0
        device = next((p.device for p in graph.parameters()), torch.device("cpu"))
        self.generator = torch.Generator(device).manual_seed(recipe.seed)
        self._press()
        for copied in copies:
            self.register(copied)
        if state is not None:
            self._resume(state)
        elif recipe.prune_at_start:
            self.prune()

    # -- training -------------------------------------------------------------------------------

    def step(self) -> Event | None:
        """To be called after every `optimizer.step()`: noise, schedules, and every `prune_every`
        steps a death check, whose record is returned."""
        self.pressure.add_noise(self.noise_std, self.generator)
        self.steps += 1
        event = None
        if self.steps % self.recipe.prune_every == 0:
            event = self.prune()
        self._set_penalty()
        return event

    @property
    def penalty(self) -> float:
        """lambda at this step."""
        return self.penalty_at(self.steps) if self.controller is None else self.controller.penalty

    @property
    def noise_std(self) -> float:
        """sigma at this step."""
        return self.noise_at(self.steps)

    def register(self, copied: nn.Module) -> None:
        """Narrow a deep copy of `module` (an EMA, say, or what wraps one) along from now on."""
        held_by = [m for m in copied.modules() if isinstance(m, TracedModule)]
        ours = {name: p.shape for name, p in self.module.named_parameters()}
        for found in held_by:
            if {name: p.shape for name, p in found.named_parameters()} == ours:
                self.copies.append(found)
                return
        raise UsageError("this is no copy of demon.module: make it with copy.deepcopy")

    @in_turn
    def finish(self) -> CompileResult:
        """Prune for the last time, take out every inserted node, and hand over what is left."""
        if not self.events or self.events[-1].step != self.steps:
            self.prune()
        planned = self.now.planned or self.dense.nothing()
        report = summarize(self.dense.name, self.dense.graph, planned, self.samples)
        errors = [e.verify_error for e in self.events if e.verify_error is not None]
        if errors:
            report.verification = Verification(
                eval_error=max(errors),
                train_error=max(errors),
                tolerance=tolerance(self.module, self.now),
                batch=self.recipe.verify_samples,
            )
        for event in self.events:
            for stage, seconds in event.seconds.items():
                report.seconds[stage] = report.seconds.get(stage, 0.0) + seconds
            if event.failure is not None:
                report.warnings.append(f"step {event.step}: {event.failure}")
        if self.controller is not None:
            left = self.dense.share(self.now, self.controller.measure)
            report.assumptions.append(self.controller.verdict(left))
        return CompileResult(strip(self.module), self.now.plan, report)

    # -- pruning --------------------------------------------------------------------------------

    @in_turn
    def prune(self) -> Event:
        """Look for the dead now, and narrow. What goes wrong is in the record, and changes nothing.

        Raises `UsageError` where the calibration data cannot be used.
        """
        event = Event(
            step=self.steps, dead={}, removed={}, widths=self._widths(), size=self.now.size,
            penalty=self.penalty, noise_std=self.noise_std,
            aim=None if self.controller is None else self.controller.reference(self.steps),
        )  # fmt: skip
        self.events.append(event)
        with _timed(event, "check"):
            modes = (False, True) if self.recipe.death_modes == "both" else (False,)
            dead, self.samples = death_test(
                self.module, self.calibration, modes, self.recipe.probe_batches
            )
        event.dead = {name: int(d.mask.sum()) for name, d in dead.items() if bool(d.mask.any())}
        try:
            with _timed(event, "plan"):
                new = self._plan(dead)
            if new.plan != self.now.plan:
                self._narrow(new, event)
        except DempError as error:
            event.failure = str(error)
        except Exception as error:  # whatever it is: nothing has changed, and training goes on
            event.failure = f"{type(error).__name__}: {error}"
        return event

    def _plan(self, dead: Mapping[str, Dead]) -> Narrowing:
        """The network without the dead that may go."""
        choice = Choice(self.dense, self.now, dead, self.recipe, self.module)
        new, control = choice.all(), self.controller
        if control is None:
            return new
        left = self.dense.share(new, control.measure)
        control.observe(self.steps, left, self.recipe.prune_every)
        if left < control.share:
            return choice.down_to(control.measure, control.share)
        return new

    def _narrow(self, new: Narrowing, event: Event) -> None:
        """Build the new network beside the old one, compare, and only then exchange them."""
        old, before = self.now, self._widths()
        transfer = Transfer(self.dense.shapes, old.plan, new.plan)
        with _timed(event, "narrow"):
            built = [self._built(transfer, new, m) for m in (self.module, *self.copies)]
        if self.recipe.verify:
            with _timed(event, "verify"):
                event.verify_error = self._verify(built[0], new)
        with _timed(event, "commit"):
            snapshot = Snapshot([self.module, *self.copies], self.optimizer)
            try:
                if self.optimizer is not None:
                    transfer.optimizer(self.optimizer, self.module, built[0])
                for target, module in zip((self.module, *self.copies), built, strict=True):
                    install(target, module)
                self.now = new
                self._press()
            except BaseException:
                snapshot.restore()
                self.now = old
                self._press()
                raise
        event.widths, event.size = self._widths(), new.size
        event.removed = {
            name: width - event.widths[name]
            for name, width in before.items()
            if width != event.widths[name]
        }

    def _built(self, transfer: Transfer, new: Narrowing, source: fx.GraphModule) -> TracedModule:
        skeleton = self.dense.skeleton(new)
        transfer.fill(skeleton, source)
        return self._instrumented(skeleton, new)

    def _verify(self, narrow: TracedModule, new: Narrowing) -> float:
        inputs = first(next(batches(self.calibration, narrow)), self.recipe.verify_samples)
        return compare((self.module, self.now), (narrow, new), inputs)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but weights and optimizer: plain data and one tensor of random state."""
        gone = {
            name: [(i, float(d.level[i])) for i in d.mask.nonzero().reshape(-1).tolist()]
            for name, d in self.now.gone.items()
        }
        return {
            "steps": self.steps, "samples": self.samples, "gone": gone,
            "neurons": {layer.node: layer.width for layer in self.dense.layers},
            "events": [event.model_dump(mode="json") for event in self.events],
            "generator": self.generator.get_state(),
            "controller": None if self.controller is None else self.controller.state(),
        }  # fmt: skip

    def _resume(self, state: Mapping[str, Any]) -> None:
        """Take the shapes that an earlier demon had; its weights are to be loaded by the caller.

        Raises `UsageError` where it was another network's.
        """
        if state.get("neurons") != {layer.node: layer.width for layer in self.dense.layers}:
            raise UsageError("the state is not that of a demon of this network and recipe")
        gone = {}
        for layer in self.dense.layers:
            mask, level = torch.zeros(layer.width, dtype=torch.bool), torch.zeros(layer.width)
            for index, value in state["gone"].get(layer.node, ()):
                mask[index], level[index] = True, value
            gone[layer.node] = Dead(mask, level)
        new = self.dense.without(gone)
        self.steps, self.samples = int(state["steps"]), int(state["samples"])
        self.events = [Event.model_validate(event) for event in state["events"]]
        self.generator.set_state(state["generator"])
        if self.controller is not None:
            self.controller.restore(state["controller"])
        transfer = Transfer(self.dense.shapes, self.now.plan, new.plan)
        for target in (self.module, *self.copies):
            built = self._built(transfer, new, target)
            if target is self.module and self.optimizer is not None:
                transfer.optimizer(self.optimizer, self.module, built)
            install(target, built)
        self.now = new
        self._press()

    # -- parts ----------------------------------------------------------------------------------

    def _instrumented(self, graph: TracedModule, narrowing: Narrowing) -> TracedModule:
        return instrument(graph, self.recipe, narrowing.layers, self.penalised)

    def _press(self) -> None:
        self.pressure = Pressure(self.module, self.now.layers, self.recipe.takes)
        self._set_penalty()

    def _set_penalty(self) -> None:
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        self.pressure.set_penalty(self.penalty * scale / self.recipe.accumulate)

    def _widths(self) -> dict[str, int]:
        return {layer.node: layer.width for layer in self.now.layers}


@contextmanager
def _timed(event: Event, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        event.seconds[stage] = event.seconds.get(stage, 0.0) + time.perf_counter() - start
