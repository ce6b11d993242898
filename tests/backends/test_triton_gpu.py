"""The Triton backend on a GPU: the numbers of the CPU, its launches, GradScaler, graphs; what any kernel must do is
in test_gpu.py."""

import copy
import math

import pytest
import torch
from torch import nn

import texp
from tests.backends.gpu import ARGUMENTS, LAYOUTS, needs, set_grads, static_grads, twins
from tests.backends.tables import DTYPES, launch, rows_of, tensor_entry
from tests.conftest import profiler, relative_error, same_bits
from texp import theory
from texp.step import groups
from texp.step.buffers import buf_of
from texp.theory import Row

pytestmark = needs("triton")

DEVICE = "cuda"


def make(p: nn.Parameter, backend: str, **arguments) -> texp.SGD:
    return texp.SGD([p], backend=backend, **arguments)


def on_device(x: float) -> torch.Tensor:
    return torch.tensor(x, device=DEVICE)


def magnitudes(row: Row, p: torch.Tensor, g: torch.Tensor | None, b: torch.Tensor | None) -> tuple:
    """The equations of a row, for p and b, with all that is added in them made positive."""
    row = Row(*map(abs, row))
    p, g, b = (torch.zeros(()).double() if x is None else x.detach().double().abs() for x in (p, g, b))
    u = row.a_b * b + row.a_g * g + row.a_p * p
    d = row.c_u * u + row.c_g * g + row.c_p * p
    return row.s_p * p + row.e * d, row.r_u * u + row.r_d * d


