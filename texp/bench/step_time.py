"""Step time of texp.SGD and torch.optim.SGD: in one run, the candidates take turns stepping the same parameters, with
warm caches (texp.bench.timing).
"""

import contextlib
import math
import platform
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

import texp
from texp import backends
from texp.bench.report import CLIPPED, FUSED, figures
from texp.bench.shapes import MODELS
from texp.bench.timing import Times, take_turns

_BYTES = 20
_TINY = 100  # elements: for such tensors the time is overhead, not arithmetic or memory
_MOST_FOR_REFERENCE = 20_000_000  # parameters
# A million steps move a parameter by at most ten times its gradient.
_ARGUMENTS = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
_MAX_NORM = 1.0


class _Clipped(torch.optim.SGD):
    """Clips the gradients before each step, as a training loop does."""

    def step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, _MAX_NORM, foreach=True)
        super().step()


def candidates(device: str, parameters: int) -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """What to time, by name: torch's three implementations and every available backend of texp, with ordinary groups,
    with exponential groups, with its scale on the device, and with clipped gradients. The reference, which is not
    made to be fast, would take most of the time for large models and is left out there.
    """
    made: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "torch for-loop": partial(torch.optim.SGD, **_ARGUMENTS, foreach=False),
        "torch foreach": partial(torch.optim.SGD, **_ARGUMENTS, foreach=True),
        FUSED: partial(torch.optim.SGD, **_ARGUMENTS, fused=True),
        FUSED + CLIPPED: partial(_Clipped, **_ARGUMENTS, fused=True),
    }
    for name, reason in backends.available().items():
        backend = backends.ALL[name]
        too_slow = name == "reference" and parameters > _MOST_FOR_REFERENCE
        if reason != backends.OK or device not in backend.device_types() or not backend.is_default() or too_slow:
            continue
        made[f"texp {name}"] = of_backend = partial(texp.SGD, **_ARGUMENTS, backend=name)
        made[f"texp {name} exponential"] = partial(of_backend, scale_invariant=True)
        if backend.advances:
            made[f"texp {name} capturable"] = partial(of_backend, capturable=True)
        made[f"texp {name}{CLIPPED}"] = partial(of_backend, max_norm=_MAX_NORM)
    return made


def run(device: str, models: Iterable[str], seconds: float, report: Callable[[str], object]) -> Iterator[dict]:
    """Yields one record (texp.bench.report.FIELDS) for each of the `models` (texp.bench.shapes.MODELS) and candidate,
    model by model, on "cpu" or "cuda"; `seconds` is that of texp.bench.timing.take_turns. Before each turn `report`
    is called with a description of it.
    """
    run_on = _machine(device)
    copy_gb_per_s = copy_bandwidth(device, seconds, report)
    for model in models:
        sizes = [math.prod(shape) for shape in MODELS[model][0]]
        size = {"model": model, "tensors": len(sizes), "parameters": sum(sizes)}
        host = device == "cuda" or max(sizes) <= _TINY
        times = _time_model(device, model, seconds, report)
        for name, measured in figures(times, _BYTES * sum(sizes), copy_gb_per_s, host).items():
            yield {**run_on, **size, "candidate": name, **measured}


def _time_model(device: str, model: str, seconds: float, report: Callable[[str], object]) -> dict[str, Times]:
    report(model)
    shapes, own_groups = MODELS[model]
    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    steps = {
        name: make([{"params": [p]} for p in params] if own_groups else params).step
        for name, make in candidates(device, sum(p.numel() for p in params)).items()
    }
    return take_turns(steps, seconds, wait=_wait(device), on_turn=lambda name: report(f"{model}, {name}"))


def copy_bandwidth(device: str, seconds: float, report: Callable[[str], object]) -> float:
    """Bandwidth, in GB/s read and written, of a copy of 400 MB.

    On a CPU a step may exceed it: a copy also reads the cache lines that it overwrites (write-allocate), which is not
    counted, whereas a step in place reads them anyway; and small models fit into the caches.
    """
    source = torch.randn(100_000_000, device=device)
    target = torch.empty_like(source)
    steps = {"copy of 400 MB": lambda: target.copy_(source)}
    (times,) = take_turns(steps, seconds, wait=_wait(device), on_turn=report).values()
    return 2 * source.nbytes / statistics.median(times.total) / 1e9


def _wait(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _machine(device: str) -> dict:
    core = backends.core()
    return {
        "device": device,
        "processor": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "instruction_set": core.cpu_variants()[0] if core is not None and device == "cpu" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "texp": texp.__version__,
    }


def cpu_model() -> str:
    """Empty if unknown."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor()
