"""texp.theory against the definition of SGD, against exact arithmetic, and against the paper's figures."""

import math
from decimal import Decimal, localcontext

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from texp import theory
from texp.theory import Hyperparameters, Row, Scale, advance

PAPER = {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9}  # PreResNet32 on CIFAR-10, 391 steps an epoch


def apply(row: Row, p: float, g: float, b: float) -> tuple[float, float]:
    u = row.a_b * b + row.a_g * g + row.a_p * p
    d = row.c_u * u + row.c_g * g + row.c_p * p
    return row.s_p * p - row.e * d, row.r_u * u + row.r_d * d


def sgd(theta: float, v: float | None, g: float, hyper: Hyperparameters) -> tuple[float, float | None]:
    """One step of torch.optim.SGD for one element, as its documentation defines it."""
    g = (-g if hyper.maximize else g) + hyper.weight_decay * theta
    if hyper.momentum != 0:
        v = g if v is None else hyper.momentum * v + (1 - hyper.dampening) * g
        g = g + hyper.momentum * v if hyper.nesterov else v
    return theta - hyper.lr * g, v


hypers = st.builds(
    Hyperparameters,
    lr=st.sampled_from([0.0, 1e-3, 0.1, 0.5, -1e-18]),
    momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    dampening=st.sampled_from([0.0, 0.3, 1.0, 1.5]),
    weight_decay=st.sampled_from([0.0, 5e-4, 0.05, 1.0]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    scale_invariant=st.booleans(),
    trust=st.none(),
)
numbers = st.floats(-1, 1, allow_subnormal=False)
steps = st.lists(st.tuples(hypers, st.none() | numbers), min_size=1, max_size=60)
_DECAYING = Hyperparameters(0.5, 0.9, weight_decay=1.0, scale_invariant=True)


@given(theta=numbers, steps=steps, grad_scale=st.sampled_from([1.0, 2.0**16]))
@example(theta=1.0, steps=[(_DECAYING, 0.5)] * 60, grad_scale=1.0)  # twice-clamped: far outside the range
@example(
    theta=1.0,
    steps=[(_DECAYING, 0.5), (_DECAYING, None), (_DECAYING._replace(momentum=0.0), 0.5)] * 9,
    grad_scale=1.0,
)
def test_the_rows_of_any_run_are_those_of_sgd(theta, steps, grad_scale):
    """Whatever changes between steps: lr, momentum (also to 0 and back), decay, Nesterov, missing grads, and
    whether the group is scale-invariant. For a gradient g of θ the stored weight sees g/P."""
    p, b, v, scale, size = theta, 0.0, None, Scale(), abs(theta)
    for hyper, g in steps:
        step = advance(scale, hyper, first=v is None, grad_scale=grad_scale)
        if g is None:
            p, b_next = apply(step.idle, p, 0.0, b)
        else:
            row = step.first if v is None else step.running
            p, b_next = apply(row, p, g / scale.P * grad_scale, b)
            theta, v = sgd(theta, v, g, hyper)
        if v is not None:
            b = b_next
        scale = step.scale
        size = max(size, abs(theta), abs(v or 0.0))
        assert 1 <= scale.P < 2
        assert scale.kappa >= 0
    # A step rounds some 20 times, and κθ, which is taken out of v and put back, can exceed v some 100 times.
    # What becomes subnormal on the way rounds absolutely.
    tolerance = 60 * 20 * 100 * (2.0**-53 * size + 5e-324)
    assert p / scale.P == pytest.approx(theta, abs=tolerance)
    folded, folded_b = apply(theory.fold_row(scale), p, 0.0, b)
    assert folded == pytest.approx(theta, abs=tolerance)
    if v is not None:
        assert folded_b == pytest.approx(v, abs=tolerance)


@given(hyper=hypers)
def test_an_ordinary_group_has_the_row_of_torch(hyper):
    hyper = hyper._replace(scale_invariant=False, maximize=False)
    step = advance(Scale(), hyper)
    keep = 1 - hyper.dampening
    if hyper.momentum == 0:
        expected = Row(a_b=1, c_g=1, c_p=hyper.weight_decay, e=hyper.lr, r_u=1)
    else:
        expected = Row(a_b=hyper.momentum, a_g=keep, a_p=keep * hyper.weight_decay, c_u=1, e=hyper.lr, r_u=1)
        if hyper.nesterov:
            expected = expected._replace(c_u=hyper.momentum, c_g=1, c_p=hyper.weight_decay)
        assert step.first == expected._replace(a_b=0, a_g=1, a_p=hyper.weight_decay)
    assert step.running == expected
    assert step.idle == theory.KEEP
    assert step.scale == Scale()


@pytest.mark.parametrize("nesterov", [False, True])
def test_inside_the_range_no_decay_is_applied_at_all(nesterov):
    scale = Scale()
    for t in range(1000):
        hyper = Hyperparameters(0.1, 0.9, weight_decay=0.02, nesterov=nesterov, scale_invariant=True)
        step = advance(scale, hyper, first=t == 0)
        row = step.first if t == 0 else step.running
        assert row.a_p == row.c_p == 0
        scale = step.scale
    assert scale.exponent > 0


def test_a_million_steps_stay_in_range_and_agree_with_exact_arithmetic():
    """Cosine from 0.1, the paper's momentum and decay. α and P/α each round by 2^−53 relative at most: 2e6 times
    that, in P twice, is 2e-10 in log10 of the LR."""
    steps = 1_000_000
    momentum, decay = Decimal.from_float(0.9), Decimal.from_float(5e-4)
    scale, P, kappa = Scale(), Decimal(1), Decimal(0)
    with localcontext() as context:
        context.prec = 40
        for t in range(steps):
            hyper = Hyperparameters(
                0.05 * (1 + math.cos(math.pi * (t % 50_000) / 50_000)), 0.9, weight_decay=5e-4, scale_invariant=True
            )
            step = advance(scale, hyper, first=t == 0)
            eta = Decimal(hyper.lr)
            kappa = momentum * kappa + decay
            alpha = 1 - eta * kappa
            if t % 9_973 == 0 or t == steps - 1:
                exact = (P * P / alpha * eta).log10()
                assert theory.log10_lr(scale, hyper, first=t == 0) == pytest.approx(float(exact), abs=1e-9)
            P, kappa = P / alpha, kappa / alpha
            scale = step.scale
            assert 1 <= scale.P < 2
        assert P.adjusted() > 100  # long outside the range of a float32


def test_the_fastest_growth_there_is():
    """Decay so strong that every step is limited to α = 1/2: P doubles, exactly."""
    scale = Scale()
    hyper = Hyperparameters(1.0, weight_decay=10.0, scale_invariant=True)
    for t in range(5000):
        step = advance(scale, hyper, first=t == 0)
        scale = step.scale
    assert scale[:2] == (1.0, 5000)
    assert theory.log10_lr(scale, hyper) == pytest.approx(10001 * math.log10(2), rel=1e-15)


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_excursion_out_of_the_range_leaves_nothing_behind(nesterov):
    """Ten times the largest decay for a while, then a LR that falls to nearly 0: κ comes back to the equilibrium,
    which for a small LR is λ/(1 − γ), instead of growing as 1/η. A large κ would drown the momentum in κθ."""
    limit = (1 - math.sqrt(0.9)) ** 2
    hyper = Hyperparameters(0.1, 0.9, weight_decay=10 * limit / 0.1, nesterov=nesterov, scale_invariant=True)
    scale = Scale()
    for t in range(100):
        step = advance(scale, hyper, first=t == 0)
        scale = step.scale
    assert step.running.a_p > 0
    for t in range(400):
        step = advance(scale, hyper._replace(lr=0.1 * 0.95**t))
        scale = step.scale
    assert step.running.a_p == step.running.c_p == 0
    assert scale.kappa == pytest.approx(hyper.weight_decay / (1 - 0.9), rel=1e-6)


@pytest.mark.parametrize(
    ("nesterov", "limit"), [(False, lambda m: (1 - math.sqrt(m)) ** 2), (True, lambda m: ((1 - m) / (1 + m)) ** 2)]
)
@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_up_to_the_end_of_the_range_nothing_stays_ordinary(nesterov, limit, momentum):
    for share, inside in ((0.999, True), (1.01, False)):
        hyper = Hyperparameters(
            0.1, momentum, weight_decay=share * limit(momentum) / 0.1, nesterov=nesterov, scale_invariant=True
        )
        scale, ordinary = Scale(), 0.0
        for t in range(20_000):
            step = advance(scale, hyper, first=t == 0)
            ordinary += step.running.a_p + step.running.c_p
            scale = step.scale
        assert (ordinary == 0) is inside


@given(st.lists(hypers, max_size=80))
def test_the_recursion_stays_finite(run):
    scale = Scale()
    for t, hyper in enumerate(run):
        step = advance(scale, hyper._replace(scale_invariant=True), first=t == 0)
        scale = step.scale
        assert theory.ALPHA_MIN <= step.alpha <= 1
        assert 1 <= scale.P < 2
        assert all(map(math.isfinite, (*step.running, *step.first, *step.idle, scale.kappa, step.growth)))


def test_norm_stats_scale_with_any_power():
    step = advance(Scale(), Hyperparameters(0.5, weight_decay=0.5, scale_invariant=True))
    assert step.norm_stat(0.5).s_p == step.growth**0.5 == step.scale.P**0.5 > 1


def test_growth_of_the_paper():
    """Li & Arora: the LR grows 1.481 times in an epoch of 391 steps at η = 0.1, λ = 5e-4, γ = 0.9."""
    assert theory.alpha_star(**PAPER) == pytest.approx(0.99949773, abs=5e-9)
    assert theory.exp_lr(391, **PAPER) / theory.exp_lr(0, **PAPER) == pytest.approx(1.4812, abs=5e-5)
    # From an empty buffer the recursion settles to the same growth.
    log10_lrs = theory.translate([0.1] * 1000, 5e-4, 0.9)
    assert 10 ** (391 * (log10_lrs[-1] - log10_lrs[-2])) == pytest.approx(1.4812, abs=5e-5)
    assert 10 ** log10_lrs[0] == pytest.approx(0.1 / (1 - 0.1 * 5e-4), rel=1e-14)


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_first_step_with_lr_0_leaves_the_scale_alone(nesterov):
    """torch.distributed.checkpoint takes one to make buffers, and loads into them the v of a torch.optim.SGD."""
    hyper = Hyperparameters(0.0, 0.9, weight_decay=0.05, nesterov=nesterov, scale_invariant=True)
    step = advance(Scale(), hyper, first=True)
    assert step.scale == Scale()
    assert apply(step.first, 2.0, 0.0, 0.0) == (2.0, 0.05 * 2.0)
    assert advance(Scale(), hyper).scale.kappa > 0


@given(
    st.lists(st.floats(0, 0.05), min_size=1, max_size=60).filter(lambda etas: etas[0] > 0),
    st.sampled_from([0.0, 0.5, 0.9]),
)
def test_translate_is_what_log10_lr_reports_step_by_step(etas, momentum):
    """Unless the first step has lr = 0, whose decay stays in the momentum buffer."""
    scale = Scale()
    for t, expected in enumerate(theory.translate(etas, 0.05, momentum)):
        hyper = Hyperparameters(etas[t], momentum, weight_decay=0.05, scale_invariant=True)
        assert theory.log10_lr(scale, hyper, first=t == 0) == pytest.approx(expected, abs=1e-13)
        scale = advance(scale, hyper, first=t == 0).scale


def test_translate_needs_no_more_than_that_something_of_the_weights_is_left():
    assert theory.translate([1.0], 0.6)[0] == pytest.approx(math.log10(theory.exp_lr(0, 1.0, 0.6)), abs=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_alpha_star_is_the_larger_root_up_to_the_end_of_the_range(momentum):
    largest = (1 - math.sqrt(momentum)) ** 2
    for share in (0.0, 1e-6, 0.5, 0.999, 1.0) if momentum else (0.0, 1e-6, 0.5, 0.999):
        decay = share * largest
        alpha = theory.alpha_star(1.0, decay, momentum)
        assert alpha**2 - (1 + momentum - decay) * alpha + momentum == pytest.approx(0, abs=4 * 2.0**-52)
        assert alpha >= math.sqrt(momentum) - 1e-7  # both roots meet at √γ, where α is as exact as √ε


def test_without_momentum_the_recursion_is_the_closed_form():
    log10_lrs = theory.translate([0.2] * 50, 0.01)
    for t, log10_lr in enumerate(log10_lrs):
        assert theory.exp_lr(t, 0.2, 0.01) == pytest.approx(0.2 * (1 - 0.2 * 0.01) ** (-2 * t - 1), rel=1e-13)
        assert 10**log10_lr == pytest.approx(theory.exp_lr(t, 0.2, 0.01), rel=1e-13)


def test_the_factors_of_texp_at_a_phase_change():
    """Inside a phase α^−2; on its first step (η_I/η_{I−1})·α_{I−1}^−1·α_I^−1; and each switch removes its part."""

    def lrs(**switches):
        return [theory.texp_lr(t, 0.1, 5e-4, 0.9, [100, 200], 0.1, **switches) for t in range(300)]

    alpha = [theory.alpha_star(0.1 * 0.1**phase, 5e-4, 0.9) for phase in range(3)]
    full = lrs()
    assert full[0] == pytest.approx(0.1 / alpha[0], rel=1e-13)
    assert full[99] / full[98] == pytest.approx(alpha[0] ** -2, rel=1e-13)
    assert full[100] / full[99] == pytest.approx(0.1 / alpha[0] / alpha[1], rel=1e-13)
    assert full[101] / full[100] == pytest.approx(alpha[1] ** -2, rel=1e-13)
    assert full[200] / full[199] == pytest.approx(0.1 / alpha[1] / alpha[2], rel=1e-13)
    no_decay = lrs(instant_decay=False)
    assert no_decay[100] / no_decay[99] == pytest.approx(1 / alpha[0] / alpha[1], rel=1e-13)
    assert no_decay[101] / no_decay[100] == pytest.approx(alpha[1] ** -2, rel=1e-13)
    no_taper = lrs(taper=False)
    assert no_taper[100] / no_taper[99] == pytest.approx(0.1 * alpha[0] ** -2, rel=1e-13)
    assert no_taper[201] / no_taper[200] == pytest.approx(alpha[0] ** -2, rel=1e-13)


def test_texp_is_step_decay_up_to_the_momentum_correction():
    """Long after a milestone TEXP and the exact schedule differ by a constant factor, within a phase not at all."""
    etas = [0.1] * 400 + [0.01] * 400
    exact = theory.translate(etas, 5e-4, 0.9)
    texp = [math.log10(theory.texp_lr(t, 0.1, 5e-4, 0.9, [400])) for t in range(800)]
    for t in (300, 700):
        assert exact[t + 50] - exact[t] == pytest.approx(texp[t + 50] - texp[t], abs=1e-12)
    # The correction is at most the momentum's share of θ, ηκ/(1 − γ) = ηλ/(1 − γ)², in P, twice.
    assert abs((exact[700] - exact[300]) - (texp[700] - texp[300])) < 2 * 0.1 * 5e-4 / 0.1**2 / math.log(10)


ERRORS = {
    "negative lr": (lambda: theory.alpha_star(-0.1, 5e-4, 0.9), "lr must be a finite number of at least 0, got -0.1"),
    "nan decay": (lambda: theory.alpha_star(0.1, math.nan, 0.9), "weight_decay must be a finite number.*got nan"),
    "momentum 1": (lambda: theory.alpha_star(0.1, 5e-4, 1.0), "momentum must be less than 1"),
    "outside the range": (lambda: theory.alpha_star(0.1, 0.1, 0.9), r"0\.1·0\.1 = 0\.01 is outside .* 0\.00263"),
    "outside, no momentum": (lambda: theory.exp_lr(0, 1.0, 1.0), r"must be less than 1$"),
    "closed form, outside": (lambda: theory.texp_lr(0, 0.1, 0.1, 0.9, [5]), "outside the theorem's range"),
    "infinite lr": (lambda: advance(Scale(), Hyperparameters(math.inf)), "lr must be a finite number, got inf"),
    "infinite milestone": (lambda: theory.texp_phases(0.1, 5e-4, 0.9, [math.inf]), r"ascending .* got \[inf\]"),
    "nothing left": (lambda: theory.translate([1.0], 1.0), r"nothing of the weights \(α = 0\)"),
    "huge gamma": (lambda: theory.texp_phases(0.1, 0.0, 0.9, [1, 2], 1e200), "leaves the range of a float"),
    "negative momentum": (lambda: advance(Scale(), Hyperparameters(0.1, -0.9)), "momentum must .* got -0.9"),
    "nan dampening": (lambda: advance(Scale(), Hyperparameters(0.1, 0.9, math.nan)), "dampening must .* got nan"),
    "milestones": (lambda: theory.texp_phases(0.1, 5e-4, 0.9, [30, 20]), r"ascending .* got \[30, 20\]"),
    "milestone 0": (lambda: theory.texp_phases(0.1, 5e-4, 0.9, [0]), r"ascending positive .* got \[0\]"),
    "lr 0": (lambda: theory.exp_lr(0, 0.0, 5e-4), "lr and gamma must be greater than 0, got lr = 0"),
    "negative step": (lambda: theory.exp_lr(-1, 0.1, 5e-4), "from 0 on, got -1"),
    "no schedule": (lambda: theory.translate([0.1, 1.9], 0.4, 0.9), r"lr = 1\.9 at step 1 .* nothing of the weights"),
    "tiny lr": (lambda: theory.texp_phases(0.1, 0.0, 0.9, [1, 2], 1e-200), r"0\.1·1e-200\^2 leaves the range"),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_bad_arguments_are_named(case):
    call, message = case
    with pytest.raises(ValueError, match=message):
        call()


def test_an_lr_beyond_float64_says_what_to_do():
    with pytest.raises(OverflowError, match=r"step 1000000 is 10\^43.*texp\.SGD with scale_invariant=True"):
        theory.exp_lr(1_000_000, **PAPER)
