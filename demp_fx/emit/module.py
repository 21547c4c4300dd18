"""A compiled graph as a Python file: one class of plain torch, no demp_fx in sight."""

from __future__ import annotations

import builtins
import importlib
import importlib.metadata
import keyword
import re
import textwrap
import types
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from demp_fx.emit import tensors
from demp_fx.emit.leaves import installed
from demp_fx.emit.structure import Structure
from demp_fx.errors import EmitError
from demp_fx.tracing.autograd import Apply

_HEAD = '''"""{name} as demp_fx wrote it: plain PyTorch at the widths that are left.

`load()` builds the module and reads the weights that lie beside this file.
"""

from __future__ import annotations

{imports}
'''

_TREE = """

def _tree(children: dict[str, nn.Module], root: nn.Module | None = None) -> nn.Module:
    tree = root or nn.Module()
    for name, child in children.items():
        tree.add_module(name, child)
    return tree
"""

_TAIL = '''

def model() -> {name}:
    """The module, with weights yet to be loaded."""
    return {name}()


def load(folder: str | Path | None = None) -> {name}:
    """The module with the weights in `folder`, by default the folder of this file."""
    from safetensors.torch import load_file

    path = Path(folder or Path(__file__).parent) / "weights.safetensors"
    module = model()
    module.load_state_dict(load_file(path), strict=True)
    return module
'''

_IMPORTS = {
    "inf": "from math import inf",
    "nan": "from math import nan",
    "NoneType": "NoneType = type(None)",
    "torch": "import torch",
    "device": "from torch import device",
}
_RESERVED = {"torch", "nn", "Path", "load", "model", "inf", "nan", "device"}


def source(module: GraphModule) -> str:
    """The Python file whose class computes what `module` computes, under the same state_dict keys.

    The class is built once, without memory, to check that it loads the module's weights.
    """
    name = _class_name(module)
    init = Structure(module).lines
    imports, forward = _forward(module)
    body = textwrap.indent("\n".join(init), " " * 8)
    unpack = tensors.UNPACK if "_unpack(" in body else ""
    tree = _TREE if "_tree(" in body else ""
    imports |= {"from pathlib import Path", "import torch", "from torch import nn"}
    if unpack:
        imports |= {"import base64", "import zlib"}
    if "import_module(" in body:
        imports.add("from importlib import import_module")
    for constant in ("inf", "nan"):
        if re.search(rf"\b{constant}\b", body):
            imports.add(_IMPORTS[constant])
    text = (
        _HEAD.format(
            name=name, imports="\n".join(sorted(imports, key=lambda line: (line.split()[1], line)))
        )
        + unpack
        + tree
        + f"\n\nclass {name}(nn.Module):\n    def __init__(self) -> None:\n"
        + f"        super().__init__()\n{body}\n\n{forward}\n"
        + _TAIL.format(name=name)
    )
    _check(text, name, module)
    return text


def _class_name(module: GraphModule) -> str:
    name = re.sub(r"\W", "_", type(module).__name__, flags=re.ASCII)
    if not name or name[0].isdigit() or keyword.iskeyword(name) or name in _RESERVED:
        name = f"Narrow_{name}"
    return name


def _forward(module: GraphModule) -> tuple[set[str], str]:
    """The imports that the graph's own code needs, and the code as a method."""
    graph = module.graph
    if type(graph._codegen) is not CodeGen:
        raise EmitError("the graph flattens its inputs (torch.export); use the Python API instead")
    code = graph.python_code("self")
    # before the function stand only fx.wrap calls, for tracing this file again
    text = code.src[code.src.index("def forward(") :].rstrip()
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    used = set(re.findall(r"\b[A-Za-z_]\w*", text))
    imports = {_import(name, code.globals[name]) for name in used & set(code.globals)}
    return imports - {""}, textwrap.indent(text, "    ")


def _import(name: str, thing: Any) -> str:
    """The statement that makes `thing` known as `name` in the generated file."""
    if name in _IMPORTS:
        return _IMPORTS[name]
    if isinstance(thing, types.ModuleType):
        return f"import {thing.__name__} as {name}"
    if getattr(builtins, name, None) is thing:
        return ""
    if isinstance(thing, Apply):
        return f"{_import(thing.__name__, thing.function)}\n{name} = {thing.__name__}.apply"
    home, path = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    if home is None or path is None or not installed(home):
        raise EmitError(
            f"the forward calls '{name}', which module.py could not import ({home}); "
            "use the module that demp_fx.compile returns instead of files"
        )
    if getattr(importlib.import_module(home), path, None) is not thing:
        raise EmitError(f"the forward uses '{name}', which is not {home}.{path}")
    return f"from {home} import {path}" + ("" if name == path else f" as {name}")


def _check(text: str, name: str, module: GraphModule) -> None:
    """Build the class on the meta device and compare what it would load with what there is."""
    space: dict[str, Any] = {"__name__": "module"}
    with torch.device("meta"):
        exec(compile(text, "module.py", "exec"), space)
        built = space[name]().state_dict()
    ours = {key: (value.shape, value.dtype) for key, value in built.items()}
    theirs = {key: (value.shape, value.dtype) for key, value in module.state_dict().items()}
    if ours != theirs:
        wrong = sorted({key for key, _ in ours.items() ^ theirs.items()})[:5]
        raise EmitError(f"the generated module does not fit its weights: {', '.join(wrong)}")
