"""A parameter, and everything of an optimizer that a failed or skipped step must leave alone."""

import copy

import torch
from torch import nn

from tests.conftest import same_bits


def param(*values, dtype=torch.float64, device="cpu") -> nn.Parameter:
    return nn.Parameter(torch.tensor(values or (1.0, -2.0, 3.0), dtype=dtype, device=device))


def snapshot(optimizer) -> list:
    """Everything that a failed or skipped step must leave alone."""
    optimizer.state_dict()  # brings back what is on a device
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "norm_stats")}
        for group in optimizer.param_groups
    ]
    tensors = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    tensors += [stat.find().clone() for stats in optimizer.norm_stats for stat in stats]
    tensors += [values["momentum_buffer"].clone() for values in optimizer.state.values()]
    return [copy.deepcopy(groups), *tensors]


def assert_unchanged(optimizer, before: list) -> None:
    groups, *tensors = snapshot(optimizer)
    assert groups == before[0]
    assert len(tensors) == len(before) - 1
    assert all(same_bits(a, b) for a, b in zip(tensors, before[1:], strict=True))
