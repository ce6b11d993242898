"""Times callables in turns, so that disturbances affect all of them alike."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

TURN_SECONDS = 0.02
FEWEST_CALLS, MOST_CALLS = 2, 2000  # of a turn
FEWEST_REPEATS = 15
_ESTIMATES = 5  # uncounted calls that estimate the time of a call


@dataclass
class Times:
    """Of one candidate, in seconds."""

    total: list[float] = field(default_factory=list)  # of each counted call, until the device is done
    host: list[float] = field(default_factory=list)  # of the same calls, until they return
    spent: float = 0.0  # in its turns, uncounted calls included


def take_turns(
    steps: dict[str, Callable[[], object]],
    seconds: float,
    *,
    wait: Callable[[], object],
    on_turn: Callable[[str], object] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Times each candidate for `seconds`, or up to a turn longer, with at least FEWEST_REPEATS counted calls.

    In every round each candidate that is not done takes one turn: as many calls as fit into TURN_SECONDS, between
    FEWEST_CALLS and MOST_CALLS. The first call of a turn, which finds the caches full of other data, is not counted.
    The order is shuffled in every round, with a fixed seed.

    `steps` are the candidates by name, `wait` waits for the device, `on_turn` is called with a candidate's name
    before its turn, untimed, and `clock` returns seconds.
    """

    def call(step: Callable[[], object]) -> tuple[float, float]:
        start = clock()
        step()
        returned = clock()
        wait()
        return clock() - start, returned - start

    calls, times = {}, {name: Times() for name in steps}
    for name, step in steps.items():
        on_turn(name)
        usual = statistics.median(call(step)[0] for _ in range(_ESTIMATES))
        calls[name] = max(FEWEST_CALLS, min(int(TURN_SECONDS / usual), MOST_CALLS))
    generator, left = random.Random(0), list(steps)
    while left:
        generator.shuffle(left)
        for name in left:
            on_turn(name)
            totals, hosts = zip(*(call(steps[name]) for _ in range(calls[name])), strict=True)
            times[name].total += totals[1:]
            times[name].host += hosts[1:]
            times[name].spent += sum(totals)
        left = [name for name in left if times[name].spent < seconds or len(times[name].total) < FEWEST_REPEATS]
    return times
