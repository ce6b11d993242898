"""What is kept from the last step is checked before it is used: whatever was changed meanwhile is seen."""

from collections import defaultdict
from collections.abc import Callable

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import texp
from tests.batch_norm_run import FORMS
from tests.conftest import targets
from texp.step.groups import scale_of

SHAPES = [(4, 3), (5,), (3, 4), (6,)]
ARGUMENTS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
# torch.optim.SGD as a loop over the tensors, and the backend that gathers everything anew at each step.
PEERS = {
    "torch": lambda params, **arguments: torch.optim.SGD(params, foreach=False, **arguments),
    "reference": lambda params, **arguments: texp.SGD(params, backend="reference", **arguments),
}


class Run:
    """Two groups of two parameters each, in float64, whose gradients are written in place where they fit."""

    def __init__(self, make: Callable, device: str = "cpu", **arguments) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator).double().to(device)) for shape in SHAPES]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.05}]
        self.optimizer = make(groups, **ARGUMENTS, **arguments)
        self.norm = nn.BatchNorm1d(2, device=device)
        self.without_grad: set[int] = set()
        self.steps = 0

    def step(self) -> None:
        generator = torch.Generator().manual_seed(1000 + self.steps)
        for i, p in enumerate(self.params):
            grad = torch.randn(p.shape, generator=generator).double()
            if i in self.without_grad:
                p.grad = None
            elif p.grad is None:
                p.grad = grad.to(p.device, getattr(p, "grad_dtype", None) or p.dtype)
            else:
                p.grad.copy_(grad)
        self.optimizer.step()
        self.steps += 1

    @property
    def groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def buf(self, i: int) -> Tensor | None:
        return self.optimizer.state.get(self.params[i], {}).get("momentum_buffer")

    def give(self, i: int, buf: Tensor | None) -> None:
        self.optimizer.state[self.params[i]]["momentum_buffer"] = buf

    def tensors(self) -> list[Tensor | None]:
        bufs = [self.buf(i) for i in range(len(self.params))]
        return [*self.params, *bufs, *self.norm.buffers()]

    def replace(self, i: int, data: Tensor) -> None:
        """With another shape or dtype: what belongs to it goes."""
        self.params[i].grad = None
        self.params[i].data = data
        self.optimizer.state.pop(self.params[i], None)


def matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, 1) if x.dim() < 2 else x


def other_strides(x: Tensor) -> Tensor:
    return matrix(x).detach().t().contiguous().t().view_as(x)


def other_strides_there(x: Tensor) -> Tensor:
    """At the very address of x."""
    return x.detach().as_strided(x.shape, (1, len(x)) if x.dim() == 2 else x.stride())


def with_gaps(x: Tensor) -> Tensor:
    return torch.stack((x.detach(), x.detach() + 9), -1)[..., 0]


def reordered(d: dict) -> None:
    items = list(d.items())[::-1]
    d.clear()
    d.update(items)


def swap_tensors(run: Run, i: int) -> None:
    torch.utils.swap_tensors(run.params[i], nn.Parameter(run.params[i].detach() + 1))


def set_memory(run: Run, i: int) -> None:
    with torch.no_grad():
        run.params[i].set_(run.params[i].detach() * 2)


def of_grad(change: Callable) -> Callable:
    def edit(run: Run, i: int) -> None:
        if (p := run.params[i]).grad is not None:
            p.grad = change(p.grad)

    return edit


def narrow_grad(run: Run, i: int) -> None:
    run.params[i].grad = None
    run.params[i].grad_dtype = torch.float32


def of_buf(change: Callable) -> Callable:
    return lambda run, i: None if run.buf(i) is None else run.give(i, change(run.buf(i)))


def more_state(run: Run, i: int) -> None:
    run.optimizer.state[run.params[i]] = {"step": 3, "other": run.params[0], "momentum_buffer": run.buf(i)}


def another_state(run: Run, i: int) -> None:
    run.optimizer.state = defaultdict(dict, run.optimizer.state)


