"""The commands, run as their users would."""

import csv
import json
import math
import re
import subprocess
import sys

import pytest
from rich.console import Console

from texp.cli.app import run


def test_info(capsys):
    assert run(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("texp", "torch", "python", "backend reference", "ok", "backend cuda", "backend triton"):
        assert word in out


def test_a_setting_that_there_is_not(capsys, monkeypatch):
    monkeypatch.setenv("TEXP_NATIVE", "yes")
    assert run(["info"]) == 1
    assert capsys.readouterr().err == "texp: TEXP_NATIVE must be auto, 1 or 0, got 'yes'\n"


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "texp", "info"], capture_output=True, text=True, check=True)
    assert "backend reference" in done.stdout
    assert done.stderr == ""


MODELS = """
from torch import nn

def conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))

def lm():
    return nn.Sequential(nn.Embedding(50, 6), nn.LayerNorm(6), nn.Linear(6, 50, bias=False))

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

number = int
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """In a module in the current folder."""
    (tmp_path / "my_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_models", None)


def test_audit(models, capsys):
    assert run(["audit", "my_models:net", "--input", "8x3x6x6", "--json", "audit.json"]) == 0
    out = capsys.readouterr().out
    for word in ("scale-invariant together", "4.weight", "Linear", "singular gap", "audit.json"):
        assert word in out
    found = json.loads((models / "audit.json").read_text())
    assert found["invariant"] == ["0.weight"]
    assert found["fraction"] == pytest.approx(108 / (108 + 8 + 130))
    assert found["norm_stats"] == [["1.running_mean", 1.0], ["1.running_var", 2.0]]


def test_audit_of_a_model_of_integers(models, capsys):
    assert run(["audit", "my_models:lm", "--input", "4x7", "--int", "50", "--no-decay-on-bias-and-norm"]) == 0
    out = capsys.readouterr().out
    assert "1 of 4 trainable parameters" in out
    assert "held out by no_decay" in out


AUDITS = {
    "no module": (["none:net", "--input", "2x3"], 2, "no model could be made by none:net"),
    "no factory": (["my_models:none", "--input", "2x3"], 2, "no model could be made by my_models:none"),
    "no model": (["my_models:number", "--input", "2x3"], 2, "makes a int, which is not a torch.nn.Module"),
    "no shape": (["my_models:net", "--input", "2,3"], 2, "--input must be a shape such as 2x3x32x32, got 2,3"),
    "lazy": (["my_models:conv", "--input", "8x3x6x6"], 2, "4.weight has no shape yet"),
    "too few rows": (["my_models:net", "--input", "8x3x6x6", "--max-rows", "4"], 1, "rank .* has not settled"),
    "folder": (["my_models:net", "--input", "8x3x6x6", "--json", "."], 2, "cannot write .: Is a directory"),
}


@pytest.mark.parametrize("case", AUDITS)
def test_audits_that_fail_say_why_in_one_line(models, capsys, case):
    arguments, code, message = AUDITS[case]
    assert run(["audit", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


def test_the_demo(tmp_path, capsys):
    """Short, but all of it: the exponential run must be the SGD run, and TEXP must not be far from it."""
    plot, steps = tmp_path / "demo.png", tmp_path / "demo.csv"
    assert run(["demo", "--epochs", "4", "--plot", str(plot), "--csv", str(steps)]) == 0
    out = capsys.readouterr().out
    assert str(plot) in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    runs: dict[str, list[dict]] = {}
    for row in csv.DictReader(steps.read_text().splitlines()):
        runs.setdefault(row["run"], []).append(row)
    sgd, exponential, texp, all_sgd, all_texp = runs.values()
    assert len(sgd) == 44
    for a, b, c in zip(sgd, exponential, texp, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-9)
        assert float(c["loss"]) == pytest.approx(float(a["loss"]), rel=0.1)
        # ‖θ̃‖²/η̃ = P²‖θ‖²/(P²η/α), and α is within 1 % of 1 here.
        assert float(b["norm2_over_lr"]) == pytest.approx(float(a["norm2_over_lr"]), rel=0.01)
    for a, b in zip(all_sgd, all_texp, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-9)
    assert float(all_sgd[-1]["loss"]) < 0.5 * float(sgd[-1]["loss"])
    assert float(exponential[-1]["log10_lr"]) > float(sgd[-1]["log10_lr"])
    assert float(sgd[-1]["loss"]) < 0.5 * float(sgd[0]["loss"])


PAPER = ["schedule", "--lr", "0.1", "--weight-decay", "5e-4", "--momentum", "0.9"]
PAPER += ["--milestones", "80,120", "--gamma", "0.1", "--epochs", "160", "--steps-per-epoch", "391"]


def test_the_schedule_of_the_paper(tmp_path, capsys):
    plot, steps = tmp_path / "schedule.png", tmp_path / "schedule.csv"
    assert run([*PAPER, "--csv", str(steps), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "0.99949773" in out
    assert "1.4812" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(steps.read_text().splitlines()))
    assert len(rows) == 160 * 391
    growth = float(rows[391]["log10_texp_lr"]) - float(rows[0]["log10_texp_lr"])
    assert 10**growth == pytest.approx(1.4812, abs=5e-5)
    last = rows[-1]
    assert float(last["lr"]) == pytest.approx(0.001)
    # They differ by the momentum corrections, of the start and of two phase changes, and no more.
    assert float(last["log10_exact_lr"]) == pytest.approx(float(last["log10_texp_lr"]), abs=0.01)
    assert math.isfinite(float(last["log10_exact_lr"]))


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_schedule_fits_the_terminal(width, monkeypatch, capsys):
    from texp.cli import schedule

    monkeypatch.setattr(schedule, "make_console", lambda: Console(width=width))
    assert run(PAPER) == 0
    out = capsys.readouterr().out
    for figure in ("0.99949773", "0.99999500", "1.00100530", "12.6497", "11.3974"):
        assert figure in out


def test_a_long_schedule_without_every_step(capsys):
    assert run([*PAPER, "--epochs", "100000000000", "--steps-per-epoch", "1000000"]) == 0
    assert "10^436.3" in capsys.readouterr().out


def test_an_output_that_breaks_off(monkeypatch, capsys):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Console, "print", full)
    assert run(PAPER) == 1
    assert capsys.readouterr().err == "texp: No space left on device\n"


ERRORS = {
    "no such command": (["train"], "train"),
    "missing option": (["schedule", "--lr", "0.1"], "--weight-decay"),
    "not a number": (["schedule", "--lr", "much", "--weight-decay", "5e-4"], "--lr"),
    "outside the range": (["schedule", "--lr", "0.1", "--weight-decay", "0.1"], "outside the theorem's range"),
    "milestones": ([*PAPER, "--milestones", "80;120"], "separated by commas; got 80;120"),
    "milestones after the end": ([*PAPER, "--milestones", "80,200"], "above 0 to below --epochs 160, got 80,200"),
    "milestones out of order": ([*PAPER, "--milestones", "120,80"], "must ascend .* got 120,80"),
    "lr 0": (["schedule", "--lr", "0", "--weight-decay", "5e-4"], "lr and gamma must be greater than 0"),
    "momentum 1": ([*PAPER, "--momentum", "1"], "momentum must be less than 1"),
    "tiny gamma": ([*PAPER, "--gamma", "1e-200"], "leaves the range of a float"),
    "too many steps": ([*PAPER, "--epochs", "100000000", "--csv", "x.csv"], "at most 10000000 steps"),
    "no command": ([], "no command given"),
    "huge seed": (["demo", "--seed", str(2**70)], "--seed"),
    "no figure": (["demo", "--plot", "demo.xyz"], "must end in .png or .pdf or .svg"),
    "device": (["bench", "--device", "tpu"], "--device must be cpu or cuda, got tpu"),
    "model": (["bench", "--models", "ViT-B, VGG"], "--models must be among 161 tiny .* BERT-large; got VGG"),
    "endless": (["bench", "--seconds", "inf"], "--seconds must be at least 0 and finite, got inf"),
    "no number of seconds": (["bench", "--seconds", "nan"], "--seconds must be at least 0 and finite, got nan"),
    "seconds below 0": (["bench", "--seconds", "-1"], "--seconds must be at least 0 and finite, got -1"),
    "plot without csv": (["bench", "--plot", "bench.png"], "give --csv as well"),
    "a folder": ([*PAPER, "--csv", "."], "cannot write .: Is a directory"),
    "too few epochs": (["demo", "--epochs", "1"], "epochs"),
    "no folder": (["demo", "--plot", "no/such/folder/demo.png"], "No such file or directory"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments_get_one_line_and_exit_code_2(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = ERRORS[case]
    assert run(arguments) == 2
    captured = capsys.readouterr()
    if arguments:
        assert captured.out == ""
    assert list(tmp_path.iterdir()) == []
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("texp: ")
    assert re.search(message, captured.err)


def test_without_the_libraries_of_the_command_line(monkeypatch, capsys):
    from texp.__main__ import main

    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "texp.cli.app")
    with pytest.raises(SystemExit, match=r'needs typer: install texp with the extra "demo"'):
        main()


def test_without_the_libraries_of_the_demo(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run(["demo"]) == 1
    assert capsys.readouterr().err == (
        'texp: this command needs scikit-learn: install texp with the extra "demo", as in pip install ".[demo]"\n'
    )
