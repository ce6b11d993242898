"""torch's own ways to train on several processes: two of them, on the CPU, against torch.optim.SGD in the same."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

import texp
from tests.integration.training import (
    ARGUMENTS,
    BATCH,
    EXPONENTIAL,
    FORMS,
    ORDINARY,
    TORCH,
    Form,
    batches,
    copied,
    fold,
    network,
)
from texp.integrations.wrapped import texp_sgd

# Imported without its warning, of torch.jit.
optim = pytest.importorskip("torch.distributed.optim", reason="this torch has no torch.distributed")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

PROCESSES = 2


def on_processes(work: Callable[..., None], tmp_path: Path, *arguments: object) -> None:
    """Calls work(rank, *arguments) on two processes that know each other."""
    rendezvous = tmp_path / f"rendezvous-{len(list(tmp_path.glob('rendezvous-*')))}"
    torch.multiprocessing.spawn(_process, args=(work, rendezvous, arguments), nprocs=PROCESSES)


def _process(rank: int, work: Callable[..., None], rendezvous: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    work(rank, *arguments)
    dist.barrier()  # neither goes while the other still talks to it
    os._exit(0)  # not by gloo's own end, whose threads now and then abort a process that is done


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    start: int = 0,
    stop: int = 20,
    ranks: int = PROCESSES,
) -> None:
    """Each process takes its part of every batch."""
    for index, (x, y) in enumerate(batches()):
        if start <= index < stop:
            mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
            optimizer.zero_grad()
            cross_entropy(model(x[mine]), y[mine]).backward()
            optimizer.step()


def layer_network() -> nn.Sequential:
    """FSDP does not average the running statistics of a BatchNorm, and needs none here."""
    return network(NoStatistics)


class NoStatistics(nn.LayerNorm):
    pass


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of a model that may be sharded."""
    gathered = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in model.state_dict().items()}
    return {name: t.clone() for name, t in gathered.items()}


def check(results: dict[str, dict[str, torch.Tensor]]) -> None:
    for form in FORMS:
        if form.name in results:
            form.check(results[form.name], results["torch"])


def folded(optimizer: torch.optim.Optimizer) -> None:
    fold(texp_sgd(optimizer) or optimizer)


def _ddp(rank: int) -> None:
    results = {}
    for form in (TORCH, *FORMS):
        model = network()
        optimizer = form.optimizer(model)
        train(nn.parallel.DistributedDataParallel(model), optimizer, rank)
        folded(optimizer)
        results[form.name] = copied(model)
    check(results)


def test_ddp(tmp_path):
    """With a BatchNorm whose running statistics are those of the first process, as DDP has them."""
    on_processes(_ddp, tmp_path)


def zero(form: Form, groups: Any) -> optim.ZeroRedundancyOptimizer:
    cls = torch.optim.SGD if form == TORCH else texp.SGD
    return optim.ZeroRedundancyOptimizer(groups, cls, **ARGUMENTS, **form.options)


def fold_everywhere(optimizer: optim.ZeroRedundancyOptimizer) -> None:
    """Each process folds the parameters that are its own, and gives them to the others."""
    folded(optimizer)
    optimizer._sync_params()


def _zero(rank: int, folder: Path) -> None:
    results = {}
    for form in (TORCH, *FORMS):
        model = network()
        optimizer = zero(form, form.groups(model))
        parallel = nn.parallel.DistributedDataParallel(model)
        train(parallel, optimizer, rank, stop=10)
        optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / form.name)
        train(parallel, optimizer, rank, start=10)
        fold_everywhere(optimizer)
        results[form.name] = copied(model)
        # The whole state, which each process takes its own part of again.
        dist.barrier()
        saved = torch.load(folder / form.name)
        resumed = network()
        optimizer = zero(form, form.groups(resumed))
        resumed.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        train(nn.parallel.DistributedDataParallel(resumed), optimizer, rank, start=10)
        fold_everywhere(optimizer)
        form.check(copied(resumed), results[form.name])
    check(results)


@pytest.mark.slow
def test_zero_redundancy_optimizer(tmp_path):
    on_processes(_zero, tmp_path, tmp_path)


def _zero_with_a_small_group(rank: int, order: int) -> None:
    results = {}
    for form in (TORCH, EXPONENTIAL):
        model = network()
        first, rest = model[0].weight, [p for p in model.parameters() if p is not model[0].weight]
        small = {"params": [first]}
        if form == EXPONENTIAL:
            statistics = [(model[1].running_mean, 1), (model[1].running_var, 2)]
            small |= {"scale_invariant": True, "norm_stats": statistics}
        optimizer = zero(form, [small, {"params": rest}][::order])
        parallel = nn.parallel.DistributedDataParallel(model)
        for start in (0, 10):
            train(parallel, optimizer, rank, start=start, stop=start + 10)
            fold_everywhere(optimizer)
        results[form.name] = copied(model)
    check(results)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
def test_a_group_of_which_one_process_has_nothing(order, tmp_path):
    """Its running statistics grow there, too: DDP takes them from the first process, whoever has the weights. And
    training goes on after it has been folded, whose scale ZeRO also keeps."""
    on_processes(_zero_with_a_small_group, tmp_path, order)


def sharded(form: Form) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Groups are found in the model before it is sharded."""
    model = layer_network()
    names = {p: name for name, p in model.named_parameters()}
    groups = form.groups(model) if form == EXPONENTIAL else [{"params": list(form.groups(model))}]
    named = [[names[p] for p in group["params"]] for group in groups]
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    params = dict(model.named_parameters())
    for group, of_group in zip(groups, named, strict=True):
        group["params"] = [params[name] for name in of_group]
    cls = torch.optim.SGD if form == TORCH else texp.SGD
    return model, cls(groups, **{**ARGUMENTS, **form.options})


def _fsdp2(rank: int, folder: Path) -> None:
    results = {}
    for form in (TORCH, *FORMS):
        model, optimizer = sharded(form)
        train(model, optimizer, rank, stop=10)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / form.name)
        train(model, optimizer, rank, start=10)
        folded(optimizer)
        results[form.name] = whole(model)

        model, optimizer = sharded(form)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / form.name)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        train(model, optimizer, rank, start=10)
        folded(optimizer)
        form.check(whole(model), results[form.name])
    check(results)
    if rank == 0:
        torch.save(results["torch"], folder / "expected")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")  # as it should be
def test_fsdp2_and_its_checkpoints(tmp_path):
    """Saved by torch.distributed.checkpoint half way, and resumed on two processes and, whole, on one."""
    on_processes(_fsdp2, tmp_path, tmp_path)
    for form in FORMS:
        model = layer_network()
        optimizer = form.optimizer(model)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / form.name, no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        train(model, optimizer, 0, start=10, ranks=1)
        folded(optimizer)
        # On two processes a gradient is the mean of those of two halves: rounded otherwise, as an ordinary step is.
        max(form, ORDINARY, key=lambda f: f.roundings).check(copied(model), torch.load(tmp_path / "expected"))
