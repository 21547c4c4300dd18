"""What is known of a graph's values while it is traced."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from demp_fx.shapes import SHAPES, shape_of
from demp_fx.tracing.modes import kept_modes
from demp_fx.tracing.norms import PLAIN
from demp_fx.tracing.states import is_written
from demp_fx.trees import tensors_of

# What takes numbers out of a tensor, or a size from them: nothing is known of it by shapes alone,
# unless the size is given by this name, or behind a number.
NUMBERS = {"item": "", "tolist": "", "numpy": "", "repeat_interleave": "output_size",
           "one_hot": "num_classes"}  # fmt: skip

# What draws anew at each call, even where nothing of the input goes into it.
DRAWS = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "poisson"}
_META = torch.device("meta")

# How code asks a tensor for the kind of its device.
_IS_ON = {"is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta"}


class Unknown:
    """The type of `UNKNOWN`, the value of a node that cannot be run on meta tensors."""


UNKNOWN = Unknown()


def on_meta(value: Any) -> Any:
    """`value` with every tensor in it on the meta device."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value)


def set_modes(modes: Mapping[nn.Module, Any]) -> None:
    """Set modules' `training`, past `nn.Module.__setattr__`, which would not take a proxy."""
    for module, mode in modes.items():
        module.__dict__["training"] = mode


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules of `model` in one mode meanwhile, but for those that it keeps in theirs."""
    before = {m: m.training for m in model.modules()}
    set_modes(dict.fromkeys(before, training) | kept_modes(model))
    try:
        yield
    finally:
        set_modes(before)


def named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and then the buffers; what is tied comes under each of its names."""
    modules = list(model.named_modules())
    for table in ("_parameters", "_buffers"):
        for path, module in modules:
            for name, tensor in getattr(module, table).items():
                if tensor is not None:
                    yield f"{path}.{name}" if path else name, tensor


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The whole numbers that modules keep in buffers which no checkpoint has (strides, say): they
    are the code's own."""
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            t = module._buffers.get(name)
            if t is not None and not t.dim() and not t.is_floating_point() and not t.is_meta:
                yield f"{path}.{name}".lstrip("."), t.detach().cpu()


