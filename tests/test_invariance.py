"""texp.audit finds what is scale-invariant in models whose answer is known, and training with the groups of
texp.param_groups visits the functions of torch.optim.SGD, running statistics included."""

import contextlib
import copy
import dataclasses
import itertools
import random
import subprocess
import sys
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from torch import nn

import texp
from tests.conftest import relative_error
from tests.models import CASES, Case, vgg
from texp.invariance import bias_or_norm

STEPS = 100
# λη = 0.002 is within the theorem's range of 0.0026 for γ = 0.9: P passes 2 some three times in these steps.
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}


def groups_of(case: Case, model: nn.Module, no_decay: str | None, **options) -> list[dict]:
    empty = not case.invariant(model, no_decay is not None)
    with pytest.warns(UserWarning, match="no parameters are scale-invariant") if empty else contextlib.nullcontext():
        return texp.param_groups(model, case.batch(0)[0], no_decay=no_decay, **options)


@pytest.mark.parametrize("no_decay", [None, "bias_and_norm"], ids=["all", "bias_and_norm"])
@pytest.mark.parametrize("name", CASES)
class TestKnownAnswers:
    def test_the_set(self, name, no_decay):
        case, model = CASES[name], CASES[name].model(eps=None)
        found = texp.audit(model, case.batch(0)[0], hold=no_decay and bias_or_norm)
        assert set(found.invariant) == case.invariant(model, no_decay is not None)
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert sorted(found.invariant + found.rest) == sorted(trainable)
        expected = [n for n in trainable if any(fnmatch(n, x) for x in case.without_effect)]
        assert found.without_effect == expected
        assert sorted(itertools.chain(*found.sets)) == sorted(found.invariant)
        assert found.gap > 1e6
        assert found.deviation < 1e-12
        assert "singular gap" in str(found)
        assert all(n in str(found) for n in found.rest)

    def test_training(self, name, no_decay):
        """100 steps with everything trainable: the loss of each step, and evaluation every tenth."""
        case = CASES[name]
        expected, actual = case.model(), case.model()
        groups = groups_of(case, actual, no_decay, **OPTIONS)
        optimizers = [torch.optim.SGD(plain_groups(expected, no_decay), **OPTIONS), texp.SGD(groups)]
        differences = differing(case, [expected, actual], optimizers)
        assert max(differences) < 1e-9
        if groups[0]["scale_invariant"]:
            assert groups[0]["scale_exponent"] >= 2
        optimizers[1].fold()
        for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
            assert relative_error(p, q) < 1e-6 or q.norm() < 1e-9


def plain_groups(model: nn.Module, no_decay: str | None) -> list[dict]:
    """As one would write them for torch.optim.SGD."""
    still = [p for n, p in model.named_parameters() if no_decay and bias_or_norm(n, p)]
    ids = {id(p) for p in still}
    moving = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": params, **extra} for params, extra in ((moving, {}), (still, {"weight_decay": 0.0})) if params]


def differing(case: Case, models: list[nn.Module], optimizers: list, steps: int = STEPS) -> list[float]:
    """Relative differences of the loss at every step, and of outputs in evaluation at every tenth."""
    differences = []
    for t in range(steps):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = case.loss(model, t)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        differences.append(abs(losses[1] / losses[0] - 1))
        if t % 10 == 9:
            outputs = [case.evaluate(model) for model in models]
            differences.append(relative_error(outputs[1], outputs[0]))
    return differences


def against_sgd(case: Case, change=lambda groups, model: None) -> float:
    """The largest difference when `change` was made to the groups."""
    expected, actual = case.model(), case.model()
    groups = texp.param_groups(actual, case.batch(0)[0], **OPTIONS)
    change(groups, actual)
    optimizers = [torch.optim.SGD(expected.parameters(), **OPTIONS), texp.SGD(groups)]
    return max(differing(case, [expected, actual], optimizers))


BIASED = CASES["VGG, biases before norms"]


