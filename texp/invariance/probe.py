"""A copy of a model at a random point that tells how its output changes when parameters are scaled. The model itself
is not touched.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

from texp.backends.memory import that_share_memory

EPS = 1e-30  # for the norms of the copy: BatchNorm refuses 0
EPS_NAMES = ("eps", "epsilon", "variance_epsilon")
RANDOM_DEPTH = ("DropPath", "StochasticDepth")  # of timm and torchvision
TINY = 1e-3  # a root mean square up to this is as good as zero, like the 1e-6 of ConvNeXt's gates


class Row(NamedTuple):
    """One equation: Σ products[i]·d_i = Σ degrees[k]·D_k for an invariant set d, where D_k are the powers of P with
    which the inputs of norms grow."""

    products: Tensor  # (n,): ⟨p_i, g_i⟩, with g the gradient of a random combination of outputs, or of statistics
    sizes: Tensor  # (n,): ‖p_i‖·‖g_i‖, next to which rounding errors of the products are to be seen
    degrees: Tensor  # (K,)
    of_output: bool


class Change(NamedTuple):
    """The effect of scaling some parameters by c."""

    output: float  # the largest relative change of an output tensor
    powers: dict[str, float]  # of c, by which running statistics grew; nan: not updated, inf: by no power


class Probe:
    """The copy, in train mode, without dropout or stochastic depth, with eps ≈ 0 in its norms. Norms in eval mode
    while the model is in train mode, or that its `train` leaves there, stay so. Arguments are those of `texp.audit`;
    random inputs are drawn like the given ones, each tensor by itself.

    Raises ValueError for parameters that are complex, uninitialised, or share memory without being the same.
    """

    def __init__(self, model: nn.Module, inputs: tuple, forward: Callable | None, seed: int, device, dtype) -> None:
        for name, p in model.named_parameters():
            if isinstance(p, nn.parameter.UninitializedParameter):
                raise ValueError(f"parameter {name} has no shape yet: run the model once before")
            if p.is_complex():
                raise ValueError(f"parameter {name} is complex, which texp.audit cannot take")
        shared = that_share_memory(model.parameters())
        if names := [name for name, p in model.named_parameters() if id(p) in shared]:
            raise ValueError(f"parameters {', '.join(names)} share memory: make them one parameter")
        # deepcopy refuses tensors that were computed, which torch's older weight_norm leaves in modules.
        computed = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf)
        self.model = copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
        of_complex = torch.promote_types(dtype, torch.complex64)
        self.model._apply(
            lambda t: t.to(device, dtype if t.is_floating_point() else of_complex if t.is_complex() else None)
        )
        self.model.train()
        for module, its in zip(self.model.modules(), model.modules(), strict=True):
            if isinstance(module, _NormBase) and model.training and not its.training:
                module.eval()
        self.model.zero_grad(set_to_none=True)
        self.forward = forward or (lambda model, *inputs: model(*inputs))
        self.generator = torch.Generator().manual_seed(seed)
        self.seed, self.device, self.dtype = seed, device, dtype
        self.example = _map(inputs, lambda x: x.detach().to(device, dtype if x.is_floating_point() else None))
        self.inputs = _map(self.example, self._like)  # the example may be special, such as all ones
        self.params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.eps: list[tuple[nn.Module, str, float | None]] = []
        self.norms: dict[nn.Module, str] = {}  # those with running statistics
        for name, module in self.model.named_modules():
            if isinstance(module, _DropoutNd) or type(module).__name__ in RANDOM_DEPTH:
                module.eval()  # other random choices are the same in every run
            for key in EPS_NAMES:
                if isinstance(eps := getattr(module, key, 0), float | None):
                    self.eps.append((module, key, eps))
                    setattr(module, key, EPS)
            if isinstance(module, _NormBase) and module.training:
                module.register_forward_pre_hook(self._see, with_kwargs=True)
                if module.running_mean is not None:
                    self.norms[module] = name
            elif isinstance(module, _NormBase) and module.running_mean is not None:
                module.running_mean.copy_(self._random_like(module.running_mean))
                module.running_var.mul_(self._random_like(module.running_var).mul_(0.3).exp())
        self.seen: list[tuple[nn.Module, Tensor]] = []  # (norm, its input) of the last run, of those in `norms`
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(self._generic(p))
        self.base = {name: p.detach().clone() for name, p in self.params.items()}

    def rows(self) -> Iterator[Row]:
        """One row of the outputs and, if there are norms with running statistics, one of these. Then moves on.

        Raises ValueError where outputs or gradients are not finite, or a BatchNorm has too little to see.
        """
        outputs = self.run()
        total = sum((self._random_like(y) * y).sum() / _rms(y) for y in outputs)
        none = torch.zeros(len(self.norms), dtype=torch.float64)
        yield Row(*self._products(total, retain=bool(self.norms)), none, of_output=True)
        if self.norms:
            total, degrees, order = torch.zeros_like(total), none.clone(), list(self.norms)
            for module, x in self.seen:
                dims = [d for d in range(x.dim()) if d != 1]
                for power, stat in ((1, x.mean(dims)), (2, x.var(dims, correction=0))):
                    part = (self._random_like(stat) * stat).sum() / _rms(stat)
                    total = total + part
                    degrees[order.index(module)] += power * part.item()
            yield Row(*self._products(total, retain=False), degrees, of_output=False)
        self.move()

    def move(self) -> None:
        """To other inputs, other random choices of the model, and parameters each times a factor of its own: what is
        invariant at one point need not be so at another."""
        with torch.no_grad():
            for name, p in self.params.items():
                factor = torch.empty((), dtype=p.dtype).uniform_(-0.3, 0.3, generator=self.generator).exp().item()
                torch.mul(self.base[name], factor, out=p)
        self.inputs = _map(self.example, self._like)
        self.seed += 1

    def rescale(self, powers: dict[str, float], c: float) -> None:
        """Moves on from where these parameters are multiplied by c^power."""
        for name, power in powers.items():
            self.base[name].mul_(c**power)
        self.move()

    def scaled(self, powers: dict[str, float], c: float) -> Change:
        """What changes when each of these parameters is multiplied by c^power. They are put back, exactly where c is
        a power of 2.

        Raises ValueError where a buffer that is not known as a running statistic depends on the scale.
        """
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        runs = []
        with torch.no_grad():
            for sign in (1, -1):
                for name, b in self.model.named_buffers():
                    # From zero, running statistics are the new ones after one step, times a constant.
                    b.copy_(torch.zeros_like(b) if _is_stat(name) else buffers[name])
                runs.append((self.run(), {name: b.clone() for name, b in self.model.named_buffers()}))
                for name, power in powers.items():
                    self.params[name].mul_(c ** (sign * power))
            for name, b in self.model.named_buffers():
                b.copy_(buffers[name])
        (before, left), (after, scaled_left) = runs
        for name, b in left.items():
            moved = b.is_floating_point() and not _is_stat(name) and not torch.equal(b, buffers[name])
            if moved and (scaled_left[name] - b).norm() > torch.finfo(b.dtype).eps ** 0.6 * b.norm():
                raise ValueError(
                    f"buffer {name} is changed by forward and grows with the weights, but how is not known: running "
                    "statistics are those called running_mean and running_var"
                )
        change = max(((b - a).norm() / a.norm().clamp_min(1e-300)).item() for a, b in zip(before, after, strict=True))
        return Change(change, {n: _log_ratio(scaled_left[n], left[n], c) for n in left if _is_stat(n)})

    def as_it_was(self, model: nn.Module) -> None:
        """Gives the copy the parameters, buffers, norms' eps and inputs that the model has."""
        own, its = (itertools.chain(each.parameters(), each.buffers()) for each in (self.model, model))
        with torch.no_grad():
            for p, q in zip(own, its, strict=True):
                p.copy_(q)
        for module, key, eps in self.eps:
            setattr(module, key, eps)
        self.inputs = self.example

    def run(self) -> list[Tensor]:
        """One forward pass; the floating-point tensors of its output. The same random choices until `move`."""
        self.seen.clear()
        random.seed(self.seed)
        torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed every GPU as well
        if self.device.type == "cuda":
            torch.cuda.manual_seed(self.seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(self.seed % 2**32)
        found = tensors(self.forward(self.model, *self.inputs))
        real = (torch.view_as_real(y) if y.is_complex() else y for y in found)
        outputs = [y for y in real if y.is_floating_point()]
        if not outputs:
            raise ValueError("the output holds no tensor of floating-point numbers; see `forward`")
        if not all(y.isfinite().all() for y in outputs):
            raise ValueError("the output is not finite at a random point near the model's")
        return outputs

    def _see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = (*args, *kwargs.values())[0]
        values = x.numel() // x.shape[1]
        if isinstance(module, _BatchNorm) and values < 3:
            raise ValueError(
                f"a {type(module).__name__} of {module.num_features} channels sees {values} values per channel: two "
                "become ±1 whatever they are, so give an example with a larger batch"
            )
        if module in self.norms:
            self.seen.append((module, x))

    def _products(self, total: Tensor, retain: bool) -> tuple[Tensor, Tensor]:
        """`Row.products` and `Row.sizes` of total."""
        params = list(self.params.values())
        if not total.requires_grad:
            return tuple(torch.zeros(2, len(params), dtype=torch.float64))
        grads = torch.autograd.grad(total, params, retain_graph=retain, materialize_grads=True)
        flat = [(p.detach().flatten(), g.to_dense().flatten()) for p, g in zip(params, grads, strict=True)]
        products = torch.stack([torch.stack([p.dot(g), p.norm() * g.norm()]) for p, g in flat]).T.cpu().double()
        if not products.isfinite().all():
            raise ValueError("the gradients are not finite at a random point near the model's")
        return tuple(products)

    def _generic(self, p: Tensor) -> Tensor:
        """A random point near p, of the same size and mostly the same signs, without its special values: zeros, ones
        and constants give sets that are invariant there and nowhere else."""
        draw = self._random_like(p)
        if p.numel() == 0:
            return p
        rms = p.square().mean().sqrt()
        if rms < TINY:
            return draw * (0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
        if p.min() == p.max():
            return p * (1 + draw.clamp(-2.5, 2.5) * 0.3)
        return p * (1 + 0.3 * draw) + 0.1 * rms * self._random_like(p)

    def _like(self, x: Tensor) -> Tensor:
        """A random input like the example x."""
        if x.is_floating_point():
            if not x.isfinite().all():  # a mask of −inf, say
                return x
            std = x.std(correction=0)
            return self._random_like(x) * (std if std > 0 else 1.0) + x.mean()
        if x.dtype == torch.bool or x.is_complex() or x.numel() == 0:
            return x
        low, high = x.min().item(), x.max().item()
        return torch.randint(low, high + 1, x.shape, generator=self.generator, dtype=x.dtype).to(x.device)

    def _random_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype).to(x.device)


def _is_stat(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, list, tuple, mapping or dataclass, nested to any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif not isinstance(value, (str, bytes, int, float, complex, type(None))):
        raise ValueError(f"the output holds a {type(value).__name__}; see `forward`")


@contextlib.contextmanager
def no_trace(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Leaves all global random states and modes as they are; in it, gradients are on, autocast is off, and what a
    model makes in its forward pass is of `dtype`."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    default = torch.get_default_dtype()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            # A compiled model would be compiled again for the copy, which takes longer than all else.
            torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext(),
        ):
            torch.set_default_dtype(dtype)
            yield
    finally:
        torch.set_default_dtype(default)
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Raises ValueError if the model was changed, and gives its buffers back what they held."""
    tensors = [*model.parameters(), *model.buffers()]
    versions = [t._version for t in tensors]
    buffers = [b.clone() for b in model.buffers()]
    try:
        yield
    finally:
        if [t._version for t in tensors] != versions:
            with torch.no_grad():
                for b, before in zip(model.buffers(), buffers, strict=True):
                    b.copy_(before)
            raise ValueError("forward uses the model itself; it must use the copy that it is given as `model`")


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)((key, _map(part, change)) for key, part in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(part, change) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(part, change) for part in value)
    return value


def _rms(x: Tensor) -> Tensor:
    """Root mean square, 1 where it is 0; not differentiated."""
    rms = x.detach().square().mean().sqrt()
    return torch.where(rms > 0, rms, torch.ones_like(rms))


def _log_ratio(after: Tensor, before: Tensor, c: float) -> float:
    """log_c of ‖after‖/‖before‖; nan where both are 0, inf where they are not multiples of one another."""
    if not after.any() and not before.any():
        return math.nan
    ratio = after.norm() / before.norm()
    multiple = (after - ratio * before).norm() <= torch.finfo(after.dtype).eps ** 0.4 * after.norm()
    return math.log(ratio.item(), c) if multiple and 0 < ratio < math.inf else math.inf
