"""Models, weights, inputs and data by name, and a clear word on each way to get them wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from demp_fx.data import BATCH, check_forward, example_inputs, load_calibration
from demp_fx.errors import UsageError
from demp_fx.loading import Loaded, load_model, load_weights

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(3, width)

    def forward(self, x, mask=None):
        return self.fc(x)

def make():
    return Net()
"""


def write(folder: Path, text: str, name: str = "net.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def loaded(folder: Path, text: str = "") -> Loaded:
    return load_model(write(folder, NET + (text or "model = Net()")))


@pytest.mark.parametrize("text", ["model = Net()", "model = Net", "def model(): return Net()"])
def test_a_file_has_a_model_or_a_function_model(tmp_path: Path, text: str) -> None:
    found = loaded(tmp_path, text)
    assert isinstance(found.model.fc, nn.Linear)
    assert found.stem == "net"


def test_a_factory_by_name(tmp_path: Path) -> None:
    assert load_model(write(tmp_path, NET) + ":make").model.fc.out_features == 4


def test_a_factory_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, NET, "net_in_a_package.py")
    monkeypatch.chdir(tmp_path)
    assert load_model("net_in_a_package:make").model.fc.out_features == 4


def test_a_file_may_import_what_stands_beside_it(tmp_path: Path) -> None:
    write(tmp_path, NET, "net_beside.py")
    text = "def model():\n    from net_beside import Net\n    return Net(7)"
    assert load_model(write(tmp_path, text)).model.fc.out_features == 7


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        ("gone.py", "", "no file .*gone.py"),
        ("no.such.package:make", "", "no file and no package 'no.such.package'"),
        ("net.py", NET, r"no `model`: define .*net\.py:make, .*net\.py:Net"),
        ("net.py:other", NET, "no `other`"),
        ("net.py", "import torch\n\n1 / 0", r"failed at .*net\.py:3: ZeroDivisionError"),
        ("net.py", "def broken(:", r"failed at .*net\.py:1: SyntaxError"),
        ("net.py", "import sys\nsys.exit(3)", r"failed at .*net\.py:2: SystemExit"),
        ("net.py", "def model():\n    raise KeyError('w')", r"net\.py:2: KeyError"),
        ("net.py", "def model(width): ...", "missing 1 required"),
        ("net.py", "def model(): return 3", "gives a int, not an nn.Module"),
        ("net.py", "model = 'resnet'", "gives a str, not an nn.Module"),
    ],
)
def test_models_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text:
        write(tmp_path, text)
    with pytest.raises(UsageError, match=message):
        load_model(spec)


@pytest.mark.parametrize("form", ["safetensors", "pt", "nested"])
def test_weights_are_loaded(tmp_path: Path, form: str) -> None:
    model, state = nn.Linear(3, 4), nn.Linear(3, 4).state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if form == "nested" else state, path)
    load_weights(model, path)
    assert torch.equal(model.weight, state["weight"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net."])
def test_the_prefix_of_a_wrapper_is_taken_off(tmp_path: Path, prefix: str) -> None:
    model, state = nn.Linear(3, 4), nn.Linear(3, 4).state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.weight, state["weight"])


def test_a_package_that_fails_is_told_from_one_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "breaking").mkdir()
    for text, message in (
        ("1 / 0", r"breaking\.net failed at .*__init__\.py:1: ZeroDivisionError"),
        ("import not_installed", r"breaking\.net failed at .*No module named 'not_installed'"),
    ):
        (tmp_path / "breaking" / "__init__.py").write_text(text)
        with pytest.raises(UsageError, match=message):
            load_model("breaking.net:make")


def test_weights_that_do_not_fit_are_told_by_key(tmp_path: Path) -> None:
    state = {f"extra{i}": torch.ones(1) for i in range(7)} | {"weight": torch.ones(4, 9)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UsageError) as error:
        load_weights(nn.Linear(3, 4), tmp_path / "w.safetensors")
    text = str(error.value)
    assert "missing: bias" in text
    assert "unexpected: extra0, extra1, extra2, extra3, extra4 and 2 more" in text
    assert "weight (4, 9) in the file, (4, 3) in the model" in text


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        load_weights(nn.Linear(3, 4), tmp_path / "w.pt")
    for name, message in (("w.pt", "does not hold tensors"), ("w.safetensors", "cannot be read")):
        (tmp_path / name).write_bytes(b"not a weights file")
        with pytest.raises(UsageError, match=message):
            load_weights(nn.Linear(3, 4), tmp_path / name)
    torch.save(nn.Linear(3, 4), tmp_path / "pickled.pt")
    with pytest.raises(UsageError, match=r"does not hold tensors alone.*could be code"):
        load_weights(nn.Linear(3, 4), tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match="not a state_dict"):
        load_weights(nn.Linear(3, 4), tmp_path / "list.pt")


