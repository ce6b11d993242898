#!/usr/bin/env python3
"""What the eps of norms costs: python benchmarks/default_eps.py [CSV]

The theorem is about norms without eps. Here models of tests/models.py keep the eps that norms have by default and
train for 100 steps in float64, with torch.optim.SGD and with texp.SGD on the groups of texp.param_groups, whose
weights are up to twice as large. In the same run eps is 1e-30, where nothing but rounding is left. Before training,
how far outputs move when the weights are doubled: training amplifies that, as it does any perturbation.
"""

import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import texp
from tests.invariance.models import CASES, Case

STEPS = 100
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}  # so much decay that P passes 2 three times


def deviation(case: Case, **eps) -> tuple[float, int]:
    """The largest relative difference of the loss at any step, and how often P was halved."""
    models = [case.model(**eps) for _ in range(2)]
    groups = texp.param_groups(models[1], case.batch(0)[0], **OPTIONS)
    optimizers = [torch.optim.SGD(models[0].parameters(), **OPTIONS), texp.SGD(groups)]
    largest = 0.0
    for t in range(STEPS):
        losses = case.step(models, optimizers, t)
        largest = max(largest, abs(losses[1] / losses[0] - 1))
    return largest, optimizers[1].param_groups[0]["scale_exponent"]


def main(path: str = "benchmarks/results/default_eps.csv") -> None:
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["model", "outputs_at_twice_the_weights", "loss_with_default_eps", "loss_with_eps_1e-30", "halvings"]
        )
        for name, case in CASES.items():
            if not case.invariant(case.model(), False):
                continue
            (default, halvings), (tiny, _) = deviation(case, eps=None), deviation(case)
            doubled = texp.audit(case.model(eps=None), case.batch(0)[0]).eps_deviation
            values = [f"{x:.2e}" for x in (doubled, default, tiny)]
            writer.writerow([name, *values, halvings])
            print(f"{name:32}", *values, halvings)


if __name__ == "__main__":
    main(*sys.argv[1:])
