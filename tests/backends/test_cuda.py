"""The CUDA backend on a GPU: the bits of the CPU, one launch, GradScaler, graphs; what any kernel must do is in
test_gpu.py."""

import copy

import pytest
import torch
from torch import nn

import texp
from tests.backends.gpu import ARGUMENTS, LAYOUTS, needs, set_grads, static_grads, twins
from tests.conftest import profiler, same_bits
from texp.step.groups import scale_of

pytestmark = needs("cuda")


def assert_same(cpu: texp.SGD, cuda: texp.SGD) -> None:
    for group, twin in zip(cpu.param_groups, cuda.param_groups, strict=True):
        assert scale_of(group) == scale_of(twin)
        for p, q in zip(group["params"], twin["params"], strict=True):
            assert same_bits(p.detach(), q.detach().cpu())
            b, c = (o.state[x].get("momentum_buffer") if x in o.state else None for o, x in ((cpu, p), (cuda, q)))
            assert (b is None) == (c is None)
            assert b is None or same_bits(b, c.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_has_the_bits_of_the_cpu(name, dtype):
    """Over steps with late and missing gradients."""
    params, on_cuda = twins(dtype)
    cpu, cuda = (
        texp.SGD(params, backend="cpu", **ARGUMENTS[name]),
        texp.SGD(on_cuda, backend="cuda", **ARGUMENTS[name]),
    )
    for t in range(12):
        set_grads(params, on_cuda, t, missing=(1,) if t < 2 else (0, 5) if t == 4 else ())
        cpu.step()
        cuda.step()
    assert_same(cpu, cuda)


def test_layouts_and_wide_buffers():
    """channels_last, transposed, with gaps and misaligned, each against a contiguous twin on the CPU."""
    for p_layout in LAYOUTS.values():
        for g_layout in LAYOUTS.values():
            torch.manual_seed(0)
            start, grad = torch.randn(4, 6, 5, 7), torch.randn(4, 6, 5, 7)
            p, q = nn.Parameter(start.clone()), nn.Parameter(p_layout(start.cuda()))
            for x, g, backend in ((p, grad, "cpu"), (q, g_layout(grad.cuda()), "cuda")):
                optimizer = texp.SGD([x], backend=backend, **ARGUMENTS["heavy ball"])
                for _ in range(3):
                    x.grad = g
                    optimizer.step()
            assert same_bits(p.detach(), q.detach().cpu().contiguous())


@pytest.mark.parametrize("groups", [1, 40])
def test_a_step_is_one_launch(groups):
    params = [
        nn.Parameter(torch.randn(5, device="cuda", dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 40
    ]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = texp.SGD(
        [{"params": params[i::groups], "lr": 0.1 + i} for i in range(groups)], backend="cuda", momentum=0.9
    )
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    with profiler(torch.profiler.ProfilerActivity.CUDA) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event.name for event in events if "Sync" not in event.name]
    assert len(kernels) == 1
    assert "apply_kernel" in kernels[0]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_scaler_skips_steps_without_the_host(name):
    """The first step among them; the host is not waited for."""
    params, on_cuda = twins(torch.float32)
    cpu, cuda = (
        texp.SGD(params, backend="cpu", **ARGUMENTS[name]),
        texp.SGD(on_cuda, backend="cuda", **ARGUMENTS[name]),
    )
    start = copy.deepcopy([p.detach() for p in on_cuda])
    for t in range(10):
        set_grads(params, on_cuda, t, missing=(1,) if t < 4 else ())
        overflow = t in (0, 3, 4)
        cuda.grad_scale = torch.tensor(1.0, device="cuda")
        cuda.found_inf = torch.tensor(float(overflow), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if t > 0 else "default")  # the first uploads the scales
        try:
            cuda.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert cuda.step_was_skipped == overflow
        if t == 0:
            assert all(same_bits(p.detach(), q) for p, q in zip(on_cuda, start, strict=True))
            assert not copy.deepcopy(cuda).state_dict()["state"]
        if not overflow:
            cpu.step()
    cuda.state_dict()  # brings the scales back
    assert_same(cpu, cuda)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_captured_step_replays_the_schedule(name):
    """Step by step as the CPU, with a learning rate in device memory."""
    params, on_cuda = twins(torch.float32)
    arguments = dict(ARGUMENTS[name])
    lr = torch.tensor(arguments.pop("lr"), device="cuda", dtype=torch.float64)
    cpu = texp.SGD(params, backend="cpu", lr=0.1, **arguments)
    cuda = texp.SGD(on_cuda, backend="cuda", lr=lr, capturable=True, **arguments)
    fixed = [torch.zeros_like(q) for q in on_cuda]

    def feed(t: int) -> None:
        set_grads(params, on_cuda, t)
        static_grads(on_cuda, fixed)
        cpu.param_groups[0]["lr"] = 0.1 / (t + 1)
        lr.fill_(0.1 / (t + 1))

    feed(0)
    cpu.step()
    cuda.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.step()
    others = []
    for t in range(1, 12):
        feed(t)
        cpu.step()
        graph.replay()
        if t % 3 == 0:  # to look at it leaves the memory that the graph knows where it is
            cuda.log10_lr()
            others.append(torch.full((1000,), 7.0, device="cuda"))
        if t == 7:
            cpu.fold()
            cuda.fold()
    cuda.state_dict()
    assert_same(cpu, cuda)


def test_a_replay_with_an_overflow_changes_nothing():
    """Neither weights nor momentum, nor P and κ, nor norm_stats."""
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5, device="cuda"))
    arguments = ARGUMENTS["exponential"]
    cpu = texp.SGD([p], backend="cpu", **arguments)
    cuda = texp.SGD([q], backend="cuda", capturable=True, **arguments)
    stats = [torch.ones(3), torch.ones(3, device="cuda")]
    for optimizer, stat in zip((cpu, cuda), stats, strict=True):
        optimizer.param_groups[0]["norm_stats"] = [(stat, 2)]
    p.grad, q.grad = torch.ones(5), torch.ones(5, device="cuda")
    cuda.grad_scale, cuda.found_inf = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    found_inf = cuda.found_inf
    cpu.step()
    cuda.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.step()
    for t in range(12):
        found_inf.fill_(t % 3 == 1)
        graph.replay()
        if t % 3 != 1:
            cpu.step()
    cuda.state_dict()
    assert_same(cpu, cuda)
    assert same_bits(stats[0], stats[1].cpu())


