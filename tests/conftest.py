"""What every test module shares: the backends to test, each on its devices, and how tensors are compared."""

import os
from dataclasses import dataclass

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import texp

# The tensors here are tiny: a second thread would only be waited for.
torch.set_num_threads(1)

# The same examples everywhere, however slow the machine; `--hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", max_examples=5000, deadline=None)
hypothesis.settings.load_profile("fixed")


# Built now if need be, so that no test waits for it. Raises where TEXP_NATIVE=1 asks for it but it cannot be had.
texp.backends.core()


@dataclass(frozen=True)
class Target:
    """A backend on a device."""

    backend: str | None
    device: str

    def sgd(self, params, **arguments) -> texp.SGD:
        return texp.SGD(params, backend=self.backend, **arguments)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cpu",) if INTERPRETED else ("cuda",),
}


def targets(interpreted: bool = True) -> list:
    """Every backend on every device that it serves; those that cannot run here are skipped with the reason.

    interpreted: whether Triton's interpreter is among them, which takes about 10 ms for a step.
    """
    params = []
    reasons = texp.backends.available()
    for backend, devices in DEVICES.items():
        if backend == "triton" and INTERPRETED and not interpreted:
            continue
        for device in devices:
            marks = []
            if device == "cuda":
                marks.append(pytest.mark.gpu)
                marks.append(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
            if reasons[backend] != "ok":
                marks.append(pytest.mark.skip(reason=reasons[backend]))
            params.append(pytest.param(Target(backend, device), id=f"{backend}-{device}", marks=marks))
    return params


@pytest.fixture(params=targets())
def target(request) -> Target:
    """A backend by name."""
    return request.param


@pytest.fixture(params=targets(interpreted=False))
def swift_target(request) -> Target:
    """A backend by name, for hundreds of steps; backends/test_triton.py has shorter runs for Triton's interpreter."""
    return request.param


@pytest.fixture(params=[Target(None, "cpu"), Target("reference", "cpu")], ids=["default", "reference"])
def general(request) -> Target:
    """For what no kernel can take: the default backend, which leaves it to the reference, and the reference."""
    return request.param


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit of every element."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def profiler(activity: torch.profiler.ProfilerActivity) -> torch.profiler.profile:
    """Of torch, to be entered once. Without acc_events, torch 2.10 to 2.12 warn that events of earlier cycles are
    lost, of which there are none."""
    return torch.profiler.profile(activities=[activity], acc_events=True)
