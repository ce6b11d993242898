"""The paper's theorem as a test: texp.SGD in its exponential form visits the functions of torch.optim.SGD.

float64 throughout. In 250 steps some 250·20 roundings of 1e-16 enter θ and training can amplify them, so 1e-11
relative is what exact arithmetic in float64 looks like; a wrong formula shows at 1e-3 or worse.
"""

import io
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import texp
from tests.conftest import relative_error
from tests.networks import NORMS, STEPS, backward, network, trainable

LR = 0.1

LRS = {
    "constant": lambda t: 1.0,
    "step": lambda t: 0.1 ** (t // 100),
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t / STEPS)),
    "warm-up from 0": lambda t: min(1.0, t / 50),
}
MOMENTA = {"fixed": lambda t: 0.9, "changing": lambda t: (0.9, 0.5, 0.0, 0.8)[t // 70], "high": lambda t: 0.95}
GRADS = {"all": False, "some missing": True}


@dataclass
class Recipe:
    """How to train: everything that torch.optim.SGD may be told, step by step."""

    nesterov: bool = False
    dampening: float = 0.0
    lr: str = "constant"
    momentum: str = "fixed"
    missing: bool = False
    decay: float = 5e-4 / LR  # λη = 5e-4, a fifth of the theorem's limit
    norm: str = "batch"
    size: float = 3.0

    def arguments(self) -> dict:
        return {"lr": LR, "momentum": MOMENTA[self.momentum](0), "weight_decay": self.decay}

    def train(self, model, optimizer, schedule, steps=range(STEPS)) -> list[float]:
        """Takes the steps `steps` of the run; returns the losses."""
        losses = []
        for t in steps:
            losses.append(backward(model, t).item())
            if self.missing:
                self._drop_grads(model, t)
            for group in optimizer.param_groups:
                # Set in the group: torch.optim.SGD refuses Nesterov with dampening in its constructor only.
                group.update(momentum=MOMENTA[self.momentum](t), nesterov=self.nesterov, dampening=self.dampening)
            optimizer.step()
            schedule.step()
        return losses

    def _drop_grads(self, model, t: int) -> None:
        """The second convolution comes late, and any parameter may be missing for a step."""
        generator = torch.Generator().manual_seed(1000 + t)
        for i, p in enumerate(trainable(model)):
            if torch.rand((), generator=generator) < 0.2 or (i == 1 and t < 30):
                p.grad = None


def pair(recipe: Recipe, target):
    """A network with torch.optim.SGD, and the same with texp.SGD in exponential form."""
    made = []
    for make, extra in ((torch.optim.SGD, {}), (target.sgd, {"scale_invariant": True})):
        model = network(recipe.norm, target.device, recipe.size)
        optimizer = make(trainable(model), **recipe.arguments(), **extra)
        made.append((model, optimizer, LambdaLR(optimizer, LRS[recipe.lr])))
    return made


def assert_same(actual, expected, tolerance=1e-11):
    """Weights and momentum of two (model, optimizer, …)."""
    for p, q in zip(trainable(actual[0]), trainable(expected[0]), strict=True):
        assert relative_error(p, q) < tolerance
        assert relative_error(_buf(actual, p), _buf(expected, q)) < tolerance


def _buf(trained, p):
    return trained[1].state[p]["momentum_buffer"]


GRID = list(itertools.product([False, True], [0.0, 0.3], LRS, ["fixed", "changing"], GRADS))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("nesterov", "dampening", "lr", "momentum", "grads"), GRID)
def test_the_whole_grid(swift_target, nesterov, dampening, lr, momentum, grads, norm):
    recipe = Recipe(nesterov, dampening, lr, momentum, GRADS[grads], norm=norm)
    expected, actual = pair(recipe, swift_target)
    losses = [recipe.train(*trained) for trained in (expected, actual)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-11)
    assert actual[1].param_groups[0]["scale"] * 2 ** actual[1].param_groups[0]["scale_exponent"] > 1.05
    actual[1].fold()
    assert_same(actual, expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("nesterov", "dampening", "lr", "grads"), list(itertools.product([False, True], [0.0, 0.3], LRS, GRADS))
)
def test_outside_the_range(swift_target, nesterov, dampening, lr, grads, norm):
    """λη twice the theorem's limit (1 − √γ)², where no exponential schedule exists: part of the decay stays
    ordinary. So strong a decay soon brings the weights to where training is chaotic; starting from large ones
    puts that off to the end of the run."""
    limit = (1 - math.sqrt(MOMENTA["high"](0))) ** 2
    decay = 2 * limit / LR / (1 - dampening)
    recipe = Recipe(nesterov, dampening, lr, "high", GRADS[grads], decay=decay, norm=norm, size=100.0)
    expected, actual = pair(recipe, swift_target)
    clipped = []
    actual[1].register_step_pre_hook(
        lambda optimizer, *_: clipped.append(texp.theory.advance(*_next(optimizer)).running.a_p > 0)
    )
    losses = [recipe.train(*trained) for trained in (expected, actual)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-11)
    assert any(clipped)  # more than the scale can take
    actual[1].fold()
    assert_same(actual, expected)


def _next(optimizer) -> tuple[texp.theory.Scale, texp.theory.Hyperparameters]:
    group = optimizer.param_groups[0]
    scale = texp.theory.Scale(group["scale"], group["scale_exponent"], group["carried_decay"])
    keys = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "scale_invariant")
    return scale, texp.theory.Hyperparameters(*(group[key] for key in keys))


