"""The Triton backend where Triton's interpreter takes its steps: its kernels, launches and uploads."""

import math
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import texp
from tests.backends import tables
from tests.backends.tables import Table
from tests.backends.test_core import ROWS, SIZES, applied, poisoned
from tests.conftest import INTERPRETED, relative_error, same_bits
from tests.states import assert_unchanged, snapshot
from tests.test_package import environment
from tests.test_theory import hypers
from texp import backends, theory
from texp.backends.reference import Entry
from texp.theory import Scale

REASON = backends.available()["triton"]
if REASON == backends.OK and not INTERPRETED:
    REASON = "Triton's interpreter is not asked for: TRITON_INTERPRET=1"
interpreter = pytest.mark.skipif(REASON != backends.OK, reason=REASON)
core = backends.core()
needs_core = pytest.mark.skipif(core is None, reason=f"without the C++ core: {backends.available()['cpu']}")


@interpreter
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("wide_buf", [False, True], ids=["own buf", "wide buf"])
def test_every_element_is_written_once_and_no_other(wide_buf, name, offset):
    """All dtypes in one step, aligned or not, with and without gradient and buffer, larger than a tile; of whole
    numbers, so that nothing is rounded."""
    table, checks = Table(), []
    for dtype in tables.DTYPES:
        wide = torch.promote_types(dtype, torch.float32) if wide_buf else dtype
        for size in (*SIZES[::3], 8193):
            start = (torch.arange(size) % 50 * 2).double()
            for with_grad, with_buf in ((True, True), (size % 2 == 0, False), (False, True)):
                p, p_storage = poisoned(start, dtype, offset)
                b, b_storage = poisoned(start + 2, wide, offset)
                g = torch.full((size + offset,), 4.0, dtype=dtype)[offset:]
                table.add_fixed(Entry(p, g if with_grad else None, b if with_buf else None), ROWS[name])
                p_next, b_next = applied(ROWS[name], start, 4.0 * with_grad, start + 2 if with_buf else 0.0)
                # The table has addresses only.
                checks += [(p, p_storage, p_next, g), (b, b_storage, b_next if with_buf else start + 2, g)]
    backends.kernels("triton").launcher.step("cpu", table.tensors, tables.table_of(table.sources))
    for inside, storage, expected, _ in checks:
        assert torch.equal(inside.double(), expected)
        inside.fill_(-7.0)
        assert (storage == -7.0).all()


class Advanced:
    """What the kernel `advance` makes of one group.

    lr: in device memory, in place of that of hyper.
    """

    KINDS = ("running", "starting", "unbuffered", "idle", "idle before its first step", "idle, unbuffered")
    POWERS = (1.0, 2.0, 0.5, -3.0, 0.0)

    def __init__(
        self, scale: Scale, hyper, begun: bool, unbuffered: bool, grad_scale: float, found_inf: float = 0.0, lr=None
    ):
        from texp.kernels import launch

        self.state = torch.tensor([[scale.P, scale.kappa, 0, 0]], dtype=torch.float64)
        self.state.view(torch.int64)[0, 2:] = torch.tensor([scale.exponent, begun])
        self.started = torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.uint8)
        buffered = {0: tables.BUFFERED, 1: tables.BUFFERED | tables.FRESH, 3: tables.BUFFERED, 4: tables.BUFFERED}
        p, table = torch.zeros(1), Table()
        for slot, kind in enumerate(self.KINDS):
            of_kind = tables.IDLE if kind.startswith("idle") else tables.STEPPING
            table.add(Entry(p), 0, of_kind, slot=slot, flags=buffered.get(slot, 0))
        for power in self.POWERS:
            table.add(Entry(p), 0, tables.STATISTIC, power=power)
        of_lr = struct.pack("=d", hyper.lr) if lr is None else struct.pack("=Q", lr.data_ptr())
        numbers = of_lr + struct.pack("=3d", hyper.momentum, hyper.dampening, hyper.weight_decay)
        where = 0 if lr is None else {torch.float32: tables.FLOAT32, torch.float64: tables.FLOAT64}[lr.dtype]
        flags = (hyper.nesterov, hyper.maximize, hyper.scale_invariant, unbuffered)
        group = tables.GROUP.pack(numbers, self.state.data_ptr(), where, 0, 0, 0, *flags)
        count = len(self.KINDS) + len(self.POWERS)
        self.rows = torch.full((count, 10), math.nan, dtype=torch.float64)
        launch._launch(
            launch.kernels.advance,
            launch._ADVANCE,
            1,
            torch.device("cpu"),
            torch.frombuffer(bytearray(group), dtype=torch.int64),
            torch.tensor([0, count]),
            torch.frombuffer(table.tensors, dtype=torch.int64),
            self.rows,
            self.started,
            torch.tensor([grad_scale]),
            torch.tensor([found_inf]),
            4,  # tensors at once: several rounds
        )

    def scale(self) -> Scale:
        return Scale(self.state[0, 0].item(), int(self.state.view(torch.int64)[0, 2]), self.state[0, 1].item())


