"""The tables of speed in README.md, made of the records of `texp bench`; as a script it prints them."""

import csv
import math
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# Rows: models of texp.bench.shapes.MODELS, and what README calls them.
LABELS = {
    "161 tiny tensors": "161 tiny tensors (what a call costs)",
    "465 tiny groups": "465 parameter groups of one tiny tensor",
    "ResNet-32": "ResNet-32 for CIFAR",
    "EfficientNet-B0": "EfficientNet-B0",
    "ResNet-50": "ResNet-50",
    "ViT-B": "ViT-B",
    "BERT-large": "BERT-large",
    "one of 50 M": "one tensor of 50 M",
}

# By folder of records, the columns: what stands above them, the candidate and the field of its record.
TABLES = {
    "cpu": (
        ("torch fused", "torch fused", "median_us"),
        ("`texp.SGD`", "texp cpu", "median_us"),
        ("times faster", "texp cpu", "speedup_over_torch_fused"),
        ("in exponential form", "texp cpu exponential", "speedup_over_torch_fused"),
        ("with clipping", "texp cpu clipped", "speedup_over_torch_fused"),
    ),
    "h100": (
        ("torch fused", "torch fused", "median_us"),
        ("`texp.SGD` (CUDA kernel)", "texp cuda", "median_us"),
        ("times faster", "texp cuda", "speedup_over_torch_fused"),
        ("in exponential form", "texp cuda exponential", "speedup_over_torch_fused"),
        ("Triton, times faster", "texp triton", "speedup_over_torch_fused"),
    ),
}


def three_digits(x: float) -> str:
    x = float(f"{x:.3g}")
    return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}"


def cell(record: dict[str, str], field: str) -> str:
    value = float(record[field])
    if field != "median_us":
        return three_digits(value)
    # Rounded first: 999.6 µs are 1.00 ms.
    return f"{three_digits(value / 1000)} ms" if float(f"{value:.3g}") >= 1000 else f"{three_digits(value)} µs"


def table(name: str) -> str:
    """In Markdown."""
    columns = TABLES[name]
    with (RESULTS / name / "step_time.csv").open() as file:
        records = {(record["model"], record["candidate"]): record for record in csv.DictReader(file)}
    rows = [["shapes of", *(above for above, _, _ in columns)]]
    for model, label in LABELS.items():
        rows.append([label, *(cell(records[model, candidate], field) for _, candidate, field in columns)])
    head, *body = (f"| {' | '.join(row)} |\n" for row in rows)
    return f"{head}|---|{'--:|' * len(columns)}\n{''.join(body)}"


if __name__ == "__main__":
    print(*map(table, TABLES), sep="\n", end="")
