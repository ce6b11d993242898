"""benchmarks/speed_tables.py, and that README shows what it makes of the records."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import speed_tables
from texp.bench.shapes import MODELS

ROOT = Path(__file__).parents[2]
SPEED = (ROOT / "README.md").read_text().split("\n## Speed\n")[1].split("\n## ")[0]
SAID = " ".join(SPEED.split())


def test_readme_shows_the_tables():
    """If it does not, paste there what `python benchmarks/speed_tables.py` prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / "speed_tables.py")]
    made = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    shown = [line for line in SPEED.splitlines() if line.startswith("|")]
    assert shown == [line for line in made.splitlines() if line]


def test_every_model_has_a_row():
    assert set(speed_tables.LABELS) == set(MODELS)


@pytest.mark.parametrize(
    ("value", "field", "text"),
    [
        ("13.15", "median_us", "13.2 µs"),
        ("7.0", "median_us", "7.00 µs"),
        ("999.4", "median_us", "999 µs"),
        ("999.6", "median_us", "1.00 ms"),
        ("87849.1", "median_us", "87.8 ms"),
        ("1234567", "median_us", "1,230 ms"),
        ("0.943", "speedup_over_torch_fused", "0.943"),
        ("0.0622", "speedup_over_torch_fused", "0.0622"),
        ("2.225", "speedup_over_torch_fused", "2.23"),
        ("9.996", "speedup_over_torch_fused", "10.0"),
        ("35.228", "speedup_over_torch_fused", "35.2"),
        ("1334.5", "speedup_over_torch_fused", "1,330"),
    ],
)
def test_a_cell_has_three_digits(value, field, text):
    assert speed_tables.cell({field: value}, field) == text


def test_a_table_has_the_figures_of_its_records(tmp_path, monkeypatch):
    """Each from its own model, candidate and field."""
    fields = ("model", "candidate", "median_us", "host_us", "speedup_over_torch_fused")
    records = [
        ("a", "torch fused", "200", "1", "1.0"),
        ("a", "texp cuda", "20", "2", "10.0"),
        ("b", "torch fused", "3000", "3", "1.0"),
        ("b", "texp cuda", "1500", "4", "2.0"),
    ]
    (tmp_path / "gpu").mkdir()
    with (tmp_path / "gpu" / "step_time.csv").open("w", newline="") as file:
        csv.writer(file).writerows([fields, *records])
    columns = (
        ("torch", "torch fused", "median_us"),
        ("texp", "texp cuda", "median_us"),
        ("faster", "texp cuda", "speedup_over_torch_fused"),
    )
    monkeypatch.setattr(speed_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(speed_tables, "TABLES", {"gpu": columns})
    monkeypatch.setattr(speed_tables, "LABELS", {"b": "B of many", "a": "A"})
    assert speed_tables.table("gpu") == (
        "| shapes of | torch | texp | faster |\n"
        "|---|--:|--:|--:|\n"
        "| B of many | 3.00 ms | 1.50 ms | 2.00 |\n"
        "| A | 200 µs | 20.0 µs | 10.0 |\n"
    )


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("gpu", "on an {},"),
        ("driver", "driver {},"),
        ("torch", "torch {},"),
        ("triton", "Triton {},"),
        ("nvcc", "nvcc {},"),
        ("commit", "commit {:.7} "),
    ],
)
def test_readme_says_what_the_gpu_records_were_made_with(key, said):
    summary = json.loads((ROOT / "benchmarks" / "results" / "h100" / "summary.json").read_text())
    assert said.format(summary[key]) in SAID


def test_what_readme_says_of_triton_in_exponential_form():
    with (ROOT / "benchmarks" / "results" / "h100" / "step_time.csv").open() as file:
        found = [
            float(record["speedup_over_torch_fused"])
            for record in csv.DictReader(file)
            if record["candidate"] == "texp triton exponential"
        ]
    assert f"are {min(found):.2f} to {max(found):.1f} times as fast as torch's fused step" in SAID
