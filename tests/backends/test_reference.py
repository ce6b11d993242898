"""The reference: temporaries in its steps, tensors in pieces, mixed dtypes, sparse momentum."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity

import texp
from tests.backends.test_rows import EXPONENTIAL, ORDINARY, SHAPES
from tests.conftest import same_bits
from texp.backends import reference
from texp.backends.reference import Entry
from texp.theory import Row


def peak(step) -> int:
    """The most bytes on the CPU that are allocated at a time during a step, beyond those before it."""
    profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top


class TestMemory:
    """Temporaries of a step with foreach are at most 1.5 times those of torch.optim.SGD.

    Where torch needs none, in a plain step or one of momentum alone, they are less than half of the parameters: of
    at most 1/32 of the elements, param, grad and buf are widened, to twice their bytes from bf16, and at most four
    more such tensors are intermediate results: 7·2/32.
    """

    SIZES = {
        "some": [(275_000,)] * 8,
        "one": [(1600, 1375)],
        "many": [(150, 147)] * 100,
        "uneven": [(3, 700_001), (99,)],
    }
    STEPS = {
        "plain": {},
        "decay": {"weight_decay": 1e-3},
        "momentum": {"momentum": 0.9},
        "momentum and decay": {"momentum": 0.9, "weight_decay": 1e-3},
        "nesterov": {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
        "maximize": {"momentum": 0.9, "weight_decay": 1e-3, "maximize": True},
        "exponential": {"momentum": 0.9, "weight_decay": 1e-3, "scale_invariant": True},
        "exponential, nesterov": {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": True, "scale_invariant": True},
    }

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("step", STEPS)
    @pytest.mark.parametrize("sizes", SIZES)
    def test_of_the_first_and_the_second_step(self, sizes, step, dtype):
        params = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in self.SIZES[sizes]]
        for p in params:
            p.grad = torch.ones_like(p)
        arguments = {"lr": 0.1, "foreach": True, **self.STEPS[step]}
        ours = texp.SGD(params, backend="reference", **arguments)
        arguments.pop("scale_invariant", None)
        theirs = torch.optim.SGD(params, **arguments)
        size = sum(p.nbytes for p in params)
        for _ in range(2):
            assert peak(ours.step) <= max(1.5 * peak(theirs.step), size / 2)

    def test_of_one_large_tensor_without_foreach(self):
        p = nn.Parameter(torch.zeros(2_200_000))
        p.grad = torch.ones_like(p)
        optimizer = texp.SGD([p], 0.1, 0.9, weight_decay=1e-3, foreach=False, backend="reference")
        optimizer.step()
        assert peak(optimizer.step) <= p.nbytes / 4

    @pytest.mark.parametrize(("count", "size", "most"), [(1000, 65, 1), (1000, 4096, 2 * 32), (3, 2_000_000, 2 * 32)])
    def test_no_more_operations_than_that_takes(self, count, size, most, monkeypatch):
        """Two batches that follow each other hold more than 1/32 of the elements."""
        batches = []
        monkeypatch.setattr(reference, "_apply", lambda row, batch: batches.append(batch))
        reference.apply(ORDINARY, [Entry(torch.empty(size)) for _ in range(count)], foreach=True)
        assert len(batches) <= most
        assert sum(entry.param.numel() for batch in batches for entry in batch) == count * size


DENSE = ("odd", "transposed", "misaligned", "channels last")


class TestPieces:
    """Of a tensor that is larger than what is worked on at a time."""

    def entry(self, shape: str, dtype: torch.dtype = torch.float32) -> Entry:
        generator = torch.Generator().manual_seed(0)
        return Entry(
            *(SHAPES[shape](lambda size: torch.randn(size, generator=generator, dtype=dtype)) for _ in range(3))
        )

    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize("most", [1, 4, 7, 100])
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("row", [ORDINARY, EXPONENTIAL], ids=["ordinary", "exponential"])
    def test_are_stepped_as_the_whole(self, row, shape, most, foreach, monkeypatch):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
            whole, entry = self.entry(shape, dtype), self.entry(shape, dtype)
            version = entry.param._version
            reference.apply(row, [whole], foreach=foreach)
            with monkeypatch.context() as patch:
                patch.setattr(reference, "AT_LEAST", most)
                reference.apply(row, [entry], foreach=foreach)
            assert all(same_bits(a, b) for a, b in zip(entry, whole, strict=True))
            assert entry.param._version > version

    @pytest.mark.parametrize("layout", ["contiguous", "transposed"])
    @pytest.mark.parametrize("lazy", [torch.Tensor.conj, torch._neg_view], ids=["conjugated", "negated"])
    def test_of_views_that_are_conjugated_or_negated(self, lazy, layout, monkeypatch):
        def entry() -> Entry:
            p, g, b = torch.randn(3, 6, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
            return Entry(lazy(p if layout == "contiguous" else p.t().contiguous().t()), g, lazy(b))

        whole, pieces = entry(), entry()
        reference.apply(EXPONENTIAL, [whole])
        monkeypatch.setattr(reference, "AT_LEAST", 4)
        reference.apply(EXPONENTIAL, [pieces])
        assert all(
            same_bits(a.resolve_conj().resolve_neg(), b.resolve_conj().resolve_neg())
            for a, b in zip(pieces, whole, strict=True)
        )

    @pytest.mark.parametrize("most", [1, 4, 7, 20])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_are_small_and_without_gaps(self, shape, most):
        entry = self.entry(shape)
        pieces = list(reference._pieces(entry, most))
        assert sum(piece.param.numel() for piece in pieces) == entry.param.numel()
        for piece in pieces:
            assert piece.param.numel() <= most
            assert piece.param.shape == piece.grad.shape == piece.buf.shape
            if shape in DENSE:
                span = sum(
                    (size - 1) * stride for size, stride in zip(piece.param.shape, piece.param.stride(), strict=True)
                )
                assert span + 1 == piece.param.numel()

    OVERLAPS = {
        "param and buf": lambda x: Entry(x[:24], torch.ones(24), x[4:28]),
        "buf and param": lambda x: Entry(x[4:28], torch.ones(24), x[:24]),
        "param and grad": lambda x: Entry(x[4:28], x[:24], torch.ones(24)),
        "grad and buf": lambda x: Entry(torch.ones(24), x[:24], x[4:28]),
        "transposed": lambda x: Entry(x[:25].view(5, 5), x[:25].view(5, 5).t(), torch.ones(5, 5)),
    }

    @pytest.mark.parametrize("foreach", [False, True])
    @pytest.mark.parametrize("overlap", OVERLAPS)
    def test_none_where_one_is_written_before_another_is_read(self, overlap, foreach, monkeypatch):
        stored = []
        for most in (100, 4):
            monkeypatch.setattr(reference, "AT_LEAST", most)
            x = torch.randn(28, generator=torch.Generator().manual_seed(2))
            reference.apply(EXPONENTIAL, [self.OVERLAPS[overlap](x)], foreach=foreach)
            stored.append(x)
        assert same_bits(*stored)

    def test_of_parameters_and_in_inference_mode(self, monkeypatch):
        monkeypatch.setattr(reference, "AT_LEAST", 4)
        p = nn.Parameter(torch.ones(12))
        with torch.enable_grad():
            reference.apply(Row(c_g=1.0, e=0.5), [Entry(p, torch.ones(12))])
        with torch.inference_mode():
            reference.apply(Row(c_g=1.0, e=0.5), [Entry(p, torch.ones(12))])
            reference.apply(Row(c_g=1.0, e=0.5), [Entry(torch.ones(12), torch.ones(12))])
        assert torch.equal(p, torch.zeros(12))
        assert p.is_leaf


H, B, S, D = torch.float16, torch.bfloat16, torch.float32, torch.float64
C, Z = torch.complex64, torch.complex128
# Of param, grad and buf, and of the arithmetic.
MIXED = [
    (S, S, D, D), (S, D, S, D), (D, S, S, D), (B, D, B, D), (B, B, D, D),
    (B, S, B, S), (B, S, S, S), (S, S, B, S), (S, B, H, S), (H, B, S, S), (H, B, H, S),
    (S, D, None, D), (B, None, D, D), (D, None, B, D),
    (C, C, Z, Z), (C, S, C, C), (Z, C, C, Z), (C, D, C, Z),
]  # fmt: skip


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("row", [ORDINARY, EXPONENTIAL], ids=["ordinary", "exponential"])
@pytest.mark.parametrize("dtypes", MIXED, ids=lambda dtypes: " ".join(str(d).removeprefix("torch.") for d in dtypes))
def test_arithmetic_is_in_the_widest_dtype_and_rounded_once(dtypes, row, foreach):
    generator = torch.Generator().manual_seed(0)
    *own, wide = dtypes
    entry = Entry(*(None if d is None else torch.randn(1000, generator=generator, dtype=d) for d in own))
    widened = Entry(*(None if x is None else x.to(wide, copy=True) for x in entry))
    grad = None if entry.grad is None else entry.grad.clone()
    reference.apply(row, [entry], foreach=foreach)
    reference.apply(row, [widened], foreach=foreach)
    assert same_bits(entry.param, widened.param.to(own[0]))
    assert grad is None or same_bits(entry.grad, grad)
    assert entry.buf is None or same_bits(entry.buf, widened.buf.to(own[2]))


def test_float32_would_lose_what_a_float64_gradient_says():
    p, g = torch.ones(3), torch.full((3,), 1 + 2**-40, dtype=torch.float64)
    reference.apply(Row(c_g=1.0, e=1.0), [Entry(p, g)])
    assert torch.equal(p, torch.full((3,), -(2.0**-40)))


class TestSparseMomentum:
    ROWS = 20

    def grad(self, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(self.ROWS, (1, 8), generator=generator)
        values = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        return torch.sparse_coo_tensor(rows, values, (self.ROWS, 3), check_invariants=True)

    @pytest.mark.parametrize("arguments", [{}, {"nesterov": True}, {"dampening": 0.5}, {"maximize": True}], ids=str)
    @pytest.mark.parametrize("foreach", [False, True])
    def test_does_not_grow(self, general, foreach, arguments):
        """And is the dense one: 200 steps are 200 sums in another order, of numbers up to 100."""
        generator = torch.Generator().manual_seed(0)
        tables = [nn.Parameter(torch.ones(self.ROWS, 3, dtype=torch.float64)) for _ in range(2)]
        made = {"lr": 0.1, "momentum": 0.9, **arguments}
        sparse = general.sgd(tables[:1], foreach=foreach, **made)
        dense = torch.optim.SGD(tables[1:], **made)
        for _ in range(200):
            tables[0].grad = self.grad(generator)
            tables[1].grad = tables[0].grad.to_dense()
            sparse.step()
            dense.step()
            buf = sparse.state[tables[0]]["momentum_buffer"]
            assert buf.is_coalesced()
            assert buf._nnz() <= self.ROWS
        assert torch.allclose(*tables, rtol=0, atol=1e-11)
        assert torch.allclose(buf.to_dense(), dense.state[tables[1]]["momentum_buffer"], rtol=0, atol=1e-11)
