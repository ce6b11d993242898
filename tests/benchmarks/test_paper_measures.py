"""The methods that the experiments of benchmarks/paper compare, and what they measure, on simple curves."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from benchmarks.paper import (
    cosine,
    fixed,
    instant_decay,
    methods,
    no_instant_decay,
    norms,
    results,
    step_decay,
)
from benchmarks.paper.setup import DIGITS
from texp.schedules import EXP, TEXP
from texp.theory import alpha_star


def quiet_sgd(lr: float = DIGITS.lr) -> torch.optim.SGD:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    return torch.optim.SGD([p], lr, DIGITS.momentum)


def scheduled(make, steps: int) -> list[float]:
    optimizer = quiet_sgd()
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


class TestWays:
    setup = DIGITS.shortened(30)

    def test_the_lrs_are_those_of_torchs_schedulers(self):
        milestones, steps = list(self.setup.milestones), self.setup.steps
        assert milestones == [10, 20]
        step = scheduled(lambda optimizer: MultiStepLR(optimizer, milestones, DIGITS.gamma), steps)
        cosine = scheduled(lambda optimizer: CosineAnnealingLR(optimizer, steps), steps)
        assert methods.step_decay(self.setup) == pytest.approx(step, rel=1e-12)
        assert methods.cosine(self.setup) == pytest.approx(cosine, rel=1e-12)

    @pytest.mark.parametrize("instant_decay", [True, False])
    @pytest.mark.parametrize("taper", [True, False])
    def test_texp_is_that_of_texp_schedules(self, instant_decay, taper):
        switches = {"instant_decay": instant_decay, "taper": taper}
        expected = scheduled(
            lambda optimizer: TEXP(
                optimizer, self.setup.milestones, DIGITS.gamma, weight_decay=DIGITS.weight_decay, **switches
            ),
            self.setup.steps,
        )
        assert methods.texp(self.setup, "", **switches).lrs == pytest.approx(expected, rel=1e-12)

    def test_exp_is_that_of_texp_schedules(self):
        expected = scheduled(lambda optimizer: EXP(optimizer, weight_decay=DIGITS.weight_decay), self.setup.steps)
        assert methods.texp(self.setup, "", ()).lrs == pytest.approx(expected, rel=1e-12)

    def test_growth_and_lr_belong_together(self):
        """η̃_t = P_t·P_{t+1}·η_t, and P_{t+1} = P_t/α_t."""
        etas = methods.step_decay(self.setup)
        for method in (methods.texp(self.setup, ""), methods.translated(self.setup, etas, "")):
            for eta, lr, growth in zip(etas, method.lrs, method.growth, strict=True):
                assert lr == pytest.approx(eta * 10 ** (2 * growth.log10_P) / growth.alpha, rel=1e-12)


def curve(loss: list[float], norm2_over_lr: list[float] | None = None) -> results.Curve:
    return results.Curve(loss, [0.0] * len(loss), norm2_over_lr or [1.0] * len(loss), {})


def values(module, setup, **curves: results.Curve) -> list[float]:
    """What an experiment measures; curves: by the names of its runs, with _ for -."""
    named = {name.replace("_", "-"): [each] for name, each in curves.items()}
    assert list(named) == list(module.runs(setup))
    return [check.value for check in module.checks(named, setup)]


class TestMeasured:
    """Of curves made by hand, with phases of 100 steps."""

    setup = DIGITS.shortened(300)
    flat = curve([1.0] * 300)
    off = curve([1.0] * 299 + [1.5])

    def test_a_check(self):
        held = [results.Check("", value, 1.0, 2.0).holds for value in (0.9, 1.0, 2.0, 2.1, math.nan)]
        assert held == [False, True, True, False, False]

    def test_means_and_differences(self):
        a, b = curve([1.0, 2.0], [3.0, 4.0]), curve([3.0, 6.0], [5.0, 8.0])
        assert results.average([a, b]) == curve([2.0, 4.0], [4.0, 6.0])
        assert results.largest_difference([a, b], [a, a]) == 4.0
        falling = curve([4.0] * 50 + [2.0] * 50)
        assert results.averaged_difference(falling, curve([4.0] * 50 + [2.5] * 50)) == pytest.approx(0.2)
        assert results.averaged_difference(falling, falling) == 0

    def test_fixed(self):
        norms = [10.0] * 50 + [2.0] * 49 + [3.0] + [10.0] * 200
        growth, texp_sgd, corrected, *varied = values(
            fixed,
            self.setup,
            fixed_sgd=self.flat,
            fixed_exp=curve(self.flat.loss, norms),
            fixed_exp_corrected=curve([1.25] + [1.0] * 299),
            fixed_texp_sgd=self.off,
        )
        assert growth == pytest.approx(1.4812, abs=5e-5)
        assert (texp_sgd, corrected, varied) == (0.5, 0.25, [0.0, 0.5])

    def test_step_decay(self):
        assert values(
            step_decay,
            self.setup,
            step_sgd=self.flat,
            step_texp=curve([1.0] * 250 + [0.875] * 50),
            step_texp_corrected=self.off,
            step_texp_sgd=curve([1.25] + [1.0] * 299),
        ) == [0.125, 0.5, 0.25]

    def test_instant_decay(self):
        sgd, instant = curve([4.0] * 100 + [3.0] * 200), curve([4.0] * 100 + [1.0] * 50 + [5.0] * 150)
        assert values(instant_decay, self.setup, step_sgd=sgd, instant_only=instant) == [0.25, 0.25]

    def test_phases_shorter_than_the_window_of_a_mean(self):
        setup = DIGITS.shortened(100)
        assert setup.milestones == (33, 67)
        both = curve([2.0] * 33 + [1.0] * 67)
        instant, sgd = values(instant_decay, setup, step_sgd=both, instant_only=both)
        assert instant == pytest.approx((16 * 2 + 34 * 1) / 50 / 2 - 1)
        assert sgd == -instant

    def test_no_instant_decay(self):
        slow = curve([9.0] * 100 + [1.5] * 50 + [1.0] * 150)
        assert values(no_instant_decay, self.setup, step_sgd=self.flat, no_instant=slow) == [0.25]

    def test_cosine(self):
        other = curve([1.25] + [1.0] * 299)
        curves = {"cosine_sgd": self.flat, "cosine_translated": self.off, "cosine_texp_sgd": other}
        assert values(cosine, self.setup, **curves) == [0.5, 0.25]

    def test_norms(self):
        off = {"gn": 1.5, "ln": 1.25, "in": 3.0}
        curves = {}
        for norm, value in off.items():
            curves |= {f"{norm}_sgd": self.flat, f"{norm}_texp_sgd": curve([value] + [1.0] * 299)}
        assert values(norms, self.setup, **curves) == [0.5, 0.25, 2.0]

    def test_the_growing_schedules_that_are_compared(self):
        """The factor of the LR within the first two phases, and from one to the other."""
        factors = {}
        for module in (fixed, instant_decay, no_instant_decay):
            for name, method in module.runs(self.setup).items():
                factors[name] = [method.lrs[t + 1] / method.lrs[t] for t in (50, 150, 99)]
        fast, slow = (
            alpha_star(lr, DIGITS.weight_decay, DIGITS.momentum) ** -2 for lr in (DIGITS.lr, DIGITS.lr / 10)
        )
        assert factors["fixed-exp"] == pytest.approx([fast, fast, fast])
        assert factors["instant-only"] == pytest.approx([fast, fast, fast / 10])
        assert factors["no-instant"] == pytest.approx([fast, slow, math.sqrt(fast * slow)])
