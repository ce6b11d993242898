"""What texp's optimizers have in common: groups, hooks, GradScaler, graphs, checkpoints, working on θ. The arithmetic
of a step is in texp.theory (scalars) and in the backends (tensors); which row applies to which tensor is in
texp.step.gather and csrc/host.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from texp import backends, theory
from texp.step import buffers, folding, gather, groups, norm_stats
from texp.step.clip import Clip
from texp.step.device_state import DeviceScaleState
from texp.step.fallback import Fallback
from texp.step.folding import Folded
from texp.step.norm_stats import NormStat, NormStats
from texp.torch_internals import (
    current_raw_stream,
    disable_dynamo,
    global_step_post_hooks,
    global_step_pre_hooks,
)

# Options of the whole optimizer rather than of a group; pickled with it.
_OPTIONS = {
    "_backend": None,
    "_clip": Clip(),
    "_step_supports_amp_scaling": False,
    "capturable": False,
    "momentum_dtype": None,
}

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unwrapped(method: Callable) -> Callable:
    """Calls a method on the optimizer itself: Lightning's wrappers are of a subclass of what they wrap, so that the
    method would assign to the wrapper.
    """

    @functools.wraps(method)
    def call(self: "FusedOptimizer", *args, **kwargs) -> Any:
        while "_optimizer" in self.__dict__:
            self = self.__dict__["_optimizer"]
        return method(self, *args, **kwargs)

    return call


class FusedOptimizer(torch.optim.Optimizer):
    """An optimizer whose step of all groups is one pass of a backend.

    A subclass adds its arguments, which become `defaults`, and its checks of hyperparameters
    (:meth:`_check_hyperparameters`).

    Args:
        params: as for any torch optimizer.
        defaults: options of a group: lr, momentum, dampening, weight_decay and nesterov, and for trust ratios
            trust_coeff, eps, trust_clip and always_adapt, from which texp.theory makes the rows of a step; maximize,
            foreach, differentiable and fused, as torch has them; and others. A subclass that allows `differentiable`
            has a :meth:`_differentiable_step`.
        backend, capturable, momentum_dtype: as texp.SGD has them.
        clip: how gradients are clipped.
    """

    _needs_sums = False  # whether rows depend on sums over the elements of a tensor, as those of LARS

    def __init__(
        self,
        params,
        defaults: dict[str, Any],
        *,
        backend: str | None,
        capturable: bool,
        momentum_dtype: torch.dtype | None,
        clip: Clip = _OPTIONS["_clip"],
    ) -> None:
        if defaults["differentiable"] and backend not in (None, "reference"):
            raise RuntimeError(f"backend={backend!r} was requested, but a differentiable step is torch's own")
        if momentum_dtype not in (None, *_FLOATING):
            raise ValueError(f"momentum_dtype must be None or one of {_FLOATING}, got {momentum_dtype!r}")
        self._clip = _checked(clip, defaults, capturable)
        self._backend = backend
        self.capturable = capturable
        self.momentum_dtype = momentum_dtype
        # Whether a GradScaler leaves gradients scaled; the name is torch's.
        self._step_supports_amp_scaling = bool(defaults["fused"])
        self._set_unfolded()
        self._find_kernels()
        super().__init__(params, defaults)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        """Raises ValueError if a new group has invalid hyperparameters."""
        hyper = groups.hyperparameters(group).check()
        theory.check_non_negative(lr=hyper.lr)
        if hyper.trust is not None and not self._needs_sums:
            raise ValueError("trust_coeff is an option of texp.LARS: with it a group would not be stepped by SGD")

    def _set_unfolded(self) -> None:
        self._folded: Folded | None = None  # the exponential form, while the parameters hold θ
        self._contexts = 0  # nested `with optimizer.folded()` that are open
        self._evaluating = False  # between eval() and train()
        self._fallback: Fallback | None = None  # for the step in progress
        self._given: list[tuple[dict[str, Any], folding.Given]] = []  # what each group was created with
        self._norm_stats = NormStats()
        this = weakref.ref(self)
        self._norm_stats.exposed = lambda: folding.exposed(this())
        self._zero: Callable[[], Any] | None = None  # the ZeroRedundancyOptimizer around this, once looked for

    def _find_kernels(self, more_params: Iterable[Tensor] = ()) -> None:
        params = [p for group in self.__dict__.get("param_groups", ()) for p in group["params"]]
        self._gpus = _gpus((*params, *more_params))
        self._use(backends.kernels(self._backend, self._gpus))
        self._device: DeviceScaleState | None = None  # P and κ, while they are there
        # Captured graphs refer to these by address: they outlive the loading of a state dict.
        self._captured: list[tuple] = self.__dict__.get("_captured", [])
        self._skipped: bool | Tensor | Callable[[], bool] = False
        self._grad_norm: float | Tensor | None = None

    def _use(self, kernels: backends.Kernels) -> None:
        self._kernels = kernels
        core = kernels.core
        # Without the core there is no telling whether a profiler or the like is to see a step.
        self._observed: Callable[[], bool] | None = core and core.observed
        self._stepper = core and core.Stepper(
            check_scale=groups.check_step, current_stream=current_raw_stream, cpu=kernels.cpu, cuda=kernels.cuda
        )

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step() changed nothing because a GradScaler had found an inf or a NaN, or, with
        skip_nonfinite=True, because the norm of the gradients was not finite. Reading it waits for the device.
        Without fused=True a GradScaler does not even call step() then, and this keeps its value.
        """
        return bool(self._skipped() if callable(self._skipped) else self._skipped)

    @property
    @unwrapped
    def grad_norm(self) -> Tensor | None:
        """The norm that the gradients of the last step had at θ before they were clipped: float64, of shape (), on
        the GPU if the step was computed there, without waiting for it. None before the first step that clips.
        """
        if isinstance(norm := self._grad_norm, Tensor):
            return norm[0].clone()
        return None if norm is None else torch.tensor(norm, dtype=torch.float64, device="cpu")

    @property
    @unwrapped
    def max_norm(self) -> float | None:
        """The greatest norm of the gradients, to which they are clipped; None: they are not. It may be set between
        steps; ValueError if it is negative or NaN. A captured graph keeps that of its capture.
        """
        return self._clip.max_norm

    @max_norm.setter
    @unwrapped
    def max_norm(self, max_norm: float | None) -> None:
        self._clip = _checked(replace(self._clip, max_norm=max_norm), self.defaults, self.capturable)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; see torch.optim.Optimizer.add_param_group. As in torch the dict itself becomes the group.
        With norm_stats in it a copy does, and the given dict keeps them.

        Raises ValueError for hyperparameters that the constructor would refuse; the optimizer is then unchanged.
        """
        if isinstance(param_group, dict):
            values = {**groups.SCALE_KEYS, **self.defaults, **param_group}
            self._check_hyperparameters(values)
            groups.check_scale(values)
            stats = norm_stats.parsed(values.get("norm_stats", []))
            exponential = groups.is_exponential(values)
            if exponential and self.defaults["differentiable"]:
                raise ValueError("a scale_invariant group cannot be differentiable: its scale is not on the tape")
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                params = param_group["params"] = list(params)  # may be a generator
                once = {id(p) for p in _tensors(params)}
                if len(once) < len(params) and exponential:
                    raise ValueError(
                        "a scale_invariant group holds a parameter twice: its scale would be applied twice"
                    )
            if self._backend is None and not _gpus(_tensors(params)) <= self._gpus:
                self._leave_device()
                self._find_kernels(_tensors(params))
            if self.capturable and self._kernels.scale_on is None:
                backends.refuse_capturable()
            param_group = dict(param_group) if "norm_stats" in param_group else param_group
            groups.set_keys(param_group, self.defaults)
        self._leave_device()
        super().add_param_group(param_group)
        self._given.append((param_group, folding.given(param_group)))
        self._norm_stats.put(param_group, stats)

    def step(self, *args, **kwargs) -> Any:
        """step(closure=None): takes one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns what the closure returned, or None.
        """
        return (self._untraced_step if torch.compiler.is_compiling() else self._hooked_step)(args, kwargs)

    step.hooked = True  # tells torch that step() itself sees to the hooks, which see how it was called

    def _hooked_step(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        try:
            # torch's wrapper, for hooks and the profiler, takes as long as the step of a small model: it is skipped
            # when nobody is observing.
            return (self._observed_step if self._is_observed() else self._step)(*args, **kwargs)
        except BaseException:
            self._fallback = None
            # A GradScaler removes these after the step; left here they would affect the next one.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    # torch.compile has nothing to gain here: a step is a single pass already.
    _untraced_step = disable_dynamo(_hooked_step)

    def _is_observed(self) -> bool:
        if type(self).step is not FusedOptimizer.step:
            return False  # a subclass overrides step(): torch has wrapped that
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            return True
        if global_step_pre_hooks or global_step_post_hooks:
            return True
        return self._observed is None or self._observed()

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        reduces_there = self._kernels.scale_on and (self._clip.limit is not None or self._needs_sums)
        if scale is None and found_inf is None and not self.capturable and not reduces_there:
            if self._device is not None:
                self._leave_device()
            self._skipped = False
            self._step_on_host(1.0)
        elif not (self._kernels.scale_on and self._step_on_device(scale, found_inf)):
            if self.capturable:
                backends.refuse_capturable()
            self._leave_device()
            self._skipped = found_inf is not None and bool(found_inf)
            if self._skipped:
                return loss
            grad_scale = 1.0 if scale is None else float(scale)
            if not 0 < grad_scale < float("inf"):
                raise ValueError(f"grad_scale must be a finite number greater than 0, got {grad_scale}")
            self._step_on_host(grad_scale)
        if self._folded is not None:
            self._forget_folded()
        return loss

    def _step_on_host(self, grad_scale: float) -> None:
        """Takes a step whose rows are computed on the host."""
        stepper, clip = self._stepper, self._clip
        if self.defaults["differentiable"]:
            return self._differentiable_step()
        if stepper is None or (self._kernels.launcher is not None and self._refuse_capture()):
            return self._step_in_plain_torch(grad_scale)
        result = stepper.step(
            self.param_groups,
            self._norm_stats,
            self.state,
            grad_scale,
            self.momentum_dtype,
            self._check_fallback,
            clip.limit,
            clip.reduce,
        )
        if clip.limit is not None:
            self._grad_norm = stepper.grad_norm
        if result:
            if result & stepper.NONFINITE:
                self._skip_nonfinite()
            if result & stepper.CAPTURING and self._refuse_capture():
                self._step_in_plain_torch(grad_scale)
            if result & stepper.AVERAGED:
                groups.warn_of_averaging()
            if result & stepper.FALLBACK:
                fallback, self._fallback = self._fallback, None
                fallback.do()
                self._find_kernels_if_moved(entry.param for _, entry in fallback.work)

    def _refuse_capture(self) -> bool:
        """Whether a graph is being captured, which would hold for ever what the host computes; raises RuntimeError
        where a backend was asked for by name: torch's own step is none.
        """
        capturing = self._kernels.cuda is not False and torch.cuda.is_current_stream_capturing()
        if capturing and self._backend is not None:
            raise RuntimeError("a step can be captured with capturable=True; this one would be computed by the host")
        return capturing

    def _step_in_plain_torch(self, grad_scale: float) -> None:
        """Without a core, or while a graph is captured that would replay what the host has computed: for ordinary
        groups that is what torch's own step does.
        """
        stats = self._norm_stats.found(self.param_groups)
        norm = gather.step(self.param_groups, stats, self.state, grad_scale, self.momentum_dtype, self._clip)
        if norm is not None:
            self._grad_norm = norm
            if self._clip.refuses(norm):
                self._skip_nonfinite()
        self._find_kernels_if_moved(p for group in self.param_groups for p in group["params"])

    def _skip_nonfinite(self) -> None:
        self._clip.refuse()
        self._skipped = True

    def _check_fallback(self, left: list[tuple], grad_scale: float) -> None:
        """Called by the core with the tensors that it leaves to plain torch, and what their rows divide gradients by;
        raises where these cannot be stepped.
        """
        self._fallback = Fallback(self._backend, self.param_groups, self.state, self.momentum_dtype)
        self._fallback.check(left, grad_scale)

    def _find_kernels_if_moved(self, params: Iterable[Tensor]) -> None:
        """Chooses kernels again if parameters have moved to another GPU."""
        if self._backend is None and not _gpus(params) <= self._gpus:
            self._find_kernels()

    def _step_on_device(self, scale: Tensor | None, found_inf: Tensor | None) -> bool:
        """Takes a step of which the host does not know whether, or when, it is taken, if this is one: it may be
        skipped, or is captured in a graph. Returns whether it did.
        """
        on, clip = self._kernels.scale_on, self._clip
        if not self.capturable:
            only_reduces = scale is None and found_inf is None
            if clip.error_if_nonfinite or not (
                only_reduces or (isinstance(found_inf, Tensor) and found_inf.device.type == on)
            ):
                return False
        if not self.capturable:
            self._refuse_capture()
        capturing = on == "cuda" and torch.cuda.is_current_stream_capturing()
        why = self._ask_device(scale, found_inf, capturing) if self._device is not None else False
        if why is not None and (why is False or self._device.scales.device != self._first_device(on)):
            why = self._make_device_state(on, capturing) or self._ask_device(scale, found_inf, capturing)
        if why is None:
            self._skipped = False if found_inf is None else found_inf
            if clip.limit is not None:
                norm = self._grad_norm = self._device.norm
                if clip.skip_nonfinite:
                    self._skipped = lambda: bool(found_inf) or not norm.isfinite()
        elif self.capturable:
            raise RuntimeError(f"capturable=True was requested, but {why}")
        return why is None

    def _ask_device(self, scale: Tensor | None, found_inf: Tensor | None, capturing: bool) -> str | bool | None:
        """Takes a step on the device: None; or says why not; False where what is kept there is out of date."""
        device_state, launcher = self._device, self._kernels.launcher
        device_state.restore(self.state)
        if launcher is not None:
            launcher.capturable = self.capturable
        if capturing:
            self._captured.append((device_state, launcher))
        device = device_state.scales.device
        return self._stepper.step_on_device(
            self.param_groups,
            self._norm_stats,
            self.state,
            self.momentum_dtype,
            device_state,
            None if scale is None else torch.as_tensor(scale, dtype=torch.float32, device=device),
            None if found_inf is None else torch.as_tensor(found_inf, dtype=torch.float32, device=device),
            capturing,
            self._clip.limit,
        )

    def _first_device(self, device_type: str) -> torch.device | None:
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params if p.device.type == device_type), None)

    def _make_device_state(self, device_type: str, capturing: bool) -> str | None:
        """Puts P and κ onto the device, or says why they cannot be there."""
        device = self._first_device(device_type)
        if device is None:
            return f"no parameter is on a device of type {device_type!r}"
        if capturing:
            raise RuntimeError("the first step of these groups cannot be captured: take one before it")
        self._leave_device()
        for index, group in enumerate(self.param_groups):
            groups.check_step(index, group)
        if self._kernels.launcher is None:
            self._kernels.core.load_cuda_kernels(device.index)
        self._device = DeviceScaleState(self.param_groups, self.state, device)
        return None

    def _read_back(self) -> None:
        """Updates P and κ on the host if they are on a device."""
        if self._device is not None:
            self._device.read_back(self.state)

    def _leave_device(self) -> None:
        if self._device is not None:
            self._read_back()
            self._device = None

    step.__signature__ = inspect.signature(_step)
    _observed_step = torch.optim.Optimizer.profile_hook_step(_step)

    @unwrapped
    @torch.no_grad()
    def fold(self) -> None:
        """Turns every scale-invariant group into the weights θ and momentum v that torch.optim.SGD would hold.

        Parameters, their gradients, momentum buffers and norm_stats are modified in place (one rounding each); the
        scale starts again at P = 1, κ = 0. Training can go on, in the same form or as an ordinary group. Under
        ZeroRedundancyOptimizer, all processes must call it.

        Raises RuntimeError, and changes nothing, where a parameter that a scale-invariant group was given is no
        longer in it: a wrapper, such as DeepSpeed's ZeRO, steps copies of the weights.
        """
        self._read_back()
        folding.fold(self)
        self._forget_folded()

    @unwrapped
    @contextlib.contextmanager
    def folded(self) -> Iterator[None]:
        """``with optimizer.folded():`` holds θ and v, as :meth:`fold` makes them, for whatever reads or writes
        absolute sizes: to export or average weights, to clip weights or gradients by them, to reset momentum, to roll
        back. Gradients are then those at θ.

        Afterwards, also after an exception, the exponential form is back: bit for bit where nothing was changed (to
        rounding where parameters share memory, or a TorchDispatchMode watches), and that of the new θ and v
        elsewhere. It needs a copy of the scale-invariant groups and of their momentum meanwhile. It may be nested. A
        step inside, or a state dict that is loaded, goes on from θ, and nothing is given back. Raises as
        :meth:`fold` does.
        """
        self._enter_folded()
        self._contexts += 1
        try:
            yield
        finally:
            self._contexts -= 1
            self._leave_folded()

    @unwrapped
    def eval(self) -> None:
        """Like entering :meth:`folded`, until :meth:`train`: the weights are θ, for evaluation and export. Some
        frameworks call these methods if an optimizer has them.
        """
        self._enter_folded()
        self._evaluating = True

    @unwrapped
    def train(self) -> None:
        """Undoes :meth:`eval`; without it, does nothing."""
        self._evaluating = False
        self._leave_folded()

    @torch.no_grad()
    def _enter_folded(self) -> None:
        if self._folded is None:
            self._read_back()
            self._folded = Folded(self)

    @torch.no_grad()
    def _leave_folded(self) -> None:
        if self._folded is not None and not self._contexts and not self._evaluating:
            self._folded.restore()
            self._folded = None

    def _forget_folded(self) -> None:
        """Nothing is to be restored any more: training has gone on from θ."""
        self._folded = None
        self._evaluating = False

    @property
    def norm_stats(self) -> list[list[NormStat]]:
        """The statistics of each group, as lists of texp.NormStat: `find()` returns the tensor, `power` is the power
        of P. To replace them, set ``group["norm_stats"]``.
        """
        return [self._norm_stats.of(group) for group in self.param_groups]

    def _given_to(self, group: dict[str, Any]) -> folding.Given:
        return next((given for of, given in self._given if of is group), [])

    @unwrapped
    def intrinsic_scales(self) -> list[float | Tensor]:
        """P of each group; a gradient times P is the gradient at θ. 1.0 for an ordinary group. While P is on a
        device, it is returned as float64 tensors there, without waiting.
        """
        if self._device is not None and self._device.is_of(self.param_groups):
            return list(self._device.scales[:, 0].clone())
        return [groups.scale_of(group).P for group in self.param_groups]

    @unwrapped
    def state_dict(self) -> dict[str, Any]:
        """Like that of any torch optimizer, with P and κ among the options of groups in exponential form. norm_stats
        belong to the model and are not part of it. After :meth:`fold`, or inside :meth:`folded`, torch.optim.SGD can
        load it.
        """
        self._read_back()
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group.pop("norm_stats", None)  # set since the last step
        return state_dict

    @unwrapped
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of a texp.SGD or of a torch.optim.SGD, at any step of a run.

        As in torch, the saved options replace those of the groups, `scale_invariant` and the scale included. Momentum
        buffers are copied, and converted to `momentum_dtype` or else to the wider of the saved dtype and the
        parameter's. Options without a scale, as torch.optim.SGD saves them, leave `scale_invariant` as it is and
        start at P = 1, κ = 0. norm_stats are kept.

        Raises ValueError where groups, shapes or scales do not fit; the optimizer is then unchanged.
        """
        self._leave_device()
        # Registered last, it runs after all other hooks.
        hook = self.register_load_state_dict_pre_hook(groups.prepare_loading)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._read_back()
        own = {name: self.__dict__[name] for name in _OPTIONS}
        return {**super().__getstate__(), **own, "norm_stats": self.norm_stats}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when unpickled, and by torch's load_state_dict."""
        if "_folded" not in self.__dict__:
            self._set_unfolded()
        # What belongs to a group passes to the one that replaces it.
        before = self.__dict__.get("param_groups", ())
        self._norm_stats.take(before)
        stats = state.get("norm_stats", [self._norm_stats.of(group) for group in before])
        super().__setstate__({key: value for key, value in state.items() if key != "norm_stats"})
        for old, new, its in zip_longest(before, self.param_groups, stats):
            if old is not None:
                self._norm_stats.put(old, [])
            self._norm_stats.put(new, its or [])
        given = [self._given_to(group) for group in before] or map(folding.given, self.param_groups)
        self._given = list(zip(self.param_groups, given, strict=True))
        for key, value in _OPTIONS.items():
            self.__dict__.setdefault(key, value)
        self._find_kernels()
        self._forget_folded()
        for group in self.param_groups:
            for key, value in groups.TORCH_DEFAULTS.items():
                group.setdefault(key, value)
        for param, values in self.state.items():
            if isinstance(buf := values.get("momentum_buffer"), groups.AsIs):
                dtype = buffers.buffer_dtype(param, buf.value, self.momentum_dtype)
                values["momentum_buffer"] = buf.value.to(param.device, dtype, copy=True)


def _checked(clip: Clip, defaults: dict[str, Any], capturable: bool) -> Clip:
    """The same; raises ValueError where an optimizer cannot clip so."""
    if clip.limit is not None and defaults["differentiable"]:
        raise ValueError("a differentiable step cannot clip: it is torch's own")
    if clip.error_if_nonfinite and capturable:
        raise ValueError(
            "error_if_nonfinite waits for the device, which a capturable step cannot; skip_nonfinite does not"
        )
    return clip


def _tensors(params: Iterable[Tensor | tuple[str, Tensor]]) -> list[Tensor]:
    """The parameters of a group, without their names."""
    return [p[1] if isinstance(p, tuple) else p for p in ([params] if isinstance(params, Tensor) else params)]


def _gpus(params: Iterable[Tensor]) -> frozenset[torch.device]:
    """The CUDA devices (with ROCm, AMD's) that these parameters are on."""
    return frozenset(p.device for p in params if isinstance(p, Tensor) and p.is_cuda)
