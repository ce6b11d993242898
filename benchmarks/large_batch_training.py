"""How benchmarks/large_batch.py trains: the model, the LR, the two optimizers, and an epoch of steps.

The model is the small ResNet of texp.cli.digits on scikit-learn's digits, which are kept in the device's memory. For
other data, put a model into `make_model`, and a DataLoader with a DistributedSampler into `Training.epoch`.
"""

import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import texp
from texp.cli.digits import Digits, PreActResNet
from texp.invariance.audit import bias_or_norm

if TYPE_CHECKING:
    from benchmarks.large_batch import Options

GROUPS = 4  # of a GroupNorm
OPTIMIZERS = ("texp", "torch", "lars")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def world() -> int:
    """Processes that torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def device_of(options: "Options") -> torch.device:
    """Of this process: on a machine with several GPUs, each has its own."""
    return torch.device(options.device, int(os.environ.get("LOCAL_RANK", "0")) if options.device == "cuda" else None)


def lr_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """Of the peak LR, from 0 to 1, at `step` of `steps`: linear up to step `warmup`, then "cosine" or "step"."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "step":
        return 0.1 ** ((step >= steps // 2) + (step >= steps * 3 // 4))
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_model(options: "Options") -> nn.Module:
    """All trainable; the same on every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = PreActResNet(options.width, all_trainable=True)
    eps = 1e-30 if options.float64 else 1e-5
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eps = eps
                if options.model == "gn":
                    setattr(module, name, nn.GroupNorm(GROUPS, norm.num_features, eps))
    return model.double() if options.float64 else model


def make_optimizer(
    name: str, options: "Options", model: nn.Module, example: Tensor, lr: float
) -> torch.optim.Optimizer:
    """The one switch, one of OPTIMIZERS. The model must be on its device and in its dtype; `example` is a small batch
    for it."""
    arguments = {"lr": lr, "momentum": options.momentum, "nesterov": True}
    if name == "texp":
        groups = texp.param_groups(model, example, no_decay="bias_and_norm", weight_decay=options.weight_decay)
        return texp.SGD(groups, backend=options.backend, fused=True, max_norm=options.clip, **arguments)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if bias_or_norm(n, p) == still], "weight_decay": 0.0 if still else decay}
        for still, decay in ((False, options.weight_decay), (True, 0.0))
    ]
    if name == "lars":
        arguments |= {"trust_coeff": options.trust_coeff, "max_norm": options.clip}
        return texp.LARS(groups, backend=options.backend, fused=True, **arguments)
    return torch.optim.SGD(groups, fused=True, **arguments)


class Training:
    """One run with one of OPTIMIZERS and one batch size, on this process."""

    def __init__(self, options: "Options", optimizer: str, batch_size: int, data: Digits) -> None:
        self.options, self.batch_size = options, batch_size
        self.device = device_of(options)
        dtype = torch.float64 if options.float64 else torch.float32
        form = torch.channels_last if options.channels_last else torch.contiguous_format
        images = (x.to(self.device, dtype).contiguous(memory_format=form) for x in (data.train_x, data.test_x))
        self.train_x, self.test_x = images
        self.train_y, self.test_y = data.train_y.to(self.device), data.test_y.to(self.device)
        self.steps = len(self.train_x) // batch_size  # of an epoch; what is left of the images is for later epochs
        self.model = make_model(options).to(self.device, memory_format=form)
        # Before the model is wrapped: the groups hold its own buffers.
        lr = options.peak_lr(batch_size)
        self.optimizer = make_optimizer(optimizer, options, self.model, self.train_x[:4], lr)
        steps, warmup = options.epochs * self.steps, int(options.warmup * self.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, steps, warmup, options.schedule)
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.order = torch.Generator().manual_seed(options.seed)
        # The gradients are averaged over the processes, and buffers are those of the first.
        self.parallel = DistributedDataParallel(self.model) if dist.is_initialized() else self.model

    def epoch(self, advance: Callable[[], object]) -> dict[str, Any]:
        """Trains for an epoch; calls `advance` after each step.

        Returns fields of a row of the CSV: lr and log10_lr, of the first step (log10 of the paper's LR, if in
        exponential form); train_loss, with smoothed labels, mean of all steps; test_accuracy, from 0 to 1;
        samples_per_s, of training; step_ms and optimizer_ms, medians over the steps, in milliseconds, of a step and
        of the optimizer's part of it; optimizer_share, their ratio.
        """
        self.model.train()
        order = torch.randperm(len(self.train_x), generator=self.order)[: self.steps * self.batch_size]
        losses, step_s, optimizer_s = [], [], []
        lr, log10_lr = self.optimizer.param_groups[0]["lr"], self._log10_lr()
        self._wait()
        start = before = time.perf_counter()
        for batch in order.view(self.steps, self.options.accumulate, world(), -1).to(self.device):
            losses.append(self._backward(batch[:, rank()]))
            # The device's work is waited for on both sides; leave that out where nobody wants the optimizer's share.
            self._wait()
            ready = time.perf_counter()
            if self.options.clip is not None and isinstance(self.optimizer, torch.optim.SGD):
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
            self.scaler.step(self.optimizer)
            self._wait()
            after = time.perf_counter()
            self.scaler.update()
            self.schedule.step()  # also where the scaler skipped the step
            step_s.append(after - before)
            optimizer_s.append(after - ready)
            before = after
            advance()
        seconds = time.perf_counter() - start
        step_ms, optimizer_ms = (statistics.median(times) * 1e3 for times in (step_s, optimizer_s))
        return {
            "lr": lr,
            "log10_lr": log10_lr,
            "train_loss": _average(torch.stack(losses).mean()),
            "test_accuracy": self.accuracy(),
            "samples_per_s": len(order) / seconds,
            "step_ms": step_ms,
            "optimizer_ms": optimizer_ms,
            "optimizer_share": optimizer_ms / step_ms,
        }

    def _backward(self, micro_batches: Tensor) -> Tensor:
        """Gradients of the mean loss over a batch, from this process's micro-batches, a row of indices each. Returns
        the loss over them."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for index, micro in enumerate(micro_batches):
            # Processes exchange gradients once a step: in the last backward pass.
            alone = self.parallel is not self.model and index < len(micro_batches) - 1
            with self.parallel.no_sync() if alone else nullcontext():
                with self._autocast():
                    logits = self.parallel(self.train_x[micro]).to(self.train_x.dtype)
                loss = cross_entropy(logits, self.train_y[micro], label_smoothing=self.options.label_smoothing)
                self.scaler.scale(loss / len(micro_batches)).backward()
            total = total + loss.detach() / len(micro_batches)
        return total

    @torch.no_grad()
    def accuracy(self) -> float:
        """On the test images, from 0 to 1; each process looks at its share of them."""
        self.model.eval()
        if dist.is_initialized():
            for buffer in self.model.buffers():  # running statistics are of each process's own images
                dist.broadcast(buffer, 0)
        mine = slice(rank(), None, world())
        with self._autocast():
            right = (self.model(self.test_x[mine]).argmax(1) == self.test_y[mine]).double().sum()
        return _average(right) * world() / len(self.test_x)

    def _autocast(self) -> torch.autocast:
        dtype = AMP[self.options.amp]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _log10_lr(self) -> float:
        if isinstance(self.optimizer, texp.SGD):
            return self.optimizer.log10_lr()[0]
        return math.log10(self.optimizer.param_groups[0]["lr"])

    def fold(self) -> None:
        """At the end: the weights are then those of torch.optim.SGD, to be exported or averaged."""
        if isinstance(self.optimizer, texp.SGD):
            self.optimizer.fold()

    def _parts(self) -> dict[str, Any]:
        names = ("model", "optimizer", "schedule", "scaler")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch depends on."""
        return {name: part.state_dict() for name, part in self._parts().items()} | {"order": self.order.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of a run with the same options."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.order.set_state(state["order"])


def _average(x: Tensor) -> float:
    """Over the processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x.item() / world()