@interpreter
@given(
    hyper=hypers,
    P=st.floats(1, 2, exclude_max=True),
    exponent=st.integers(-5, 5000),
    kappa=st.floats(0, 100, allow_subnormal=False),
    begun=st.booleans(),
    unbuffered=st.booleans(),
    grad_scale=st.sampled_from([1.0, 2.0**16, 3.0]),
)
def test_the_rows_on_the_device_have_the_bits_of_theory(hyper, P, exponent, kappa, begun, unbuffered, grad_scale):
    """But for statistics with powers other than 1 and 2, by exp and log: within a few ulp."""
    scale = Scale(P, exponent, kappa)
    of = Advanced(scale, hyper, begun, unbuffered, grad_scale)
    step = theory.advance(scale, hyper, first=unbuffered or not begun, grad_scale=grad_scale)
    unread = step.idle._replace(a_p=0.0)  # it has a buffer of zeros, which stays so
    expected = [step.running, step.first, step.running, step.idle, unread, step.idle]
    assert of.rows[: len(expected)].tolist() == [list(row) for row in expected]
    statistics = of.rows[len(expected) :]
    for row, power in zip(statistics.tolist(), of.POWERS, strict=True):
        expected_row = list(step.norm_stat(power))
        assert row == expected_row or (power not in (1, 2) and row == pytest.approx(expected_row, rel=4e-15))
    assert of.scale() == step.scale
    momentum = hyper.momentum != 0
    assert of.started.tolist() == [1, momentum, 0, 1, 0, 0]
    assert of.state.view(torch.int64)[0, 3] == ((begun and not unbuffered) or momentum)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
@example(value=0.1)  # the lower half, taken by itself, would be negative
@example(value=-0.1)
@example(value=5e-324)  # nothing but a lower half
@example(value=-5e-324)
@example(value=sys.float_info.max)
@example(value=-sys.float_info.max)
def test_a_number_on_the_device_keeps_its_bits(dtype, value):
    """The row of an ordinary step without momentum holds its LR as it is."""
    most = torch.finfo(dtype).max
    lr = torch.tensor(min(max(value, -most), most), dtype=dtype)
    of = Advanced(Scale(), theory.Hyperparameters(0.0, 0.0, 0.0, 0.0), False, False, 1.0, lr=lr)
    assert same_bits(of.rows[0, 7], lr.double())


@interpreter
def test_an_overflow_advances_nothing():
    hyper = theory.Hyperparameters(0.1, 0.9, 0.0, 0.1, scale_invariant=True)
    of = Advanced(Scale(1.5, 3, 0.25), hyper, True, False, 1.0, found_inf=1.0)
    assert of.scale() == Scale(1.5, 3, 0.25)
    assert of.rows.isnan().all()
    assert of.started.tolist() == [1, 0, 0, 1, 0, 0]


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hyperparameters_on_the_device(dtype):
    """All four of them, changed in place between steps; float32 ones are taken as what they are in float64."""

    def run(make, **arguments) -> nn.Parameter:
        p = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
        optimizer = texp.SGD([p], lr=0.1, momentum=0.5, scale_invariant=True, **arguments)
        group = optimizer.param_groups[0]
        numbers = {key: make(0.5) for key in ("lr", "momentum", "dampening", "weight_decay")}
        group.update(numbers)
        for t in range(6):
            for key, value in zip(numbers, (0.1, 0.8, 0.25, 0.2), strict=True):
                if isinstance(numbers[key], torch.Tensor):
                    numbers[key].fill_(value / (t + 1))
                else:
                    group[key] = torch.tensor(value / (t + 1), dtype=dtype).item()
            p.grad = torch.full_like(p, math.cos(t))
            optimizer.step()
        return p

    on_device = run(lambda x: torch.tensor(x, dtype=dtype), backend="triton", capturable=True)
    assert relative_error(on_device, run(lambda x: x, backend="reference")) < 1e-13


