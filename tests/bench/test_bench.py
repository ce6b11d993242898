"""texp bench as its users run it: what it measures, and what it leaves behind."""

import csv
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from texp import backends
from texp.bench import report, step_time
from texp.bench.report import FIELDS
from texp.bench.shapes import MODELS
from texp.cli.app import run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_time.py"

TORCH = ["torch for-loop", "torch foreach", "torch fused", "torch fused clipped"]


def read(path: Path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_benchmark(tmp_path, capsys):
    table, figure = tmp_path / "bench.csv", tmp_path / "bench.png"
    arguments = ["bench", "--models", " 161 tiny tensors, ResNet-32,", "--seconds", "0", "--threads", "1"]
    assert run([*arguments, "--csv", str(table), "--plot", str(figure)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    made = read(table)
    assert list(made[0]) == list(FIELDS)
    sizes = {"161 tiny tensors": ("161", "1610", "32200"), "ResNet-32": ("95", "464154", "9283080")}
    assert {record["model"] for record in made} == set(sizes)
    for model, size in sizes.items():
        of_model = [record for record in made if record["model"] == model]
        names = [record["candidate"] for record in of_model]
        assert names[:4] == TORCH
        assert {"texp reference", "texp reference exponential"} <= set(names)
        core = backends.available()["cpu"] == backends.OK
        assert ("texp cpu" in names) == ("texp cpu exponential" in names) == core
        for record in of_model:
            assert (record["tensors"], record["parameters"], record["bytes"]) == size
            assert (record["device"], record["threads"]) == ("cpu", "1")
            assert (record["instruction_set"] != "") == core
            assert int(record["repeats"]) >= 15
            assert 0 < float(record["q1_us"]) <= float(record["median_us"]) <= float(record["q3_us"])
            if model == "ResNet-32":
                assert record["host_us"] == ""
            else:
                assert 0 < float(record["host_us"]) <= float(record["median_us"])
        assert float(of_model[2]["speedup_over_torch_fused"]) == 1


def test_the_script(tmp_path):
    table, figure = tmp_path / "step_time.csv", tmp_path / "step_time.svg"
    arguments = ["--models", "161 tiny tensors, 465 tiny groups", "--seconds", "0", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments, "--csv", table, "--plot", figure],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert {record["model"] for record in read(table)} == {"161 tiny tensors", "465 tiny groups"}
    assert figure.read_text().startswith("<?xml")
    assert done.stdout.splitlines()[-2:] == [str(table), str(figure)]


def test_it_says_what_is_being_measured():
    """Before the records of a model come."""
    told = []
    first = next(step_time.run("cpu", ["161 tiny tensors"], 0, told.append))
    assert told[0] == "copy of 400 MB"
    assert {f"161 tiny tensors, {name}" for name in step_time.candidates("cpu", 1610)} <= set(told)
    assert first["candidate"] == TORCH[0]


def test_an_interruption_keeps_the_records_of_the_models_before(tmp_path, monkeypatch):
    record = dict.fromkeys(FIELDS, 1) | {"model": "ResNet-32"}

    def interrupted(*_):
        yield record
        raise KeyboardInterrupt

    monkeypatch.setattr(step_time, "run", interrupted)
    table = tmp_path / "bench.csv"
    assert run(["bench", "--models", "ResNet-32,ViT-B", "--csv", str(table)]) == 130
    assert [row["model"] for row in read(table)] == ["ResNet-32"]


def test_a_record_is_in_the_csv_when_it_comes(tmp_path):
    table = tmp_path / "bench.csv"
    given = [dict.fromkeys(FIELDS, i) for i in range(3)]
    for i, record in enumerate(report.saved(iter(given), table)):
        assert record is given[i]
        assert len(read(table)) == i + 1


def test_candidates_are_backends_of_the_device(monkeypatch):
    monkeypatch.setattr(backends, "available", lambda: dict.fromkeys(backends.ALL, backends.OK))
    monkeypatch.setattr(backends.triton, "_kernels", lambda: (SimpleNamespace(INTERPRETED=False), backends.OK))

    def of_texp(device: str, parameters: int) -> set[str]:
        names = list(step_time.candidates(device, parameters))
        assert names[:4] == TORCH
        ordinary = {name for name in names[4:] if not name.endswith((" exponential", " capturable", " clipped"))}
        on_device = {f"{name} capturable" for name in ordinary & {"texp cuda", "texp triton"}}
        more = {f"{name} {form}" for name in ordinary for form in ("exponential", "clipped")}
        assert set(names[4:]) == ordinary | more | on_device
        return ordinary

    assert of_texp("cpu", 20_000_000) == {"texp cpu", "texp reference"}
    assert of_texp("cuda", 20_000_000) == {"texp cuda", "texp triton", "texp reference"}
    assert of_texp("cpu", 20_000_001) == {"texp cpu"}
    assert of_texp("cuda", 20_000_001) == {"texp cuda", "texp triton"}
    monkeypatch.setattr(backends, "available", lambda: dict.fromkeys(backends.ALL, "a reason"))
    assert of_texp("cpu", 1) == set()


# Tensors and parameters, as torchvision and transformers count them; ResNet-32 as in He et al., with affine norms.
SIZES = {
    "161 tiny tensors": (161, 1610),
    "465 tiny groups": (465, 4650),
    "ResNet-32": (95, 464_154),
    "EfficientNet-B0": (213, 5_288_548),
    "ResNet-50": (161, 25_557_032),
    "one of 50 M": (1, 50_000_000),
    "ViT-B": (152, 86_567_656),
    "BERT-large": (391, 335_141_888),
}


@pytest.mark.parametrize("model", MODELS)
def test_the_shapes_are_those_of_the_models(model):
    shapes, own_groups = MODELS[model]
    assert (len(shapes), sum(math.prod(shape) for shape in shapes)) == SIZES[model]
    assert own_groups == (model == "465 tiny groups")
