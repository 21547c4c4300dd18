"""Operations of the user's own: pinned without a rule, cut through with one."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import demp_fx
from demp_fx.channels.rules import RULES
from demp_fx.channels.rules.pointwise import FUNCTIONS
from demp_fx.channels.stream import FAILED
from demp_fx.emit.module import source
from demp_fx.errors import UsageError
from demp_fx.tracing.autograd import Apply

GUIDE = Path(__file__).parent.parent / "docs" / "custom_ops.md"
DEAD = [0, 1, 5]


@torch.library.custom_op("demp_rules::swell", mutates_args=())
def swell(x: Tensor) -> Tensor:
    return x * x.abs()


@swell.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("demp_rules::faceless", mutates_args=())
def faceless(x: Tensor) -> Tensor:
    return 3 * x


@torch.library.custom_op("demp_rules::project", mutates_args=())
def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.T + bias


@project.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("demp_rules::backwards", mutates_args=())
def backwards(x: Tensor) -> Tensor:
    return x.flip(0)


@backwards.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("demp_rules::raise_", mutates_args=("x",))
def raise_(x: Tensor) -> None:
    x += 1


class Step(torch.autograd.Function):
    """Rounds, and lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


step = Step.apply


class Outside(Step):
    """Rounds where no walk can follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy().round())


outside = Outside.apply


class Middle(nn.Module):
    """A layer whose outputs `DEAD` are zero, an operation, and a reader."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make, self.op, self.read = nn.Linear(4, 8), op, nn.Linear(8, 3)
        with torch.no_grad():
            self.make.weight[DEAD] = 0
            self.make.bias[DEAD] = 0
            self.read.weight[0, 2:5] = 0
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.op(self.make(x)))


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Rules of one test are none of the others."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def compiled(op: Callable[[Tensor], Tensor]) -> tuple[demp_fx.CompileResult, int]:
    """The result, checked to be exact, and how many channels the layer has left."""
    model, x = Middle(op), torch.randn(5, 4, dtype=torch.float64)
    result = demp_fx.compile(model, x[:2])
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-12, atol=1e-12)
    return result, result.module.get_parameter("make.weight").shape[0]


def raised(x: Tensor) -> Tensor:
    y = x * 1
    raise_(y)
    return y


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (swell, "demp_rules::swell"),
        (faceless, "demp_rules::faceless"),
        (backwards, "demp_rules::backwards"),
        (raised, "demp_rules::raise_"),
        (outside, f"{__name__}.Outside"),
    ],
)
def test_without_a_rule_it_is_left_alone_and_named(
    op: Callable[[Tensor], Tensor], name: str
) -> None:
    result, width = compiled(op)
    assert width == 8
    (pin,) = (p for p in result.report.pinned if name in p.reason)
    assert "make.weight[0]" in pin.members
    assert __file__ in str(pin.source)


@pytest.mark.parametrize("op", [swell, outside])
def test_pointwise(op: Callable[[Tensor], Tensor]) -> None:
    demp_fx.rule("demp_rules::swell", "pointwise")
    demp_fx.rule(Outside, "pointwise")
    result, width = compiled(op)
    assert width == 5
    assert not [p for p in result.report.pinned if "swell" in p.op or "Outside" in p.op]


class Reverse(torch.autograd.Function):
    """A view, with a gradient of its own; it says apart what the backward will need."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grad, None


class Swish(torch.autograd.Function):
    """Keeps its input instead of two results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return grad * gate * (1 + x * (1 - gate))


class Limited(Step):
    """The length of its gradient is one."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.norm(dim=-1, keepdim=True)


class Centred(Step):
    """Takes off an average, as nobody can tell it how many zeros it has been over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.sum(-1, keepdim=True) / x.shape[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("op", "left"),
    [
        (step, 5),
        (Swish.apply, 5),
        (lambda x: Reverse.apply(x, 0.5), 5),
        (Limited.apply, 8),
        (Centred.apply, 8),
    ],
    ids=["step", "swish", "reverse", "limited", "centred"],
)
def test_an_autograd_function_is_what_its_forward_and_its_backward_do(
    op: Callable[[Tensor], Tensor], left: int
) -> None:
    result, width = compiled(op)
    assert width == left
    assert any("over channels" in p.reason for p in result.report.pinned) == (left == 8)
    model, x = Middle(op), torch.randn(5, 4, dtype=torch.float64)
    for net in (model, result.module):
        net(x).square().sum().backward()
    grads = [net.get_parameter("make.weight").grad for net in (model, result.module)]
    assert grads[0] is not None
    keep = [k for k in range(8) if k not in DEAD or left == 8]
    torch.testing.assert_close(grads[1], grads[0][keep])


def test_a_contraction() -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
            self.bias = nn.Parameter(torch.randn(8, dtype=torch.float64))
            with torch.no_grad():
                self.weight[:2], self.bias[:2] = 0, 0

        def forward(self, x: Tensor) -> Tensor:
            return project(x, self.weight, self.bias)

    _, width = compiled(Between())
    assert width == 8
    demp_fx.rule("demp_rules::project", "...i,oi,o->...o")
    result, width = compiled(Between())
    assert width == 5
    assert result.module.get_parameter("op.weight").shape == (6, 5)


def test_a_movement_leaves_channels_that_stay_where_they_are() -> None:
    demp_fx.rule("demp_rules::backwards", "move")
    assert compiled(backwards)[1] == 5


