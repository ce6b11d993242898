"""Time of a step's kernels alone, by torch's profiler: python -m benchmarks.kernel_time, on a GPU.

For each list of tensors and dtype, microseconds and launches of a step of torch.optim.SGD(fused=True) and of texp.SGD
with rows that the host computes, and with rows on the device (of which the second launch waits for the first).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import texp
from texp.bench.shapes import MODELS

SHAPES = {
    "16 × 4096²": [(4096, 4096)] * 16,
    "ResNet-50": MODELS["ResNet-50"][0],
    "161 tiny tensors": MODELS["161 tiny tensors"][0],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
STEPS = 12

OF_TORCH = partial(torch.optim.SGD, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=True)
OF_TEXP = partial(texp.SGD, lr=1e-6, momentum=0.9, weight_decay=1e-4)
CANDIDATES = {
    "torch fused": OF_TORCH,
    "cuda": partial(OF_TEXP, backend="cuda"),
    "cuda, rows on the device": partial(OF_TEXP, backend="cuda", capturable=True),
    "triton": partial(OF_TEXP, backend="triton"),
    "triton, rows on the device": partial(OF_TEXP, backend="triton", capturable=True),
}


def kernel_time(step: Callable[[], object]) -> tuple[float, float]:
    """Microseconds and launches of a step, copies of tables left out."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as prof:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    kernels = [e for e in prof.events() if e.device_type == DeviceType.CUDA and "emcpy" not in e.name]
    return sum(e.device_time for e in kernels) / STEPS, len(kernels) / STEPS


def main() -> None:
    print(torch.cuda.get_device_name())
    for name, shapes in SHAPES.items():
        for dtype in DTYPES:
            params = [torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype)) for shape in shapes]
            for p in params:
                p.grad = torch.randn_like(p)
            for candidate, make in CANDIDATES.items():
                time, launches = kernel_time(make(params).step)
                print(f"{name:18} {dtype!s:16} {candidate:28} {time:8.1f} µs in {launches:.0f}")


if __name__ == "__main__":
    main()