class TestGroups:
    @pytest.mark.parametrize("no_decay", [None, "bias_and_norm"])
    def test_every_backend_scales_what_must_grow(self, swift_target, no_decay):
        """Running statistics, and without decay also the biases that they see."""
        expected, actual = (BIASED.model().to(swift_target.device) for _ in range(2))
        groups = texp.param_groups(actual, BIASED.batch(0)[0], no_decay=no_decay, **OPTIONS, nesterov=True)
        optimizer = swift_target.sgd(groups)
        plain = torch.optim.SGD(plain_groups(expected, no_decay), **OPTIONS, nesterov=True)
        assert max(differing(BIASED, [expected, actual], [plain, optimizer], 60)) < 1e-9

    def test_what_is_in_them(self):
        model = BIASED.model()
        groups = texp.param_groups(model, BIASED.batch(0)[0], no_decay="bias_and_norm", lr=0.3, weight_decay=0.1)
        scaled, rest, still = groups
        assert [g["scale_invariant"] for g in groups] == [True, False, False]
        assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
        assert [g["lr"] for g in groups] == [0.3] * 3
        assert scaled["params"] == [model[i].weight for i in (0, 4 - 1, 7)]
        assert rest["params"] == [model[11].weight]
        assert {id(p) for p in still["params"]} == {id(p) for i in (1, 4, 8) for p in model[i].parameters()} | {
            id(model[11].bias)
        }
        stats = {id(tensor): power for tensor, power in scaled["norm_stats"]}
        for norm in (model[1], model[4], model[8]):
            assert stats.pop(id(norm.running_mean)) == 1
            assert stats.pop(id(norm.running_var)) == 2
        # No group of their own: they have no gradient, and grow as the statistics that cancel them.
        assert stats == {id(model[i].bias): 1 for i in (0, 3, 7)}

    def test_no_decay_by_name(self):
        case, model = CASES["VGG"], CASES["VGG"].model()
        groups = texp.param_groups(model, case.batch(0)[0], no_decay=lambda name, p: name.startswith("3."))
        assert [len(g["params"]) for g in groups] == [6, 4, 1]
        assert groups[2]["params"][0] is model[3].weight
        with pytest.raises(ValueError, match="bias_and_norm"):
            texp.param_groups(model, case.batch(0)[0], no_decay="biases")

    def test_frozen_parameters_stay_in_an_ordinary_group(self):
        case, model = CASES["unused"], CASES["unused"].model()
        groups = texp.param_groups(model, case.batch(0)[0])
        assert any(p is model.frozen.weight for p in groups[1]["params"])

    def test_a_wrong_group_diverges(self):
        """The head, which the audit leaves out, marked by hand."""

        def mark_the_head(groups, model):
            head = model[11].weight
            groups[0]["params"].append(head)
            groups[1]["params"] = [p for p in groups[1]["params"] if p is not head]

        assert against_sgd(CASES["VGG"]) < 1e-9
        assert against_sgd(CASES["VGG"], mark_the_head) > 1e-3

    def test_without_statistics_evaluation_is_wrong(self):
        assert against_sgd(CASES["ResNet"], lambda groups, model: groups[0].update(norm_stats=[])) > 1e-3


def everything(model: nn.Module) -> list:
    """All that an audit must leave as it is, as bytes or values."""
    hooks = [list(vars(m)[key]) for m in model.modules() for key in vars(m) if key.endswith("_hooks")]
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return [
        [(id(t), t._version, t.requires_grad, t.detach().numpy().tobytes()) for t in tensors],
        [(m.training, getattr(m, "eps", None), getattr(m, "momentum", None)) for m in model.modules()],
        hooks,
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        (torch.get_default_dtype(), torch.is_grad_enabled()),
    ]


class Fails(nn.Sequential):
    """After so many calls of any copy, counted here."""

    calls = 0

    def forward(self, x):
        Fails.calls += 1
        if Fails.calls > 5:
            raise OSError("out of luck")
        random.random(), np.random.rand(), torch.rand(())
        return super().forward(x)


