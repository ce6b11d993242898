"""texp.SGD: its arguments and what they mean."""

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from texp import theory
from texp.optimizer import FusedOptimizer, unwrapped
from texp.step import buffers, groups
from texp.step.clip import Clip
from texp.torch_internals import disable_dynamo


class SGD(FusedOptimizer):
    r"""SGD with momentum, a drop-in for :class:`torch.optim.SGD`, that can train scale-invariant parameters in
    the exponential form of Li & Arora (ICLR 2020): without weight decay, with a learning rate that grows at
    every step, and through exactly the same functions.

    Args:
        params: parameters, named parameters or groups, as for any torch optimizer.
        lr: learning rate η; a float, or a tensor of one element. In a scale-invariant group too this is the
            ordinary LR, so that any torch scheduler works unchanged. Default 1e-3.
        momentum: γ, default 0.
        dampening: τ, default 0.
        weight_decay: λ, an L2 penalty as in torch, default 0.
        nesterov: Nesterov momentum, default False. Needs momentum > 0 and no dampening.
        maximize: gradient ascent instead of descent, default False.
        foreach: whether the reference backend batches tensors; None, the default: where it is faster.
        differentiable: take torch's own step, which autograd can follow. Default False; not for scale-invariant
            groups.
        fused: True asks a GradScaler to leave the gradients scaled, as torch's fused step does: the step unscales
            them while reading them, without waiting for the device. It does not select kernels: a step is a single
            pass in any case. Default None.
        scale_invariant: the loss must not change when all parameters of the group are multiplied by the same
            number c > 0. Their weight decay is then traded for a growing LR. Default False; usually set per
            group, as texp.param_groups does.
        backend: "reference", "cpu", "cuda" or "triton". None, the default, takes "cpu" for tensors on the CPU and,
            for tensors on GPUs, "cuda" or else "triton"; what they cannot take is stepped by "reference", in plain
            torch. A named backend never falls back. With TRITON_INTERPRET=1 in the environment, "triton" steps
            tensors on the CPU, slowly.
        capturable: keep P and κ on the GPU, so that a step captured in a graph replays the schedule.
            Hyperparameters may then be float32 or float64 tensors on the device; numbers are fixed by the capture.
            Take a step before each capture. Needs "cuda" or "triton"; default False. An option of the optimizer, not
            of a group.
        max_norm: clip the gradients of all groups to this norm, as torch.nn.utils.clip_grad_norm_ before the step
            would, by the norm that they have at θ; they are not modified. None, the default: do not clip. An option
            of the optimizer, as the next three: :attr:`max_norm` may be set between steps, :attr:`grad_norm` is the
            norm.
        norm_type: 2, the default, or inf.
        error_if_nonfinite: RuntimeError, and no step, if the norm is not finite, for which the device is waited for.
            Default False: then the step is taken, and weights become NaN.
        skip_nonfinite: a step whose norm is not finite changes nothing, and :attr:`step_was_skipped` is True. Default
            False. Works without max_norm, too, and without waiting for the device.
        momentum_dtype: the dtype of momentum buffers, such as float32 for weights in bfloat16, or bfloat16 for
            weights in float32. None, the default: the dtype to which torch promotes parameter and gradient.

    In a scale-invariant group the parameters hold Pθ, where θ are the weights that torch.optim.SGD would hold,
    and the momentum buffers (v − κθ)/P; `group["scale"]` is P, kept in [1, 2), `group["scale_exponent"]` counts how
    often it was halved for that, and `group["carried_decay"]` is κ. :meth:`intrinsic_scales` gives P of any group.
    The functions computed are the same; :meth:`fold` turns the weights into θ themselves. Any group can become
    scale-invariant at any step (set ``group["scale_invariant"] = True``), and an ordinary one again by
    :meth:`fold` and setting it to False.

    ``group["norm_stats"]`` lists running statistics that grow with the weights: if the input of a BatchNorm grows as
    P^d, its running mean with power d and its running variance with power 2·d. Each step multiplies them by the
    change of P^power. An entry is (module, "running_mean", power), or (function, power) with a function that returns
    the tensor, which are looked up at every step, wherever the model has been moved; or (tensor, power), which is
    valid until the model replaces the tensor. The optimizer moves them from the group to :attr:`norm_stats`. They are
    not in state dicts: to resume a run, create the groups with them again.

    On GPUs, P and κ are on the device while steps are captured with capturable=True or, with fused=True, may be
    skipped by a GradScaler. :meth:`fold`, :meth:`log10_lr` and :meth:`state_dict` then update them in the groups.

    A step modifies in place: parameters, momentum buffers, norm_stats. It never writes to a gradient. With fused=True
    a step under a GradScaler unscales the gradients while reading them; if the scaler found an inf or a NaN, nothing
    is changed and :attr:`step_was_skipped` is True.

    The first optimizer builds the C++ core if there is none yet (texp.native), once for this torch and Python.

    Raises, before anything is changed: ValueError for hyperparameters that are negative (except the LR of a step),
    not finite or beyond the range of the arithmetic, for a max_norm that is negative or NaN, another norm_type, and
    for combinations that torch refuses or that cannot be; RuntimeError for a norm that is not finite if asked, for a
    backend that is not available, for tensors that cannot be written to (expanded, integer, made in inference mode),
    for momentum buffers that do not fit, and for sparse gradients with weight decay unless the group is
    scale-invariant and without momentum.

    Parameters that share memory (views of one tensor, or one that is given twice) are stepped one after the other by
    the reference backend.
    """

    # A graph break inside a constructor would lose attributes, so torch.compile leaves it alone.
    @disable_dynamo
    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        scale_invariant: bool = False,
        backend: str | None = None,
        capturable: bool = False,
        momentum_dtype: torch.dtype | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        # The errors of torch.optim.SGD, in its order and words; NaN and infinity, which it accepts, are refused.
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        numbers = {"learning rate": lr, "momentum value": momentum, "weight_decay value": weight_decay}
        for what, value in numbers.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"Invalid {what}: {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if fused and differentiable:
            raise RuntimeError("`fused` does not support `differentiable`")
        if fused and foreach:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        defaults.update(maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused)
        if scale_invariant:
            defaults["scale_invariant"] = True
        clip = Clip(max_norm, norm_type, error_if_nonfinite, skip_nonfinite)
        super().__init__(
            params, defaults, backend=backend, capturable=capturable, momentum_dtype=momentum_dtype, clip=clip
        )

    @unwrapped
    def log10_lr(self) -> list[float]:
        """log10 of the paper's learning rate η̃ of the next step, one float for each group (η̃ itself leaves the
        range of a float in long runs). For an ordinary group, log10 of its LR; −inf if the LR is 0.
        """
        self._read_back()
        return [
            theory.log10_lr(
                groups.scale_of(group),
                groups.hyperparameters(group),
                first=groups.is_first(group, [buffers.buf_of(self.state, p) for p in group["params"]]),
            )
            for group in self.param_groups
        ]

    @torch.enable_grad()
    def _differentiable_step(self) -> None:
        for index, group in enumerate(self.param_groups):
            if groups.is_exponential(group):
                raise RuntimeError(f"parameter group {index} is scale_invariant: its step cannot be differentiable")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            bufs = [buffers.buf_of(self.state, p) for p in params]
            torch_sgd(
                params,
                [p.grad for p in params],
                bufs,
                has_sparse_grad=any(p.grad.is_sparse for p in params),
                foreach=False,
                fused=False,
                **{
                    key: group[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
                },
            )
            if group["momentum"] != 0:
                for param, buf in zip(params, bufs, strict=True):
                    self.state[param]["momentum_buffer"] = buf
