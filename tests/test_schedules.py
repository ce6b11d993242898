"""texp.schedules: the paper's schedules as torch LR schedulers, over torch.optim.SGD and others."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import texp
from tests.networks import backward, network, trainable
from texp.schedules import EXP, TEXP

DECAY, MOMENTUM, LR = 5e-3, 0.9, 0.1


def sgd(momentum: float = MOMENTUM, make=torch.optim.SGD, **arguments):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros_like(p)
    return make([p], lr=LR, momentum=momentum, **arguments)


def lrs(optimizer, scheduler, steps: int) -> list[float]:
    values = []
    for _ in range(steps):
        values.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return values


@pytest.mark.parametrize("make", [torch.optim.SGD, texp.SGD])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_exp(make, momentum):
    optimizer = sgd(momentum, make)
    expected = [texp.theory.exp_lr(t, LR, DECAY, momentum) for t in range(20)]
    assert lrs(optimizer, EXP(optimizer, weight_decay=DECAY), 20) == expected


@pytest.mark.parametrize("instant_decay", [False, True])
@pytest.mark.parametrize("taper", [False, True])
def test_texp_and_its_ablations(instant_decay, taper):
    switches = {"instant_decay": instant_decay, "taper": taper}
    optimizer = sgd()
    scheduler = TEXP(optimizer, [5, 11], 0.2, weight_decay=DECAY, **switches)
    expected = [texp.theory.texp_lr(t, LR, DECAY, MOMENTUM, [5, 11], 0.2, **switches) for t in range(20)]
    assert lrs(optimizer, scheduler, 20) == expected


def losses(optimizer, model, schedule=None, steps: int = 250) -> list[float]:
    values = []
    for t in range(steps):
        values.append(backward(model, t).item())
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return values


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.0, 0.3), (0.9, 0.0), (0.9, 0.3)])
def test_exp_is_sgd_with_weight_decay_that_starts_at_its_equilibrium(momentum, dampening):
    """The main theorem, exact: SGD whose buffer holds its equilibrium share κθ of the weights, ηκ = 1/α − 1, and
    plain SGD with an empty buffer under EXP. Without momentum that is SGD from its very beginning."""
    arguments = {"lr": LR, "momentum": momentum, "dampening": dampening}
    models = network(), network()
    with_decay = torch.optim.SGD(trainable(models[0]), weight_decay=DECAY, **arguments)
    plain = torch.optim.SGD(trainable(models[1]), **arguments)
    alpha = texp.theory.alpha_star(LR, DECAY * (1 - dampening), momentum)
    if momentum:
        for optimizer, kappa in ((with_decay, (1 / alpha - 1) / LR), (plain, 0.0)):
            for p in optimizer.param_groups[0]["params"]:
                optimizer.state[p]["momentum_buffer"] = kappa * p.detach()
    schedule = EXP(plain, weight_decay=DECAY)
    assert losses(plain, models[1], schedule) == pytest.approx(losses(with_decay, models[0]), rel=1e-11)


def test_texp_is_step_decay_with_the_momentum_correction():
    """At a milestone the buffer of step decay still carries the old phase's share of θ. Exchanging it for the new
    phase's, and starting from the equilibrium, makes TEXP exact."""
    milestone, steps = 100, 250
    models = network(), network()
    decayed = torch.optim.SGD(trainable(models[0]), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    plain = torch.optim.SGD(trainable(models[1]), lr=LR, momentum=MOMENTUM)
    schedule = TEXP(plain, [milestone], 0.1, weight_decay=DECAY)

    def kappa(lr: float) -> float:
        return (1 / texp.theory.alpha_star(lr, DECAY, MOMENTUM) - 1) / lr

    for p, q in zip(trainable(models[0]), trainable(models[1]), strict=True):
        decayed.state[p]["momentum_buffer"] = kappa(LR) * p.detach()
        plain.state[q]["momentum_buffer"] = torch.zeros_like(q)
    for t in range(steps):
        if t == milestone:
            decayed.param_groups[0]["lr"] = LR * 0.1
            for p in trainable(models[0]):
                decayed.state[p]["momentum_buffer"] += (kappa(LR * 0.1) - kappa(LR)) * p.detach()
        assert backward(models[1], t).item() == pytest.approx(backward(models[0], t).item(), rel=1e-11)
        decayed.step()
        plain.step()
        schedule.step()


def test_each_group_has_its_own_schedule():
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": params[0], "momentum": 0.5}, {"params": params[1], "lr": 0.01}], lr=LR)
    scheduler = EXP(optimizer, weight_decay=DECAY)
    for t in range(4):
        assert scheduler.get_last_lr() == [
            texp.theory.exp_lr(t, LR, DECAY, 0.5),
            texp.theory.exp_lr(t, 0.01, DECAY, 0.0),
        ]
        optimizer.step()
        scheduler.step()


def test_a_tensor_lr_and_an_optimizer_without_momentum():
    optimizer = sgd()
    optimizer.param_groups[0]["lr"] = lr = torch.tensor(LR, dtype=torch.float64)
    lrs(optimizer, EXP(optimizer, weight_decay=DECAY), 3)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(texp.theory.exp_lr(3, LR, DECAY, MOMENTUM))
    rmsprop = torch.optim.RMSprop([nn.Parameter(torch.ones(2))], lr=LR)
    assert EXP(rmsprop, weight_decay=DECAY).get_last_lr() == [texp.theory.exp_lr(0, LR, DECAY)]


def test_a_run_is_resumed_from_bytes_that_load_with_weights_only():
    optimizer = sgd()
    scheduler = TEXP(optimizer, [5, 11], 0.2, weight_decay=DECAY)
    expected = lrs(optimizer, scheduler, 20)
    optimizer = sgd()
    scheduler = TEXP(optimizer, [5, 11], 0.2, weight_decay=DECAY)
    lrs(optimizer, scheduler, 8)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = sgd()
    resumed_scheduler = TEXP(resumed, [1], 0.9, weight_decay=0.0)
    resumed.load_state_dict(saved[0])
    resumed_scheduler.load_state_dict(saved[1])
    assert lrs(resumed, resumed_scheduler, 12) == expected[8:]
    # So grown a LR would be outside the range as an initial one.
    resumed.param_groups[0]["lr"] = 10.0
    TEXP(resumed, [5, 11], 0.2, weight_decay=DECAY, last_epoch=7)
    # The other way that torch knows: the number of steps taken, minus 1.
    by_epoch = sgd()
    by_epoch.load_state_dict(saved[0])
    scheduler = TEXP(by_epoch, [5, 11], 0.2, weight_decay=DECAY, last_epoch=7)
    assert lrs(by_epoch, scheduler, 12) == expected[8:]


ERRORS = {
    "weight decay": (sgd(weight_decay=0.1), {}, r"group 0 has weight_decay = 0\.1: the schedule replaces"),
    "nesterov": (sgd(nesterov=True), {}, "group 0 has nesterov=True"),
    "dampening": (sgd(dampening=1.5), {}, r"group 0 has dampening = 1\.5: it must be from 0 to 1"),
    "milestones": (sgd(), {"milestones": [5, 3]}, r"ascending .* got \[5, 3\]"),
    "half a milestone": (sgd(), {"milestones": [2.5]}, r"ascending .* got \[2\.5\]"),
    "range": (sgd(), {"weight_decay": 0.1}, "outside the theorem's range"),
    "decay": (sgd(), {"weight_decay": math.nan}, "weight_decay must be a finite number"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_leave_the_optimizer_alone(case):
    optimizer, arguments, message = ERRORS[case]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        TEXP(optimizer, **{"milestones": [3], "weight_decay": DECAY, **arguments})
    assert optimizer.state_dict() == before


def test_an_lr_beyond_float64():
    optimizer = sgd()
    scheduler = EXP(optimizer, weight_decay=DECAY)
    scheduler.last_epoch = 1_000_000
    optimizer.step()
    with pytest.raises(OverflowError, match="beyond float64"):
        scheduler.step()
