"""Every name of torch that is used here but is not part of its public interface, and what takes its place where a
version of torch does not have it.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

try:
    # What torch.optim.optimizer.register_optimizer_step_pre_hook and its like have registered.
    from torch.optim.optimizer import _global_optimizer_post_hooks as global_step_post_hooks
    from torch.optim.optimizer import _global_optimizer_pre_hooks as global_step_pre_hooks
except ImportError:
    # Then there is no telling, and every step is taken as one with hooks.
    global_step_pre_hooks = global_step_post_hooks = {0: None}

try:
    from torch import _appdirs
except ImportError:
    _appdirs = None


disable_dynamo = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable
"""As torch.compiler.disable, which takes seconds to import what it needs."""

try:
    from torch.optim.optimizer import _device_dtype_check_for_fused as check_for_fused
except ImportError:

    def check_for_fused(param: Tensor) -> None:
        """Raises for a parameter that torch's fused step does not take, in its words where they are to be had."""
        if param.is_meta or not param.is_floating_point():
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported devices, but "
                f"{param.dtype} and {param.device.type}"
            )


def _foreach(name: str) -> Callable:
    """torch._foreach_`name`, or one operation after the other."""

    def one_by_one(tensors: list[Tensor], others, **arguments) -> list[Tensor]:
        others = others if isinstance(others, list) else [others] * len(tensors)
        return [getattr(x, name)(y, **arguments) for x, y in zip(tensors, others, strict=True)]

    return getattr(torch, f"_foreach_{name}", one_by_one)


foreach_add, foreach_add_, foreach_mul, foreach_copy_ = map(_foreach, ("add", "add_", "mul", "copy_"))


def extensions_folder() -> str:
    """torch.utils.cpp_extension.get_default_build_root(), whose module asks CUDA for devices when it is imported."""
    if _appdirs is None:
        return os.path.expanduser("~/.cache/torch_extensions")
    return os.path.realpath(_appdirs.user_cache_dir(appname="torch_extensions"))


current_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)
"""The address of the CUDA stream that torch is using on a device. Called by the C++ core."""
