"""Any module -> fx graph: symbolic tracing that keeps names, hierarchy and train()/eval().

Beyond `torch.fx.Tracer`: `module.training` is a node, so the graph follows train() and eval();
composite `torch.nn` modules appear as their parts (`expressions`), functions behind `torch.fx.wrap`
as what they do; control flow on sizes follows the example inputs; and a submodule that cannot be
traced stays whole, with the reason in the notes. Where Python asks for the mode, both are traced
and merged. What cannot be traced so, or only as one opaque leaf, goes to `torch.export`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import torch
from torch import fx, nn

from demp_fx.errors import DempError, TraceError, UsageError
from demp_fx.inputs import ExampleInputs, Inputs
from demp_fx.tracing.merge import DiffersError, Version, merge
from demp_fx.tracing.module import TracedModule, TraceNotes, draft
from demp_fx.tracing.preserve import preserved
from demp_fx.tracing.source import failed_at, first_line
from demp_fx.tracing.states import as_buffers
from demp_fx.tracing.tracer import Tracer
from demp_fx.tracing.values import in_mode, named_state
from demp_fx.turns import default_device, in_turn

# Attributes of a graph module that parts of a model would have to share a name with.
RESERVED = {*dir(TracedModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}
UNWRITABLE = {'"', "\\", "\n"}  # what fx would have to escape in strings


def trace(model: nn.Module, example_inputs: ExampleInputs) -> TracedModule:
    """Turn `model` into a graph of its leaf modules and torch functions.

    The result has the state_dict keys, the parameters and the train()/eval() flags of `model`. It
    shares leaf modules and tensors with it: deepcopy it before changing either. Arguments of
    forward that are not among the example inputs take their defaults and are no arguments of the
    result; those without a tensor in them keep the value given here. `meta["demp_fx"]` holds the
    `TraceNotes`, `meta["example_inputs"]` the shapes of the inputs (on meta), each node's
    `meta["source"]` the user's "file:line".

    Args:
        model: any module; a GraphModule is traced anew.
        example_inputs: a tensor, or a tuple or dict of forward's arguments. Sizes that steer
            Python's control flow are taken from them; nothing is computed on their values.

    Raises:
        UsageError: the inputs do not fit forward's signature, or the model has to be unwrapped or
            initialised first.
        TraceError: the model's own forward could not be traced.
    """
    module = trace_graph(model, example_inputs)
    module.recompile()
    return module


@in_turn
def trace_graph(model: nn.Module, example_inputs: ExampleInputs) -> TracedModule:
    """What `trace` returns, for the use of its graph: see `draft`."""
    inputs = Inputs.of(example_inputs)
    _bind(_checked(model), inputs)
    own = set(vars(model))
    try:
        with default_device():
            graph, notes = _graph(model, lambda: _bind(model, inputs))
        module = draft(model, graph, type(model).__name__)
    finally:
        for constant in vars(model).keys() - own:  # fx keeps tensors it met on the way there
            delattr(model, constant)
    if any(map(_saves_otherwise, model.modules())):
        for name in module.state_dict().keys() - model.state_dict().keys():
            owner, _, buffer = name.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(buffer)
    meta = model.meta if isinstance(model, fx.GraphModule) else {}
    before = meta.get("demp_fx", TraceNotes())
    baked = list(dict.fromkeys([*before.baked, *notes.baked]))
    module.meta["example_inputs"] = inputs.map(lambda t: torch.empty_like(t, device="meta"))
    module.meta["demp_fx"] = TraceNotes(
        {**before.opaque, **notes.opaque}, baked, notes.exported or before.exported,
        [*before.memos, *notes.memos],
    )  # fmt: skip
    return module


def _saves_otherwise(module: nn.Module) -> bool:
    """Whether a module has a way of its own to save its state, which may leave buffers out."""
    kind, plain = type(module), nn.Module
    own = kind.state_dict is not plain.state_dict or bool(module._state_dict_hooks)
    return own or kind._save_to_state_dict is not plain._save_to_state_dict


def _graph(
    model: nn.Module, bind: Callable[[], inspect.BoundArguments]
) -> tuple[fx.Graph, TraceNotes]:
    """The graph of the first front end that can make one."""
    try:
        graph, tracer = _symbolic(model, bind)
        failure, where, why = None, "", _mostly_opaque(model, tracer)
        if not why:
            return graph, _notes(model, tracer)
    except DempError:
        raise
    except Exception as error:
        failure, where, why = error, failed_at(error), first_line(error)
    with torch.device("cpu"):  # torch.export makes tensors when it is imported, half a second long
        from demp_fx.tracing.exported import Exporter

    exporter = Exporter(model, bind())
    try:
        exported = exporter.trace()
    except Exception as error:
        if failure is None:
            return graph, _notes(model, tracer)
        raise TraceError(
            f"{where}: {type(model).__name__} could not be traced: {why}. Nor could torch.export "
            f"take it, at {failed_at(error)}: {first_line(error)}. "
            "Move these lines into a submodule, which is then left whole, or into a function "
            "decorated with torch.fx.wrap."
        ) from failure
    for name, constant in exporter.constants.items():
        setattr(model, name, constant)
    reason = f"{where}: {why}" if where else why
    return exported, TraceNotes({}, list(exporter.baked), reason)


def _notes(model: nn.Module, tracer: Tracer) -> TraceNotes:
    paths = {module: path for path, module in model.named_modules()}
    memos = [f"{paths[m]}.{name}".lstrip(".") for m, name in tracer.memos or () if m in paths]
    return TraceNotes(tracer.opaque, list(tracer.baked), memos=sorted(memos))


def _symbolic(
    model: nn.Module, bind: Callable[[], inspect.BoundArguments]
) -> tuple[fx.Graph, Tracer]:
    """The graph by symbolic tracing. Where Python asks for the mode it is traced in both, and flags
    and numbers that differ follow it; where more differs, modules without state that ask are left
    whole, and else it stays in the mode that it is in."""
    graph, tracer = _traced(model, bind)
    free = tracer.modes.keys() - tracer.kept.keys()
    uniform = all(tracer.modes[m] == model.training for m in free)
    for forking in (False, True) if tracer.by_mode else ():
        done = {model.training: (graph, tracer)} if uniform and not forking else {}
        for training in {False, True} - done.keys():
            with in_mode(model, training), contextlib.suppress(Exception):
                done[training] = _traced(model, bind, forking)
        if len(done) < 2:
            continue
        with contextlib.suppress(DiffersError, ValueError):
            merged = merge(Version(done[False][0]), Version(done[True][0]))
            graph, tracer = merged, done[model.training][1]
            tracer.baked = {note: None for note in tracer.baked if note not in tracer.by_mode}
            break
    return graph, tracer


def _traced(
    model: nn.Module, bind: Callable[[], inspect.BoundArguments], forking: bool = False,
    remembers: bool = False,
) -> tuple[fx.Graph, Tracer]:  # fmt: skip
    """The graph of the mode that the model is in. Attributes that turn out to be states are traced
    as buffers then, of which every use is seen."""
    done, tracer = None, Tracer(bind(), forking, remembers=remembers)
    try:
        done = tracer.trace(model), tracer
    except Exception:
        if tracer.memos:
            return _traced(model, bind, forking, remembers=True)
        if not tracer.changed:
            raise
    if tracer.changed:
        again = Tracer(bind(), forking, tracer.changed, remembers)
        try:
            with preserved(model.modules()):
                as_buffers(model, tracer.changed)
                return again.trace(model), again
        except Exception:  # they are numbers to the code
            if done is None:
                raise
    assert done is not None
    return done


def _mostly_opaque(model: nn.Module, tracer: Tracer) -> str:
    """Why a graph says too little: most of the parameters are in modules that failed; or ""."""
    if not tracer.opaque:
        return ""
    sizes = {id(p): p.numel() for p in model.parameters()}
    modules = dict(model.named_modules())
    names = [n for n in tracer.opaque if n in modules and n not in tracer.chosen]
    hidden = {id(p) for name in names for p in modules[name].parameters()}
    if 2 * sum(sizes[p] for p in hidden) <= sum(sizes.values()):
        return ""
    return f"{names[0]} could not be traced: {tracer.opaque[names[0]]}"


def _checked(model: nn.Module) -> nn.Module:
    """`model`, unless it is known that no graph can be made of it."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model has to be an nn.Module, not a {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError("a TorchScript module has no Python to trace: hand in the original module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UsageError(f"{type(model).__name__} only wraps a model: hand in its `.module`")
    own = RESERVED & (model._modules.keys() | model._parameters.keys() | model._buffers.keys())
    if own:
        raise TraceError(
            f"{type(model).__name__} has a submodule, parameter or buffer called {min(own)!r}, "
            "and an fx.GraphModule something of its own: give it another name"
        )
    state = list(named_state(model))
    for name in (*dict(model.named_modules()), *(name for name, _ in state)):
        if not UNWRITABLE.isdisjoint(name):
            raise TraceError(f"torch.fx cannot write code with the name {name!r}: give it another")
    for name, tensor in state:
        if nn.parameter.is_lazy(tensor):
            raise UsageError(f"{name} has no shape yet: run the model once on example inputs first")
    return model


def _bind(model: nn.Module, inputs: Inputs) -> inspect.BoundArguments:
    signature = inspect.signature(model.forward)
    try:
        return signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise UsageError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from None
