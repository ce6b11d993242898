"""texp.LARS: its arguments and what they mean."""

from typing import Any

import torch
from torch import Tensor

from texp.optimizer import FusedOptimizer
from texp.step import groups
from texp.step.clip import Clip
from texp.torch_internals import disable_dynamo


class LARS(FusedOptimizer):
    """LARS (You, Gitman and Ginsburg 2017, "Large Batch Training of Convolutional Networks"): SGD with momentum where
    the gradient and the decay of each tensor are multiplied by its trust ratio
    trust_coeff·‖p‖ / (‖g‖ + weight_decay·‖p‖ + eps), or 1 where a norm is 0. On a GPU a step is a few launches,
    whatever the number of tensors and groups: sums of squares, rows, and the rows applied.

    The arguments, their meaning and the state are those of timm.optim.Lars, whose state dicts load, and of
    :class:`texp.SGD`.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        lr: learning rate; a float, or a tensor of one element. Default 1.0.
        momentum, dampening, weight_decay, nesterov: as in texp.SGD.
        trust_coeff: default 0.001.
        eps: default 1e-8.
        trust_clip: the ratio over the learning rate, and at most 1, in place of the ratio, as in LARC. Default False.
        always_adapt: multiply by the ratio also in groups without weight decay. Default False.
        maximize, fused, backend, capturable, momentum_dtype, max_norm, norm_type, error_if_nonfinite,
            skip_nonfinite: as in texp.SGD. The norms of trust ratios are those of clipped, unscaled gradients.

    Norms are added in float64. A step modifies in place parameters and momentum buffers, and never a gradient. Raises
    as texp.SGD does, and ValueError for a scale_invariant group: in the exponential form weights are as large as the
    schedule says, and a ratio of norms would undo that.
    """

    _needs_sums = True

    @disable_dynamo
    def __init__(
        self,
        params,
        lr: float | Tensor = 1.0,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        backend: str | None = None,
        capturable: bool = False,
        momentum_dtype: torch.dtype | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        defaults.update(trust_coeff=trust_coeff, eps=eps, trust_clip=trust_clip, always_adapt=always_adapt)
        defaults.update(maximize=maximize, foreach=None, differentiable=False, fused=fused)
        clip = Clip(max_norm, norm_type, error_if_nonfinite, skip_nonfinite)
        super().__init__(
            params, defaults, backend=backend, capturable=capturable, momentum_dtype=momentum_dtype, clip=clip
        )

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        super()._check_hyperparameters(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if groups.is_exponential(group):
            raise ValueError("LARS takes no scale_invariant group: a ratio of norms would undo its schedule")