class TestLeavesNoTrace:
    @pytest.mark.parametrize("name", CASES)
    def test_nothing_changes(self, name):
        case, model = CASES[name], CASES[name].model(eps=None).float()
        case.loss(model.double(), 0).backward()
        for i, module in enumerate(model.modules()):
            module.training = bool(i % 2)
        before = everything(model)
        with torch.no_grad():
            texp.audit(model, case.batch(0)[0])
            assert not torch.is_grad_enabled()
        assert everything(model) == before

    def test_not_even_when_it_fails(self):
        model = Fails(*vgg())
        before = everything(model)
        with pytest.raises(OSError, match="out of luck"):
            texp.audit(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
        assert Fails.calls == 6
        assert everything(model) == before

    def test_it_is_a_function_of_its_seed(self):
        case = CASES["pre-activation ResNet"]
        audits = []
        for i, seed in enumerate((1, 1, 2)):
            torch.manual_seed(i)
            audits.append(texp.audit(case.model(), case.batch(0)[0], seed=seed))
        assert audits[0] == audits[1]
        assert audits[2].gap != audits[0].gap
        assert audits[2].invariant == audits[0].invariant

    def test_scipy_is_imported_when_it_is_needed(self):
        code = "import sys, texp; assert 'scipy' not in sys.modules; sys.modules['scipy'] = None\n"
        code += "try: texp.audit(None)\nexcept ImportError as error: print(error)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "pip install scipy" in done.stdout


def example(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    extra: tuple


class Wrapped(nn.Module):
    """`how` turns the model and the input into an output, or into something else."""

    def __init__(self, how, **parts) -> None:
        super().__init__()
        self.model, self.how = vgg(), how
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.how(self, *args)


class TestModels:
    """What may go in, and come out."""

    @pytest.mark.parametrize(
        "how",
        [
            lambda m, x: (m.model(x), 3, [None]),
            lambda m, x: {"a": {"b": [m.model(x)]}, "label": "cat"},
            lambda m, x: Out(m.model(x), (m.model(x).argmax(1),)),
            lambda m, x: m.model(x).logsumexp(1).mean(),
        ],
    )
    def test_outputs(self, how):
        found = texp.audit(Wrapped(how), example())
        assert found.rest == [f"model.{n}" for n in ("8.weight", "8.bias", "11.weight", "11.bias")]

    def test_inputs(self):
        """Nested, of several kinds, and a `forward` of one's own."""
        batch = {"image": example(), "masks": [torch.ones(4, dtype=torch.bool)], "name": "cat"}

        def forward(model, batch, scale):
            return model.model(batch["image"] * scale)[batch["masks"][0]]

        found = texp.audit(Wrapped(None), batch, torch.tensor(2), forward=forward)
        assert len(found.rest) == 4

    def test_outputs_that_are_seen_are_not_free_to_grow(self):
        """A hidden layer among the outputs."""
        found = texp.audit(Wrapped(lambda m, x: (m.model(x), m.model[:4](x))), example())
        assert "model.3.weight" in found.rest

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_models_of_low_precision(self, dtype):
        assert len(texp.audit(vgg().to(dtype), example()).rest) == 4

    @pytest.mark.parametrize("name", CASES)
    def test_an_audit_in_float32(self, name):
        case, model = CASES[name], CASES[name].model()
        found = texp.audit(model, case.batch(0)[0], dtype=torch.float32)
        assert set(found.invariant) == case.invariant(model, no_decay=False)

    @pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
    def test_weights_that_hooks_compute(self):
        """torch's older weight_norm leaves computed tensors in the module, which deepcopy refuses."""
        model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        model(example())
        assert texp.audit(model, example()).invariant == ["0.weight_v"]

    def test_spectral_norm(self):
        """Its estimates are buffers that every forward pass in train mode changes."""
        conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
        model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        assert texp.audit(model, example()).invariant == ["0.parametrizations.weight.original"]

    def test_sparse_gradients(self):
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.LayerNorm(4), nn.Flatten(), nn.Linear(20, 3))
        tokens = torch.arange(40).view(8, 5) % 9
        assert texp.audit(model, tokens).invariant == ["0.weight"]

    def test_a_large_eps_is_told(self):
        """The set is that of eps = 0; what the eps spoils is measured with the model's own."""
        small, large = (CASES["VGG"].model(eps) for eps in (None, 0.5))
        audits = [texp.audit(model, example()) for model in (small, large)]
        assert audits[0].invariant == audits[1].invariant
        assert audits[0].eps_deviation < 1e-3
        assert audits[1].eps_deviation > 0.1

    def test_progress(self):
        seen = []
        found = texp.audit(vgg(), example(), progress=lambda *args: seen.append(args))
        assert seen[-1][:2] == (found.rows, found.rank)


class TestNotClearCut:
    def test_the_rank_has_not_settled(self):
        with pytest.raises(texp.AuditError, match=r"has not settled: it is 8 after max_rows = 16"):
            texp.audit(vgg(), example(), max_rows=16)

    def test_what_gradients_do_not_see(self):
        """The norm of a weight, detached."""
        model = Wrapped(lambda m, x: m.model(x) + m.model[0].weight.detach().norm())
        with pytest.raises(texp.AuditError, match="the output moves by"):
            texp.audit(model, example())

    def test_a_lower_precision_inside(self):
        def how(m, x):
            half = copy.deepcopy(m.model[:3]).float()
            y = torch.func.functional_call(half, {n: p.float() for n, p in m.model[:3].named_parameters()}, x.float())
            return m.model[3:](y.double())

        with pytest.raises(texp.AuditError, match="a lower precision than float64"):
            texp.audit(Wrapped(how), example())

    def test_statistics_of_another_kind(self):
        class Strange(nn.BatchNorm2d):
            def forward(self, x):
                self.running_mean.copy_(x.detach().mean((0, 2, 3)).exp())
                return super().forward(x)

        with pytest.raises(texp.AuditError, match="running_mean does not grow as a power of the scale"):
            texp.audit(vgg(norm=Strange), example())


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (vgg().requires_grad_(False), "no trainable parameters"),
            (nn.Sequential(nn.LazyConv2d(3, 3)), "0.weight has no shape yet"),
            (Wrapped(lambda m, x: x, z=nn.Parameter(torch.ones(2, dtype=torch.complex64))), "z is complex"),
            (Wrapped(lambda m, x: x.argmax(1)), "no tensor of floating-point numbers"),
            (Wrapped(lambda m, x: x), "depends on none of the trainable parameters"),
            (Wrapped(lambda m, x: m.model(x) / 0), "not finite"),
            (nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)), "4 channels sees 2 values per channel"),
        ],
    )
    def test_what_cannot_be_audited(self, model, message):
        with pytest.raises(ValueError, match=message):
            texp.audit(model, example(2))