def test_a_function_as_a_rule() -> None:
    seen = []

    @demp_fx.rule("demp_rules::backwards")
    def rule(walk: Any, call: Any) -> None:
        seen.append(call.op)
        value = walk.value(call.tensors[0])
        walk.give(call.outputs[0], value.labels, value.facts)

    assert compiled(backwards)[1] == 5
    assert seen


def test_an_operation_whose_rule_fails_half_way_is_left_alone_and_named() -> None:
    @demp_fx.rule("demp_rules::backwards")
    def rule(walk: Any, call: Any) -> None:
        walk.give(call.outputs[0], walk.value(call.tensors[0]).labels)
        walk.relabel(call.tensors[0], ())
        raise ValueError("no idea")

    result, width = compiled(backwards)
    assert width == 8
    (pin,) = (p for p in result.report.pinned if p.reason.startswith(FAILED))
    assert pin.reason.endswith("demp_rules::backwards: ValueError: no idea")
    assert "make.weight[0]" in pin.members


def test_the_decorator_leaves_the_operation_as_it_is() -> None:
    assert demp_fx.rule("demp_rules::swell", "pointwise")(swell) is swell


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("aten::roll", "pointwise"),
        ("swell", "pointwise"),
        ("demp_rules::swell", "pointwize"),
        ("demp_rules::swell", "ij->ji"),
        ("demp_rules::swell", "...i,oi,o->o..."),
    ],
)
def test_what_cannot_be_a_rule_is_refused(name: str, family: str) -> None:
    with pytest.raises(UsageError, match=re.escape(name if "pointwise" in family else family)):
        demp_fx.rule(name, family)


@pytest.mark.parametrize("ruled", [False, True])
def test_an_autograd_function_keeps_its_backward(ruled: bool, tmp_path: Path) -> None:
    if ruled:
        demp_fx.rule(Step, "pointwise")
    model = Middle(step)
    narrow = demp_fx.compile(model, torch.randn(2, 4, dtype=torch.float64)).module
    for module in (narrow, copy.deepcopy(narrow), pickle.loads(pickle.dumps(narrow))):
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(model(x).sum(), x)
        (found,) = torch.autograd.grad(module(x).sum(), x)
        assert expected.abs().max() > 0.01  # that of round() is zero
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_forward_that_is_called_by_hand_is_what_it_does() -> None:
    result, width = compiled(lambda x: Step.forward(None, x))
    assert width == 5
    assert not any(isinstance(n.target, Apply) for n in result.module.graph.nodes)


def test_an_autograd_function_may_write_to_what_it_is_given() -> None:
    class Scaled(torch.autograd.Function):
        """Notes down what it did, for its backward."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, notes: dict[str, Any], scales: list[float]) -> Tensor:
            notes["scale"] = scales.pop()
            return x * notes["scale"]

    result, width = compiled(lambda x: Scaled.apply(x, {"scale": None}, [1.0, 2.0]))
    assert width == 8
    assert any("Scaled is not known to keep channels apart" in p.reason
               for p in result.report.pinned)  # fmt: skip


class Reversible(torch.autograd.Function):
    """Runs a module, and again in its backward, with the random numbers that it saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, saved: Tensor | None) -> Tensor:
        ctx.saved = saved
        result: Tensor = module(x)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        torch.set_rng_state(ctx.saved)
        return grad, None, None


def test_a_module_in_a_function_that_is_not_followed_stays_as_it_is() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = Reversible.apply(x, self.inner, None)  # refused in the backward
            return result

    result, width = compiled(Holds())
    assert width == 8
    for name in ("op.inner.0", "op.inner.2"):
        assert result.module.get_parameter(f"{name}.weight").shape == (8, 8)


def test_functions_of_installed_packages_can_be_written_to_a_file() -> None:
    pytest.importorskip("tests.zoo.shim")
    layers = pytest.importorskip("timm.layers.activations_me")
    result, width = compiled(layers.SwishMe())
    assert width == 5
    text = source(result.module)
    assert "from timm.layers.activations_me import SwishAutoFn" in text
    space: dict[str, Any] = {}
    exec(text, space)
    written = space["Middle"]().double()
    written.load_state_dict(result.module.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(written(x), result.module(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_looked_into(reentrant: bool) -> None:
    def op(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=reentrant)

    assert compiled(op)[1] == 5


def test_tracing_leaves_autograd_functions_as_they_are() -> None:
    demp_fx.trace(Middle(step), torch.randn(2, 4, dtype=torch.float64))
    x = torch.ones(2, requires_grad=True)
    step(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2))  # type: ignore[arg-type]
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    examples = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    space: dict[str, Any] = {"__name__": "guide"}
    for example in examples:
        exec(compile(example, str(GUIDE), "exec"), space)
    stem, before, reason, after = capsys.readouterr().out.splitlines()
    assert stem.startswith("Conv2d(3, 8,")
    assert before.startswith("Conv2d(8, 32,")
    assert reason == "guide.Step is not known to keep channels apart"
    assert after.startswith("Conv2d(8, 24,")


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_activations_of_well_known_packages_are_elementwise(name: str) -> None:
    class Own(Step):
        pass

    Own.__module__, _, Own.__qualname__ = name.rpartition(".")
    result, width = compiled(lambda x: Own.apply(x))  # type: ignore[no-untyped-call]
    assert not any(name in pin.reason for pin in result.report.pinned)
    assert width < 8