def test_inputs_by_shape(tmp_path: Path) -> None:
    net = loaded(tmp_path, "model = Net().double()")
    x = example_inputs(net, ["2x3"])
    assert isinstance(x, torch.Tensor)
    assert x.shape == (2, 3)
    assert x.dtype == torch.float64
    a, b = example_inputs(net, ["5:int64", "1x16:float16"])
    assert (a.dtype, b.dtype, a.shape) == (torch.int64, torch.float16, (5,))
    named = example_inputs(net, ["2x3", "mask=2x3:bool"])
    assert isinstance(named, dict)
    assert list(named) == ["x", "mask"]
    assert named["mask"].all()


@pytest.mark.parametrize(
    "text",
    [
        "example_inputs = torch.ones(2, 3)",
        "example_inputs = (torch.ones(2, 3),)",
        "def example_inputs(): return {'x': torch.ones(2, 3)}",
    ],
)
def test_inputs_from_the_models_file(tmp_path: Path, text: str) -> None:
    net = loaded(tmp_path, f"model = Net()\n{text}")
    check_forward(net.model, example_inputs(net, []), "the example inputs")


@pytest.mark.parametrize(
    ("specs", "text", "message"),
    [
        ([], "", "pass --input"),
        ([], "example_inputs = 3", "is a int"),
        ([], "def example_inputs():\n    return unknown", r"net\.py:\d+: NameError"),
        (["3,4"], "", "--input 3,4: expected"),
        (["1x3:float33"], "", "--input 1x3:float33: expected"),
        (["other=1x3"], "", "takes x, mask"),
    ],
)
def test_inputs_that_make_no_sense(
    tmp_path: Path, specs: list[str], text: str, message: str
) -> None:
    net = loaded(tmp_path, f"model = Net()\n{text}")
    with pytest.raises(UsageError, match=message):
        example_inputs(net, specs)


def test_an_input_of_the_wrong_shape(tmp_path: Path) -> None:
    net = loaded(tmp_path, "model = Net().train()")
    with pytest.raises(UsageError, match=r"the inputs \(1x5\) at .*net\.py:11: RuntimeError: mat1"):
        check_forward(net.model, torch.ones(1, 5), "the inputs")
    assert net.model.training


def test_calibration_data_comes_in_batches(tmp_path: Path) -> None:
    net = loaded(tmp_path)
    x = torch.randn(BATCH + 44, 3)
    torch.save(x, tmp_path / "x.pt")
    torch.save([x[:5], x[5:9]], tmp_path / "list.pt")
    np.save(tmp_path / "x.npy", x.double().numpy())
    np.savez(tmp_path / "x.npz", images=x.numpy())
    save_file({"x": x}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.npy", "x.npz", "x.safetensors"):
        batches = load_calibration(tmp_path / name, net)
        assert [len(batch) for batch in batches] == [BATCH, 44]
        assert torch.equal(torch.cat(batches), x)
    assert [len(b) for b in load_calibration(tmp_path / "list.pt", net)] == [5, 4]
    np.savez(tmp_path / "both.npz", x=x.numpy(), mask=np.ones(len(x), bool))
    first, _ = load_calibration(tmp_path / "both.npz", net)
    assert {name: len(value) for name, value in first.items()} == {"x": BATCH, "mask": BATCH}


def test_calibration_data_that_makes_no_sense(tmp_path: Path) -> None:
    net = loaded(tmp_path)
    with pytest.raises(UsageError, match="no file"):
        load_calibration(tmp_path / "x.pt", net)
    torch.save("text", tmp_path / "x.pt")
    with pytest.raises(UsageError, match="does not hold tensors"):
        load_calibration(tmp_path / "x.pt", net)
    np.savez(tmp_path / "x.npz", images=np.ones((2, 3)), labels=np.ones(2))
    with pytest.raises(UsageError, match="holds images, labels; the forward takes x, mask"):
        load_calibration(tmp_path / "x.npz", net)
    np.savez(tmp_path / "x.npz", x=np.ones((2, 3)), mask=np.ones(1))
    with pytest.raises(UsageError, match="not of one length"):
        load_calibration(tmp_path / "x.npz", net)
    np.save(tmp_path / "x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot be read"):
        load_calibration(tmp_path / "x.npy", net)