class Pair:
    """An optimizer on the CPU, and its twin on the GPU that it follows: both take a step from the same numbers, are
    compared, and then the CPU goes on from those of the GPU. So the bounds are those of a single step.

    On the longest way to a result there are 7 roundings, of three products that follow each other and of four sums.
    A compiler may leave out some of them where it fuses a product and a sum. With ε = 2u, where u is the most that
    one rounding changes, each side is then within 3.5 ε·M of the exact result, M being the result with all that is
    added in it made positive, and both are within 7 ε·M of each other. Where the GPU computes the row, too, three of
    its coefficients follow each other, each of which may be rounded to another neighbour, ε away: 10 ε·M. The bound
    is 16 ε·M, for terms of second order. A narrower type rounds both results to it, u of that type each, or half of
    its smallest number.
    """

    def __init__(self, cpu: texp.SGD, gpu: texp.SGD) -> None:
        self.cpu, self.gpu = cpu, gpu
        self.elements = self.unequal = 0

    def tensors(self):
        for group, twin in zip(self.cpu.param_groups, self.gpu.param_groups, strict=True):
            for p, q in zip(group["params"], twin["params"], strict=True):
                yield p, buf_of(self.cpu.state, p), q, buf_of(self.gpu.state, q)

    def bounds(self) -> list[tuple]:
        """M of p and of b for each tensor, before the step."""
        made = []
        for group in self.cpu.param_groups:
            hyper = groups.hyperparameters(group)
            bufs = [buf_of(self.cpu.state, p) for p in group["params"]]
            scale = getattr(self.cpu, "grad_scale", None)
            step = theory.advance(
                groups.scale_of(group),
                hyper,
                first=all(b is None for b in bufs),
                grad_scale=1.0 if scale is None else scale.item(),
            )
            for p, b in zip(group["params"], bufs, strict=True):
                row = step.first if b is None and hyper.momentum else step.running
                made.append(magnitudes(step.idle if p.grad is None else row, p, p.grad, b))
        return made

    def step(self, take=None) -> None:
        """take: takes the step on the GPU, if that is not a call of step()."""
        bounds = self.bounds()
        self.cpu.step()
        (take or self.gpu.step)()
        self.gpu.log10_lr()  # brings the scales back
        for (p, b, q, c), (of_p, of_b) in zip(self.tensors(), bounds, strict=True):
            assert (b is None) == (c is None)
            self.compare(p, q, of_p)
            if b is not None:
                assert b.dtype == c.dtype
                self.compare(b, c, of_b, stepped=p.dtype)
        for group, twin in zip(self.cpu.param_groups, self.gpu.param_groups, strict=True):
            scale, other = groups.scale_of(group), groups.scale_of(twin)
            assert scale.exponent == other.exponent
            for x, y in ((scale.P, other.P), (scale.kappa, other.kappa)):
                # Of less than 16 operations in float64.
                assert math.isclose(x, y, rel_tol=16 * torch.finfo(torch.float64).eps)
        self.follow()

    def follow(self) -> None:
        with torch.no_grad():
            for p, b, q, c in self.tensors():
                p.copy_(q)
                if b is not None:
                    b.copy_(c)
        for group, twin in zip(self.cpu.param_groups, self.gpu.param_groups, strict=True):
            if groups.is_exponential(twin):
                groups.set_scale(group, groups.scale_of(twin))

    def compare(self, x: torch.Tensor, y: torch.Tensor, magnitude: torch.Tensor, stepped=None) -> None:
        dtype = torch.promote_types(stepped or x.dtype, torch.float32)  # of the arithmetic
        info, own = torch.finfo(dtype), torch.finfo(x.dtype)
        x, y = x.detach().double(), y.detach().cpu().double()
        bound = 16 * info.eps * magnitude + 2 * info.tiny * info.eps
        if x.numel() and own.eps > info.eps:
            bound = bound + own.eps * torch.maximum(x.abs(), y.abs()) + own.tiny * own.eps
            self.elements += x.numel()
            self.unequal += int((x != y).sum())
        assert x.isfinite().all()
        assert ((x - y).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_it_has_the_numbers_of_the_cpu(name, dtype):
    """Over steps with late and missing gradients."""
    params, on_gpu = twins(dtype)
    pair = Pair(
        texp.SGD(params, backend="cpu", **ARGUMENTS[name]), texp.SGD(on_gpu, backend="triton", **ARGUMENTS[name])
    )
    for t in range(12):
        set_grads(params, on_gpu, t, missing=(1,) if t < 2 else (0, 5) if t == 4 else ())
        pair.step()
    # 16 ε·M is at most 2⁻⁸·M/|x| of the distance between two neighbours in float16, and less in bfloat16: no more
    # are rounded to different ones. A conversion that truncates would change every other.
    assert pair.unequal <= pair.elements / 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_buffers_may_be_wider(dtype):
    """As those that another optimizer kept in float32."""
    params, on_gpu = twins(dtype)
    arguments = ARGUMENTS["exponential"]
    cpu, gpu = texp.SGD(params, backend="cpu", **arguments), texp.SGD(on_gpu, backend="triton", **arguments)
    for optimizer, own in ((cpu, params), (gpu, on_gpu)):
        for p in own:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
    pair = Pair(cpu, gpu)
    for t in range(6):
        set_grads(params, on_gpu, t)
        pair.step()


@pytest.mark.parametrize("g_layout", LAYOUTS)
@pytest.mark.parametrize("p_layout", LAYOUTS)
def test_layouts(p_layout, g_layout):
    """Against a contiguous twin on the CPU."""
    torch.manual_seed(0)
    start, grad = torch.randn(4, 6, 5, 7), torch.randn(4, 6, 5, 7)
    p, q = nn.Parameter(start.clone()), nn.Parameter(LAYOUTS[p_layout](start.to(DEVICE)))
    p.grad, q.grad = grad, LAYOUTS[g_layout](grad.to(DEVICE))
    strides = q.stride()
    pair = Pair(*(make(x, backend, **ARGUMENTS["heavy ball"]) for x, backend in ((p, "cpu"), (q, "triton"))))
    for _ in range(3):
        pair.step()
    assert q.stride() == strides


def test_nothing_is_written_beside_a_misaligned_tensor():
    """Of sizes that fill no tile and no vector."""
    for dtype in DTYPES:
        for size in (1, 15, 16, 17, 2047, 2049, 4096):
            for offset in (0, 1, 8, 16):
                whole = torch.full((size + 64,), 7.0, device=DEVICE, dtype=dtype)
                p = nn.Parameter(whole[16 + offset :][:size])
                p.grad = torch.ones_like(p)
                make(p, "triton", lr=1.0).step()
                assert (p == 6).all()
                p.detach().fill_(7.0)
                assert (whole == 7).all()


@pytest.mark.parametrize("of", [texp.SGD, texp.LARS], ids=["SGD", "LARS"])
@pytest.mark.parametrize("max_norm", [None, 1.0], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("count", [1, 40])
def test_a_step_is_one_launch_for_each_class_of_types(count, scaled, max_norm, of):
    """And one that computes the rows of all groups, where a scaler may skip the step. Where gradients are clipped, or
    there are trust ratios, each class is reduced before and tiles put together, for both at once; a norm is made of
    them to clip.
    """
    params = [
        nn.Parameter(torch.randn(5, device=DEVICE, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16) * 40
    ]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = of(
        [{"params": params[i::count], "lr": 0.1 + i} for i in range(count)],
        backend="triton",
        momentum=0.9,
        max_norm=max_norm,
    )

    def step() -> None:
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = on_device(2.0), on_device(0.0)
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profiler(torch.profiler.ProfilerActivity.CUDA) as profile:
        step()
        torch.cuda.synchronize()
    events = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # Copies of rows and a record of the step as a whole, "Optimizer.step#SGD.step", may be among the events.
    launches = [name for name in events if name in ("reduce", "add", "norm", "advance", "apply")]
    clipped = max_norm is not None
    reduced = clipped or of is texp.LARS
    before = ["reduce", "reduce", "add"] * reduced + ["norm"] * clipped + ["advance"] * (scaled or reduced)
    assert sorted(launches) == sorted([*before, "apply", "apply"])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_scaler_skips_steps_without_the_host(name):
    """The first step among them; the host is not waited for."""
    params, on_gpu = twins(torch.float32)
    pair = Pair(
        texp.SGD(params, backend="cpu", **ARGUMENTS[name]), texp.SGD(on_gpu, backend="triton", **ARGUMENTS[name])
    )
    gpu = pair.gpu

    def take(overflow: bool, mode: str) -> None:
        gpu.grad_scale, gpu.found_inf = on_device(4.0), on_device(float(overflow))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            gpu.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert gpu.step_was_skipped == overflow

    for t in range(10):
        set_grads(params, on_gpu, t, missing=(1,) if t < 4 else ())
        mode = "error" if t > 0 else "default"  # the first uploads the scales, and compiles
        if t in (0, 3, 4):
            before = [(q.detach().clone(), None if c is None else c.clone()) for _, _, q, c in pair.tensors()]
            known = [groups.scale_of(group) for group in gpu.param_groups]
            take(True, mode)
            if t == 0:
                assert not copy.deepcopy(gpu).state_dict()["state"]
            gpu.log10_lr()
            assert [groups.scale_of(group) for group in gpu.param_groups] == known
            for (_, _, q, c), (q_before, c_before) in zip(pair.tensors(), before, strict=True):
                assert same_bits(q.detach(), q_before)
                assert (c is None) == (c_before is None)
                assert c is None or same_bits(c, c_before)
        else:
            pair.cpu.grad_scale, pair.cpu.found_inf = torch.tensor(4.0), torch.tensor(0.0)
            pair.step(lambda mode=mode: take(False, mode))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_captured_step_replays_the_schedule(name):
    """Step by step as the CPU, with a learning rate in device memory, and overflows in between."""
    params, on_gpu = twins(torch.float32)
    arguments = dict(ARGUMENTS[name])
    lr = torch.tensor(arguments.pop("lr"), device=DEVICE, dtype=torch.float64)
    cpu = texp.SGD(params, backend="cpu", lr=0.1, **arguments)
    gpu = texp.SGD(on_gpu, backend="triton", lr=lr, capturable=True, **arguments)
    pair, fixed = Pair(cpu, gpu), [torch.zeros_like(q) for q in on_gpu]
    gpu.grad_scale, gpu.found_inf = on_device(1.0), on_device(0.0)
    found_inf = gpu.found_inf

    def feed(t: int) -> None:
        set_grads(params, on_gpu, t)
        static_grads(on_gpu, fixed)
        cpu.param_groups[0]["lr"] = 0.1 / (t + 1)
        lr.fill_(0.1 / (t + 1))

    feed(0)
    pair.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.step()
    others = []
    for t in range(1, 12):
        feed(t)
        overflow = t in (1, 5, 6)
        found_inf.fill_(float(overflow))
        if overflow:
            before = [(q.detach().clone(), None if c is None else c.clone()) for _, _, q, c in pair.tensors()]
            known = groups.scale_of(gpu.param_groups[0])
            graph.replay()
            gpu.log10_lr()
            assert groups.scale_of(gpu.param_groups[0]) == known
            for (_, _, q, c), (q_before, c_before) in zip(pair.tensors(), before, strict=True):
                assert same_bits(q.detach(), q_before)
                assert c is None or same_bits(c, c_before)
        else:
            pair.step(graph.replay)
        others.append(torch.full((1000,), 7.0, device=DEVICE))  # takes memory that was freed
    assert all((other == 7).all() for other in others)


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_captured_step_clips(name, norm_type):
    """With the bits of steps that are not captured, which clip as the CPU does; what is not finite skips a step."""
    arguments = dict(ARGUMENTS[name], max_norm=0.5, norm_type=norm_type, skip_nonfinite=True)
    (params, on_gpu), (_, others) = twins(torch.float32), twins(torch.float32)
    cpu = texp.SGD(params, backend="cpu", **arguments)
    graphed, plain = (texp.SGD(x, backend="triton", capturable=True, **arguments) for x in (on_gpu, others))
    fixed, graph = [torch.zeros_like(q) for q in on_gpu], torch.cuda.CUDAGraph()
    for t in range(8):
        set_grads(params, on_gpu, t)
        if t in (2, 5):
            params[0].grad.view(-1)[0] = on_gpu[0].grad.view(-1)[0] = math.nan
        static_grads(on_gpu, fixed)
        for q, other in zip(on_gpu, others, strict=True):
            other.grad = q.grad.clone()
        if t == 1:
            with torch.cuda.graph(graph):
                graphed.step()
        cpu.step()
        plain.step()
        if t == 0:
            graphed.step()
        else:
            graph.replay()
        assert same_bits(graphed.grad_norm, plain.grad_norm)
        # Both add in float64, each in an order of its own.
        assert t in (2, 5) or math.isclose(plain.grad_norm.item(), cpu.grad_norm.item(), rel_tol=1e-10)
        for q, other in zip(on_gpu, others, strict=True):
            assert same_bits(q.detach(), other.detach())
    for p, q in zip(params, on_gpu, strict=True):
        assert p.numel() == 0 or relative_error(q, p) < 8 * 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("clip", [{}, {"max_norm": 0.5}, {"max_norm": 0.05, "norm_type": math.inf}], ids=str)
@pytest.mark.parametrize("trust_clip", [False, True])
def test_a_captured_step_of_lars(trust_clip, clip):
    """With a LR in device memory: with the bits of steps that are not captured, which are those of the CPU but for
    roundings of float64."""
    arguments = dict(clip, momentum=0.9, weight_decay=0.01, trust_coeff=0.5, trust_clip=trust_clip)
    (params, on_gpu), (_, others) = twins(torch.float64), twins(torch.float64)
    start, graph = [p.detach().clone() for p in params], torch.cuda.CUDAGraph()
    cpu = texp.LARS(params, backend="cpu", **arguments)
    lrs = [torch.tensor(1.0, device=DEVICE, dtype=torch.float64) for _ in "ab"]
    graphed, plain = (
        texp.LARS(x, backend="triton", capturable=True, lr=lr, **arguments)
        for x, lr in zip((on_gpu, others), lrs, strict=True)
    )
    fixed = [torch.zeros_like(q) for q in on_gpu]
    for t in range(8):
        set_grads(params, on_gpu, t)
        static_grads(on_gpu, fixed)
        cpu.param_groups[0]["lr"] = 0.0 if t == 3 else 1.0 / (t + 1)
        for lr in lrs:
            lr.fill_(cpu.param_groups[0]["lr"])
        for q, other in zip(on_gpu, others, strict=True):
            other.grad = q.grad.clone()
        if t == 1:
            with torch.cuda.graph(graph):
                graphed.step()
        cpu.step()
        plain.step()
        if t == 0:
            graphed.step()
        else:
            graph.replay()
        for q, other in zip(on_gpu, others, strict=True):
            assert same_bits(q.detach(), other.detach())
    for p, q, before in zip(params, on_gpu, start, strict=True):
        # A sum of 100,001 squares, each of which rounds, is within 2^-53 of that many times itself, on either side.
        assert p.numel() == 0 or relative_error(q, p) < 8 * 2 * 100_001 * 2.0**-53
        assert p.numel() == 0 or relative_error(p, before) > 1e-3


def test_norm_stats_in_replays():
    """Powers 1 and 2 are exact products of the growth, another one is within the errors of exp and log."""
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5, device=DEVICE))
    cpu = make(p, "cpu", **ARGUMENTS["exponential"])
    gpu = make(q, "triton", capturable=True, **ARGUMENTS["exponential"])
    powers = (1, 2, 0.5)
    stats = {x: [torch.ones(3, dtype=torch.float64, device=x) for _ in powers] for x in ("cpu", DEVICE)}
    for optimizer, own in ((cpu, stats["cpu"]), (gpu, stats[DEVICE])):
        optimizer.param_groups[0]["norm_stats"] = list(zip(own, powers, strict=True))
    p.grad, q.grad = torch.ones(5), torch.ones(5, device=DEVICE)
    cpu.step()
    gpu.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.step()
    for _ in range(20):
        cpu.step()
        graph.replay()
    for x, y in zip(stats["cpu"], stats[DEVICE], strict=True):
        # 21 steps, each of P's growth within some ε of the CPU's, and of exp(log(growth)/2) within some more.
        assert relative_error(y, x) < 21 * 64 * torch.finfo(torch.float64).eps


def test_each_capture_needs_a_step_before_it():
    """What a graph reads when it is replayed is pinned memory, which no capture may allocate."""
    params, on_gpu = twins(torch.float32)
    arguments = ARGUMENTS["exponential"]
    pair = Pair(
        texp.SGD(params, backend="cpu", **arguments),
        texp.SGD(on_gpu, backend="triton", capturable=True, **arguments),
    )
    fixed = [torch.zeros_like(q) for q in on_gpu]

    def feed(t: int) -> None:
        set_grads(params, on_gpu, t)
        static_grads(on_gpu, fixed)

    def all_of_it() -> list[torch.Tensor]:
        held = [x.detach().clone() for _, _, q, c in pair.tensors() for x in (q, c)]
        scale = torch.tensor([*groups.scale_of(pair.gpu.param_groups[0])], dtype=torch.float64)
        return [*held, scale]

    feed(0)
    pair.step()
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        pair.gpu.step()
    before = all_of_it()
    other = torch.zeros(3, device=DEVICE)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        other.add_(1)  # an empty capture is warned of
        with pytest.raises(RuntimeError, match="take one of the same tensors before each capture"):
            pair.gpu.step()
    torch.cuda.synchronize()
    pair.gpu.log10_lr()
    assert all(same_bits(x, y) for x, y in zip(all_of_it(), before, strict=True))
    feed(1)
    pair.step(first.replay)
    feed(2)
    pair.step()
    with torch.cuda.graph(second):
        pair.gpu.step()
    for t, graph in ((3, second), (4, first), (5, second)):
        feed(t)
        pair.step(graph.replay)


@pytest.mark.parametrize("how", ["unscaled", "scaled", "LARS"])
def test_a_schedule_compiles_nothing_again(monkeypatch, how):
    import triton

    compiled = []

    def count(*, fn, **_) -> None:
        compiled.append(fn.name)

    monkeypatch.setattr(launch(), "_compiled", {})
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", count)
    for name in ("reduce", "add", "advance", "apply"):
        getattr(launch().kernels, name).device_caches.clear()
    p = nn.Parameter(torch.ones(1000, device=DEVICE))
    p.grad = torch.full_like(p, 1e-3)
    if how == "LARS":
        optimizer = texp.LARS([p], lr=0.1, weight_decay=0.1, backend="triton")
    else:
        optimizer = make(p, "triton", **ARGUMENTS["exponential"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    expected = {"unscaled": [], "scaled": ["advance"], "LARS": ["add", "advance", "reduce"]}[how]
    for t in range(1000):
        if how == "scaled":
            optimizer.grad_scale, optimizer.found_inf = on_device(2.0), on_device(0.0)
        optimizer.step()
        schedule.step()
        if t == 0:
            at_first = [name.rpartition(".")[2] for name in compiled]
            assert sorted(at_first) == sorted([*expected, "apply"])
    assert len(compiled) == 1 + len(expected)
    assert optimizer.param_groups[0]["lr"] < 1e-6


def test_rows_that_change_wait_for_their_copies():
    """The device is kept busy while the host takes more steps than there are slots of pinned memory."""
    launcher, p, g = launch().Launcher(), torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    busy, slots = torch.randn(4096, 4096, device=DEVICE), launch()._SLOTS
    for _ in range(40):
        busy @ busy
    for n in range(4 * slots):
        launcher.apply("cuda:0", 1, tensor_entry(p, g), rows_of([Row(c_g=1.0, e=float(n))]))
    assert (p == -sum(range(4 * slots))).all()


def test_streams_do_not_share_memory():
    """A step on another stream does not overwrite what a step on this one is still to read."""
    launcher, params = launch().Launcher(), [torch.zeros(3, device=DEVICE) for _ in range(2)]
    g, busy = torch.ones(3, device=DEVICE), torch.randn(4096, 4096, device=DEVICE)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    launcher.apply("cuda:0", 0, tensor_entry(params[0], g), rows_of([Row()]))  # compiles
    torch.cuda.synchronize()
    for n in range(1, 9):
        for k, (p, stream) in enumerate(zip(params, streams, strict=True)):
            with torch.cuda.stream(stream):
                if k == 0:
                    busy @ busy
                launcher.apply("cuda:0", 2 * n + k, tensor_entry(p, g), rows_of([Row(c_g=1.0, e=-float(n + k))]))
    torch.cuda.synchronize()
    assert [p[0].item() for p in params] == [36.0, 44.0]


def test_a_profiler_of_triton_sees_the_launches():
    import triton

    seen, launcher = [], launch().Launcher()
    p = torch.zeros(3, device=DEVICE)
    given = ("cuda:0", 1, tensor_entry(p), rows_of([Row(s_p=2.0)]))
    launcher.apply(*given)

    def hook(metadata) -> None:
        seen.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        launcher.apply(*given)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    launcher.apply(*given)
    assert seen == ["apply"]


def test_tensors_on_the_cpu_are_refused():
    """A backend that was asked for by name never falls back; nothing is changed."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device=DEVICE))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer = texp.SGD([q, p], lr=0.1, momentum=0.9, backend="triton")
    message = (
        r"backend='triton' was requested, but of a parameter of shape \(3,\) in parameter group 0, the parameter is"
    )
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert (p == 1).all()
    assert (q == 1).all()
    assert not optimizer.state
