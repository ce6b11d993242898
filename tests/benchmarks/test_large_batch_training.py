"""How the recipe for large batches trains: that every option arrives where it is meant to."""

import itertools
from contextlib import contextmanager

import pytest
import torch

import texp
from benchmarks import large_batch, large_batch_training


def training(**options) -> large_batch_training.Training:
    """On the CPU, in batches of 360."""
    given = large_batch.Options(width=4, batch_size="360", device="cpu", **options)
    return large_batch_training.Training(given, given.optimizer, 360, large_batch.load_digits())


BATCH = torch.arange(360)


def test_gradients_are_exchanged_once_a_step(monkeypatch):
    """All micro-batches but the last are under no_sync, forward and backward."""
    calls = []

    class Parallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.alone = module, False

        def no_sync(self):
            @contextmanager
            def entered():
                self.alone = True
                yield
                self.alone = False

            return entered()

        def forward(self, x):
            y = self.module(x)
            calls.append(["forward", self.alone])
            y.register_hook(lambda grad: calls.append(["backward", self.alone]))
            return y

    made = training(accumulate=3)
    made.parallel = Parallel(made.model)
    made._backward(BATCH.view(3, 120))
    assert calls == [[what, alone] for alone in (True, True, False) for what in ("forward", "backward")]


@pytest.mark.parametrize("name", ["texp", "torch", "lars"])
def test_the_optimizer(name):
    made = training(
        optimizer=name, base_lr=0.1, base_batch=90, momentum=0.8, weight_decay=0.03, trust_coeff=0.1, clip=2
    )
    groups = made.optimizer.param_groups
    assert {(group["momentum"], group["nesterov"], group["initial_lr"]) for group in groups} == {(0.8, True, 0.4)}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert all(decays[id(p)] == (0.03 if p.dim() > 1 else 0) for p in made.model.parameters())
    assert made.optimizer.defaults["fused"]
    if name == "torch":
        return
    assert made.optimizer.max_norm == 2
    assert training(optimizer=name, backend="reference").optimizer._backend == "reference"
    if name == "texp":
        assert any(group["scale_invariant"] for group in groups)
    else:
        assert isinstance(made.optimizer, texp.LARS)
        assert {group["trust_coeff"] for group in groups} == {0.1}


def test_the_loss_has_smoothed_labels():
    made = training(label_smoothing=0.3)
    loss = made._backward(BATCH.view(1, -1))
    with torch.no_grad():
        logits = made.model(made.train_x[BATCH])
    expected = torch.nn.functional.cross_entropy(logits, made.train_y[BATCH], label_smoothing=0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_the_layers_compute_in(amp, dtype, channels_last):
    """In training and at evaluation."""
    made, seen = training(amp=amp, channels_last=channels_last), []

    def look(module, inputs, y):
        seen.append((y.dtype, y.is_contiguous(memory_format=torch.channels_last)))

    made.model.blocks[1].conv2.register_forward_hook(look)
    made._backward(BATCH.view(1, -1))
    made.accuracy()
    assert seen == [(dtype, channels_last)] * 2


def test_the_evaluation_is_with_running_statistics():
    """And leaves them as they are."""
    made = training()
    made._backward(BATCH.view(1, -1))
    buffers = {name: b.clone() for name, b in made.model.named_buffers()}
    accuracy = made.accuracy()
    assert all(torch.equal(b, buffers[name]) for name, b in made.model.named_buffers())
    one_by_one = [made.model(x[None]).argmax().item() for x in made.test_x]  # independent of the others
    assert accuracy == sum(a == b for a, b in zip(one_by_one, made.test_y.tolist(), strict=True)) / 360


def test_the_statistics_at_the_evaluation_are_those_of_the_first_process(monkeypatch):
    made, sent = training(), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: None)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, source: sent.append((id(buffer), source)))
    made.accuracy()
    assert sent == [(id(buffer), 0) for buffer in made.model.buffers()]


def test_every_epoch_has_an_order_of_its_own(monkeypatch):
    """The images that are left over are not always the same."""
    made, batches = training(), []
    monkeypatch.setattr(made, "_backward", lambda batch, real=made._backward: batches.append(batch) or real(batch))
    made.epoch(lambda: None)
    made.epoch(lambda: None)
    one, other = torch.cat(batches[:3]).flatten(), torch.cat(batches[3:]).flatten()
    assert len(one.unique()) == len(other.unique()) == 3 * 360
    assert set(one.tolist()) != set(other.tolist())
    assert one.tolist() != sorted(one.tolist())


def test_the_times(monkeypatch):
    """By a clock that only forward and backward (three seconds) and the optimizer (one) move on. Samples are counted
    of all processes."""
    made, now = training(), 0.0

    def take(seconds, result=None):
        nonlocal now
        now += seconds
        return result

    monkeypatch.setattr(made, "_backward", lambda batch, real=made._backward: take(3.0, real(batch)))
    made.optimizer.register_step_post_hook(lambda *_: take(1.0))
    monkeypatch.setattr(large_batch_training.time, "perf_counter", lambda: now)
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        row = made.epoch(lambda: None)
        names = ("step_ms", "optimizer_ms", "optimizer_share", "samples_per_s")
        assert [row[name] for name in names] == [4000, 1000, 0.25, 90]


def test_the_seed_is_also_of_the_initialisation():
    one, other = (training(seed=seed).model.stem.weight for seed in (0, 1))
    assert not torch.equal(one, other)


def test_the_learning_rate():
    def factors(schedule):
        return [large_batch_training.lr_factor(step, 20, 4, schedule) for step in range(21)]

    warmup = [0.2, 0.4, 0.6, 0.8]
    assert factors("step") == pytest.approx(warmup + [1.0] * 6 + [0.1] * 5 + [0.01] * 6)
    cosine = factors("cosine")
    assert cosine[:5] == pytest.approx([*warmup, 1.0])
    assert cosine[12] == pytest.approx(0.5)
    assert cosine[20] == 0
    assert all(a > b for a, b in itertools.pairwise(cosine[4:]))
