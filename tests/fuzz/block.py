"""What a random network is made of: specs that print as they are written, and blocks built of them.

A block is an `nn.Module` whose constructor takes the `Place` where it stands and its options. A
`Spec` names a block and its options: hypothesis draws specs, shrinks them and prints them, and
`read` turns the printed text into a spec again.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Draw = st.SearchStrategy[Any]
BLOCKS: dict[str, type[Block]] = {}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A block by name, with the options its constructor gets."""

    kind: str
    options: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{k}={v!r}' for k, v in self.options)})"

    def build(self, at: Place) -> Block:
        return BLOCKS[self.kind](at, **dict(self.options))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block stands: how many channels come in, the sizes beside them, which dim they are.

    Feature maps are (batch, width, *space), tokens are (batch, tokens, width).
    """

    width: int
    space: tuple[int, ...]
    tokens: bool = False

    @property
    def dim(self) -> int:
        return -1 if self.tokens else 1

    def but(self, **changes: Any) -> Place:
        return dataclasses.replace(self, **changes)

    def sample(self) -> Tensor:
        """A tensor of the shape of the values here."""
        return (
            torch.zeros(2, *self.space, self.width)
            if self.tokens
            else torch.zeros(2, self.width, *self.space)
        )

    def shaped(self, vector: Tensor) -> Tensor:
        """One number a channel, to be broadcast to the values here."""
        return vector if self.tokens else vector.reshape(-1, *(1 for _ in self.space))


class Block(nn.Module):
    """A structure; a subclass is registered under its name.

    `draws`: a strategy for each option. `worlds`: where it can stand: in "maps", in "tokens".
    `nests`: which options are lists of blocks of a world ("same": the one the block stands in).
    `out`: the place behind it. `fixed`: it takes no inputs of another resolution.
    """

    draws: ClassVar[dict[str, Draw]] = {}
    nests: ClassVar[dict[str, str]] = {}
    worlds: ClassVar[tuple[str, ...]] = ("maps", "tokens")
    fixed = False

    def __init_subclass__(cls) -> None:
        BLOCKS[cls.__name__] = cls

    def __init__(self, at: Place) -> None:
        super().__init__()
        self.at = self.out = at

    @property
    def dim(self) -> int:
        return self.at.dim

    def chain(self, specs: Sequence[Spec], at: Place) -> tuple[nn.Sequential, Place]:
        """Blocks one behind the other, and the place behind them."""
        blocks = []
        for spec in specs:
            blocks.append(spec.build(at))
            at = blocks[-1].out
        return nn.Sequential(*blocks), at


def is_fixed(model: nn.Module) -> bool:
    """Whether some block of a network takes one resolution only."""
    return any(getattr(m, "fixed", False) for m in model.modules())


def read(text: str, more: dict[str, Callable[..., Any]]) -> Any:
    """What a printed spec says; `more`: what else may be called in it. Only literals and calls of
    known names are evaluated."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            options = {str(k.arg): value(k.value) for k in node.keywords}
            if node.func.id in more:
                return more[node.func.id](**options)
            if node.func.id in BLOCKS:
                return Spec(node.func.id, tuple(options.items()))
            raise ValueError(f"no block is named {node.func.id!r}")
        if isinstance(node, (ast.Tuple, ast.List)):
            return tuple(value(item) for item in node.elts)
        return ast.literal_eval(node)

    return value(ast.parse(text.strip(), mode="eval").body)
