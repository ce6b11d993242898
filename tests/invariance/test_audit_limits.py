"""What texp.audit must not be taken in by, what it cannot answer, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

import texp
from tests.invariance.models import Wrapped, example, vgg


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


class Routed(nn.Module):
    """A residual stream with an expert that is taken when `taken` says so."""

    def __init__(self, expert: nn.Module, taken) -> None:
        super().__init__()
        self.stem, self.expert, self.norm, self.head = nn.Linear(6, 6), expert, nn.LayerNorm(6), nn.Linear(6, 3)
        self.taken = taken

    def forward(self, x):
        stream = self.stem(x)
        if self.taken(x):
            stream = stream + self.expert(x)
        return self.head(self.norm(stream))


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
        assert texp.audit(model, example(), seed=seed).invariant == ["0.weight", "3.weight", "6.weight"]

    def test_a_wide_clip(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardtanh(-20, 20), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        assert "0.weight" not in texp.audit(model, example()).invariant

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

    def test_a_branch_that_no_input_takes(self):
        """As an expert that nothing is routed to: it writes to the residual stream, but is not in the set."""
        model = Routed(nn.Linear(6, 6), lambda x: (x > 1e3).any())
        found = texp.audit(model, torch.randn(5, 6))
        assert found.unreached == found.without_effect == ["expert.weight", "expert.bias"]
        assert {found.reasons[name] for name in found.unreached} == {"reached by no input that was tried"}
        assert "(if others do, this may be wrong): expert.weight, expert.bias" in str(found)
        with pytest.warns(UserWarning, match=r"no input that was tried reaches 2 parameters \(expert\.weight, "):
            texp.param_groups(model, torch.randn(5, 6))
        texp.param_groups(model.requires_grad_(True), torch.full((5, 6), 1e4))
        model.expert.requires_grad_(False)
        texp.param_groups(model, torch.randn(5, 6))

    def test_a_branch_that_few_inputs_take(self):
        """Where too few rows see it to say what of it must be scaled, more are tried, and at last it is said what
        lacks."""

        def audit(share):
            expert = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
            return texp.audit(Routed(expert, lambda x: torch.rand(()) < share), torch.randn(5, 6), seed=8)

        assert audit(0.03).invariant == ["stem.weight", "stem.bias", "expert.2.weight", "expert.2.bias"]
        with pytest.raises(
            texp.AuditError, match=r"not clear.* Only \d of \d+ rows see expert\..*: a larger example"
        ):
            audit(0.02)

    def test_an_example_of_ones(self):
        """A BatchNorm of a constant is noise; inputs are drawn for the first row, too."""
        assert texp.audit(Net(), torch.ones(4, 3, 8, 8)).invariant == texp.audit(Net(), example()).invariant

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
        found = texp.audit(model, example())
        assert found.invariant == []
        assert found.norm_stats == []

    def test_a_complex_output_counts(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))

        def both(copied, x):
            y = copied(x)
            return nn.functional.batch_norm(y, None, None, training=True, eps=1e-30), torch.fft.rfft2(y)

        assert texp.audit(model, example(), forward=both).invariant == []


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
            texp.audit(Own(), example())

    def test_parameters_that_share_memory(self):
        model = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False))
        model[2].weight.data = model[0].weight.data
        with pytest.raises(ValueError, match=r"parameters 0\.weight, 2\.weight share memory: make them one"):
            texp.audit(model, torch.randint(7, (3, 5)))

    def test_outputs_that_are_not_understood(self):
        with pytest.raises(ValueError, match="the output holds a Normal; see `forward`"):
            texp.audit(Net(lambda y: (y, torch.distributions.Normal(y, 1.0))), example())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.complex128])
    def test_dtypes_that_tell_too_little(self, dtype):
        with pytest.raises(ValueError, match=r"dtype must be torch\.float64 or torch\.float32, got"):
            texp.audit(Net(), example(), dtype=dtype)

    def test_a_forward_that_uses_the_model_itself(self):
        """What it has changed of the model by then is put back."""
        model = Net()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="forward uses the model itself"):
            texp.audit(model.double(), example(), forward=lambda copied, x: model(x) + 0 * copied(x))
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
    texp.audit(Net(), example())
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
