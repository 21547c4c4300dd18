"""Verify: run the original and the rewritten module side by side, in float64, in both modes.

Where a kernel of the original knows no float64, both run in the dtype that they have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from demp_fx.errors import VerificationError
from demp_fx.inputs import ExampleInputs, Inputs
from demp_fx.passes.narrow import ROUNDED
from demp_fx.passes.other_sizes import OtherSizes
from demp_fx.passes.outcome import Verification
from demp_fx.passes.sides import LOOSEST, Run, run_of
from demp_fx.passes.trials import few, fresh
from demp_fx.tracing.memo import forgotten
from demp_fx.tracing.preserve import CONSTANT, TABLES
from demp_fx.trees import tensors_of
from demp_fx.turns import in_turn

TOLERANCE = 1e-9  # relative, in float64; rounding alone stays below 1e-12
FOLDED = 16  # units of rounding of the parameters' own dtype, where constants were folded into them
ROUGH = 1000  # such units, where all is computed in that dtype


@in_turn
def verify(
    original: nn.Module, narrow: nn.Module, example_inputs: ExampleInputs, *,
    observed: bool = False, train: bool = True, traced: nn.Module | None = None,
) -> Verification:  # fmt: skip
    """Compare two modules on `example_inputs` (or a calibration batch).

    Unless something was only `observed` on data, fresh inputs of another batch size are tried;
    where the `traced` original does not follow the original there, the example inputs alone count.
    A second call follows where the first one changes what the original keeps; it counts where the
    `traced` one keeps it as well.
    Raises `VerificationError` where the two differ by more than the tolerance, which is larger
    where parameters of `narrow` were computed anew and rounded. Neither is changed.
    """
    inputs = Inputs.of(example_inputs)
    notes = getattr(narrow, "meta", {}).get("demp_fx")
    with forgotten(original, notes.memos if notes else ()):
        rounding = _rounding(narrow)
        folded = getattr(narrow, "meta", {}).get(ROUNDED, False)
        made = [rounding] * folded + [torch.finfo(t.dtype).eps for t in _made(original, narrow)]
        tolerance = max(TOLERANCE, FOLDED * max(made, default=0.0))
        pair = _Pair(original, narrow, traced, inputs, observed, rounding, tolerance)
        trials = [few(inputs) if observed else fresh(inputs), inputs]
        evaluated = pair.compare(False, trials)
        # what was observed holds for the statistics of the whole batch
        trained = pair.compare(True, [inputs] if observed else trials) if train else None
        if evaluated is None and trained is None:
            raise VerificationError(
                "the original runs on none of these inputs, and nothing was compared: "
                f"{pair.refusal}"
            ) from pair.refusal
        sized = False
        if evaluated is not None and not (observed or pair.fixed):
            given = evaluated[1]
            example = few(inputs) if given.inputs is trials[0] else inputs
            others = OtherSizes(original, narrow, traced, example, given.precision, pair.tolerance)
            sized = others.decide()
    return Verification(
        eval_error=None if evaluated is None else evaluated[0],
        train_error=None if trained is None else trained[0],
        tolerance=pair.tolerance, batch=pair.batch, fixed=pair.fixed, sized=sized,
        forgets=pair.forgets,
    )  # fmt: skip


@dataclass
class _Pair:
    """The original and the narrow module, compared on one trial after another.

    `observed`: something is known of `inputs` alone. `rounding`: a unit of it, in the dtype of the
    parameters. `tolerance` grows with what rounding is found to do. `batch`, `fixed`, `forgets`:
    see `Verification`. `refusal`: why the original does not run on a trial.
    """

    original: nn.Module
    narrow: nn.Module
    traced: nn.Module | None
    inputs: Inputs
    observed: bool
    rounding: float
    tolerance: float
    batch: int = 0
    fixed: bool = False
    forgets: bool = False
    refusal: Exception | None = None

    def compare(self, training: bool, trials: list[Inputs]) -> tuple[float, Run] | None:
        """How far the two are from each other in one mode, and from which run, on the first of the
        trials that tells; None where none does."""
        for trial in trials:
            try:
                given = run_of(self.original, trial, training)
            except VerificationError:
                raise
            except Exception as refusal:
                self.refusal = refusal
                continue  # a batch size, or a mode, that the original itself does not take
            if trial is not self.inputs and not given.is_defined():
                continue  # random numbers are outside of what it is defined on
            if given.precision == "own":
                self.tolerance = max(self.tolerance, ROUGH * self.rounding)
            given, error, failure = self._error(given)
            if not error <= self.tolerance:
                if self.observed and trial is not self.inputs:
                    continue  # samples may depend on those beside them
                if training != self.narrow.training and followed_mode(self.narrow):
                    return None  # there the original goes another way, which the trace has noted
                if trial is not self.inputs and not self._is_followed(given):
                    self.fixed = True
                    continue
                raise VerificationError(self._reason(given, error, failure)) from failure
            self.batch = max(self.batch, next(iter(trial.tensors[0].shape), 1))
            return error, given
        return None

    def _error(self, given: Run) -> tuple[Run, float, Exception | None]:
        """How far the narrow module is from a run of the original: from the first call alone, where
        what the original keeps from call to call was not followed."""
        error, failure = given.error(self.narrow)
        if self.tolerance < error <= LOOSEST:
            self.tolerance = max(self.tolerance, given.amplified(self.original))
        if error <= self.tolerance or len(given.outputs) == 1 or self._is_followed(given):
            return given, error, failure
        error, failure = given.first.error(self.narrow)
        self.forgets = self.forgets or error <= self.tolerance
        return given.first, error, failure

    def _is_followed(self, given: Run) -> bool:
        """Whether the traced original, where there is one, does what the original did."""
        return self.traced is None or given.error(self.traced)[0] <= self.tolerance

    def _reason(self, given: Run, error: float, failure: Exception | None) -> str:
        """What is wrong, in the order in which users can do something about it."""
        mode = "train" if given.training else "eval"
        if failure is not None:
            return (
                f"the narrow module does not take inputs of shape {given.shapes}, which the "
                f"original takes: {failure}; nothing was handed over"
            )
        if not given.is_defined():
            return (
                f"the original's own output has numbers in it that are none (nan) in {mode} mode, "
                "and cannot be compared; nothing was handed over"
            )
        again, _ = given.error(self.original)
        if not again <= self.tolerance:
            return (
                f"the original's own output is another one each time in {mode} mode (by "
                f"{again:.1e}): its code takes random numbers that are not torch's, and what they "
                "decided was traced; nothing was handed over"
            )
        if self.traced is not None and not self._is_followed(given):
            followed, _ = given.error(self.traced)
            return (
                "the graph that was traced does not compute what the original does (it differs by "
                f"{followed:.1e} with nothing cut): its code changes something on the way that was "
                "not followed; nothing was handed over"
            )
        return (
            f"the narrow module differs from the original in {mode} mode by {error:.1e} (relative, "
            f"float64; tolerance {self.tolerance:.0e}); nothing was handed over"
        )


def followed_mode(narrow: nn.Module) -> list[str]:
    """The lines of the original's code that ask for the mode, and were traced in one of them."""
    notes = getattr(narrow, "meta", {}).get("demp_fx")
    return [line for line in notes.baked if line.endswith(" mode")] if notes else []


def _rounding(module: nn.Module) -> float:
    """A unit of rounding in the coarsest dtype of its parameters."""
    real = [p for p in module.parameters() if p.is_floating_point()]
    return max((torch.finfo(p.dtype).eps for p in real), default=0.0)


def _made(original: nn.Module, narrow: nn.Module) -> list[Tensor]:
    """Numbers of the narrow module that the original computes itself: what it makes in its forward,
    it makes in float64 here; and what it keeps of earlier calls, for each size, is made at each
    call."""
    made = [t for name, t in narrow.named_buffers() if CONSTANT in name]
    for module in original.modules():
        own = vars(module).items()
        made += tensors_of([v for name, v in own if type(v) is dict and name not in TABLES])
    return [t for t in made if t.is_floating_point() or t.is_complex()]
