"""The table of README's section "Integrations": which frameworks texp.SGD was run with, and what was run.

    pytest tests/integration --junitxml integration.xml
    python -m benchmarks.integration_table integration.xml

keeps the results, with the versions that are installed, in benchmarks/results/integration.json, and prints the table;
without a file it prints the table of the results that are kept.
"""

import json
import platform
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

RESULTS = Path(__file__).parent / "results" / "integration.json"

# By module of tests/integration: what README calls it, the distribution whose version counts, and what was run.
ROWS = {
    "test_lightning": (
        "Lightning",
        "lightning",
        "clipping, accumulation, bf16, a GradScaler, resuming in mid-epoch, averaging, Fabric, `FoldCallback`",
    ),
    "test_transformers": (
        "transformers' Trainer",
        "transformers",
        "evaluation in between, clipping, accumulation, bf16, resuming, the best model at the end, `FoldCallback`",
    ),
    "test_accelerate": (
        "accelerate",
        "accelerate",
        "`prepare`, accumulation, a GradScaler and `step_was_skipped`, `save_state`, `eval()` and `train()`",
    ),
    "test_timm": (
        "timm",
        "timm",
        "its factory, schedulers, layer decay, `param_groups_weight_decay`, `ModelEmaV3`, `CheckpointSaver`",
    ),
    "test_distributed": (
        "torch.distributed, two processes",
        "torch",
        "DDP, `ZeroRedundancyOptimizer`, FSDP2 with sharded checkpoints, from two processes to one",
    ),
    "test_deepspeed": ("DeepSpeed, two processes", "deepspeed", "ZeRO 1 and 2 in float32"),
    "test_sam": ("SAM of pytorch-optimizer", "pytorch-optimizer", "SAM and ASAM around it, resuming"),
    "test_skorch": ("skorch", "skorch", "steps with a closure, clipping, checkpoints"),
    "test_ignite": ("ignite", "pytorch-ignite", "accumulation, schedules, checkpoints, `EMAHandler`"),
    "test_fastai": ("fastai", "fastai", "`fit_one_cycle`, saving and loading, in float32"),
    "test_opacus": ("opacus", "opacus", "private training; in the exponential form without noise and clipping"),
}


def results(junit: Path) -> dict:
    """What pytest wrote there, and the versions that are installed."""
    counts = {module: Counter() for module in ROWS}
    for case in ElementTree.parse(junit).iter("testcase"):
        # A module that is skipped as a whole has no class, and is a test by its name.
        module = (case.get("classname") or case.get("name")).rpartition(".")[2]
        if module in counts:
            bad = {"failure": "failed", "error": "failed", "skipped": "skipped"}
            counts[module][next((bad[child.tag] for child in case if child.tag in bad), "passed")] += 1
    return {
        "python": platform.python_version(),
        "torch": installed("torch"),
        "tests": {module: dict(sorted(found.items())) for module, found in counts.items()},
        "versions": {module: installed(distribution) for module, (_, distribution, _) in ROWS.items()},
    }


def installed(distribution: str) -> str | None:
    try:
        return version(distribution).partition("+")[0]
    except PackageNotFoundError:
        return None


def table(of: dict) -> str:
    """In Markdown."""
    rows = [["framework", "version", "what was run", "tests"]]
    for module, (label, _, what) in ROWS.items():
        counts = of["tests"][module]
        said = ", ".join(f"{counts[how]} {how}" for how in ("passed", "failed", "skipped") if counts.get(how))
        rows.append([label, of["versions"][module] or "not installed", what, said or "none"])
    head, *body = (f"| {' | '.join(row)} |\n" for row in rows)
    return f"{head}|---|---|---|---|\n{''.join(body)}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        RESULTS.write_text(json.dumps(results(Path(sys.argv[1])), indent=2) + "\n")
    print(table(json.loads(RESULTS.read_text())), end="")
