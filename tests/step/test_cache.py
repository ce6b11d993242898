"""What the core keeps from the last step, where steps fail, meet, take turns or share memory; edits: test_edits.py.

Everywhere against torch.optim.SGD in float64.
"""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import texp
from tests.conftest import Target, same_bits, targets
from tests.step.test_edits import PEERS, Run, assert_close

DEFAULT = pytest.param(Target(None, "cpu"), id="default-cpu")
KERNELS = [target for target in targets() if target.values[0].backend != "reference"]


def pair(target: Target, **arguments) -> list[Run]:
    return [Run(make, target.device, **arguments) for make in (target.sgd, PEERS["torch"])]


def step_both(runs: list[Run], steps: int = 2) -> None:
    for _ in range(steps):
        for run in runs:
            run.step()
        assert_close(*runs)


# Of the second group, or of its first parameter.
FAULTS = {
    "an lr that is no number": lambda group, p, state: group.update(lr=float("nan")),
    "an lr that is text": lambda group, p, state: group.update(lr="0.1"),
    "a momentum below 0": lambda group, p, state: group.update(momentum=-1.0),
    "an option that is missing": lambda group, p, state: group.pop("weight_decay"),
    "no list of parameters": lambda group, p, state: group.update(params=3),
    "a scale that is none": lambda group, p, state: group.update(scale=0.5, scale_exponent=0, carried_decay=0.0),
    "state that is no dict": lambda group, p, state: state.update({p: 3}),
    "a buffer of another shape": lambda group, p, state: state.update({p: {"momentum_buffer": torch.ones(7)}}),
    "a buffer of integers": lambda group, p, state: state.update({p: {"momentum_buffer": torch.ones(3, 4).int()}}),
    "weights that were expanded": lambda group, p, state: setattr(p, "data", p.detach()[:1].expand(3, 4)),
    "statistics that are none": lambda group, p, state: group.update(scale_invariant=True, norm_stats=[3]),
}


@pytest.mark.parametrize("target", [DEFAULT, *targets()])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_fails_leaves_nothing_behind(target, fault):
    """The first group has been gathered by then; what comes after it is as if the step had not been asked for."""
    runs = pair(target)
    step_both(runs)
    (ours, _), p, state = runs, runs[0].params[2], runs[0].optimizer.state
    before, kept = [x.detach().clone() for x in ours.tensors()], (p.data, dict(state), dict(ours.groups[1]))
    FAULTS[fault](ours.groups[1], p, state)
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, RuntimeError)):
        ours.optimizer.step()
    p.data, entries, group = kept
    state.update(entries)
    ours.groups[1].clear()
    ours.groups[1].update(group)
    assert all(same_bits(x, y) for x, y in zip(ours.tensors(), before, strict=True))
    step_both(runs, steps=3)


def share(run: Run, kind: str) -> None:
    """Of the first tensor of the first group, of 12 elements, and the first of the second."""
    p, q = run.params[0], run.params[2]
    if kind == "weights":
        q.data = p.data.view(3, 4)
    elif kind == "some weights":
        memory = torch.cat((p.detach().flatten(), p.detach().flatten()))
        p.data, q.data = memory[:12].view(4, 3), memory[7:19].view(3, 4)
    elif kind == "buffers":
        run.give(2, run.buf(0).view(3, 4))
    else:
        run.give(2, p.data.view(3, 4))


@pytest.mark.parametrize("kind", ["weights", "some weights", "buffers", "a buffer and weights"])
@pytest.mark.parametrize("target", [DEFAULT, *targets()])
def test_groups_whose_memory_begins_to_overlap(target, kind):
    """They go one after the other, or are refused by a kernel that is named; until they are apart again."""
    runs = pair(target)
    step_both(runs)
    for run in runs:
        share(run, kind)
    if target.backend in (None, "reference"):
        step_both(runs, steps=3)
    else:
        for _ in range(2):
            before = [x.detach().clone() for x in runs[0].tensors()]
            with pytest.raises(RuntimeError, match="in memory that another tensor of this step lies in"):
                runs[0].optimizer.step()
            assert all(same_bits(x, y) for x, y in zip(runs[0].tensors(), before, strict=True))
    for run in runs:
        run.params[2].data = run.params[2].detach().clone()
        run.give(2, run.buf(2).clone())
    step_both(runs, steps=3)


@pytest.mark.parametrize("target", [DEFAULT, *targets()])
def test_lists_of_tensors_that_take_turns(target):
    runs = pair(target)
    step_both(runs)
    for turn in ({0, 1}, {2, 3}, {1, 2}, {0, 1, 2, 3}, {0, 1}, {2, 3}, set(), {0, 1}):
        for run in runs:
            run.without_grad = set(turn)
        step_both(runs, steps=1)