class TestUploads:
    """Tables go to the device when anything in them has changed, and only then."""

    @pytest.fixture
    def run(self, monkeypatch):
        if REASON != backends.OK:
            pytest.skip(REASON)
        from texp.kernels import launch

        uploads = []
        upload = launch._Tables._upload
        monkeypatch.setattr(
            launch._Tables, "_upload", lambda self, words: uploads.append(len(words)) or upload(self, words)
        )
        p = nn.Parameter(torch.arange(10.0))
        p.grad = torch.ones(10)
        optimizer = texp.SGD([p], lr=1.0, backend="triton")
        optimizer.step()
        assert len(uploads) == 1
        return p, optimizer, uploads

    def test_the_same_step_uploads_nothing(self, run):
        p, optimizer, uploads = run
        for _ in range(3):
            optimizer.step()
        assert len(uploads) == 1
        assert torch.equal(p.detach(), torch.arange(10.0) - 4)

    @pytest.mark.parametrize("change", ["lr", "gradient", "size", "dtype"])
    def test_what_changes_is_uploaded(self, run, change):
        """A size or a dtype also where the address stays the same."""
        p, optimizer, uploads = run
        if change == "lr":
            optimizer.param_groups[0]["lr"] = 2.0
            expected = torch.arange(10.0) - 3
        elif change == "gradient":
            p.grad = torch.full((10,), 5.0)
            expected = torch.arange(10.0) - 6
        elif change == "size":
            whole = p.data
            p.grad = None
            p.data = whole[:4]
            p.grad = torch.ones(4)
            expected = torch.cat((torch.arange(4.0) - 2, torch.arange(4.0, 10.0) - 1))
        else:
            p.grad = None
            p.data = p.data.view(torch.bfloat16)
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
            expected = torch.zeros(20, dtype=torch.bfloat16)
        optimizer.step()
        assert len(uploads) == 2
        assert torch.equal(whole if change == "size" else p.detach(), expected)

    def test_nothing_is_kept_of_a_step_that_failed(self, run, monkeypatch):
        from texp.kernels import launch

        p, optimizer, _ = run
        before, upload = p.detach().clone(), launch._Tables._upload

        def fail(self, words):
            raise MemoryError

        monkeypatch.setattr(launch._Tables, "_upload", fail)
        optimizer.param_groups[0]["lr"] = 2.0
        for _ in range(2):
            with pytest.raises(MemoryError):
                optimizer.step()
        assert same_bits(p.detach(), before)
        monkeypatch.setattr(launch._Tables, "_upload", upload)
        optimizer.step()
        assert torch.equal(p.detach(), before - 2)


@interpreter
@pytest.mark.parametrize("capturable", [False, True])
def test_a_launch_that_fails_changes_nothing(monkeypatch, capturable):
    """No momentum buffer is left behind either."""
    from texp.kernels import launch

    def fail(*arguments, **options):
        raise MemoryError

    optimizer = texp.SGD(
        [nn.Parameter(torch.ones(3))], 0.1, 0.9, scale_invariant=True, backend="triton", capturable=capturable
    )
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(3)
    monkeypatch.setattr(launch, "_launch", fail)
    before = snapshot(optimizer)
    with pytest.raises(MemoryError):
        optimizer.step()
    assert not optimizer.state
    assert_unchanged(optimizer, before)


@interpreter
def test_other_defaults_of_torch_change_nothing():
    """Neither its default dtype nor its default device is that of the tables."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        optimizer = texp.SGD([p], lr=1.0, momentum=0.9, backend="triton", capturable=True)
        for _ in range(2):
            optimizer.step()
        optimizer.state_dict()
        texp.SGD([p], lr=1.0, backend="triton").step()
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert torch.allclose(p.detach(), torch.full((3,), 1 - 1 - 1.9 - 1))


@interpreter
def test_what_no_kernel_can_take_is_refused():
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    message = "backend='triton' was requested, but of a parameter of shape .* is not float32, float64, bfloat16 or fl"
    with pytest.raises(RuntimeError, match=message):
        texp.SGD([p], lr=0.1, backend="triton").step()


@pytest.mark.parametrize(
    ("native", "interpret", "reason"),
    [
        ("1", "0", "there is no GPU that torch can use; with TRITON_INTERPRET=1"),
        ("1", "1", "ok"),
        ("0", "1", "there is no C++ core: TEXP_NATIVE=0 in the environment turns it off"),
    ],
)
def test_when_it_is_available(native, interpret, reason):
    if backends.triton.missing():
        pytest.skip(backends.triton.missing())
    if native == "1" and backends.core() is None:
        pytest.skip("without the C++ core")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code = "from texp import backends; print(backends.available()['triton'])"
    env = environment(TEXP_NATIVE=native, TRITON_INTERPRET=interpret)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(reason)


@needs_core
def test_without_triton(monkeypatch):
    backends.triton._kernels.cache_clear()
    try:
        monkeypatch.setattr(backends.triton.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="backend='triton' was requested, but Triton is not installed"):
            texp.SGD([nn.Parameter(torch.ones(1))], backend="triton")
    finally:
        backends.triton._kernels.cache_clear()
