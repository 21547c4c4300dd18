"""Pruning groups and how they feed each other, as plain data."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from demp_fx.errors import UsageError

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class Member:
    """One dim of a parameter or buffer, whose channels go with those of its group."""

    name: str
    dim: int
    size: int

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


@dataclass(frozen=True)
class Pin:
    """Channels of a group that have to stay: why, by which op, at which node and user line."""

    reason: str
    op: str
    node: str
    source: str | None
    channels: int


@dataclass(frozen=True)
class Tie:
    """Two axes whose channels are one, because of an op. Axes are named 'name[dim]', or
    'producer->consumer' where they are those of a value on its way."""

    a: str
    b: str
    op: str
    node: str
    source: str | None


@dataclass(frozen=True)
class Block:
    """An axis that consists of equal blocks (heads, say), sizes from outside in."""

    sizes: list[int]
    node: str
    source: str | None


@dataclass
class Group:
    """Channels that are cut together.

    `name`: of its first member; a group without members is named by the value that carries it.
    `size`: how many channels can be told apart; `removable`: how many of them can go. Of the
    channels, `dead` are known to be zero wherever they are used, `constant` to be the same for all
    inputs, the others are live. `macs`: multiplications of one example forward that vanish with
    the whole group. `ties`: a tree over the axes of the group, parents
    first.
    """

    id: int
    name: str = ""
    size: int = 0
    removable: int = 0
    dead: int = 0
    constant: int = 0
    macs: int = 0
    members: list[Member] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)

    @property
    def live(self) -> int:
        """Channels of which nothing is known."""
        return self.size - self.dead - self.constant


@dataclass(frozen=True)
class Link:
    """One group feeds another, at a node: by a contraction ("read"), or where the graph may be cut
    ("sum": into a residual sum, "gather": in front of one of several readers, "spread": before
    what turns dead channels into others). "block": the target says which blocks of the source
    are there."""

    source: int
    target: int
    kind: str
    node: str
    line: str | None


@dataclass(frozen=True)
class Node:
    """A node of the fx graph with a tensor as its value.

    `kind`: the class of its module, or the name of its function. `module`: the submodule that it
    is or belongs to. `inputs`: the nodes that it takes; `joins`: how ("sum", "concat", "" for
    anything else). `groups`: whose channels its value carries, and how many of each.
    """

    name: str
    kind: str
    module: str
    inputs: list[str]
    joins: str
    shape: list[int]
    groups: dict[int, int]
    source: str | None


@dataclass
class GroupGraph:
    """Groups, links between them, and the nodes of the network that they are in."""

    groups: list[Group]
    links: list[Link]
    nodes: list[Node]

    def only(self, pattern: str) -> GroupGraph:
        """The groups with a member in modules that match, and what is between them.

        `pattern`: the start of a module's name ("layer1.0"), or one with wildcards ("*.conv1").
        Raises `UsageError` where nothing matches.
        """
        groups = [g for g in self.groups if any(matches(m.name, pattern) for m in g.members)]
        if not groups:
            raise UsageError(f"no pruning group has a member that matches {pattern!r}")
        ids = {g.id for g in groups}
        nodes = [n for n in self.nodes if ids & n.groups.keys() and matches(n.module, pattern)]
        names = {n.name for n in nodes}
        return GroupGraph(
            groups,
            [link for link in self.links if link.source in ids and link.target in ids],
            [Node(n.name, n.kind, n.module, [i for i in n.inputs if i in names], n.joins, n.shape,
                  n.groups, n.source) for n in nodes],
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON knows it: lists, dicts with strings for keys, numbers, strings."""
        found = asdict(self)
        for node in found["nodes"]:
            node["groups"] = {str(k): n for k, n in node["groups"].items()}
        return found

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> GroupGraph:
        """What `to_json` wrote. Raises `UsageError` where the text is something else."""
        try:
            data = json.loads(text)
            groups = [
                Group(**{
                    **g,
                    "members": _each(Member, g["members"]), "pins": _each(Pin, g["pins"]),
                    "blocks": _each(Block, g["blocks"]), "ties": _each(Tie, g["ties"]),
                })
                for g in data["groups"]
            ]  # fmt: skip
            nodes = [
                Node(**{**n, "groups": {int(k): v for k, v in n["groups"].items()}})
                for n in data["nodes"]
            ]
            return cls(groups, _each(Link, data["links"]), nodes)
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"not a dependency graph: {error!r}") from error

    def to_networkx(self) -> nx.MultiDiGraph[int]:
        """As a multigraph of networkx.

        A node for each group, by its id, with the attributes of `Group` (`members`, `pins`,
        `blocks` and `ties` as lists of dicts). An edge for each link, with `kind`, `node` and
        `line` as in `Link`.
        """
        import networkx as nx  # half a second, which most do not need

        graph: nx.MultiDiGraph[int] = nx.MultiDiGraph()
        for group in self.groups:
            data = asdict(group)
            graph.add_node(data.pop("id"), **data)
        for link in self.links:
            graph.add_edge(link.source, link.target, kind=link.kind, node=link.node, line=link.line)
        return graph


def _each(kind: type[Any], rows: Iterable[dict[str, Any]]) -> list[Any]:
    return [kind(**row) for row in rows]


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name is, or is inside of, what a pattern names."""
    if name == pattern or name.startswith(f"{pattern}."):
        return True
    wild = any(c in pattern for c in "*?[")
    return wild and (fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"{pattern}.*"))
