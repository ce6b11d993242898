#!/usr/bin/env bash
# timm 1.0.31, with torch 2.13.0 and torchvision 0.28.0.
# Guess: an optimizer that was registered as "my_sgd", that list_optimizers() lists and get_optimizer_class() finds,
#   is what create_optimizer_v2(model, "my_sgd") makes. A name that nobody registered is refused.
# Seen: create_optimizer_v2 takes what stands behind the last underscore for the name, because of "lookahead_sgd". Of
#   "my_sgd" it makes torch's SGD, without a warning, and of "no_such_adam" an Adam. Named "mysgd", ours is made.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
"$python" -m venv env
env/bin/pip install -q "torch==2.13.0" numpy "torchvision==0.28.0" "timm==1.0.31"
cat >a.py <<'PY'
import warnings

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # PyPI's wheel beside a torch for CPUs: its operators cannot be loaded, and timm needs none
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.optim import OptimInfo, create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.optim._optim_factory import default_registry


class MySGD(torch.optim.SGD):
    pass


for name in ("my_sgd", "mysgd"):
    default_registry.register(OptimInfo(name, MySGD, has_momentum=True))
warnings.simplefilter("error")
for name in ("my_sgd", "mysgd", "no_such_adam"):
    listed = name in list_optimizers()
    found = get_optimizer_class(name).__name__ if listed else None
    made = type(create_optimizer_v2(torch.nn.Linear(1, 1), name, lr=0.1))
    print(f"{name}: listed {listed}, found {found}, made {made.__name__}")
PY
env/bin/python a.py | tee seen
diff seen - <<'SEEN'
my_sgd: listed True, found MySGD, made SGD
mysgd: listed True, found MySGD, made MySGD
no_such_adam: listed False, found None, made Adam
SEEN