def append(run: Run, i: int) -> None:
    run.params.append(nn.Parameter(torch.full_like(run.params[i].detach(), 0.5)))
    run.groups[i % 2]["params"].append(run.params[-1])


def exchange(run: Run, i: int) -> None:
    run.groups[i % 2]["params"].reverse()


def remove(run: Run, i: int) -> None:
    if len(run.groups[i % 2]["params"]) > 1:
        run.groups[i % 2]["params"].pop(0)


def move(run: Run, i: int) -> None:
    if len(run.groups[i % 2]["params"]) > 1:
        run.groups[1 - i % 2]["params"].insert(0, run.groups[i % 2]["params"].pop())


def another_dict(run: Run, i: int) -> None:
    run.groups[i % 2] = dict(run.groups[i % 2])


def another_list(run: Run, i: int) -> None:
    run.groups[i % 2]["params"] = list(run.groups[i % 2]["params"])


def more_keys(run: Run, i: int) -> None:
    group = run.groups[i % 2]
    items = list(group.items())
    group.clear()
    group.update({"name": "first", **dict(items[:3]), "in between": run.params, **dict(items[3:])})


def option(**values) -> Callable:
    return lambda run, i: run.groups[i % 2].update(values)


def filled(run: Run, i: int) -> None:
    """A tensor that stays in its group, with other numbers."""
    lr = run.groups[i % 2]["lr"]
    if isinstance(lr, Tensor):
        lr.mul_(0.5)
    else:
        run.groups[i % 2]["lr"] = torch.tensor(lr, dtype=torch.float64)


def fold(run: Run, i: int) -> None:
    """Which is refused where a group has lost a parameter: that would keep Pθ."""
    try:
        run.optimizer.fold()
    except RuntimeError as error:
        assert "cannot be folded" in str(error)  # noqa: PT017


EDITS = {
    "nothing": lambda run, i: None,
    "no gradient": lambda run, i: run.without_grad.add(i),
    "other gradients are missing": lambda run, i: run.without_grad.symmetric_difference_update(range(4)),
    "gradients again": lambda run, i: run.without_grad.clear(),
    "another gradient": of_grad(torch.clone),
    "a gradient of other strides": of_grad(other_strides),
    "a gradient of other strides at its address": of_grad(other_strides_there),
    "a gradient with gaps": of_grad(with_gaps),
    "weights elsewhere": lambda run, i: setattr(run.params[i], "data", run.params[i].detach().clone()),
    "weights of other strides": lambda run, i: setattr(run.params[i], "data", other_strides(run.params[i])),
    "weights of other strides at their address": lambda run, i: setattr(
        run.params[i], "data", other_strides_there(run.params[i])
    ),
    "weights with gaps": lambda run, i: setattr(run.params[i], "data", with_gaps(run.params[i])),
    "weights of another shape": lambda run, i: run.replace(i, torch.ones_like(run.params[i]).repeat(2, 1)[:5]),
    "fewer weights at their address": lambda run, i: run.replace(i, run.params[i].detach()[:2]),
    "other memory by set_": set_memory,
    "swapped tensors": swap_tensors,
    "another buffer": of_buf(lambda b: b * 2),
    "a buffer of other strides": of_buf(other_strides),
    "a buffer of other strides at its address": of_buf(other_strides_there),
    "a buffer with gaps": of_buf(with_gaps),
    "no buffer": lambda run, i: run.optimizer.state[run.params[i]].pop("momentum_buffer", None),
    "None for a buffer": lambda run, i: run.give(i, None),
    "no state": lambda run, i: run.optimizer.state.pop(run.params[i], None),
    "all state is lost": lambda run, i: run.optimizer.state.clear(),
    "more state": more_state,
    "state in another order": lambda run, i: reordered(run.optimizer.state),
    "another state": another_state,
    "a parameter more": append,
    "parameters in another order": exchange,
    "a parameter less": remove,
    "a parameter of the other group": move,
    "another list of parameters": another_list,
    "groups in another order": lambda run, i: run.groups.reverse(),
    "keys in another order": lambda run, i: reordered(run.groups[i % 2]),
    "more keys": more_keys,
    "another dict": another_dict,
    "another lr": option(lr=0.3),
    "an lr that is an int": option(lr=1),
    "an lr of 0": option(lr=0),
    "an lr of NumPy": option(lr=numpy.float64(0.07)),
    "an lr in a tensor": filled,
    "no momentum": option(momentum=0),
    "another momentum": option(momentum=0.5),
    "momentum again": option(momentum=0.9),
    "dampening": option(dampening=0.25),
    "nesterov": option(nesterov=True, dampening=0),
    "maximize": option(maximize=True),
    "no decay": option(weight_decay=0.0),
    "another decay": option(weight_decay=0.2),
}
# Edits of which torch.optim.SGD makes something else.
OURS = {
    "a gradient of another dtype": narrow_grad,
    "weights of another dtype": lambda run, i: run.replace(i, run.params[i].detach().float()),
    "a narrow buffer": of_buf(torch.Tensor.float),
    "an lr of NumPy, in float32": option(lr=numpy.float32(0.07)),
    "a flag of NumPy": option(maximize=numpy.bool_(True)),
    "exponential": option(scale_invariant=True),
    "folded": fold,
    "another scale": option(scale=1.5),
    "statistics": lambda run, i: run.groups[i % 2].update(norm_stats=[(run.norm, "running_var", 2)]),
    "no statistics": option(norm_stats=[]),
}
if not hasattr(torch.Tensor, "grad_dtype"):
    del OURS["a gradient of another dtype"]


