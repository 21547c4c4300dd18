"""The record of a demon: one entry for every death check, whatever came of it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Size(BaseModel):
    """How large a network is. `channels` counts the neurons of the layers that take part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    params: int
    macs: int = Field(description="multiplications of one forward of the example inputs")
    channels: int


class Event(BaseModel):
    """One death check."""

    model_config = ConfigDict(extra="forbid")

    step: int
    dead: dict[str, int] = Field(description="dead channels found, by layer of neurons")
    removed: dict[str, int] = Field(description="channels that went, by layer of neurons")
    widths: dict[str, int] = Field(description="width of every layer of neurons afterwards")
    size: Size = Field(description="afterwards")
    penalty: float = Field(description="lambda at this step")
    noise_std: float = Field(description="sigma at this step")
    aim: float | None = Field(None, description="under a target: the share that ought to be left")
    seconds: dict[str, float] = Field({}, description="wall-clock, by stage")
    verify_error: float | None = Field(None, description="largest relative difference, float64")
    failure: str | None = Field(None, description="why nothing was narrowed, if that went wrong")

    @property
    def total_removed(self) -> int:
        return sum(self.removed.values())
