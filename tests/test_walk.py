"""The walk in Python, which feeds the Triton kernels where there is no C++ core: it asks what the core asks."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import texp
from tests.test_triton import core, interpreter, needs_core
from texp import tables
from texp.groups import scale_of
from texp.on_device import OnDevice
from texp.walk import Walk


def numbers_and_groups() -> tuple[list[nn.Parameter], list[dict]]:
    """Every dtype and layout, in ordinary and exponential groups, some that stand at the same point."""
    generator = torch.Generator().manual_seed(0)

    def param(*shape, dtype=torch.float32) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

    params = [param(3, 5), param(7, dtype=torch.bfloat16), param(0), param(), param(4, 3, dtype=torch.float64)]
    params += [
        nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        param(6, dtype=torch.half),
    ]
    params += [nn.Parameter(torch.randn(8, 4)[:, 1:3]), nn.Parameter(torch.randn(9)[1:])]
    tensors = torch.ones(3), torch.ones(4, dtype=torch.float64), torch.ones(2)
    stats = [((lambda stat=stat: stat), power) for stat, power in zip(tensors, (1, 2.0, 0.5), strict=True)]
    groups = [
        {"params": params[:3], "momentum": 0.9, "weight_decay": 0.1},
        {"params": params[3:5], "momentum": 0.9, "weight_decay": 0.1, "scale_invariant": True, "norm_stats": stats},
        {"params": params[5:7], "lr": 0.3},
        {"params": params[7:8], "momentum": 0.8, "nesterov": True, "scale_invariant": True, "weight_decay": 0.5},
        {"params": params[8:], "momentum": 0.9, "weight_decay": 0.1},
    ]
    return params, groups


def optimizer_in_mid_run() -> texp.SGD:
    """With buffers, and gradients whose layout is not that of the parameters, one of them missing."""
    params, groups = numbers_and_groups()
    optimizer = texp.SGD(groups, lr=0.1, backend="reference")
    for t in range(2):
        for i, p in enumerate(params):
            p.grad = None if (t, i) == (1, 3) else torch.full(p.shape, 0.5, dtype=p.dtype)
        optimizer.step()
    buf = optimizer.state[params[1]]
    buf["momentum_buffer"] = buf["momentum_buffer"].float()
    of_other_dtypes(params)
    return optimizer


def of_other_dtypes(params: list[nn.Parameter]) -> None:
    """Gradients, where torch keeps them in the dtype in which they come."""
    if hasattr(torch.Tensor, "grad_dtype"):
        for p, dtype in ((params[1], torch.float32), (params[6], torch.float64), (params[8], torch.bfloat16)):
            p.grad = None
            p.grad_dtype = dtype
            p.grad = torch.full(p.shape, 0.5, dtype=dtype)


def decoded(tensors: bytearray, rows: bytearray) -> list[tuple]:
    """What a kernel is told of each tensor; copies, of which each walk makes its own, have no address here."""
    by_index = list(struct.iter_unpack("=10d", rows))
    return [
        (numel, slot, kind, bits, by_index[source], bool(g), bool(b))
        for _, g, b, numel, slot, source, kind, bits in tables._WITH_GRAD.iter_unpack(tensors)
    ]


@needs_core
def test_both_walks_ask_the_same_of_a_kernel():
    told = []
    for of in (core, Walk()):
        torch.manual_seed(0)
        optimizer = optimizer_in_mid_run()
        calls = []
        given = (optimizer.param_groups, optimizer._norm_stats, optimizer.state, 4.0, None)
        assert not of.step(*given, None, recorder(calls), False)
        ((device, tensors, rows),) = calls
        told.append((device, decoded(tensors, rows), [scale_of(group) for group in optimizer.param_groups]))
    of_core, of_walk = told
    assert of_core[::2] == of_walk[::2]
    assert sorted(of_core[1]) == sorted(of_walk[1])


def recorder(calls: list[tuple]):
    return lambda *call: calls.append(call)


@needs_core
@pytest.mark.parametrize("capturing", [False, True])
def test_both_walks_on_a_device_make_the_same_tables(capturing):
    """Byte for byte, where no tensor is copied; or give the same reason."""
    torch.manual_seed(0)
    params, groups = numbers_and_groups()
    lr = torch.tensor(0.25)
    groups[0]["lr"], groups[1]["weight_decay"] = lr, torch.tensor(0.125, dtype=torch.float64)
    optimizer = texp.SGD(groups, lr=0.1)
    for p in params[:7] + params[8:]:
        p.grad = torch.ones_like(p)
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    of_other_dtypes(params)
    optimizer.state[params[2]]["momentum_buffer"] = torch.zeros(0, dtype=torch.float64)
    optimizer.state[params[8]]["momentum_buffer"] = torch.zeros(8, dtype=torch.float16)
    if not capturing:
        params[0].grad = params[3].grad = None
        params[7].requires_grad_(False)
    of_groups = OnDevice(optimizer.param_groups, optimizer.state, torch.device("cpu"))
    told = []
    for of in (core, Walk()):
        calls = []
        on_device = of_groups.states, of_groups.started, of_groups.ticket
        given = (optimizer.param_groups, optimizer._norm_stats, optimizer.state, None)
        why = of.step_on_device(*given, *on_device, None, None, capturing, recorder(calls))
        told.append((why, calls))
    assert told[0] == told[1]
    assert (told[0][0] is None) != capturing


KEPT = nn.BatchNorm1d(2)
EDITS = {
    "nothing": lambda p, o: None,
    "no gradient": lambda p, o: setattr(p, "grad", None),
    "another gradient": lambda p, o: setattr(p, "grad", torch.full_like(p, -0.5)),
    "a gradient of another layout": lambda p, o: setattr(p, "grad", torch.full((3, 4), 2.0).double().t()),
    "lr": lambda p, o: o.param_groups[0].update(lr=0.3),
    "no momentum": lambda p, o: o.param_groups[0].update(momentum=0.0),
    "momentum": lambda p, o: o.param_groups[0].update(momentum=0.5),
    "nesterov": lambda p, o: o.param_groups[0].update(nesterov=True),
    "decay": lambda p, o: o.param_groups[0].update(weight_decay=0.2),
    "exponential": lambda p, o: o.param_groups[0].update(scale_invariant=True),
    "folded": lambda p, o: o.fold(),
    "another scale": lambda p, o: o.param_groups[0].update(scale=1.5),
    "no buffer": lambda p, o: o.state.pop(p, None),
    "another buffer": lambda p, o: o.state[p].update(momentum_buffer=torch.ones(4, 3, dtype=torch.float64)),
    "a buffer that was resized": lambda p, o: o.state[p].update(
        momentum_buffer=torch.ones(3, 4, dtype=torch.float64).t()
    ),
    "other weights": lambda p, o: setattr(p, "data", torch.ones(4, 3, dtype=torch.float64)),
    "transposed weights": lambda p, o: setattr(p, "data", torch.ones(3, 4, dtype=torch.float64).t()),
    "statistics": lambda p, o: o.param_groups[0].update(norm_stats=[(KEPT, "running_var", 2)]),
    "no statistics": lambda p, o: o.param_groups[0].update(norm_stats=[]),
    "order": lambda p, o: o.param_groups.reverse(),
}


@interpreter
@given(edits=st.lists(st.tuples(st.sampled_from(list(EDITS)), st.integers(0, 1)), max_size=8))
@settings(max_examples=25)
def test_the_walk_in_python_sees_every_change(edits):
    """It takes a step as it took the last one where nothing but numbers has changed; so the same edits are made here
    of an optimizer whose steps are planned anew each time."""
    runs = []
    for backend in ("reference", "triton"):
        KEPT.reset_running_stats()
        params = [nn.Parameter(torch.full((4, 3), 1.0 + i, dtype=torch.float64)) for i in range(2)]
        optimizer = texp.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9, backend=backend)
        if backend == "triton":
            optimizer._kernels = optimizer._kernels._replace(core=Walk())
        for edit, which in (("nothing", 0), ("nothing", 0), *edits):
            for p in params:
                p.grad = p.grad if p.grad is not None else torch.full_like(p, 0.5)
            EDITS[edit](params[which], optimizer)
            for _ in range(2):
                optimizer.step()
        stats = [stat.find().clone() for stats in optimizer.norm_stats for stat in stats]
        bufs = [optimizer.state.get(p, {}).get("momentum_buffer") for p in params]
        runs.append(
            (params + stats + [b for b in bufs if b is not None], list(map(scale_of, optimizer.param_groups)))
        )
    (of_reference, scales), (of_walk, scales_of_walk) = runs
    assert scales == scales_of_walk
    for expected, actual in zip(of_reference, of_walk, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


REFUSED = {
    "expanded": lambda: torch.ones(1).expand(4),
    "inference": lambda: inference_tensor(),
    "integer": lambda: torch.ones(4, dtype=torch.int32),
    "complex": lambda: torch.ones(4, dtype=torch.complex64),
    "subclass": lambda: torch.ones(4).as_subclass(Tagged),
}


class Tagged(torch.Tensor):
    pass


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(4)


@interpreter
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("where", ["parameter", "buffer"])
@pytest.mark.parametrize("what", REFUSED)
def test_both_walks_refuse_the_same(what, where, capturable):
    """In the same words, but for subclasses, of which the core says more; nothing is changed."""
    told = []
    for of in (core, Walk()):
        if of is None:
            continue
        tensor = REFUSED[what]()
        p = nn.Parameter(torch.ones(4)) if where == "buffer" else nn.Parameter(tensor, requires_grad=False)
        first = nn.Parameter(torch.ones(4))
        optimizer = texp.SGD(
            [{"params": [first]}, {"params": [p]}], 0.1, 0.9, backend="triton", capturable=capturable
        )
        optimizer._kernels = optimizer._kernels._replace(core=of)
        first.grad = torch.ones(4)
        p.grad = torch.ones(4).to(p.dtype) if where == "buffer" or what != "inference" else torch.ones(4)
        if where == "buffer":
            optimizer.state[p]["momentum_buffer"] = tensor
        with pytest.raises((RuntimeError, ValueError)) as error:
            optimizer.step()
        assert (first == 1).all()
        assert len(optimizer.state) == (where == "buffer")
        told.append((type(error.value), str(error.value) if what != "subclass" else ""))
    assert len(set(told)) == 1
