"""Which tensors share memory, told from addresses alone."""

import pytest
import torch
from torch import Tensor, nn

from texp.backends.memory import that_share_memory


class Parameter(nn.Parameter):
    pass


def twice(x: Tensor) -> list[Tensor]:
    return [x, x]


def of_two_storages(x: Tensor) -> list[Tensor]:
    return [torch.from_numpy(x.numpy()[:6]), torch.from_numpy(x.numpy()[4:])]


# For each case tensors made of one of 10 elements, and the places of those that share memory.
CASES = {
    "itself": (lambda x: [x], []),
    "twice": (twice, [0, 1]),
    "a view of all": (lambda x: [x, x.view(2, 5)], [0, 1]),
    "halves": (lambda x: [x[:5], x[5:]], []),
    "slices": (lambda x: [x[:6], x[5:]], [0, 1]),
    "every other": (lambda x: [x[:9:2], x[9:]], []),
    "interleaved": (lambda x: [x[::2], x[1::2]], [0, 1]),
    "transposed": (lambda x: [x[:6].view(2, 3).t(), x[5:]], [0, 1]),
    "transposed, by itself": (lambda x: [x[:6].view(2, 3).t(), x[6:]], []),
    "one in another, and one in none": (lambda x: [x[9:], x[2:4], x[:8]], [1, 2]),
    "two in another": (lambda x: [x[2:3], x[:9], x[6:7], x[9:]], [0, 1, 2]),
    "a chain": (lambda x: [x[6:], x[3:7], x[:4]], [0, 1, 2]),
    "an empty one": (lambda x: [x, x[4:4], x[4:4]], []),
    "of another dtype": (lambda x: [x[:4], x.view(torch.int16)[7:9]], [0, 1]),
    "of two storages": (of_two_storages, [0, 1]),
    "a subclass, twice": (lambda x: twice(Parameter(x)), [0, 1]),
    "a sparse one, twice": (lambda x: [*twice(x.to_sparse()), x], [0, 1]),
    "a sparse one and another": (lambda x: [x.to_sparse(), x.to_sparse()], []),
}


@pytest.mark.parametrize("name", CASES)
def test_that_share_memory(name):
    make, shared = CASES[name]
    x = torch.arange(1.0, 11.0)
    tensors = make(x)
    found = that_share_memory(tensors)
    assert [i for i, tensor in enumerate(tensors) if id(tensor) in found] == shared
    assert that_share_memory(reversed(tensors)) == found
