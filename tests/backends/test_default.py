"""Which kernels an optimizer takes where no backend is named, without a GPU: devices and kernels are stand-ins."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import texp
from texp import backends, native, optimizer
from texp.backends import Kernels

GPU = torch.device("cuda:0")
NO_GPUS = frozenset()


def refused(device: int) -> None:
    raise RuntimeError("no kernel image is available for execution on the device")


CORES = {
    "with the kernel": SimpleNamespace(with_cuda=True, load_cuda_kernels=lambda device: None),
    "for other GPUs": SimpleNamespace(with_cuda=True, load_cuda_kernels=refused),
    "without the kernel": SimpleNamespace(with_cuda=False),
    "none": None,
}


@pytest.fixture
def stand_ins(monkeypatch):
    """Makes this look like a machine with a GPU and such a core and such Triton kernels."""

    def make(core: str, triton: str, hip: str | None = None) -> None:
        monkeypatch.setattr(native, "load", lambda may_build: CORES[core])
        monkeypatch.setattr(native, "core", lambda: CORES[core])
        monkeypatch.setattr(native, "why_missing", lambda part: "so it was")
        monkeypatch.setattr(backends.cuda, "devices", lambda: (1, None))
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.version, "hip", hip)
        kernels = SimpleNamespace(INTERPRETED=triton == "interpreted", Launcher=lambda: "triton")
        loaded = (None, "Triton is not installed") if triton == "none" else (kernels, backends.OK)
        monkeypatch.setattr(backends.triton, "_kernels", lambda: loaded)

    return make


# By core and Triton: the backend for tensors on GPUs.
ON_GPUS = {
    ("with the kernel", "there"): "cuda",
    ("with the kernel", "none"): "cuda",
    ("for other GPUs", "there"): "triton",
    ("for other GPUs", "none"): "reference",
    ("without the kernel", "there"): "triton",
    ("without the kernel", "interpreted"): "reference",
    ("without the kernel", "none"): "reference",
    ("none", "there"): "reference",
    ("none", "none"): "reference",
}


@pytest.mark.parametrize(("core", "triton"), ON_GPUS)
def test_the_best_kernel_that_there_is(stand_ins, core, triton):
    stand_ins(core, triton)
    expected = ON_GPUS[core, triton]
    assert backends.default_for("cuda", [GPU]) == expected
    assert backends.default_for("cuda") == ("cuda" if core == "for other GPUs" else expected)  # whatever GPU it is
    made = backends.kernels(None, {GPU})
    assert made.cuda == {"cuda": True, "triton": "triton", "reference": False}[expected]
    assert made.cpu == (core != "none")
    assert made.scale_on == (None if expected == "reference" else "cuda")
    assert made.core is CORES[core]


def test_on_rocm_triton_is_asked_first(stand_ins):
    stand_ins("with the kernel", "there", hip="6.4")
    assert backends.default_for("cuda", [GPU]) == "triton"
    assert "ROCm" in backends.available()["cuda"]


def test_a_folder_that_passes_for_triton(monkeypatch, tmp_path):
    """Python takes any folder of that name on its path for a package."""
    (tmp_path / "triton").mkdir()
    monkeypatch.setitem(sys.modules, "triton", None)  # so that what is imported here is taken out again
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert backends.triton.missing().startswith("Triton is installed but does not load: ")


@pytest.mark.parametrize("core", CORES)
def test_nothing_of_gpus_is_looked_at_for_tensors_on_the_cpu(stand_ins, monkeypatch, core):
    """To ask for them is slow, and a process that forks afterwards can use none."""
    stand_ins(core, "there")
    for module, name in ((backends.cuda, "devices"), (backends.triton, "_kernels")):
        monkeypatch.setattr(module, name, lambda: pytest.fail("GPUs were looked for"))
    assert backends.kernels(None) == Kernels(CORES[core], cpu=core != "none")


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """What `backends.kernels` is asked for; parameters are on the GPU of which tests say so in `on_gpu`."""
    calls, kernels = [], backends.kernels

    def recorded(name, gpus):
        calls.append((name, gpus))
        return kernels(name)

    monkeypatch.setattr(backends, "kernels", recorded)
    monkeypatch.setattr(
        optimizer, "_gpus", lambda params: frozenset(GPU for p in params if getattr(p, "is_on_gpu", False))
    )
    return calls


def on_gpu(p: nn.Parameter) -> nn.Parameter:
    p.is_on_gpu = True
    p.grad = torch.ones_like(p)
    return p


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3))


class TestAnOptimizer:
    """Looks for kernels for GPUs when it first has a parameter on one."""

    def test_with_parameters_on_the_cpu(self, asked):
        texp.SGD([parameter()], lr=0.1).add_param_group({"params": [parameter()]})
        assert asked == [(None, NO_GPUS)]

    def test_with_one_on_a_gpu(self, asked):
        made = texp.SGD([("first", parameter()), ("second", on_gpu(parameter()))], lr=0.1)
        made.add_param_group({"params": [("third", on_gpu(parameter()))]})
        assert asked == [(None, NO_GPUS), (None, {GPU})]

    def test_with_one_in_a_later_group(self, asked):
        made = texp.SGD([parameter()], lr=0.1)
        made.add_param_group({"params": on_gpu(parameter())})
        assert asked == [(None, NO_GPUS), (None, {GPU})]

    @pytest.mark.parametrize("backend", [None, "reference"])
    def test_with_one_that_moves(self, asked, monkeypatch, backend):
        """It is stepped by plain torch once, and then by the kernels."""
        monkeypatch.setattr(native, "load", lambda may_build: None)  # so that all is left to plain torch
        p = parameter()
        made = texp.SGD([p], lr=0.5, backend=backend)
        on_gpu(p)
        for _ in range(2):
            made.step()
        assert asked == [(backend, NO_GPUS)] + ([(None, {GPU})] if backend is None else [])
        assert (p == 0).all()

    def test_when_it_is_loaded(self, asked):
        made = texp.SGD([on_gpu(parameter())], lr=0.1)
        made.load_state_dict(made.state_dict())
        assert asked[-1] == (None, {GPU})

    def test_with_a_named_backend(self, asked):
        texp.SGD([on_gpu(parameter())], lr=0.1, backend="reference")
        assert [name for name, _ in asked] == ["reference"]
