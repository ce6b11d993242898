"""DeepSpeed's ZeRO on the CPU: its flat partitions are the parameters of texp.SGD."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from tests.integration.training import BATCH, EXPONENTIAL, FORMS, TORCH, Form, batches, copied, distance, network

# Only the processes import it.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

PROCESSES = 2


def _process(rank: int, rendezvous: Path, stage: int) -> None:
    import deepspeed

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    deepspeed.init_distributed("gloo")
    results = {form.name: trained(deepspeed, form, rank, stage) for form in (TORCH, *FORMS)}
    assert distance(results["torch"], network(dtype=torch.float32).state_dict()) > 1
    for form in FORMS:
        form.check(results[form.name], results["torch"])
    dist.barrier()  # neither goes while the other still talks to it
    os._exit(0)  # not by gloo's own end, whose threads now and then abort a process that is done


def trained(deepspeed, form: Form, rank: int, stage: int) -> dict[str, torch.Tensor]:
    model = network(dtype=torch.float32)
    optimizer = form.optimizer(model)
    names = {p: name for name, p in model.named_parameters()}
    scaled = {names[p]: 1 for p in optimizer.param_groups[0]["params"]} | {"1.running_mean": 1, "1.running_var": 2}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": BATCH // PROCESSES,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    for x, y in batches(dtype=torch.float32):
        mine = slice(rank * BATCH // PROCESSES, (rank + 1) * BATCH // PROCESSES)
        engine.backward(cross_entropy(engine(x[mine]), y[mine]))
        engine.step()
    weights = copied(model)
    if form == EXPONENTIAL:
        # fold() would turn the partitions into θ, from which the model's weights are copied only after a step.
        P = optimizer.param_groups[0]["scale"]
        assert P != 1
        weights |= {name: weights[name] / P**power for name, power in scaled.items()}
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_zero(stage, tmp_path):
    torch.multiprocessing.spawn(_process, args=(tmp_path / "rendezvous", stage), nprocs=PROCESSES)