def test_ordinary_parameters_beside_a_scale_invariant_group(target):
    """A trainable head in a group of its own, with its own LR."""
    made = []
    for make, extra in ((torch.optim.SGD, {}), (target.sgd, {"scale_invariant": True})):
        model = network(device=target.device)
        model.head.requires_grad_(True)
        body = [*model.conv1.parameters(), *model.conv2.parameters()]
        groups = [{"params": body, **extra}, {"params": model.head.parameters(), "lr": 0.05}]
        made.append((model, make(groups, lr=LR, momentum=0.9, weight_decay=5e-3)))
    for model, optimizer in made:
        for t in range(STEPS):
            backward(model, t)
            optimizer.step()
    assert "scale" not in made[1][1].param_groups[1]
    made[1][1].fold()
    assert_same(made[1], made[0])


@pytest.mark.parametrize("nesterov", [False, True])
def test_there_and_back_in_the_middle_of_a_run(target, nesterov):
    """torch.optim.SGD → texp.SGD, ordinary → exponential → saved and loaded → exponential → torch.optim.SGD."""
    recipe = Recipe(nesterov, lr="cosine")
    expected, _ = pair(recipe, target)
    model, optimizer, schedule = pair(recipe, target)[0]
    recipe.train(*expected)

    def move(make, **extra):
        """A new optimizer and scheduler that take over, through bytes that load with weights_only."""
        file = io.BytesIO()
        torch.save((optimizer.state_dict(), schedule.state_dict()), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        fresh = make(trainable(model), **recipe.arguments(), **extra)
        fresh_schedule = LambdaLR(fresh, LRS[recipe.lr])
        fresh.load_state_dict(saved[0])
        fresh_schedule.load_state_dict(saved[1])
        return fresh, fresh_schedule

    recipe.train(model, optimizer, schedule, range(0, 50))
    optimizer, schedule = move(target.sgd)
    assert not {"scale", "scale_invariant"} & optimizer.param_groups[0].keys()
    recipe.train(model, optimizer, schedule, range(50, 70))
    optimizer.param_groups[0]["scale_invariant"] = True
    recipe.train(model, optimizer, schedule, range(70, 120))
    group = optimizer.param_groups[0]
    scale = group["scale"], group["scale_exponent"], group["carried_decay"]
    assert scale > (1.0, 0, 0.0)
    optimizer, schedule = move(target.sgd)
    group = optimizer.param_groups[0]
    assert scale == (group["scale"], group["scale_exponent"], group["carried_decay"])
    assert group["scale_invariant"] is True
    recipe.train(model, optimizer, schedule, range(120, 150))
    optimizer.fold()
    assert (group["scale"], group["scale_exponent"], group["carried_decay"]) == (1.0, 0, 0.0)
    recipe.train(model, optimizer, schedule, range(150, 180))
    group["scale_invariant"] = False  # without folding first: the scale stays where it is
    recipe.train(model, optimizer, schedule, range(180, 200))
    optimizer.fold()
    optimizer, schedule = move(torch.optim.SGD)
    recipe.train(model, optimizer, schedule, range(200, STEPS))
    assert_same((model, optimizer), expected)


def test_a_state_dict_of_torch_starts_an_exponential_run_at_any_step(target):
    """Loaded into a group that is already marked: the mark stays, P = 1 and κ = 0."""
    recipe = Recipe()
    expected, actual = pair(recipe, target)
    recipe.train(*expected, range(100))
    actual[0].load_state_dict(expected[0].state_dict())
    actual[1].param_groups[0].update(scale=1.5, scale_exponent=3, carried_decay=0.1)
    state = torch.optim.SGD.state_dict(expected[1])
    actual[1].load_state_dict(state)
    actual[2].load_state_dict(expected[2].state_dict())
    group = actual[1].param_groups[0]
    assert group["scale_invariant"] is True
    assert (group["scale"], group["scale_exponent"], group["carried_decay"]) == (1.0, 0, 0.0)
    recipe.train(*expected, range(100, 200))
    recipe.train(*actual, range(100, 200))
    actual[1].fold()
    assert_same(actual, expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_running_statistics_that_grow_with_the_weights(target, nesterov):
    """Evaluation with the running statistics of BatchNorm, at any step: with norm_stats it is that of the SGD
    run. Both norms here see the power 1, for the first resets it."""
    made = []
    for make, extra in ((torch.optim.SGD, {}), (target.sgd, {"scale_invariant": True})):
        model = network(device=target.device)
        for norm in (model.norm1, model.norm2):
            norm.__init__(norm.num_features, eps=norm.eps, affine=False, dtype=torch.float64, device=target.device)
        stats = [
            (stat, d) for n in (model.norm1, model.norm2) for stat, d in ((n.running_mean, 1), (n.running_var, 2))
        ]
        if extra:
            extra = {**extra, "norm_stats": stats}
        group = {"params": trainable(model), **extra}
        made.append((model, make([group], lr=LR, momentum=0.9, weight_decay=0.02, nesterov=nesterov)))
    x = torch.randn(8, 1, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(target.device)
    for t in range(100):
        for model, optimizer in made:
            backward(model, t)
            optimizer.step()
        if t % 10 == 9:
            outputs = [model.eval()(x) for model, _ in made]
            assert relative_error(outputs[1], outputs[0]) < 1e-11
            for model, _ in made:
                model.train()
    assert made[1][1].param_groups[0]["scale_exponent"] > 0
    made[1][1].fold()
    for name, stat in made[0][0].named_buffers():
        assert relative_error(made[1][0].get_buffer(name), stat) < 1e-11


def test_log10_lr_is_the_lr_of_plain_sgd(target):
    """The paper's own form: plain SGD without decay, with the LRs that texp.SGD reports, from the same weights."""
    recipe = Recipe(lr="cosine")
    _, actual = pair(recipe, target)
    plain_model = network(device=target.device)
    plain = torch.optim.SGD(trainable(plain_model), lr=0.0, momentum=0.9)
    exact = texp.theory.translate([LR * LRS["cosine"](t) for t in range(STEPS)], recipe.decay, 0.9)
    for t in range(STEPS):
        (log10_lr,) = actual[1].log10_lr()
        assert log10_lr == pytest.approx(exact[t], abs=1e-12)
        plain.param_groups[0]["lr"] = 10**log10_lr
        loss, plain_loss = backward(actual[0], t), backward(plain_model, t)
        assert plain_loss.item() == pytest.approx(loss.item(), rel=1e-11)
        actual[1].step()
        actual[2].step()
        plain.step()
    group = actual[1].param_groups[0]
    for p, q in zip(trainable(actual[0]), trainable(plain_model), strict=True):
        assert relative_error(p * 2.0 ** group["scale_exponent"], q) < 1e-11


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_norm_settles_at_its_equilibrium(swift_target, momentum):
    """Under gradients that are noise of unit length, ‖g‖ = 1/‖p‖ and ⟨g, p⟩ = 0, ‖θ‖² settles where what a step
    adds balances what decay takes away: without momentum ‖θ‖² = α²‖θ‖² + η²/‖θ‖², so ‖θ‖⁴ = η²/(1 − α²).
    In the exponential form ‖w‖²/η̃ is constant while both grow."""
    eta, decay = 0.1, 0.02
    p = torch.nn.Parameter(torch.full((1000,), 0.02, dtype=torch.float64, device=swift_target.device))
    optimizer = swift_target.sgd([p], lr=eta, momentum=momentum, weight_decay=decay, scale_invariant=True)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(4000):
        g = torch.randn(1000, generator=generator, dtype=torch.float64).to(swift_target.device)
        g -= g.dot(p.detach()) / p.detach().dot(p.detach()) * p.detach()
        p.grad = g / g.norm() / p.detach().norm()
        log10_stored_lr = optimizer.log10_lr()[0] - 2 * optimizer.param_groups[0]["scale_exponent"] * math.log10(2)
        ratios.append(p.detach().square().sum().item() / 10**log10_stored_lr)
        optimizer.step()
    settled = ratios[2000:]
    assert optimizer.log10_lr()[0] > 5
    # With 1,000 independent directions a step's noise is within a few times 1/√1000 of orthogonal to the rest.
    assert max(settled) / min(settled) < 1.1
    if momentum == 0:
        alpha = 1 - eta * decay
        theta2 = eta / math.sqrt(1 - alpha**2)
        assert settled[-1] == pytest.approx(theta2 / eta * alpha, rel=0.01)


@pytest.mark.parametrize("nesterov", [False, True])
def test_in_float32_nothing_is_lost_but_by_rounding(target, nesterov):
    """60 steps in float32 against torch.optim.SGD in float64, P rescaled about ten times. The gradients g of θ are
    given, and so the steps are linear in θ and v.

    A row rounds at most ten times by an ulp, half of them up (backends/test_rows.py), relative to what is summed:
    |θ| in p, and |v| + κ|θ| + |g| in P·b, which comes to θ times η/(1 − γ) at most. Inside the theorem's range the
    steps damp both without oscillation, so the errors of all steps at most add up.
    """
    gamma, eta, lambda_ = 0.5, 0.1, 0.5
    generator = torch.Generator().manual_seed(0)
    theta = torch.nn.Parameter(torch.randn(500, generator=generator, dtype=torch.float64))
    p = torch.nn.Parameter(theta.detach().float().to(target.device))
    arguments = {"lr": eta, "momentum": gamma, "weight_decay": lambda_, "nesterov": nesterov}
    expected = torch.optim.SGD([theta], **arguments)
    optimizer = target.sgd([p], scale_invariant=True, **arguments)
    (group,) = optimizer.param_groups
    bound = torch.finfo(torch.float32).eps * theta.detach().abs()  # that of the start
    for _ in range(60):
        theta.grad = torch.randn(500, generator=generator, dtype=torch.float64)
        p.grad = (theta.grad / group["scale"]).float().to(target.device)
        expected.step()
        optimizer.step()
        v = expected.state[theta]["momentum_buffer"]
        summed = v.abs() + group["carried_decay"] * theta.detach().abs() + theta.grad.abs()
        bound += 10 * torch.finfo(torch.float32).eps * (theta.detach().abs() + eta / (1 - gamma) * summed)
    assert group["scale_exponent"] >= 8
    optimizer.fold()
    assert ((p.detach().cpu().double() - theta.detach()).abs() <= bound).all()
    # And the bound is worth something: a decay that was lost in one step would not be within it.
    assert (bound < eta * lambda_ * 0.1 * theta.detach().abs().mean()).all()
