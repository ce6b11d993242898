"""Tensors on the CPU, by the C++ core (csrc/cpu)."""

from collections.abc import Iterable

from torch import Tensor

from texp import native
from texp.backends.base import Backend, reason_of_core
from texp.backends.reference import REDUCTIONS, Entry


class Cpu(Backend):
    name = "cpu"

    def device_types(self) -> tuple[str, ...]:
        return ("cpu",)

    def reason(self) -> str:
        return reason_of_core()

    def reduce(self, entries: Iterable[Entry], reduction: str = "squares") -> Tensor:
        return native.core().reduce(list(entries), REDUCTIONS.index(reduction))
