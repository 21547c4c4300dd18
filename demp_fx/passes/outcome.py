"""What `compile` did, as data: the numbers and words behind every table and page."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from demp_fx.passes.document import Document


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Width(_Data):
    """One layer's width: output channels (or features) and input channels, before and after."""

    name: str
    kind: str
    out_before: int
    out_after: int
    in_before: int
    in_after: int


class Pinned(_Data):
    """Channels that had to stay, and what keeps them."""

    reason: str
    op: str
    node: str
    source: str | None = Field(description="the user's file:line")
    members: list[str] = Field(description="parameter axes that it keeps, as 'name[dim]'")
    channels: int


class Verification(_Data):
    """Largest relative difference from the original, by mode (in float64, if its ops know that).
    `tolerance`: 1e-9, and more only where the original makes more of rounding.

    `fixed`: the code takes the batch size of the example as given, and no other was compared.
    `sized`: inputs of another size go another way than those of the example. `forgets`: something
    that the original keeps from call to call is not kept.
    """

    eval_error: float | None = Field(description="None where eval mode was not comparable")
    train_error: float | None = Field(description="None where train mode was not comparable")
    tolerance: float
    batch: int
    fixed: bool = False
    sized: bool = False
    forgets: bool = False

    @property
    def errors(self) -> str:
        """The errors of the modes that were compared, in words."""
        modes = {"eval": self.eval_error, "train": self.train_error}
        return ", ".join(f"{e:.1e} in {mode} mode" for mode, e in modes.items() if e is not None)


class CompileReport(_Data, Document):
    """Everything about one compilation. Sizes are counts; MACs are of one example forward."""

    what = "report of a compilation"

    model: str
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    channels_before: int
    channels_after: int
    widths: list[Width] = []
    pinned: list[Pinned] = []
    dead_proven: int = Field(0, description="channels known dead or constant from the weights")
    dead_observed: int = Field(0, description="channels that never fired on the calibration data")
    constants_folded: int = Field(0, description="constant channels folded into biases or carriers")
    carriers: int = Field(0, description="constant channels kept to stand for all the others")
    gathers: int = Field(0, description="edges cut by an index_select")
    scatters: int = Field(0, description="residual adds that became an index_add")
    opaque: dict[str, str] = Field({}, description="submodules that could not be traced, and why")
    assumptions: list[str] = []
    warnings: list[str] = []
    verification: Verification | None = None
    seconds: dict[str, float] = Field({}, description="wall-clock by stage")
    versions: dict[str, str] = {}

    @property
    def param_sparsity(self) -> float:
        """1 - params / dense params."""
        return 1.0 - self.params_after / self.params_before if self.params_before else 0.0

    @property
    def channel_sparsity(self) -> float:
        """Removed channels over all channels that parameters carry."""
        before = self.channels_before
        return 1.0 - self.channels_after / before if before else 0.0