@pytest.mark.skipif(texp.backends.core() is None, reason=f"without the C++ core: {texp.backends.available()['cpu']}")
def test_a_step_inside_the_check_of_the_same_optimizer(monkeypatch):
    """Both are taken, and the steps after them compare with what was really done last."""
    runs = pair(Target(None, "cpu"))
    for run in runs:
        run.params.append(nn.Parameter(torch.ones(3, dtype=torch.complex128)))  # which is left to the reference
        run.groups[1]["params"].append(run.params[-1])
    step_both(runs)
    ours, theirs = (run.optimizer for run in runs)
    check, calls = ours._check_fallback, []

    def step_first(left: list, grad_scale: float) -> None:
        calls.append(left)
        if len(calls) == 1:
            ours.step()
        check(left, grad_scale)

    monkeypatch.setattr(ours, "_check_fallback", step_first)
    ours.step()
    for _ in range(2):
        theirs.step()
    assert len(calls) == 2
    assert_close(*runs)
    step_both(runs, steps=3)


@pytest.mark.parametrize("target", [DEFAULT, *targets()])
def test_a_step_inside_the_gathering_of_the_same_optimizer(target):
    """Of other tensors: what is uploaded for one of them is not taken for the other's."""

    class SteppingLR:
        def __init__(self, run: Run) -> None:
            self.run, self.asked = run, 0

        def __float__(self) -> float:
            self.asked += 1
            if self.asked == 1:
                p = self.run.params[0]
                p.grad, grad = None, p.grad
                self.run.optimizer.step()
                p.grad = grad
            return 0.05

    runs = pair(target)
    step_both(runs, steps=3)
    ours, theirs = runs
    ours.groups[1]["lr"] = SteppingLR(ours)
    ours.optimizer.step()
    p = theirs.params[0]
    p.grad, grad = None, p.grad
    theirs.optimizer.step()
    p.grad = grad
    theirs.optimizer.step()
    assert_close(*runs)
    assert ours.groups[1]["lr"].asked > 1
    step_both(runs, steps=3)


@pytest.mark.parametrize("elements", [10, 1_200_000])  # the GIL is released for the longer one
def test_threads_that_step_an_optimizer_each(swift_target, elements):
    def made(seed: int) -> tuple[texp.SGD, list[nn.Parameter]]:
        generator = torch.Generator().manual_seed(seed)
        params = [nn.Parameter(torch.randn(n, generator=generator).to(swift_target.device)) for n in (elements, 7)]
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        return swift_target.sgd(params, lr=0.1, momentum=0.9, weight_decay=0.1), params

    def step(optimizer: texp.SGD) -> None:
        for _ in range(20):
            optimizer.step()

    alone, side_by_side = ([made(seed) for seed in range(3)] for _ in range(2))
    for optimizer, _ in alone:
        step(optimizer)
    threads = [threading.Thread(target=step, args=(optimizer,)) for optimizer, _ in side_by_side]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (_, expected), (_, params) in zip(alone, side_by_side, strict=True):
        assert all(same_bits(p, q) for p, q in zip(params, expected, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deep", "pickled"])
def test_copies_go_on_by_themselves(target, copied):
    """In the middle of a run: the copy keeps nothing of what the first one compares with."""
    runs = pair(target)
    step_both(runs)
    others = copied(runs)
    for run in others:
        run.steps += 100  # other gradients
    step_both(others)
    step_both(runs)
    step_both(others)
    assert not torch.allclose(runs[0].params[0], others[0].params[0])


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("elements", [5, 1_200_000])  # the GIL is released for the longer one
@pytest.mark.parametrize(("exponential", "decay"), [(False, 0.1), (True, 0.1), (True, 0.0)], ids=str)
def test_versions_of_what_a_step_changes_rise_by_one(target, elements, exponential, decay):
    """Those of idle parameters where their group grows, and of no gradient."""
    if elements > 1000 and target.backend != "cpu":
        pytest.skip("only the CPU's kernels release the GIL")
    params = [nn.Parameter(torch.ones(n, device=target.device)) for n in (elements, 3, 4)]
    stat = torch.ones(3, device=target.device)
    group = {"params": params, "scale_invariant": exponential, "norm_stats": [(stat, 2)]}
    optimizer = target.sgd([group], lr=0.1, momentum=0.9, weight_decay=decay)
    for idle in ((), (), (1,), (2,), (1, 2), (), (0, 1, 2)):
        for i, p in enumerate(params):
            p.grad = None if i in idle else torch.ones_like(p)
        bufs = [optimizer.state[p].get("momentum_buffer") for p in params]
        before = [None if x is None else x._version for x in (*params, *bufs, stat, *(p.grad for p in params))]
        optimizer.step()
        grows = exponential and decay != 0 and len(idle) < 3
        changes = [int(i not in idle or grows) for i in range(3)]
        for x, version, change in zip(
            (*params, *bufs, stat, *(p.grad for p in params)),
            before,
            (*changes, *changes, int(grows), 0, 0, 0),
            strict=True,
        ):
            assert x is None or x._version == version + change
