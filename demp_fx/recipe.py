"""Recipes: what a demon does, as declarative configuration. YAML in and out."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from demp_fx.channels.cuts import Cuts
from demp_fx.errors import UsageError
from demp_fx.nodes.watch import Test

Percent = Annotated[str, StringConstraints(pattern=r"^(100|[1-9]?\d)(\.\d+)?%$")]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Measure = Literal["macs", "params", "channels"]


class Config(BaseModel):
    """A part of a recipe. Unknown fields are errors, and errors name the field."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> Self:
        """Raises `UsageError`, a line for each wrong field."""
        try:
            return cls.model_validate({} if data is None else data)
        except ValidationError as error:
            lines = [f"\n  {'.'.join(map(str, e['loc'])) or where}: {e['msg']}"
                     for e in error.errors()]  # fmt: skip
            raise UsageError(f"{where} is not valid:" + "".join(lines)) from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Read a YAML file, or a text of several lines as YAML. Raises `UsageError` for a file that
        is none, or not valid."""
        text, where = (str(path), "recipe") if "\n" in str(path) else (None, str(path))
        try:
            data = yaml.safe_load(text or Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{where} cannot be read: {error}") from error
        return cls.from_dict(data, where)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """As YAML, every field with its value; written to a file, if one is named."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


class Recipe(Config):
    """How a demon prunes: pressure that makes neurons die, and the test that finds the dead.

    Defaults are the paper's for ResNet-18 on CIFAR-10. Steps are optimizer steps.
    """

    penalty: float = Field(1e-2, ge=0, description="lambda: peak of the L1 penalty's strength")
    noise_std: float = Field(5e-5, ge=0, description="sigma: peak standard deviation of the noise")
    span: Annotated[int, Field(gt=0)] | Percent = Field(
        85_000, description="steps of the one-cycle of both, or a percentage of the run"
    )
    prune_every: int = Field(5_000, gt=0, description="steps between death checks")
    prune_at_start: bool = Field(True, description="check before the first step too")
    penalise: Literal["auto", "scales", "weights"] = Field(
        "auto",
        description="scales: of every normalisation; weights: of every layer of neurons; auto: the "
        "scales of batch-, group- and instance-norms, and the weights of neurons without one",
    )
    death_threshold: float = Field(0.0, ge=0, description="eps of the death test")
    death_test: Literal["auto"] | Test = Field(
        "auto",
        description="one-sided: the sum is at most eps, as in the paper; silent: nothing is above "
        "eps; two-sided: all is within eps of -1 or of 1; auto: one-sided for ReLU and its like, "
        "two-sided for tanh and its like, silent for what may be negative (GELU, leaky ReLU)",
    )
    death_modes: Literal["both", "eval"] = Field(
        "both",
        description="eval: what is dead in eval mode goes, as in the paper; both: it must be dead "
        "under the probe batches' own statistics too, so that training goes on as if it were there",
    )
    probe_batches: int | None = Field(None, gt=0, description="of the calibration data; none: all")
    only: list[str] = Field(["*"], description="layers that take part, as name patterns")
    exempt: list[str] = Field([], description="layers that do not: no noise, penalty or pruning")
    min_width: int = Field(1, ge=1, description="channels that every layer of neurons keeps")
    round_to: int = Field(1, ge=1, description="widths are rounded up to a multiple of this")
    target: dict[Measure, float] | None = Field(
        None, description="what is to be left, as a share of the dense network, such as macs: 0.35"
    )
    accumulate: int = Field(1, ge=1, description="backward passes in one optimizer step")
    cuts: Cuts = Field("pays", description="where residual sums and branches may be cut")
    verify: bool = Field(True, description="compare before and after every narrowing, in float64")
    verify_samples: int = Field(16, gt=0, description="of a probe batch, to compare on")
    seed: Seed = Field(0, description="of the noise")

    @model_validator(mode="after")
    def _target_is_one_share(self) -> Self:
        if self.target is not None:
            if len(self.target) != 1:
                raise ValueError("target: name one of macs, params, channels")
            if not all(0 < share < 1 for share in self.target.values()):
                raise ValueError("target: the share that is left lies between 0 and 1")
        return self

    def takes(self, layer: str) -> bool:
        """Whether the layer of this name takes part."""
        hit = any(fnmatchcase(layer, pattern) for pattern in self.only)
        return hit and not any(fnmatchcase(layer, pattern) for pattern in self.exempt)

    def steps(self, total: int | None) -> int:
        """The span in steps; `total`: the steps of the run, if known."""
        if isinstance(self.span, int):
            return self.span
        if total is None:
            raise UsageError("span is a percentage: say how long the run is (total_steps)")
        return max(1, round(float(self.span[:-1]) / 100 * total))
