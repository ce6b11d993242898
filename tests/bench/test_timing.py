"""The method of the benchmark, with steps that take the time of a clock made here."""

import pytest

from texp.bench.report import CLIPPED, FUSED, figures
from texp.bench.timing import Times, take_turns

ESTIMATES = 5  # calls of each candidate before the first turn


class Clock:
    """Stands still but for the steps and the waiting; its times are sums of powers of two, hence exact."""

    def __init__(self):
        self.now = 0.0
        self.queued = 0.0
        self.calls: list[str] = []

    def step(self, name: str, host: float, device: float = 0.0, cold: float = 0.0):
        """A step that takes `host` seconds to return, `cold` more after another's, and leaves the device `device`."""

        def call():
            self.now += host if self.calls and self.calls[-1] == name else host + cold
            self.queued += device
            self.calls.append(name)

        return call

    def wait(self):
        self.now += self.queued
        self.queued = 0.0

    def take_turns(self, steps: dict, seconds: float, **arguments) -> dict[str, Times]:
        return take_turns(steps, seconds, wait=self.wait, clock=lambda: self.now, **arguments)


@pytest.mark.parametrize(
    ("call", "seconds", "calls", "turns"),
    [
        pytest.param(2**-10, 1.0, 20, 52, id="as many calls as fit 20 ms, turns up to the budget"),
        pytest.param(2**-5, 1.0, 2, 16, id="longer than a turn: two calls"),
        pytest.param(2**-5, 0.0, 2, 15, id="without a budget: 15 counted calls"),
        pytest.param(8.0, 1.0, 2, 15, id="longer than the budget: 15 counted calls"),
        pytest.param(2**-10, 0.0, 20, 1, id="without a budget: one turn is enough"),
        pytest.param(2**-17, 0.125, 2000, 9, id="short: at most 2,000 calls"),
    ],
)
def test_calls_of_a_candidate(call, seconds, calls, turns):
    """Whatever the others take."""
    clock = Clock()
    steps = {"other": clock.step("other", 2**-9), "this": clock.step("this", call), "slow": clock.step("slow", 1.0)}
    times = clock.take_turns(steps, seconds)["this"]
    assert clock.calls.count("this") == ESTIMATES + turns * calls
    assert times.total == times.host == [call] * turns * (calls - 1)
    assert times.spent == turns * calls * call


def test_the_call_that_finds_cold_caches_is_not_counted():
    clock = Clock()
    steps = {name: clock.step(name, 2**-9, cold=2**-6) for name in "abc"}
    times = clock.take_turns(steps, 0.5)
    for of_calls in times.values():
        assert set(of_calls.total) == {2**-9}
        assert of_calls.spent > sum(of_calls.total) + 2**-6


def test_each_round_has_its_own_order_and_each_run_the_same():
    runs = []
    for _ in range(2):
        clock, told = Clock(), []
        clock.take_turns({name: clock.step(name, 2**-7) for name in "abc"}, 0.5, on_turn=told.append)
        assert told[:3] == ["a", "b", "c"]
        rounds = ["".join(told[i : i + 3]) for i in range(3, len(told), 3)]
        assert all(sorted(of_round) == ["a", "b", "c"] for of_round in rounds)
        assert len(set(rounds)) == 6
        runs.append(told)
    assert runs[0] == runs[1]


def test_a_candidate_is_named_before_it_is_called():
    clock, told = Clock(), []
    calls_when_told = []

    def on_turn(name):
        told.append(name)
        calls_when_told.append(len(clock.calls))

    clock.take_turns({name: clock.step(name, 2**-5) for name in "ab"}, 0.0, on_turn=on_turn)
    assert [clock.calls[i] for i in calls_when_told] == told


def test_the_host_does_not_wait_for_the_device_and_the_total_does():
    clock = Clock()
    times = clock.take_turns({"a": clock.step("a", 2**-12, device=2**-8)}, 0.1)["a"]
    assert set(times.host) == {2**-12}
    assert set(times.total) == {2**-12 + 2**-8}


def test_figures():
    """Four times as fast as torch's fused step is a speed-up of 4; what clips is compared with what clips."""
    times = {
        FUSED: Times(total=[300e-6, 400e-6, 500e-6], host=[30e-6] * 3),
        FUSED + CLIPPED: Times(total=[900e-6] * 3, host=[90e-6] * 3),
        "texp clipped": Times(total=[150e-6] * 3, host=[15e-6] * 3),
        "texp": Times(total=[50e-6, 100e-6, 100e-6, 120e-6, 900e-6], host=[10e-6, 20e-6, 20e-6, 20e-6, 90e-6]),
    }
    made = figures(times, 20_000_000, copy_gb_per_s=250.0, host=True)
    assert made["texp"] == {
        "bytes": 20_000_000,
        "repeats": 5,
        "median_us": 100.0,
        "q1_us": 100.0,
        "q3_us": 120.0,
        "host_us": 20.0,
        "gb_per_s": 200.0,
        "share_of_copy": 0.8,
        "speedup_over_torch_fused": 4.0,
    }
    assert [made[FUSED][name] for name in ("q1_us", "q3_us", "speedup_over_torch_fused")] == [350.0, 450.0, 1.0]
    assert made["texp clipped"]["speedup_over_torch_fused"] == 6.0
    assert figures(times, 20_000_000, copy_gb_per_s=250.0, host=False)["texp"]["host_us"] is None