def assert_close(actual: Run, expected: Run) -> None:
    """To rounding; where weights or gradients are in float32, to that of few steps."""
    for x, y in zip(actual.tensors(), expected.tensors(), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            within = 1e-12 if x.dtype == torch.float64 else 1e-6
            assert torch.allclose(x, y, rtol=within, atol=within)


@FORMS
@pytest.mark.parametrize(
    ("peer", "edit"), [*(("torch", edit) for edit in EDITS), *(("reference", edit) for edit in OURS)]
)
def test_every_change_between_steps_is_seen(swift_target, peer, edit, exponential):
    """Made of a parameter of each group, and of its neighbour after some more steps."""
    peer, arguments = ("reference", {"scale_invariant": True}) if exponential else (peer, {})
    runs = [Run(make, swift_target.device, **arguments) for make in (swift_target.sgd, PEERS[peer])]
    for i in (None, 0, 2, 1):
        for run in runs:
            if i is not None:
                {**EDITS, **OURS}[edit](run, i)
        for _ in range(2):
            for run in runs:
                run.step()
            assert_close(*runs)


WAYS = [
    pytest.param(
        *target.values, capturable, id=f"{target.id}{', capturable' if capturable else ''}", marks=target.marks
    )
    for target in targets()
    for capturable in ([False, True] if target.values[0].backend in ("cuda", "triton") else [False])
    if target.values[0].backend != "reference"
]


@pytest.mark.parametrize(("target", "capturable"), WAYS)
@given(edits=st.lists(st.tuples(st.sampled_from([*EDITS, *OURS]), st.integers(0, 3)), max_size=8))
@example(edits=[("no gradient", 1), ("a narrow buffer", 1)])  # an idle tensor's buffer is left alone
@settings(max_examples=25)
def test_every_sequence_of_changes_is_seen(target, capturable, edits):
    """Also where P and κ are on the device."""
    runs = [Run(target.sgd, target.device, capturable=capturable), Run(PEERS["reference"], target.device)]
    for edit, i in (("nothing", 0), *edits):
        for run in runs:
            {**EDITS, **OURS}[edit](run, i)
            for _ in range(2):
                run.step()
        assert_close(*runs)
        runs[0].optimizer.log10_lr()  # brings the scales back
        assert [scale_of(group) for group in runs[0].groups] == [scale_of(group) for group in runs[1].groups]
