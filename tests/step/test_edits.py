"""What is kept from the last step is checked before it is used: whatever was changed meanwhile is seen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import texp
from tests.conftest import INTERPRETED
from texp.step.groups import scale_of

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


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@given(edits=st.lists(st.tuples(st.sampled_from(list(EDITS)), st.integers(0, 1)), max_size=8))
@settings(max_examples=25)
def test_every_change_between_steps_is_seen(backend, edits):
    """The same edits are made of an optimizer whose steps are gathered anew each time."""
    if (reason := texp.backends.available()[backend]) != "ok":
        pytest.skip(reason)
    if backend == "triton" and not INTERPRETED:
        pytest.skip("Triton's interpreter is not asked for: TRITON_INTERPRET=1")
    runs = []
    for name in ("reference", backend):
        KEPT.reset_running_stats()
        params = [nn.Parameter(torch.full((4, 3), 1.0 + i, dtype=torch.float64)) for i in range(2)]
        optimizer = texp.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.9, backend=name)
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
    (of_reference, scales), (of_backend, scales_of_backend) = runs
    assert scales == scales_of_backend
    for expected, actual in zip(of_reference, of_backend, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
