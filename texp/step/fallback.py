"""The tensors of a step that no kernel can take: they are stepped in plain torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from texp.backends import reference
from texp.backends.memory import that_share_memory
from texp.backends.reference import Entry
from texp.step import buffers, checks, groups
from texp.theory import KEEP, Row


@dataclass
class Fallback:
    """What is left to texp.backends.reference: by the C++ core, which calls `check` before it changes anything, or
    all of a step where there is no core. `do` is called after the core has done its part.
    """

    named: str | None  # the backend that was requested by name, which leaves no parameter to others
    param_groups: list[dict[str, Any]]
    state: dict[Tensor, Any]
    momentum_dtype: torch.dtype | None  # of the optimizer
    work: list[tuple[tuple[bool | None, Row], Entry]] = field(default_factory=list)  # by `foreach` and row
    new_bufs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def check(self, left: Iterable[tuple], grad_scale: float) -> None:
        """grad_scale: what the rows divide gradients by."""
        for index, why, row, param, grad, buf, starts in left:
            group, row, entry = self.param_groups[index], Row(*row), Entry(param, grad, buf)
            if "trust_coeff" in group and grad is not None:
                p_norm, g_norm = reference.reduce([entry])[0].sqrt().tolist()
                hyper = groups.hyperparameters(group)
                ratio = hyper.trust.ratio(hyper.lr, hyper.weight_decay, p_norm, g_norm / grad_scale)
                row = row.with_ratio(ratio)
            checks.refuse_capture(index, group)
            checks.check_fused(group, entry)
            checks.check_tensors(index, entry)
            if starts:
                entry = buffers.with_buf(entry, self.momentum_dtype)
            elif buf is not None and row not in (KEEP, Row()):
                entry = buffers.widened(entry, self.momentum_dtype)
            if entry.buf is not buf:
                self.new_bufs.append((param, entry.buf))
            checks.check_row(index, row, entry)
            if self.named is not None and why is not None:  # a tensor of norm_stats is left without a reason
                raise RuntimeError(
                    f"backend={self.named!r} was requested, but of a parameter of shape {tuple(param.shape)} in "
                    f"parameter group {index}, {why}; backend=None leaves such parameters to plain torch"
                )
            if any(x is not None and x.layout != torch.strided for x in entry):
                checks.check_sparse(index, groups.hyperparameters(group), row)
            if row not in (KEEP, Row()):
                self.work.append(((group["foreach"], row), entry))

    def do(self) -> None:
        shared = that_share_memory(reference.written(entry for _, entry in self.work))
        for (foreach, row), entries in reference.in_batches(self.work, shared):
            reference.apply(row, entries, foreach=foreach, shared=shared)
        for param, buf in self.new_bufs:
            self.state[param]["momentum_buffer"] = buf
