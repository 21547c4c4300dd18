"""The plan: everything that a narrowing does, as data, to replay on any checkpoint."""

from __future__ import annotations

from typing import Literal as OneOf

from pydantic import BaseModel, ConfigDict

from demp_fx.passes.document import Document


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Gather(_Data):
    """Between `producer` and `consumer`, only the channels `index` of `dim` are passed on."""

    producer: str
    consumer: str
    dim: int
    index: list[int]


class Regroup(_Data):
    """Between `producer`, which computes the weight of a grouped convolution, and `consumer`, each
    block of filters keeps the inputs (dim 1) in its row of `index`. `rank`: of the weight;
    `filters`: how many a block has."""

    producer: str
    consumer: str
    rank: int
    filters: int
    index: list[list[int]]


class Spread(_Data):
    """Between `producer` and `consumer`, channels that are zero or constant are put back.

    `places`: where the producer's channels go among `size`; `shift`: the constants, zero elsewhere.
    """

    producer: str
    consumer: str
    dim: int
    rank: int
    size: int
    places: list[int]
    shift: list[float] | None


class Sum(_Data):
    """A residual sum of operands that carry different channels.

    `left` and `right`: where the operand's channels go among the `size` channels of the result,
    None where it has all of them. `shift`: constants of channels that an operand lost.
    """

    node: str
    dim: int
    rank: int
    size: int
    left: list[int] | None
    right: list[int] | None
    shift: list[float] | None


class Selection(_Data):
    """Data movements that end in an arrangement of a node's channels, as one `index_select`.

    `node` becomes the channels `index` of `producer` on `dim`. `places`: where they go among
    `size`, if some come from nowhere; `shift`: the constants that those are, if not zeros.
    """

    node: str
    producer: str
    path: list[str]
    dim: int
    index: list[int]
    rank: int
    size: int
    places: list[int] | None = None
    shift: list[float] | None = None


class Count(_Data):
    """An average over channels of which some were zero, and left: `size` (of the last dim) and
    `ratio` say how many are still there."""

    node: str
    ratio: float
    size: int


class Folding(_Data):
    """Constants of the input channels `dropped` of a weight move elsewhere.

    Into the bias: `values`, one a dropped channel. Or into `carriers`: input channels that stay;
    the weights of carrier j grow by sum_k mix[j][k] * (the weights of dropped[k]).
    """

    weight: str
    dim: int
    dropped: list[int]
    bias: str | None = None
    values: list[float] = []
    carriers: list[int] = []
    mix: list[list[float]] = []


class Literal(_Data):
    """A size that the code of a node names, and its new value.

    `path`: where it stands, from "args" or "kwargs" on. `value`: an int, a list of sizes, or the
    start, stop and step of a slice (None: from the start, to the end). `of`: what it was for the
    example inputs, where the batch is in it as well: what the code computes there is multiplied by
    `value` and divided by this. `target`: the function to call instead, where sizes that were equal
    no longer are (chunk becomes split).
    """

    node: str
    path: list[int | str]
    value: int | float | list[int | None]
    of: int | None = None
    slice: bool = False
    target: str | None = None


class Frozen(_Data):
    """A number that a node is given, computed of sizes of which some are no longer what they were,
    while others depend on the input (`x / (c * h * w)`): it is computed of the old ones instead.

    `path`: where it stands. `sizes`: for each node that asks for sizes, by dim, the old and the new
    one, None where it stays.
    """

    node: str
    path: list[int | str]
    sizes: dict[str, list[tuple[int, int] | None]]


class PruningPlan(_Data, Document):
    """What stays of a model.

    `keep`: for each parameter and buffer that gets narrower, by dim, the indices kept. `nodes`: for
    each node of the graph, by dim, the new size. The rest is how the graph is changed around them.
    `grouped`: for each weight of a grouped convolution, by group that is left, the indices kept on
    dim 1. `shapes`: the original shape of each parameter that gets narrower, to tell whether a
    checkpoint fits.
    """

    what = "pruning plan"

    version: OneOf[1] = 1
    keep: dict[str, dict[int, list[int]]] = {}
    grouped: dict[str, list[list[int]]] = {}
    nodes: dict[str, dict[int, int]] = {}
    literals: list[Literal] = []
    frozen: list[Frozen] = []
    gathers: list[Gather] = []
    sums: list[Sum] = []
    regroups: list[Regroup] = []
    spreads: list[Spread] = []
    selections: list[Selection] = []
    counts: list[Count] = []
    folds: list[Folding] = []
    shapes: dict[str, list[int]] = {}

    @property
    def rounds(self) -> bool:
        """Whether it computes numbers anew, which are rounded to the dtype of the parameters."""
        return bool(self.folds) or any(s.shift for s in self.sums)
