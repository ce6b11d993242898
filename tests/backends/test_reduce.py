"""Sums of squares, ‖p‖² and ‖g‖² of every tensor: of each backend against exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch

from tests.backends.tables import DTYPES, launch
from tests.backends.test_reference import peak
from tests.backends.test_rows import SHAPES
from tests.conftest import INTERPRETED, same_bits
from texp import backends
from texp.backends import reference
from texp.backends.reference import Entry


def exact(x: torch.Tensor | None) -> float:
    """Of at most float32, whose squares float64 holds; of float64 by fractions."""
    if x is None:
        return 0.0
    values = x.detach().cpu().flatten().tolist()
    if x.dtype == torch.float64:
        return float(sum(Fraction(value) ** 2 for value in values))
    return math.fsum(value * value for value in values)


def bound(x: torch.Tensor | None) -> float:
    """Each of n squares rounds once and each sum once, by at most 2^-53 of what it comes to: n of it in all, in
    whatever order, of numbers that are all positive."""
    return 0.0 if x is None else (x.numel() + 1) * 2.0**-53 * exact(x)


def check(target, entries: list[Entry]) -> torch.Tensor:
    before = [[None if x is None else x.clone() for x in entry] for entry in entries]
    sums = backends.ALL[target.backend].reduce(entries)
    assert (sums.dtype, sums.device, tuple(sums.shape)) == (
        torch.float64,
        entries[0].param.device,
        (len(entries), 2),
    )
    for (of_p, of_g), entry in zip(sums.tolist(), entries, strict=True):
        for found, x in ((of_p, entry.param), (of_g, entry.grad)):
            assert abs(found - exact(x)) <= bound(x)
    for entry, unchanged in zip(entries, before, strict=True):
        assert all(x is None or same_bits(x, y) for x, y in zip(entry, unchanged, strict=True))
    return sums


def normal(device: str, dtype: torch.dtype, generator: torch.Generator):
    return lambda size: torch.randn(size, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of_g", DTYPES, ids=str)
@pytest.mark.parametrize("of_p", DTYPES, ids=str)
def test_every_dtype_and_shape(target, shape, of_p, of_g):
    generator = torch.Generator().manual_seed(0)
    p, g = (SHAPES[shape](normal(target.device, dtype, generator)) for dtype in (of_p, of_g))
    check(target, [Entry(p, g), Entry(p), Entry(g, p, torch.ones_like(g))])


def test_many_tensors(target):
    """Of every dtype, of sizes that fill no tile and several, some without gradient, and some without elements."""
    generator = torch.Generator().manual_seed(0)
    entries = []
    for i, size in enumerate((0, 1, 7, 1000, 2048, 4097, 0, 16_384, 16_385, 40_000)):
        p, g = (normal(target.device, DTYPES[(i + k) % 4], generator)((size,)) for k in (0, 1))
        entries.append(Entry(p, None if i % 3 == 2 else g))
    check(target, entries)


def test_many_tiles(target, monkeypatch):
    """More than are added at once."""
    size, interpreted = 3_000_000, target.backend == "triton" and INTERPRETED
    if interpreted:
        size = 100_000
        monkeypatch.setattr(launch(), "_BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    check(target, [Entry(*(normal(target.device, torch.float32, generator)((size,)) for _ in "pg"))])


def test_the_bits_are_those_of_any_run(target):
    """Whatever the number of threads is."""
    generator = torch.Generator().manual_seed(0)
    entries = [
        Entry(*(normal(target.device, torch.float32, generator)(size) for _ in "pg"))
        for size in ((300_001,), (700, 300), (12,))
    ]
    expected, threads = check(target, entries), torch.get_num_threads()
    try:
        for count in (1, 3, 2, 1):
            torch.set_num_threads(count)
            assert same_bits(backends.ALL[target.backend].reduce(entries), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e30])
def test_what_is_not_finite_shows(target, value):
    """And what float32 could not square does not."""
    p = torch.ones(5000, device=target.device)
    p[4321] = value
    sums = backends.ALL[target.backend].reduce([Entry(p, p), Entry(torch.ones(3, device=target.device))])
    expected = torch.tensor(4999.0 + float(p[4321]) ** 2, dtype=torch.float64)
    assert torch.allclose(sums[0].cpu(), expected, rtol=5001 * 2.0**-53, atol=0, equal_nan=True)
    assert sums[1].tolist() == [3.0, 0.0]


class TestTheReference:
    """What no kernel takes."""

    def test_no_entries(self):
        assert reference.reduce([]).shape == (0, 2)

    def test_complex_numbers(self):
        """Conjugated and negated views too."""
        p = torch.complex(*torch.randn(2, 50, generator=torch.Generator().manual_seed(0)))
        sums = reference.reduce([Entry(p, p.conj()), Entry(p.conj().imag, torch._neg_view(p))])
        squares = exact(p.real), exact(p.imag)
        expected = torch.tensor([[sum(squares)] * 2, [squares[1], sum(squares)]], dtype=torch.float64)
        assert torch.allclose(sums, expected, rtol=102 * 2.0**-53, atol=0)

    def test_sparse_gradients(self):
        """A row that is there twice is the sum of both."""
        p = torch.ones(6, 3)
        g = torch.sparse_coo_tensor([[1, 4, 1]], torch.full((3, 3), 2.0), (6, 3), check_invariants=True)
        assert reference.reduce([Entry(p, g)]).tolist() == [[18.0, 3 * 4.0**2 + 3 * 2.0**2]]
        assert not g.is_coalesced()

    def test_temporaries_are_small(self):
        """A piece in float64 and its squares, and no copy of the whole."""
        entries = [Entry(torch.ones(1000, 1000), torch.ones(1000, 1000).t())]
        assert peak(lambda: reference.reduce(entries)) <= 3 * 8 * reference.SUMMED


def test_nothing(target):
    assert backends.ALL[target.backend].reduce([]).shape == (0, 2)