class Net(nn.Module):
    """conv, BatchNorm, and what the test makes of it."""

    def __init__(self, then=lambda x: x) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.then = then

    def forward(self, x):
        return self.then(self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8)


class TestWhatLooksInvariant:
    """But is not, or not always."""

    @pytest.mark.parametrize("seed", range(4))
    def test_activations_that_clip(self, seed):
        """The scale and bias before a ReLU6 are not invariant once it clips, which random inputs may not show."""
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
            nn.Conv2d(6, 6, 3, bias=False, groups=6), nn.BatchNorm2d(6), nn.ReLU6(),
            nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 3),
        )  # fmt: skip
        assert texp.audit(model, images(), seed=seed).invariant == ["0.weight", "3.weight", "6.weight"]

    def test_a_wide_clip(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardtanh(-20, 20), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        assert "0.weight" not in texp.audit(model, images()).invariant

    @pytest.mark.parametrize("seed", range(3))
    def test_layers_that_are_skipped_at_random(self, seed):
        """Each row sees other choices: a layer that was never drawn would be thought to have no effect."""

        class Skipping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
                self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

            def forward(self, x):
                x = self.stem(x)
                for layer in self.layers:
                    if torch.rand(()) < 0.5:
                        x = x + torch.tanh(layer(x))
                return self.out(nn.functional.layer_norm(x, (6,), eps=1e-30))

        found = texp.audit(Skipping(), torch.randn(5, 6), seed=seed)
        assert found.without_effect == []
        assert found.invariant == []

    def test_an_example_of_ones(self):
        """A BatchNorm of a constant is noise; inputs are drawn for the first row, too."""
        assert texp.audit(Net(), torch.ones(4, 3, 8, 8)).invariant == texp.audit(Net(), images()).invariant

    @pytest.mark.parametrize("by_hand", [False, True])
    def test_norms_that_stay_in_eval_mode(self, by_hand):
        """Their statistics are constants: nothing before them may be scaled, nor are they."""

        class Frozen(Net):
            def train(self, mode: bool = True):
                super().train(mode)
                self.bn.eval()
                return self

        model = Net() if by_hand else Frozen()
        model.train()
        model.bn.eval()
        found = texp.audit(model, images())
        assert found.invariant == []
        assert found.norm_stats == []

    def test_a_complex_output_counts(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))

        def both(copied, x):
            y = copied(x)
            return nn.functional.batch_norm(y, None, None, training=True, eps=1e-30), torch.fft.rfft2(y)

        assert texp.audit(model, images(), forward=both).invariant == []


