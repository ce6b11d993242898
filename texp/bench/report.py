"""The results of texp bench, a record for each model and candidate: as CSV, table and figure."""

import csv
import itertools
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from rich.table import Column, Table

from texp.bench.timing import Times

FUSED = "torch fused"
CLIPPED = " clipped"  # ends the names of candidates that clip gradients by their norm

# The columns of the CSV and what they mean.
FIELDS = {
    "device": "cpu or cuda",
    "processor": "model of the CPU or GPU; empty if unknown",
    "instruction_set": "used by the C++ core; empty on cuda, and without the core",
    "threads": "CPU threads of torch",
    "model": "whose shapes are stepped; see texp.bench.shapes.MODELS",
    "tensors": "number of tensors",
    "parameters": "elements of all tensors, float32",
    "candidate": "the optimizer, and how it takes its steps",
    "bytes": "moved by a step: 20 for each parameter, which reads p, g and b and writes p and b; not by clipping",
    "repeats": "number of timed calls",
    "median_us": "microseconds of a call, until the device is done",
    "q1_us": "first quartile",
    "q3_us": "third quartile",
    "host_us": "median microseconds of the host: on cuda until the call returns, without waiting for the device; "
    "on cpu all that a step of tiny tensors takes, and empty for other models",
    "gb_per_s": "10^9 bytes a second: bytes over median_us",
    "share_of_copy": "gb_per_s over that of a copy in the same run, texp.bench.step_time.copy_bandwidth",
    "speedup_over_torch_fused": "median_us of torch's fused step over that of the candidate, with clip_grad_norm_ "
    "before it where the candidate clips: above 1 is faster",
    "torch": "its version",
    "texp": "its version",
}


def figures(times: dict[str, Times], bytes_: int, copy_gb_per_s: float, host: bool) -> dict[str, dict]:
    """The fields that are computed from the times of candidates, FUSED and FUSED + CLIPPED among them, from the bytes
    that a step moves and the bandwidth of a copy; `host`: whether the times show the overhead of the host.
    """
    made = {}
    for name, of_calls in times.items():
        fused = statistics.median(times[FUSED + CLIPPED if name.endswith(CLIPPED) else FUSED].total)
        q1, median, q3 = statistics.quantiles(of_calls.total, n=4, method="inclusive")
        gb_per_s = bytes_ / median / 1e9
        made[name] = {
            "bytes": bytes_,
            "repeats": len(of_calls.total),
            "median_us": round(median * 1e6, 2),
            "q1_us": round(q1 * 1e6, 2),
            "q3_us": round(q3 * 1e6, 2),
            "host_us": round(statistics.median(of_calls.host) * 1e6, 2) if host else None,
            "gb_per_s": round(gb_per_s, 3),
            "share_of_copy": round(gb_per_s / copy_gb_per_s, 4),
            "speedup_over_torch_fused": round(fused / median, 3),
        }
    return made


def saved(records: Iterable[dict], path: Path) -> Iterator[dict]:
    """Yields the records, each after writing it to the CSV, so that an interruption loses none."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, tuple(FIELDS))
        writer.writeheader()
        for record in records:
            writer.writerow(record)
            file.flush()
            yield record


def table(records: list[dict]) -> Table:
    """For the console."""
    numbers = ("median_us", "host_us", "gb_per_s", "share_of_copy", "speedup_over_torch_fused")
    columns = (Column(name, justify="right", overflow="fold") for name in numbers)
    table = Table("model", "candidate", *columns, title=_machine(records[0]))
    for model, of_model in itertools.groupby(records, key=lambda record: record["model"]):
        for record in of_model:
            values = ("–" if record[name] is None else f"{record[name]:.4g}" for name in numbers)
            table.add_row(model, record["candidate"], *values)
        table.add_section()
    return table


def _machine(record: dict) -> str:
    return f"{record['processor'] or record['device']}, threads: {record['threads']}, torch {record['torch']}"


def pyplot() -> ModuleType:
    """matplotlib.pyplot for figures in files, which needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(csv_path: Path, path: Path) -> None:
    """Plots the speed-ups over torch's fused step from a CSV of `saved`."""
    plt = pyplot()
    with csv_path.open() as file:
        records = list(csv.DictReader(file))
    models = list(dict.fromkeys(record["model"] for record in records))
    names = [name for name in dict.fromkeys(record["candidate"] for record in records) if name != FUSED]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, (name, marker) in enumerate(zip(names, itertools.cycle("osD^vPX*"), strict=False)):
        speedups = {r["model"]: float(r["speedup_over_torch_fused"]) for r in records if r["candidate"] == name}
        x = [models.index(model) + 0.08 * (i - (len(names) - 1) / 2) for model in speedups]
        axes.plot(x, list(speedups.values()), marker, label=name)
    axes.axhline(1, color="black", lw=0.8, label=FUSED)
    axes.set_xticks(range(len(models)), models, rotation=20)
    axes.set(yscale="log", ylabel="speed-up over torch fused", title=_machine(records[0]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
