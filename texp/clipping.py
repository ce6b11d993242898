"""Clipping by the norm that gradients have at θ."""

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as clip_grad_norm_of_params_
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from texp.integrations.wrapped import texp_sgd
from texp.step import folding


@torch.no_grad()
def clip_grad_norm_(
    optimizer: torch.optim.Optimizer,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Like torch.nn.utils.clip_grad_norm_ for all parameters of a texp.SGD, but with the norm of the gradients at the
    weights θ of torch.optim.SGD: in groups in exponential form, the gradient at Pθ times P.

    Args:
        optimizer: the texp.SGD, not its parameters; it may be wrapped.
        max_norm: the maximum norm, at least 0.
        norm_type, error_if_nonfinite, foreach: as in torch.

    Returns the norm over all gradients before clipping, a tensor of one element. Gradients are modified in place.
    Under a GradScaler, unscale them first. Raises RuntimeError for a norm that is not finite if error_if_nonfinite is
    True, ValueError for a max_norm that is negative or NaN, and TypeError for another optimizer; gradients are then
    unchanged.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be at least 0, got {max_norm}")
    sgd = texp_sgd(optimizer)
    if sgd is None:
        raise TypeError(
            f"texp.clip_grad_norm_ takes the texp.SGD whose gradients are to be clipped, got {type(optimizer)}; "
            "for parameters of another optimizer there is torch.nn.utils.clip_grad_norm_"
        )
    param_groups = folding.exposed(sgd) or sgd.param_groups
    params = [p for group in param_groups for p in group["params"]]
    scales = sgd.intrinsic_scales()
    if norm_type == 0 or all(isinstance(P, float) and P == 1 for P in scales):  # 0 counts elements
        return clip_grad_norm_of_params_(params, max_norm, norm_type, error_if_nonfinite, foreach)
    norms = []
    for group, P in zip(param_groups, scales, strict=True):
        grads = [p.grad for p in group["params"] if p.grad is not None]
        if grads:
            norm = get_total_norm(grads, norm_type, foreach=foreach)
            norms.append(norm * (P.to(norm.device, norm.dtype) if isinstance(P, Tensor) else P))
    norm = get_total_norm(norms, norm_type, error_if_nonfinite)
    clip_grads_with_norm_(params, max_norm, norm, foreach)
    return norm