class TestWhatIsRefused:
    def test_statistics_under_other_names(self):
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3, bias=False)
                self.register_buffer("moving_mean", torch.zeros(4))

            def forward(self, x):
                x = self.conv(x)
                with torch.no_grad():
                    self.moving_mean.lerp_(x.mean((0, 2, 3)), 0.1)
                return nn.functional.batch_norm(x, None, None, training=True, eps=1e-30)

        with pytest.raises(ValueError, match="buffer moving_mean is changed by forward and grows with the weights"):
            texp.audit(Own(), images())

    def test_parameters_that_share_memory(self):
        model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False))
        model[2].weight.data = model[0].weight.data
        with pytest.raises(ValueError, match=r"parameters 0\.weight, 2\.weight share memory: make them one"):
            texp.audit(model, torch.randint(7, (3, 5)))

    def test_outputs_that_are_not_understood(self):
        with pytest.raises(ValueError, match="the output holds a Normal; see `forward`"):
            texp.audit(Net(lambda y: (y, torch.distributions.Normal(y, 1.0))), images())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.complex128])
    def test_dtypes_that_tell_too_little(self, dtype):
        with pytest.raises(ValueError, match=r"dtype must be torch\.float64 or torch\.float32, got"):
            texp.audit(Net(), images(), dtype=dtype)

    def test_a_forward_that_uses_the_model_itself(self):
        """What it has changed of the model by then is put back."""
        model = Net()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="forward uses the model itself"):
            texp.audit(model.double(), images(), forward=lambda copied, x: model(x) + 0 * copied(x))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name].to(value.dtype)), name


def test_masks_and_complex_buffers_are_kept():
    """A mask of −inf is no number to draw others like; a complex buffer has a complex dtype of the same width."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12, bias=False), nn.Linear(4, 3)
            self.norm = nn.LayerNorm(4)
            self.register_buffer("turns", torch.polar(torch.ones(5, 2), torch.arange(10.0).view(5, 2)))

        def forward(self, x, mask):
            assert self.turns.dtype == torch.complex128
            q, k, v = self.qkv(x).chunk(3, -1)
            turned = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (2, 2))) * self.turns).flatten(-2)
            return self.out(self.norm(torch.softmax(turned @ k.mT + mask, -1) @ v))

    mask = torch.full((5, 5), -torch.inf).triu(1)
    found = texp.audit(Attention(), torch.randn(2, 5, 4), mask)
    assert "qkv.weight" in found.rest
    assert found.gap > 1e6


def test_no_generator_of_a_gpu_is_seeded(monkeypatch):
    """fork_rng does not give back the states of GPUs that the audit has nothing to do with."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seeded.append(seed))
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.append(seed))
    texp.audit(Net(), images())
    assert seeded == []


def test_deep_models_stay_near_their_starting_point():
    """Every point is a factor away from the first one; a walk would be lost after hundreds of rows."""
    blocks = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(24)]

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)
            self.blocks = nn.ModuleList(blocks)

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(self.norm(x))

    found = texp.audit(Deep(), torch.randn(6, 4))
    writers = ["stem", *(f"blocks.{i}.3" for i in range(24))]
    assert set(found.invariant) == {f"{name}.{kind}" for name in writers for kind in ("weight", "bias")}
    assert found.gap > 1e6


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_a_large_eps_is_warned_of(eps):
    """The set is that of the model without eps; how much eps spoils is said."""
    torch.manual_seed(0)
    model = Net()
    model.bn.eps = eps
    found = texp.audit(model, images())
    assert "conv.weight" in found.invariant
    assert (found.eps_deviation > 0.01) == (eps > 0.1)
    warned = (
        pytest.warns(UserWarning, match="eps of the model's norms is large")
        if eps > 0.1
        else contextlib.nullcontext()
    )
    with warned:
        texp.param_groups(model, images())
