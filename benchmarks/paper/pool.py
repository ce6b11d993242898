"""Runs side by side: a network for digits is too small to share between cores."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from rich.console import Console

from benchmarks.paper import data
from benchmarks.paper.methods import Method
from benchmarks.paper.setup import Setup
from benchmarks.paper.training import train
from texp.cli.common import make_progress


def train_all(tasks: list[tuple[str, Method, Setup, int, int]], jobs: int, console: Console) -> None:
    """Trains `jobs` runs at a time; each is its name, method, setup and seed, and the threads that it may use."""
    if not tasks:
        return
    with make_progress(console) as progress:
        bar = progress.add_task("runs", total=len(tasks))
        if jobs == 1:
            for task in tasks:
                name, method, _, seed, _ = task
                steps = progress.add_task(f"{name}, seed {seed}", total=len(method.lrs))
                _train(*task, lambda t, steps=steps: progress.update(steps, completed=t + 1))
                progress.remove_task(steps)
                progress.advance(bar)
            return
        # Not forked: torch's threads do not survive that. An interruption is for this process to see.
        context = multiprocessing.get_context("spawn")
        ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        with ProcessPoolExecutor(jobs, context, **ignore) as pool:
            try:
                for done in as_completed([pool.submit(_train, *task) for task in tasks]):
                    done.result()
                    progress.advance(bar)
            except BaseException:
                # Runs go on from their checkpoints: there is nothing to wait for.
                for process in multiprocessing.active_children():
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise


def _train(
    name: str, method: Method, setup: Setup, seed: int, threads: int, tell: Callable[[int], object] = lambda t: None
) -> None:
    """The results are in its CSV; `tell` gets the number of each step taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # On a GPU too, a run that is taken up again has the same curve, and float32 is not TF32.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for t in train(name, method, setup, seed, data.load(setup)):
                tell(t)
    finally:
        torch.set_num_threads(before)
