"""Generated modules compute and load what the graph does, where demp_fx cannot be imported."""

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, symbolic_trace

import demp_fx
from demp_fx.emit import folder
from demp_fx.emit.module import source
from demp_fx.errors import EmitError, UsageError
from demp_fx.passes.outcome import CompileReport


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, width, 3, padding=1, padding_mode="reflect")
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.layers = nn.Sequential(Block(4), Block(4))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.layers(self.stem(x))).flatten(1))


class Tied(nn.Module):
    """Tied and bare parameters, every sort of buffer, a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6, bias=False)
        self.again = self.norm
        self.scale = nn.Parameter(torch.randn(6))
        self.frozen = nn.Parameter(torch.randn(()), requires_grad=False)
        self.register_buffer("shift", torch.randn(6))
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0]), persistent=False)
        self.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)
        self.register_buffer("table", torch.randn(70, 70), persistent=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.again(self.norm(self.embed(x)) * self.scale + self.shift)[..., self.order]
        y = y * self.frozen + self.table[0, :6] + torch.exp(self.mask).sum()
        return {"logits": self.head(y), "features": y}


class Named(nn.Module):
    """Names that Python does not take as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"0": nn.Linear(4, 4), "a-b": nn.Linear(4, 4)})
        self.parts["a-b"].bias.requires_grad_(False)
        self.parts["0"].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["a-b"](self.parts["0"](x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.lstm(x)
        return self.attention(y, y, y, need_weights=False)[0]


CASES = {
    "residual": (Residual, torch.randn(2, 3, 9, 9)),
    "tied": (Tied, torch.randint(0, 11, (2, 3))),
    "named": (Named, torch.randn(2, 4)),
    "recurrent": (Recurrent, torch.randn(2, 3, 5)),
}


def graph_of(model: nn.Module) -> GraphModule:
    """As demp_fx.trace leaves it: persistence of buffers and modes are the model's."""
    graph = symbolic_trace(model)
    for path, module in graph.named_modules():
        original = model.get_submodule(path)
        module._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
        module.training = original.training
    return graph


def build(graph: GraphModule) -> nn.Module:
    space: dict[str, Any] = {"__name__": "generated"}
    exec(source(graph), space)
    module = space["model"]()
    assert isinstance(module, nn.Module)
    return module


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", [True, False])
def test_a_generated_module_is_the_graph(name: str, dtype: torch.dtype, mode: bool) -> None:
    kind, x = CASES[name]
    graph = graph_of(kind().to(dtype).train(mode))
    module = build(graph)
    keys = {key: (v.shape, v.dtype) for key, v in graph.state_dict().items()}
    assert {key: (v.shape, v.dtype) for key, v in module.state_dict().items()} == keys
    theirs = [(name, p.requires_grad) for name, p in graph.named_parameters()]
    assert [(name, p.requires_grad) for name, p in module.named_parameters()] == theirs
    module.load_state_dict(graph.state_dict(), strict=True)
    x = x.to(dtype) if x.is_floating_point() else x
    for wanted in (mode, not mode):
        ours, original = module.train(wanted)(x), graph.train(wanted)(x)
        torch.testing.assert_close(ours, original, rtol=0, atol=0)


def test_modes_are_kept_module_by_module() -> None:
    model = Residual()
    model.layers[0].bn1.eval()
    graph = graph_of(model)
    modules = dict(build(graph).named_modules())
    assert modules["layers.1.bn1"].training
    assert not modules["layers.0.bn1"].training


def test_tied_parameters_stay_tied() -> None:
    graph = graph_of(Tied())
    graph.again = graph.norm
    calls = [node for node in graph.graph.nodes if node.target == "norm"]
    calls[-1].target = "again"
    module = build(graph)
    assert module.head.weight is module.embed.weight
    assert module.again is module.norm


def test_the_source_reads_well() -> None:
    text = source(graph_of(Residual()))
    assert "self.stem = nn.Conv2d(3, 4, (3, 3), stride=(2, 2))" in text
    assert "'bn1': nn.BatchNorm2d(5)," in text
    assert "class Residual(nn.Module):" in text


class NormThenAct(nn.BatchNorm2d):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


def test_a_batch_norm_has_the_parts_of_the_layer_that_it_was_in() -> None:
    x = torch.randn(2, 3, 4, 4)
    graph = demp_fx.trace(nn.Sequential(nn.Conv2d(3, 4, 1), NormThenAct(4)), x)
    assert "_tree({'act':nn.ReLU(),},nn.BatchNorm2d(4))" in "".join(source(graph).split())
    module = build(graph)
    module.load_state_dict(graph.state_dict(), strict=True)
    torch.testing.assert_close(module(x), graph(x), rtol=0, atol=0)


class Own(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight if x.sum() > 0 else x


def test_a_leaf_of_an_installed_packages_class_is_imported_from_there() -> None:
    from tests.zoo.transformers_networks import hf

    SwinDropPath = hf.models.swin.modeling_swin.SwinDropPath  # noqa: N806
    net = nn.Sequential(nn.Linear(3, 4), SwinDropPath(0.25))
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("1", (graph.call_module("0", (x,)),)))
    space: dict[str, Any] = {"__name__": "module"}
    exec(source(GraphModule(net, graph)), space)
    built = space["model"]()
    assert type(built.get_submodule("1")) is SwinDropPath
    assert built.get_submodule("1").drop_prob == 0.25


def test_a_leaf_of_the_users_own_class_is_refused_by_name() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
            return isinstance(m, Own) or super().is_leaf_module(m, qualname)

    model = nn.Sequential(nn.Linear(3, 3), Own(3))
    with pytest.raises(EmitError, match=r"'1' is a .*Own.*demp_fx\.compile returns"):
        source(GraphModule(model, Tracer().trace(model)))


def test_a_function_of_the_users_own_is_refused_by_name() -> None:
    space: dict[str, Any] = {"__name__": "some_script"}
    exec("def gate(x):\n    return x * 2", space)
    graph = symbolic_trace(nn.Sequential(nn.Linear(3, 3)))
    output = graph.graph.output_node()
    with graph.graph.inserting_before(output):
        output.args = (graph.graph.call_function(space["gate"], output.args),)
    with pytest.raises(EmitError, match="gate"):
        source(graph)


def test_what_is_written_is_the_same_each_time() -> None:
    graph = demp_fx.trace(nn.Sequential(nn.Linear(2, 3)), torch.randn(1, 2))
    imports = [line for line in source(graph).splitlines() if "import" in line][1:4]
    assert imports == ["from pathlib import Path", "from torch import nn", "import torch"]


def test_hooks_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    graph = symbolic_trace(nn.Sequential(nn.Linear(3, 3)))
    setattr(graph, "0", model[0])
    with pytest.raises(EmitError, match="hooks"):
        source(graph)


def result_of(graph: GraphModule) -> Any:
    report = CompileReport(
        model="Residual", params_before=2, params_after=1, macs_before=2, macs_after=1,
        channels_before=2, channels_after=1,
    )  # fmt: skip
    plan = SimpleNamespace(save=lambda path: Path(path).write_text("{}\n"))
    return SimpleNamespace(module=graph, plan=plan, report=report)


def test_the_folder_works_where_demp_fx_does_not_exist(tmp_path: Path) -> None:
    graph = graph_of(Tied())
    out = folder.write(result_of(graph), tmp_path / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "module.py", "plan.json", "report.html", "report.json", "weights.safetensors",
    ]  # fmt: skip
    x = torch.randint(0, 11, (2, 3))
    torch.save((x, graph(x)), tmp_path / "expected.pt")
    script = """
        import sys
        sys.modules["demp_fx"] = None
        import safetensors.torch, torch
        import module
        x, expected = torch.load("../expected.pt")
        net = module.load()
        assert torch.equal(net(x)["logits"], expected["logits"])
        again = module.Tied()
        weights = safetensors.torch.load_file("weights.safetensors")
        again.load_state_dict(weights, strict=True)
        assert torch.equal(again(x)["features"], expected["features"])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=out, check=True)


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder.write(result_of(graph_of(Residual())), out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UsageError, match="exists"):
        folder.write(result_of(graph_of(Named())), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_overwriting_replaces_an_earlier_result_but_no_other_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder.write(result_of(graph_of(Residual())), out)
    folder.write(result_of(graph_of(Named())), out, overwrite=True)
    assert "class Named(" in (out / "module.py").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        folder.write(result_of(graph_of(Residual())), out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_failure_midway_leaves_nothing_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder.write(result_of(graph_of(Residual())), out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    broken = result_of(graph_of(Named()))

    def full(path: Path) -> None:
        raise OSError("no space left on device")

    broken.plan.save = full
    with pytest.raises(EmitError, match="no space left"):
        folder.write(broken, out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_hold_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        folder.write(result_of(graph_of(Named())), tmp_path / "file", overwrite=True)
    with pytest.raises(EmitError, match="cannot write"):
        folder.write(result_of(graph_of(Named())), tmp_path / "file" / "out")
