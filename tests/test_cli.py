"""The command line as a user meets it: what it prints, where, and what it exits with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from demp_fx.cli import main

MODEL = """
import torch
from torch import nn

print("a model may talk")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return OUTPUT

def model(dead=4):
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for bn in (net.bn1, net.bn2):
            bn.bias.normal_()
        net.bn1.weight[:dead] = 0
        net.bn1.bias[:dead] = 0
    return net

def all_dead():
    return model(dead=8)
"""
PLAIN = "self.head(x.mean((2, 3)))"


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.py"
    path.write_text(MODEL.replace("OUTPUT", PLAIN))
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fails(code: int, *arguments: str | Path) -> str:
    """The one line of an error that is the user's to mend; nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr.lower()
    return result.stderr


def process(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "demp_fx.cli", *arguments]


def test_help_names_the_exit_codes() -> None:
    done = subprocess.run(process("--help"), capture_output=True, text=True, check=True)
    assert "could not be traced" in done.stdout
    assert "130" in done.stdout


def test_compile_writes_a_folder_that_compiles_again(net: Path) -> None:
    result = run("compile", net, "--input", "1x3x8x8")
    assert result.exit_code == 0, result.stderr
    assert "8 -> 4" in result.stdout
    assert "a model may talk" not in result.stdout
    out = net.parent / "net-narrow"
    assert sorted(p.name for p in out.iterdir()) == [
        "module.py", "plan.json", "report.html", "report.json", "weights.safetensors",
    ]  # fmt: skip
    assert load_file(out / "weights.safetensors")["conv1.weight"].shape == (4, 3, 3, 3)
    again = run(
        "compile", out / "module.py", "--weights", out / "weights.safetensors",
        "--input", "1x3x8x8", "--out", "again", "--json",
    )  # fmt: skip
    assert again.exit_code == 0, again.stderr
    report = json.loads(again.stdout)
    assert report["channels_before"] == report["channels_after"]


