"""texp.audit finds what is scale-invariant in models whose answer is known, and leaves no trace in them."""

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
from tests.invariance.models import CASES, Wrapped, example, vgg
from texp.invariance.audit import bias_or_norm


@pytest.mark.parametrize("no_decay", [None, "bias_and_norm"], ids=["all", "bias_and_norm"])
@pytest.mark.parametrize("name", CASES)
def test_the_set(name, no_decay):
    case, model = CASES[name], CASES[name].model(eps=None)
    found = texp.audit(model, case.batch(0)[0], hold=no_decay and bias_or_norm)
    assert set(found.invariant) == case.invariant(model, no_decay is not None)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(found.invariant + found.rest) == sorted(trainable)
    for expected, names in ((case.without_effect, found.without_effect), (case.unreached, found.unreached)):
        assert names == [n for n in trainable if any(fnmatch(n, x) for x in expected)]
    assert sorted(itertools.chain(*found.sets)) == sorted(found.invariant)
    assert found.gap > 1e6
    assert found.deviation < 1e-12
    assert "singular gap" in str(found)
    assert all(n in str(found) for n in found.rest)


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


@dataclasses.dataclass
class Out:
    logits: torch.Tensor
    extra: tuple


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
