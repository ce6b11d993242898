"""Tensors on NVIDIA's GPUs, by the CUDA kernel in the C++ core (csrc/cuda)."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from texp import native
from texp.backends import reference
from texp.backends.base import OK, Backend, reason_of_core
from texp.backends.reference import Entry
from texp.torch_internals import current_raw_stream


# Called on demand: it loads the driver, and then processes that are forked cannot use a GPU.
@functools.cache
def devices() -> tuple[int, str | None]:
    """How many there are, and what CUDA says where it finds none."""
    return native.core().cuda_devices()


class Cuda(Backend):
    name = "cuda"
    advances = True

    def device_types(self) -> tuple[str, ...]:
        return ("cuda",)

    def reason(self) -> str:
        if (why := reason_of_core()) != OK:
            return why
        if torch.version.hip is not None:
            return f"torch {torch.__version__} is built for ROCm, whose GPUs the Triton kernels serve"
        if not native.core().with_cuda:
            return f"the CUDA kernel was not built: {native.why_missing('TEXP_CUDA')}"
        count, error = devices()
        if count < 1:
            return f"the CUDA kernel was built, but no device: {error or 'CUDA sees none'}"
        if not torch.backends.cuda.is_built():
            return f"the CUDA kernel was built, but torch {torch.__version__} was not: it has no CUDA tensors"
        return OK

    def supports(self, device: torch.device) -> bool:
        """Whether the kernel was built for a GPU of its kind."""
        try:
            native.core().load_cuda_kernels(device.index)
        except RuntimeError:
            return False
        return True

    def reduce(self, entries: Iterable[Entry], reduction: str = "squares") -> Tensor:
        entries = list(entries)
        if not entries:
            return reference.reduce(entries)
        device = entries[0].param.device
        stream = current_raw_stream(device.index)
        return native.core().reduce(entries, reference.REDUCTIONS.index(reduction), str(device), stream)