def test_the_written_module_computes_what_the_model_does(net: Path) -> None:
    assert run("compile", net, "--input", "1x3x8x8", "--out", "out").exit_code == 0
    script = """
import sys
sys.path[:0] = ["out", "."]
import net, torch
sys.modules["demp_fx"] = None
import module
x = torch.randn(2, 3, 11, 7)
torch.testing.assert_close(module.load()(x), net.model()(x))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_json_is_all_there_is_on_stdout(net: Path) -> None:
    command = process("compile", str(net), "--input", "1x3x8x8", "--json")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["params_after"] < report["params_before"]
    assert "wrote net-narrow" in done.stderr
    assert report == json.loads(Path("net-narrow/report.json").read_text())


def test_a_dry_run_writes_nothing(net: Path) -> None:
    result = run("compile", net, "--input", "1x3x8x8", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "8 -> 4" in result.stdout
    assert {p.name for p in net.parent.iterdir()} <= {"net.py", "__pycache__"}


def test_what_is_to_stay_is_said_by_options(net: Path) -> None:
    def left(*options: str) -> int:
        result = run("compile", net, "--input", "1x3x8x8", "--json", "--dry-run", *options)
        [conv] = [w for w in json.loads(result.stdout)["widths"] if w["name"] == "conv1"]
        return int(conv["out_after"])

    assert (left(), left("--round-to", "6")) == (4, 6)
    assert left("--keep", "conv1", "--cuts", "never") == 8
    assert "fits 'conv3'" in fails(2, "compile", net, "--input", "1x3x8x8", "--keep", "conv3")


def test_calibration_data_finds_what_never_fires(net: Path) -> None:
    text = net.read_text().replace("net.bn1.bias[:dead] = 0", "net.bn1.bias[:dead] = -1")
    net.write_text(text.replace("net.bn1.weight[:dead] = 0", "net.bn1.weight[:dead] = 1e-9"))
    torch.save(torch.randn(40, 3, 8, 8), "x.pt")
    without = run("compile", net, "--input", "1x3x8x8", "--json", "--dry-run")
    with_data = run(
        "compile", net, "--calibrate", "x.pt", "--input", "1x3x8x8", "--json", "--dry-run"
    )
    assert with_data.exit_code == 0, with_data.stderr
    assert (
        json.loads(with_data.stdout)["channels_after"]
        < json.loads(without.stdout)["channels_after"]
    )


def test_inspect_prints_groups_as_a_tree_and_as_json(net: Path) -> None:
    tree = run("inspect", net, "--input", "1x3x8x8")
    assert tree.exit_code == 0, tree.stderr
    assert "conv1.weight[0]" in tree.stdout
    assert "conv2.weight[1]" in tree.stdout
    result = run("inspect", net, "--input", "1x3x8x8", "--format", "json")
    assert json.loads(result.stdout)["groups"]
    written = run("inspect", net, "--input", "1x3x8x8", "--format", "json", "--out", "deps.json")
    assert written.stdout == ""
    assert json.loads(Path("deps.json").read_text()) == json.loads(result.stdout)


def test_inspect_writes_every_format(net: Path) -> None:
    begins = {
        "dot": "digraph",
        "mermaid": "flowchart",
        "graphml": "<?xml",
        "html": "<!doctype html>",
    }
    for form, start in begins.items():
        result = run("inspect", net, "--input", "1x3x8x8", "--format", form)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(start)
        assert "conv1.weight[0]" in result.stdout


def test_inspect_answers_why(net: Path) -> None:
    result = run("inspect", net, "--input", "1x3x8x8", "--why", "conv1")
    assert result.exit_code == 0, result.stderr
    assert "conv2.weight[1]" in result.stdout
    assert "net.py:" in result.stdout
    assert "conv1" in fails(2, "inspect", net, "--input", "1x3x8x8", "--why", "conv11")
    both = ("--why", "conv1", "--format", "json")
    assert run("inspect", net, "--input", "1x3x8x8", *both).exit_code == 2


def test_inspect_shows_a_part(net: Path) -> None:
    result = run("inspect", net, "--input", "1x3x8x8", "--filter", "head")
    assert result.exit_code == 0, result.stderr
    assert "head.weight[0]" in result.stdout
    assert "conv1.weight[1]" not in result.stdout
    assert "no pruning group" in fails(2, "inspect", net, "--input", "1x3x8x8", "--filter", "tail")


def test_passes_are_listed_a_line_each() -> None:
    result = run("passes")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) > 3


@pytest.mark.parametrize(
    "output", ["{'logits': self.head(x.mean((2, 3))), 'x': x}", f"({PLAIN}, x)"]
)
def test_models_that_give_dicts_and_tuples_compile(net: Path, output: str) -> None:
    net.write_text(MODEL.replace("OUTPUT", output))
    result = run("compile", net, "--input", "1x3x8x8")
    assert result.exit_code == 0, result.stderr


def test_a_layer_of_which_every_channel_is_dead_compiles_with_a_warning(net: Path) -> None:
    result = run("compile", f"{net}:all_dead", "--input", "1x3x8x8")
    assert result.exit_code == 0, result.stderr
    assert "warning: " in result.stderr
    assert "conv1" in result.stderr


def test_a_file_without_a_model(net: Path) -> None:
    net.write_text("x = 3")
    assert "no `model`" in fails(2, "compile", net, "--input", "1x3x8x8")


def test_an_input_of_the_wrong_shape(net: Path) -> None:
    text = fails(2, "compile", net, "--input", "1x4x8x8")
    assert "(1x4x8x8)" in text
    assert "net.py:17" in text


def test_no_input(net: Path) -> None:
    assert "--input" in fails(2, "compile", net)
    assert "--input" in fails(2, "inspect", net)


def test_a_forward_that_cannot_be_traced(net: Path) -> None:
    net.write_text(MODEL.replace("OUTPUT", f"{PLAIN} if x.sum() > 0 else x"))
    text = fails(3, "compile", net, "--input", "1x3x8x8")
    assert text.count("net.py") == 2
    assert "Nor could torch.export take it" in text
    assert not Path("net-narrow").exists()


def test_weights_that_are_not_finite(net: Path) -> None:
    net.write_text(
        net.read_text().replace("return net\n", "net.head.bias.data[0] = torch.nan; return net\n")
    )
    text = fails(2, "compile", net, "--input", "1x3x8x8")
    assert "head.bias" in text


def test_a_folder_that_exists(net: Path) -> None:
    assert run("compile", net, "--input", "1x3x8x8").exit_code == 0
    before = Path("net-narrow/report.json").read_bytes()
    assert "exists" in fails(2, "compile", net, "--input", "1x3x8x8")
    assert Path("net-narrow/report.json").read_bytes() == before
    assert run("compile", net, "--input", "1x3x8x8", "--overwrite").exit_code == 0


def test_weights_that_do_not_fit(net: Path) -> None:
    save_file({"conv1.weight": torch.ones(8, 3, 5, 5)}, "w.safetensors")
    text = fails(2, "compile", net, "--input", "1x3x8x8", "--weights", "w.safetensors")
    assert "conv1.weight (8, 3, 5, 5) in the file, (8, 3, 3, 3) in the model" in text
    assert "missing: bn1.weight" in text


def test_calibration_data_of_the_wrong_shape(net: Path) -> None:
    torch.save(torch.randn(4, 1, 8, 8), "x.pt")
    text = fails(2, "compile", net, "--input", "1x3x8x8", "--calibrate", "x.pt")
    assert "calibration data" in text


def test_a_place_that_cannot_be_written(net: Path) -> None:
    Path("file").write_text("")
    fails(5, "compile", net, "--input", "1x3x8x8", "--out", "file/out")
    fails(5, "inspect", net, "--input", "1x3x8x8", "--out", "file/deps.txt")


def test_names_outside_of_ascii_print_in_a_locale_without_them(tmp_path: Path) -> None:
    text = "from torch import nn\nmodel = nn.Sequential()\nmodel.add_module('é', nn.Linear(3, 2))\n"
    (tmp_path / "net.py").write_text(text, encoding="utf-8")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(process("inspect", "net.py", "--input", "1x3"), cwd=tmp_path,
                          env=os.environ | plain, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "é.weight" in done.stdout.decode("utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("command", ["passes", "inspect net.py --input 1x3x8x8"])
def test_a_full_disk_behind_stdout(net: Path, command: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(process(*command.split()), stdout=full, stderr=subprocess.PIPE,
                              text=True)  # fmt: skip
    assert done.returncode == 5
    assert "error: cannot write to stdout" in done.stderr


def test_a_bug_shows_its_traceback(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demp_fx.data.check_forward", lambda *_: 1 / 0)
    result = run("compile", net, "--input", "1x3x8x8")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr.splitlines()[-1]


def test_wrong_options_exit_with_2() -> None:
    assert run("compile").exit_code == 2
    assert run("inspect", "x.py", "--format", "poem").exit_code == 2


def test_ctrl_c_exits_with_130(net: Path) -> None:
    net.write_text("import time\nopen('started', 'w').close()\ntime.sleep(60)\n")
    running = subprocess.Popen(
        process("compile", str(net)), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background
    )  # fmt: skip
    while not Path("started").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, text = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "interrupted" in text
    assert "Traceback" not in text
