"""One operand of a contraction, its dims named by letters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from demp_fx.channels.labels import varying
from demp_fx.channels.stream import Stream


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a contraction: its dims by letter, and its labels by letter."""

    tensor: Tensor
    letters: str

    def dim(self, letter: str) -> int:
        return self.letters.find(letter)

    def labels(self, walk: Stream, letter: str) -> list[Tensor]:
        """Its labels that vary on a letter's dim."""
        d = self.dim(letter)
        return [label for label in walk.value(self.tensor).labels if d in varying(label)]

    def single(self, walk: Stream, letter: str) -> Tensor | None:
        """Its one label on a letter, where that label varies nowhere else (1-D)."""
        found = self.labels(walk, letter)
        if len(found) == 1 and len(varying(found[0])) == 1:
            return found[0].reshape(-1)
        return None