class _Shortcuts(TorchDispatchMode):
    """Meanwhile shapes on meta are found out the short way."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        shape = shape_of(func, SHAPES, kwargs)
        if shape is None or not all(a.is_meta for a in args if isinstance(a, Tensor)):
            return func(*args, **(kwargs or {}))
        return shape(args)


class Values(fx.Interpreter):
    """What nodes give on meta tensors, worked out when asked for: sizes are known, data is not.

    Args:
        root: the module being traced; its `training` attributes are proxies meanwhile.
        graph: the graph so far; the values of its placeholders have to be put into `env`.
        modes: the true train()/eval() flags of all modules.
        flags: the proxies that stand for them.
        state: the parameters, buffers and other tensors that modules have as attributes, by name;
            forward may have assigned to them since.

    Attributes:
        numbers: those of the code's own that are in buffers, by name.
        asked: which of them something was decided by.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        modes: Mapping[nn.Module, bool],
        flags: Mapping[nn.Module, Any],
        state: Mapping[str, Tensor],
    ) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.modes, self.flags, self.state = modes, flags, state
        self.training = {flag.target: modes[module] for module, flag in flags.items()}
        self.numbers, self.asked = dict(_numbers(root)), set[str]()
        self.device = next((t.device for t in state.values()), torch.device("cpu"))
        self.busy = False  # modules run for real: nothing is to be recorded
        self.tried: set[fx.Node] = set()

    def of(self, proxy: Any) -> Any:
        """The value of a proxy, or `UNKNOWN`; anything but a proxy is its own value."""
        return self.of_node(proxy.node) if isinstance(proxy, fx.Proxy) else proxy

    def of_node(self, last: fx.Node) -> Any:
        """The value of a node, or `UNKNOWN`; a mode does not depend on what ran before."""
        if last.target in self.training:
            return self.training[str(last.target)]
        pending, node = [], last
        while node.op != "root" and node not in self.tried:
            pending.append(node)
            node = node.prev
        if pending:
            self._run(pending[::-1])
        return self.env.get(last, UNKNOWN)

    def real(self, node: fx.Node, sized: bool = True) -> Any:
        """What a node gives that nothing goes into but the code's own numbers (and, if it may be
        `sized`, sizes of the example inputs).

        Raises `TypeError` where there is more to it.
        """
        value = self.of_node(node)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        told = not isinstance(value, Unknown) and not tensors_of(value)
        if isinstance(value, torch.dtype) or (sized and told):
            return value
        if node.op == "get_attr" and node.target not in self.state:
            return self.fetch_attr(str(node.target))  # a tensor that the code has made
        if node.op == "get_attr" and node.target in self.numbers and not is_written(node):
            self.asked.add(str(node.target))
            return self.numbers[str(node.target)]
        drawn = getattr(node.target, "__name__", node.target) in DRAWS
        if drawn or node.op not in ("call_function", "call_method"):
            raise TypeError("control flow depends on the values in a tensor")
        numbers = functools.partial(self.real, sized=sized)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), numbers)
        with self._running(torch.device("cpu")):
            return getattr(fx.Interpreter, node.op)(self, node.target, args, kwargs)

    def _run(self, nodes: list[fx.Node]) -> None:
        self.tried.update(nodes)
        with self._running():
            for node in nodes:
                if node not in self.env:
                    with contextlib.suppress(Exception):
                        self.env[node] = self._given(node)

    def _given(self, node: fx.Node) -> Any:
        """What a node gives; code may have made its arguments on a device that it has named."""
        if PLAIN in node.meta:  # the module under this name does more than is called here
            return self.env[node.all_input_nodes[0]]
        try:
            return self.run_node(node)
        except Exception:
            before = {n: self.env[n] for n in node.all_input_nodes}
            try:
                self.env.update(on_meta(before))
                with contextlib.suppress(Exception):
                    return self.run_node(node)
                # a place in a tensor may be a number in another one, computed of sizes
                numbers = [n for n, t in before.items() if isinstance(t, Tensor) and not t.dim()]
                self.env.update({n: self.real(n) for n in numbers})
                return self.run_node(node)
            finally:
                self.env.update(before)

    @contextlib.contextmanager
    def _running(self, device: torch.device = _META) -> Iterator[None]:
        outer, self.busy = self.busy, True
        try:
            with (
                torch.no_grad(),
                device,
                _Shortcuts(),  # type: ignore[no-untyped-call]
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore")
                yield
        finally:
            self.busy = outer

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.training:
            return self.training[target]
        value = self.state.get(target)
        return on_meta(super().get_attr(target, args, kwargs) if value is None else value)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is getattr:  # code may go another way for each kind of device
            given, name = args[:2]
            if isinstance(given, torch.device) and given.type == "meta":
                return getattr(self.device, name)
            if isinstance(given, Tensor) and name in _IS_ON:
                return self.device.type == name.removeprefix("is_")
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        before = {m: m.training for m in module.modules()}
        set_modes({m: self.modes[m] for m in before})
        try:
            with contextlib.suppress(Exception):
                return torch.func.functional_call(module, on_meta(state), args, kwargs)
            return _filled(module, state, args, kwargs)
        finally:
            set_modes(before)


def _filled(module: nn.Module, state: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
    """What a module gives that asks for numbers, on meta: its sizes, if they are the same whether
    all that it gets is zero or one. Raises where they differ, or it does not run."""
    found = []
    with torch.device("cpu"), torch.random.fork_rng([]):
        for make in (torch.zeros_like, torch.ones_like):
            alike = functools.partial(make, device="cpu")
            given = pytree.tree_map_only(Tensor, alike, (args, kwargs))
            own = {name: t.detach().to("cpu", copy=True) for name, t in state.items()}
            found.append(on_meta(torch.func.functional_call(module, own, *given)))
    sizes = [[t.shape for t in pytree.tree_leaves(f) if isinstance(t, Tensor)] for f in found]
    if sizes[0] != sizes[1]:
        raise TypeError("its sizes depend on numbers")
    return found[0]


def needs_numbers(name: str, args: Any, kwargs: Any, values: Values) -> bool:
    """Whether a call of one of the `NUMBERS` cannot do without them."""
    size = NUMBERS[name]
    given = next((a for a in (*args[1:], *kwargs.values())), None)
    unsized = given is None or isinstance(values.of(given), Tensor)
    return not size or (size not in kwargs and unsized)
