"""What a step refuses before it changes anything."""

from typing import Any

import torch

from texp import theory
from texp.backends import reference
from texp.backends.reference import Entry
from texp.step.groups import is_exponential
from texp.theory import Hyperparameters, Row
from texp.torch_internals import check_for_fused


def refuse_capture(index: int, group: dict[str, Any]) -> None:
    """Raises where a captured graph would replay one step of a schedule for ever."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing() and is_exponential(group):
        raise RuntimeError(
            f"parameter group {index} is scale_invariant: its step cannot be captured by the reference backend, "
            "which computes P on the host; backend='cuda' and 'triton' with capturable=True can"
        )


def check_tensors(index: int, entry: Entry) -> None:
    """Raises for a tensor that cannot be stepped, and for a momentum buffer, set by the user, that does not fit."""
    param, grad, buf = entry
    where = f"parameter group {index}: a parameter of shape {tuple(param.shape)}"
    if not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(f"{where} and dtype {param.dtype} cannot take a step, which is not an integer")
    if buf is not None:
        would_densify = buf.layout != torch.strided and grad is not None and grad.layout == torch.strided
        fits = buf.shape == param.shape and buf.device == param.device and not would_densify
        is_number = buf.is_complex() if param.is_complex() else buf.is_floating_point()
        if not fits or not is_number:
            raise RuntimeError(
                f"{where}, {param.dtype}, on {param.device} cannot have a momentum buffer of shape "
                f"{tuple(buf.shape)}, {buf.dtype}, {buf.layout}, on {buf.device}"
                f"{' with a dense gradient' if would_densify else ''}"
            )
    for what, tensor in (("a parameter", param), ("a momentum buffer", buf)):
        if tensor is None or tensor.layout != torch.strided:
            continue
        strides = () if tensor.is_contiguous() else zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and stride == 0 for size, stride in strides):
            raise RuntimeError(
                f"parameter group {index}: {what} of shape {tuple(tensor.shape)} holds several elements in one place "
                "(it was expanded) and cannot be written to; clone() it first"
            )
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"parameter group {index}: {what} of shape {tuple(tensor.shape)} was made in inference mode and "
                "cannot be written to outside of it; clone() it first"
            )


def check_row(index: int, row: Row, entry: Entry) -> None:
    """Raises for a row that the arithmetic of these tensors cannot hold. It may have NaN, where gradients are clipped
    by a norm that is not finite.
    """
    dtype = reference.arithmetic(entry)
    limit = torch.finfo(dtype).max
    if any(abs(x) > limit for x in row):
        raise ValueError(
            f"parameter group {index}: a step with these hyperparameters leaves the range of the arithmetic of "
            f"{dtype}, {limit:.3g}: {row}"
        )


def check_sparse(index: int, hyper: Hyperparameters, row: Row) -> None:
    """Raises RuntimeError where `row` would make a sparse gradient or buffer dense."""
    if hyper.weight_decay != 0 and not (hyper.scale_invariant and hyper.momentum == 0):
        raise RuntimeError(
            f"parameter group {index}: sparse gradients with weight_decay = {hyper.weight_decay} need a "
            "scale_invariant group without momentum (torch.optim.SGD refuses them altogether); an ordinary decay "
            "would have to touch every row of the parameter"
        )
    if row.a_p != 0 or row.c_p != 0:
        raise RuntimeError(
            f"parameter group {index}: with sparse gradients lr·weight_decay must be at most {1 - theory.ALPHA_MIN} "
            f"and no decay may be carried in the momentum, got lr = {hyper.lr}, weight_decay = {hyper.weight_decay}"
        )


def check_fused(group: dict[str, Any], entry: Entry) -> None:
    """With fused=True, raises for tensors that torch's fused step refuses, in its words. DTensors, which it refuses
    as well, are allowed here.
    """
    if not group["fused"] or entry.grad is None:
        return
    check_for_fused(entry.param)
    if entry.grad.is_sparse:
        raise RuntimeError("`_fused_sgd` does not support sparse gradients")
