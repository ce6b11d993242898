"""Step time of texp.SGD against torch.optim.SGD, in one run: every candidate steps the same parameters in turn, so
that what disturbs the machine disturbs all of them. Reported are medians and ratios to torch's fused step.

Bytes: a step reads p, g and b and writes p and b, 20 bytes for each float32 parameter. The floor is what a copy on
the same device reaches in the same run, counting bytes read and written.
"""

import csv
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import texp
from texp import backends
from texp.shapes import MODELS

FIELDS = (
    "device", "threads", "model", "tensors", "parameters", "candidate", "repeats", "median_us", "fastest_us",
    "gb_per_s", "share_of_copy", "times_torch_fused", "torch", "texp",
)  # fmt: skip

FUSED = "torch fused"

_BYTES = 20


def candidates(device: str) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """By name; of texp, each backend that is available, in ordinary and in exponential groups."""
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "torch for-loop": lambda groups: _torch(groups, foreach=False),
        "torch foreach": lambda groups: _torch(groups, foreach=True),
        FUSED: lambda groups: _torch(groups, fused=True),
    }
    for name, reason in backends.available().items():
        if reason == backends.OK and (name == "cpu") <= (device == "cpu"):
            made[f"texp {name}"] = lambda groups, name=name: _texp(groups, backend=name)
            made[f"texp {name} exponential"] = lambda groups, name=name: _texp(
                groups, backend=name, scale_invariant=True
            )
    return made


# So small that 10,000 steps leave the parameters in range.
_ARGUMENTS = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}


def _torch(groups, **arguments) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, **_ARGUMENTS, **arguments)


def _texp(groups, **arguments) -> torch.optim.Optimizer:
    return texp.SGD(groups, **_ARGUMENTS, **arguments)


def run(device: str, models: Iterable[str], seconds: float) -> Iterator[dict]:
    """Yields one record (FIELDS) for each model and candidate.

    Args:
        device: "cpu" or "cuda".
        models: names of texp.shapes.MODELS.
        seconds: about how long each candidate steps each model; at least 5 steps.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    copy_gb_per_s = copy_bandwidth(device, wait)
    for model in models:
        shapes, own_groups = MODELS[model]
        params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers = {
            name: make([{"params": [p]} for p in params] if own_groups else params)
            for name, make in candidates(device).items()
        }
        times = _interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, wait, seconds)
        parameters = sum(p.numel() for p in params)
        fused = statistics.median(times[FUSED])
        for name, values in times.items():
            median = statistics.median(values)
            gb_per_s = parameters * _BYTES / median / 1e9
            yield {
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
                "model": model,
                "tensors": len(params),
                "parameters": parameters,
                "candidate": name,
                "repeats": len(values),
                "median_us": round(median * 1e6, 2),
                "fastest_us": round(min(values) * 1e6, 2),
                "gb_per_s": round(gb_per_s, 3),
                "share_of_copy": round(gb_per_s / copy_gb_per_s, 4),
                "times_torch_fused": round(fused / median, 3),
                "torch": torch.__version__,
                "texp": texp.__version__,
            }


def copy_bandwidth(device: str, wait: Callable[[], None]) -> float:
    """GB/s, read and written, of a copy of 400 MB."""
    source = torch.randn(100_000_000, device=device)
    target = torch.empty_like(source)
    (times,) = _interleaved({"copy": lambda: target.copy_(source)}, wait, 1.0).values()
    return 2 * source.nbytes / statistics.median(times) / 1e9


# Calls of one candidate in a row: at most so many, at most so long.
_IN_A_ROW, _TURN_SECONDS = 20, 0.02


def _interleaved(
    steps: dict[str, Callable[[], object]], wait: Callable[[], None], seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call, the candidates taking turns; the first call of a turn, which finds the caches full of
    the others' data, is not counted where there are more."""

    def call(step: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - start

    # Three calls to warm up; the last says how long a call takes.
    estimates = {name: [call(step) for _ in range(3)][-1] for name, step in steps.items()}
    in_a_row = {name: max(1, min(_IN_A_ROW, int(_TURN_SECONDS / t))) for name, t in estimates.items()}
    longest = max(in_a_row[name] * t for name, t in estimates.items())
    turns = min(max(5, int(seconds / longest)), 100)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            turn = [call(step) for _ in range(in_a_row[name])]
            times[name] += turn[1:] or turn
    return times


def write_csv(records: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(records)


def plot(csv_path: Path, path: Path) -> None:
    """Times faster than torch's fused step, from a CSV of `write_csv`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with csv_path.open() as file:
        records = list(csv.DictReader(file))
    models = list(dict.fromkeys(record["model"] for record in records))
    names = [name for name in dict.fromkeys(record["candidate"] for record in records) if name != FUSED]
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        ratios = {r["model"]: float(r["times_torch_fused"]) for r in records if r["candidate"] == name}
        axes.bar(
            [x + (i + 0.5) * width - 0.4 for x in range(len(models))], [ratios[m] for m in models], width, label=name
        )
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(models)), models, rotation=20)
    device, threads = records[0]["device"], records[0]["threads"]
    axes.set(yscale="log", ylabel="times faster than torch fused", title=f"{device}, {threads} threads")
    axes.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