@pytest.mark.parametrize("fault", ["capturable=False", "no gradient", "first step"])
def test_captures_that_are_refused(fault):
    p, q = (nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer = texp.SGD([p, q], lr=0.1, momentum=0.9, backend="cuda", capturable=fault != "capturable=False")
    if fault != "first step":
        optimizer.step()
    if fault == "no gradient":
        q.grad = None
    before = p.detach().clone()
    message = {"first step": "take one before it", "no gradient": "has no gradient"}.get(fault, "capturable=True")
    other = torch.zeros(3, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1)  # an empty capture is warned of
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    torch.cuda.synchronize()
    assert torch.equal(p, before)


def test_a_scaler_without_gradients():
    """It then gives 0 for found_inf, which is no tensor."""
    p = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = texp.SGD([p], lr=0.1, backend="cuda")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device="cuda"), 0
    optimizer.step()
    assert not optimizer.step_was_skipped
    assert (p == 1).all()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_steps_with_and_without_a_scaler_in_turn(name):
    """And momentum that comes late."""
    params, on_cuda = twins(torch.float32)
    cpu, cuda = (
        texp.SGD(params, backend="cpu", **ARGUMENTS[name]),
        texp.SGD(on_cuda, backend="cuda", **ARGUMENTS[name]),
    )
    for t in range(12):
        set_grads(params, on_cuda, t)
        scaled = t % 4 < 2
        for optimizer, device in ((cpu, "cpu"), (cuda, "cuda")):
            if t == 5:
                optimizer.param_groups[0]["momentum"] = 0.5
            optimizer.grad_scale = torch.tensor(2.0, device=device) if scaled else None
            optimizer.found_inf = torch.tensor(0.0, device=device) if scaled else None
            optimizer.step()
    cuda.state_dict()
    assert_same(cpu, cuda)


def test_more_tensors_than_one_table_holds():
    params = [nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(3000)]
    for p in params:
        p.grad = torch.ones_like(p)
    texp.SGD([{"params": [p], "lr": 1.0 + i} for i, p in enumerate(params)], backend="cuda").step()
    assert torch.equal(torch.stack([p[0] for p in params]), -torch.arange(1.0, 3001.0, device="cuda"))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    size = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip(f"needs {8 * size / 2**30:.0f} GiB of free device memory")
    p = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    texp.SGD([p], lr=1.0, momentum=0.9, backend="cuda").step()
    assert all((part == -1).all() for part in p.detach().split(2**28))
