"""The CUDA backend on a GPU: the bits of the CPU, one launch, GradScaler, graphs, streams."""

import copy

import pytest
import torch
from torch import nn

import texp
from tests.conftest import relative_error, same_bits
from texp.on_device import OnDevice

needs_kernel = pytest.mark.skipif(
    texp.backends.available()["cuda"] != "ok", reason=f"backend cuda: {texp.backends.available()['cuda']}"
)

ARGUMENTS = {
    "plain": {"lr": 0.1, "weight_decay": 0.1},
    "heavy ball": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "exponential": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1, "scale_invariant": True},
    "exponential nesterov": {
        "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "scale_invariant": True,
    },
}  # fmt: skip
SHAPES = [(33, 7), (4096,), (4097,), (), (0,), (3, 5, 2, 2), (100_001,)]


def gpu(test):
    return pytest.mark.gpu(needs_kernel(test))


def twins(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return params, [nn.Parameter(p.detach().cuda()) for p in params]


def set_grads(cpu: list, cuda: list, seed: int, missing: tuple = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    for i, (p, q) in enumerate(zip(cpu, cuda, strict=True)):
        g = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad, q.grad = (None, None) if i in missing else (g, g.cuda())


def assert_same(cpu: texp.SGD, cuda: texp.SGD) -> None:
    for group, twin in zip(cpu.param_groups, cuda.param_groups, strict=True):
        for key in ("scale", "scale_exponent", "carried_decay"):
            assert group[key] == twin[key]
        for p, q in zip(group["params"], twin["params"], strict=True):
            assert same_bits(p.detach(), q.detach().cpu())
            b, c = (o.state[x].get("momentum_buffer") if x in o.state else None for o, x in ((cpu, p), (cuda, q)))
            assert (b is None) == (c is None)
            assert b is None or same_bits(b, c.cpu())


@gpu
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


@gpu
def test_layouts_and_wide_buffers():
    """channels_last, transposed, with gaps and misaligned, each against a contiguous twin on the CPU."""
    layouts = {
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "with gaps": lambda x: torch.stack((x, x + 9), -1)[..., 0],
        "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    }
    for p_layout in layouts.values():
        for g_layout in layouts.values():
            torch.manual_seed(0)
            start, grad = torch.randn(4, 6, 5, 7), torch.randn(4, 6, 5, 7)
            p, q = nn.Parameter(start.clone()), nn.Parameter(p_layout(start.cuda()))
            for x, g, backend in ((p, grad, "cpu"), (q, g_layout(grad.cuda()), "cuda")):
                optimizer = texp.SGD([x], backend=backend, **ARGUMENTS["heavy ball"])
                for _ in range(3):
                    x.grad = g
                    optimizer.step()
            assert same_bits(p.detach(), q.detach().cpu().contiguous())


@gpu
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
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event.name for event in events if "Sync" not in event.name]
    assert len(kernels) == 1
    assert "step_kernel" in kernels[0]


@gpu
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


@gpu
def test_grad_scaler():
    torch.manual_seed(0)
    model = nn.Linear(8, 4, device="cuda")
    twin = copy.deepcopy(model)
    runs = []
    for net, make in ((model, texp.SGD), (twin, torch.optim.SGD)):
        named = {"backend": "cuda"} if make is texp.SGD else {}
        optimizer = make(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, **named)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3)
        for t in range(10):
            generator = torch.Generator().manual_seed(t)
            loss = net(torch.randn(16, 8, generator=generator).cuda()).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss * (torch.inf if t in (0, 4) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append((scaler.get_scale(), net))
    assert runs[0][0] == runs[1][0]
    for p, q in zip(runs[0][1].parameters(), runs[1][1].parameters(), strict=True):
        assert relative_error(p, q) < 1e-6


@gpu
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_captured_step_replays_the_schedule(name):
    """Step by step as the CPU, with a learning rate in device memory."""
    params, on_cuda = twins(torch.float32)
    arguments = dict(ARGUMENTS[name])
    lr = torch.tensor(arguments.pop("lr"), device="cuda", dtype=torch.float64)
    cpu = texp.SGD(params, backend="cpu", lr=0.1, **arguments)
    cuda = texp.SGD(on_cuda, backend="cuda", lr=lr, capturable=True, **arguments)
    for q in on_cuda:
        q.grad = torch.zeros_like(q)
    static = [q.grad for q in on_cuda]

    def feed(t: int) -> None:
        set_grads(params, on_cuda, t)
        for fixed, q in zip(static, on_cuda, strict=True):
            fixed.copy_(q.grad)
            q.grad = fixed
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


@gpu
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


@gpu
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


@gpu
def test_a_scaler_without_gradients():
    """It then gives 0 for found_inf, which is no tensor."""
    p = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = texp.SGD([p], lr=0.1, backend="cuda")
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device="cuda"), 0
    optimizer.step()
    assert not optimizer.step_was_skipped
    assert (p == 1).all()


@gpu
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


@gpu
def test_streams():
    """The step runs on the stream that is current."""
    p = nn.Parameter(torch.zeros(1000, device="cuda"))
    p.grad = torch.zeros_like(p)
    optimizer = texp.SGD([p], lr=1.0, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles; a step that did not wait would read a gradient of 0
        p.grad.fill_(1.0)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    assert (p == -1).all()


@gpu
def test_more_tensors_than_one_table_holds():
    params = [nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(3000)]
    for p in params:
        p.grad = torch.ones_like(p)
    texp.SGD([{"params": [p], "lr": 1.0 + i} for i, p in enumerate(params)], backend="cuda").step()
    assert torch.equal(torch.stack([p[0] for p in params]), -torch.arange(1.0, 3001.0, device="cuda"))


@gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    size = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip(f"needs {8 * size / 2**30:.0f} GiB of free device memory")
    p = nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    texp.SGD([p], lr=1.0, momentum=0.9, backend="cuda").step()
    assert all((part == -1).all() for part in p.detach().split(2**28))


class TestOnDevice:
    """Here with the CPU as the device."""

    def make(self):
        params = [nn.Parameter(torch.ones(2)) for _ in range(4)]
        optimizer = texp.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=0.1, momentum=0.9)
        optimizer.param_groups[0].update(scale=1.5, scale_exponent=7, carried_decay=0.25)
        for p in params[:2]:
            optimizer.state[p]["momentum_buffer"] = torch.ones(2)
        return optimizer, params, OnDevice(optimizer.param_groups, optimizer.state, torch.device("cpu"))

    def step(self, optimizer, params, device):
        """The second group advances, its parameter starts; the third parameter of the first was skipped."""
        for p in params[2:]:
            optimizer.state[p]["momentum_buffer"] = torch.zeros(2)
        device.states[1, 0], device.states.view(torch.int64)[1, 2] = 1.25, 1
        device.started[3] = 1

    def test_holds_what_the_host_knows(self):
        _, _, device = self.make()
        assert device.states[0, :2].tolist() == [1.5, 0.25]
        assert device.states.view(torch.int64)[:, 2:].tolist() == [[7, 1], [0, 0]]
        assert device.started.tolist() == [1, 1, 0, 0]

    def test_is_read_back(self):
        optimizer, params, device = self.make()
        self.step(optimizer, params, device)
        device.read_back(optimizer.state)
        first, second = optimizer.param_groups
        assert (first["scale"], first["scale_exponent"], first["carried_decay"]) == (1.5, 7, 0.25)
        assert (second["scale"], second["scale_exponent"], second["carried_decay"]) == (1.25, 1, 0.0)
        assert [p in optimizer.state for p in params] == [True, True, False, True]
        device.restore(optimizer.state)
        assert all(p in optimizer.state for p in params)
        assert device.is_of(optimizer.param_groups, torch.device("cpu"))

    def test_is_written_in_place(self):
        optimizer, params, device = self.make()
        at = device.states.data_ptr(), device.started.data_ptr()
        self.step(optimizer, params, device)
        optimizer._device = device
        optimizer.fold()
        assert (device.states.data_ptr(), device.started.data_ptr()) == at
        assert device.states[:, :2].tolist() == [[1.0, 0.0], [1.0, 0.0]]
        assert device.started.tolist() == [1, 1, 0, 1]

    @pytest.mark.parametrize("change", ["parameter", "group", "flag", "scale"])
    def test_sees_what_changes_on_the_host(self, change):
        optimizer, _, device = self.make()
        assert device.is_of(optimizer.param_groups, torch.device("cpu"))
        groups = list(optimizer.param_groups)
        if change == "parameter":
            groups[0]["params"].append(nn.Parameter(torch.ones(1)))
        elif change == "group":
            groups.pop()
        elif change == "flag":
            groups[0]["scale_invariant"] = True
        else:
            groups[0]["scale"] = 1.75
            device.states[0, 0] = 1.875
        assert not device.is_of(groups, torch.device("cpu"))
        if change == "scale":
            device.read_back(optimizer.state)
            assert groups[0]["scale"] == 1.75  # what somebody has set is not lost
