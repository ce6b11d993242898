"""Time of the host in a step: what is left of it when the kernels do nothing.

python -m benchmarks.host_time [CHECKOUT…] [--csv FILE]: for each checkout, this one if none is named, the
microseconds of optimizer.step() for several lists of tensors, with rows that the host computes and with rows that are
left to a device. Checkouts take turns, in processes of their own, and the fastest of all rounds counts: others are
disturbed.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TURNS, ROUNDS, SECONDS_OF_A_ROUND = 3, 100, 0.002

MODELS = ("161 tiny tensors", "465 tiny groups", "ResNet-50")


def measure() -> dict[str, float]:
    """By case, in microseconds, in this process."""
    import torch

    import texp
    from texp.bench.shapes import MODELS as SHAPES

    torch.set_num_threads(1)
    texp.backends.core().use_cpu_variant("nothing")
    times = {}
    for model in MODELS:
        shapes, own_groups = SHAPES[model]
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for p in params:
            p.grad = torch.zeros_like(p)
        for form in ("ordinary", "exponential"):
            made = [{"params": [p]} for p in params] if own_groups else params
            arguments = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4, "scale_invariant": form == "exponential"}
            optimizer = texp.SGD(made, backend="cpu", **arguments)
            times[f"{model}, {form}"] = fastest(optimizer.step)
            kernels = optimizer._kernels._replace(cpu=Nothing(), scale_on="cpu", launcher=Nothing())
            optimizer._use(kernels)
            times[f"{model}, {form}, launcher"] = fastest(optimizer.step)
            optimizer.capturable = True
            times[f"{model}, {form}, launcher, rows on the device"] = fastest(optimizer.step)
    return times


class Nothing:
    """A launcher that launches nothing."""

    capturable = False

    def apply(self, *tables) -> None:
        pass

    def step_on_device(self, *tables) -> None:
        pass


def fastest(step) -> float:
    from time import perf_counter

    def round_of(calls: int) -> float:
        start = perf_counter()
        for _ in range(calls):
            step()
        return (perf_counter() - start) / calls

    calls = max(1, int(SECONDS_OF_A_ROUND / min(round_of(1) for _ in range(5))))
    return round(min(round_of(calls) for _ in range(ROUNDS)) * 1e6, 2)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("benchmarks.host_time", description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT])
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args(arguments)
    code = "import json, benchmarks.host_time as of; print(json.dumps(of.measure()))"
    best: dict[str, dict[Path, float]] = {}
    for _ in range(TURNS):
        for checkout in given.checkouts:
            path = os.pathsep.join([str(checkout.resolve()), str(ROOT)])
            command, environment = [sys.executable, "-c", code], os.environ | {"PYTHONPATH": path}
            done = subprocess.run(command, cwd=ROOT.parent, env=environment, stdout=subprocess.PIPE, check=True)
            for case, time in json.loads(done.stdout.splitlines()[-1]).items():
                of_case = best.setdefault(case, {})
                of_case[checkout] = min(time, of_case.get(checkout, time))
    for case, times in best.items():
        print(f"{case:60}", *(f"{times[checkout]:9.2f}" for checkout in given.checkouts))
    if given.csv is not None:
        with given.csv.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["case", *(checkout.name for checkout in given.checkouts)])
            writer.writerows(
                [case, *(times[checkout] for checkout in given.checkouts)] for case, times in best.items()
            )


if __name__ == "__main__":
    main(sys.argv[1:])
