"""What takes the place of names that a version of torch may not have does the same as they do in this one."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils import cpp_extension

import texp
from texp import torch_internals

NAMES = [
    (torch_optimizer, "_global_optimizer_pre_hooks"),
    (torch, "_disable_dynamo"),
    (torch, "_is_zerotensor"),
    (torch._C, "_len_torch_dispatch_stack"),
    (torch, "_appdirs"),
    (torch._C, "_cuda_getCurrentRawStream"),
    *((torch, f"_foreach_{name}") for name in ("add", "add_", "mul", "copy_")),
]


@pytest.fixture(scope="module")
def without():
    """The module as it is where torch has none of these names."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in NAMES:
            patch.delattr(owner, name, raising=False)
        patch.setitem(sys.modules, "torch._appdirs", None)
        spec = importlib.util.spec_from_file_location("without", torch_internals.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_hooks_are_always_expected(without):
    assert without.global_step_pre_hooks
    assert without.global_step_post_hooks
    assert not torch_internals.global_step_pre_hooks
    assert not torch_internals.global_step_post_hooks
    hook = torch_optimizer.register_optimizer_step_post_hook(lambda *arguments: None)
    try:
        assert torch_internals.global_step_post_hooks
    finally:
        hook.remove()


def test_other_answers(without):
    assert without.disable_dynamo(lambda: 3)() == torch_internals.disable_dynamo(lambda: 3)() == 3


def test_the_folder_of_extensions(without):
    assert torch_internals.extensions_folder() == cpp_extension.get_default_build_root()
    assert Path(without.extensions_folder()).is_relative_to(Path.home())


@pytest.mark.parametrize("name", ["add", "add_", "mul", "copy_"])
def test_foreach(without, name):
    for other in ([torch.full((2,), 3.0), torch.full((3,), 5.0)], 2.0):
        if name == "copy_" and other == 2.0:
            continue
        made = []
        for module in (torch_internals, without):
            tensors = [torch.arange(2.0), torch.arange(3.0)]
            arguments = {"alpha": -0.5} if name == "add_" and isinstance(other, list) else {}
            returned = getattr(module, f"foreach_{name}")(tensors, other, **arguments)
            made.append(tensors if name.endswith("_") else returned)
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_a_step_is_the_same(without, monkeypatch):
    stepped = []
    for names in (torch_internals, without):
        for name in ("foreach_add", "foreach_add_", "foreach_mul", "foreach_copy_"):
            monkeypatch.setattr(texp.backends.reference, name, getattr(names, name))
        p = nn.Parameter(torch.arange(4.0))
        optimizer = texp.SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, backend="reference")
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
        stepped.append(p)
    assert torch.equal(*stepped)


def test_they_stand_nowhere_else():
    """No other module of texp names what torch keeps to itself."""
    command = ["git", "grep", "-nE", r"torch(\.[a-z_]+)*\._[a-zA-Z]|import _[a-z]", "--", "texp", "kernels", "csrc"]
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        pytest.skip("this is no checkout of git")
    found = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.splitlines()
    assert found
    others = [line for line in found if not line.startswith("texp/torch_internals.py")]
    assert others == [
        line for line in others if "torch._dynamo" in line and line.startswith("texp/invariance/probe.py")
    ]
