"""What is known of tensors while ops run: their labels, and what their channels hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from demp_fx.channels.constraints import Axis, Site, Traffic
from demp_fx.channels.empty import Empty
from demp_fx.channels.facts import Facts
from demp_fx.channels.labels import Labels, along, varying
from demp_fx.channels.system import System
from demp_fx.channels.value import Call, Value
from demp_fx.channels.writes import Write, memory_of

STRUCTURE = ""  # the reason of a pin that is no news to anyone: kernel sizes, unused dims


class Values:
    """What rules ask of tensors and say of them; constraints go to `system`.

    `with_facts`: what is known of the channels is wanted, too; `labelled`: they are. `names`: for
    the twin on meta of each parameter and buffer, by its id, the name and the original. `params`:
    the values of these, by name.
    """

    def __init__(self, with_facts: bool, labelled: bool) -> None:
        self.with_facts, self.labelled = with_facts, labelled
        self.system = System()
        self.site = Site("", "")
        self.params: dict[str, Value] = {}
        self.names: dict[int, tuple[str, Tensor]] = {}
        self.weights: dict[tuple[int, int, int], Empty] = {}  # by place in memory
        self.writes: dict[int, tuple[Write, ...]] = {}  # into each storage, in order
        self.changing: Mapping[str, Facts | None] = {}  # what calls write to: what is left known
        self.profiles = 0  # how many spatial maps there are

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; a parameter gets its atoms when it is first met."""
        value = tensor.__dict__.get("demp")
        if value is None:
            value = Value(version=self.version(tensor))
            known = self.names.get(id(tensor))
            if known is not None:
                value = self._parameter(tensor, *known)
            tensor.__dict__["demp"] = value
        return value

    def _parameter(self, tensor: Tensor, name: str, real: Tensor) -> Value:
        if not self.labelled:
            return Value(data=real.detach())
        rank = tensor.dim()
        labels = tuple(
            along(self.system.fresh(name, d, n).atoms, rank, d)
            for d, n in enumerate(tensor.shape)
            if n > 1
        )
        read = self.with_facts and not real.is_meta and real.layout is torch.strided
        read = read and name not in self.changing
        read = read and (real.is_floating_point() or real.is_complex() or real.dtype == torch.bool)
        line = real.numel() == max(real.shape, default=1)
        data, rows = real.detach(), None
        if read and not line and rank > 1:
            rows = self.weights[_place(data)] = Empty(data)
        value = Value(labels, None, data, 0, vector=read and line, rows=rows)
        self.params[name] = value
        if name in self.changing:
            value = Value(labels, self.changing[name], table=True)
        self.system.store(name, *(memory_of(t) for t in (tensor, real)))
        return value

    def empty(self, weight: Tensor, dim: int) -> Tensor | None:
        """Which slices of the numbers behind a value are all zero; None where none is."""
        whole = self.weights.get(_place(weight))
        if whole is not None:
            axes = list(zip(whole.weight.shape, whole.weight.stride(), strict=True))
            axis = (weight.size(dim), weight.stride(dim))
            if axis in axes:
                return whole.along(axes.index(axis))
        return Empty(weight).along(dim)

    def slices(self, weight: Tensor, but: Collection[int] = ()) -> Facts | None:
        """Zeros of the numbers behind a value, where whole slices of them are: along any dim (`but`
        some)."""
        found: Tensor | None = None
        for d in set(range(weight.dim())) - set(but):
            if (empty := self.empty(weight, d)) is not None:
                zero = along(empty, weight.dim(), d)
                found = zero if found is None else found | zero
        return None if found is None else Facts.zeros(found)

    def give(
        self, out: Tensor, labels: Labels, facts: Facts | None = None, data: Tensor | None = None,
        moved: bool = False,
    ) -> None:  # fmt: skip
        """Set what is known of an op's result; `moved`: it is a view, and writes nothing.

        Of complex numbers only zeros are followed: constants are real. A single channel is on no
        axis that could get narrower: it stays.
        """
        for label in labels:
            if label.numel() == 1:
                self.system.pin(label, STRUCTURE, self.site)
                labels = tuple(x for x in labels if x is not label)
        if facts is not None and out.is_complex():
            facts = Facts.of(facts.zero, facts.values)
        out.__dict__["demp"] = Value(labels, facts, data, self.version(out))
        if not moved and data is None:
            for label in labels:
                if label.numel() and len(varying(label)) == 1:
                    elements = out.numel() // label.numel()
                    self.system.traffic.append(Traffic(label.reshape(-1), elements))

    def tie(self, label: Tensor, dims: tuple[int, ...], call: Call) -> Tensor:
        """Let a label no longer vary on `dims`: what is on one line along them is one."""
        line = label
        for d in dims:
            line = line.narrow(d, 0, 1)
        if line.shape != label.shape:
            self.system.same(line.expand(label.shape), label, call.site)
        return line

    def relabel(self, tensor: Tensor, labels: Labels) -> None:
        """Give a tensor labels that say the same as those it had."""
        tensor.__dict__["demp"] = replace(self.value(tensor), labels=labels)

    def rows(self, blocks: Tensor) -> Tensor:
        """A fresh atom for each distinct row of atoms (N, k): whether that block is there."""
        _, number = blocks.unique(dim=0, return_inverse=True)
        axis = self.system.fresh(f"{self.site.node}.blocks", -1, int(number.max()) + 1)
        atoms: Tensor = axis.atoms[number]
        return atoms

    def firsts(self, gate: Tensor) -> Tensor:
        """The first index of each distinct atom, in order."""
        _, number = gate.unique(return_inverse=True)
        first = torch.full((int(number.max()) + 1,), gate.numel())
        return first.scatter_reduce(0, number, torch.arange(gate.numel()), "amin").sort().values

    def link(self, rows: Tensor, gate: Tensor, site: Site) -> None:
        """Tie the survival of rows (N, D) to atoms (N); both may repeat themselves."""
        first = self.firsts(gate)
        self.system.link(rows[first], gate[first], site)

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer; None of anything else."""
        known = self.names.get(id(tensor))
        return None if known is None else known[0]

    def pin(
        self, call: Call, label: Tensor, reason: str, outputs: tuple[Tensor, ...] = (),
        zero: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Keep the atoms of a label, but for those that are `zero`, because of this call (while it
        computes any of `outputs`)."""
        self.system.pin(label, reason, call.site, outputs, zero)

    def profile(self) -> int:
        """The number of a new spatial map."""
        self.profiles += 1
        return self.profiles

    def axis_of(self, label: Tensor) -> Axis | None:
        """The axis whose atoms a label carries, all of them in order, if there is one."""
        flat = label.reshape(-1)
        if flat.numel() == 0:
            return None
        axes = self.system.axes
        first, lo, hi = int(flat[0]), 0, len(axes)
        while lo < hi:
            mid = (lo + hi) // 2
            lo, hi = (mid + 1, hi) if axes[mid].stop <= first else (lo, mid)
        if lo == len(axes) or axes[lo].start != first or axes[lo].size != flat.numel():
            return None
        return axes[lo] if torch.equal(flat, axes[lo].atoms) else None

    def version(self, tensor: Tensor) -> int:
        """How often what a tensor holds was changed in place."""
        return len(self.writes.get(memory_of(tensor), ())) if self.writes else 0


def _place(weight: Tensor) -> tuple[int, int, int]:
    """The device, address and size of what a tensor and its whole views hold."""
    address = weight.data_ptr() if weight.layout is torch.strided else id(weight)
    return weight.get_device(), address, weight.numel()
