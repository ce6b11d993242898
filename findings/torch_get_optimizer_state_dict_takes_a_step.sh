#!/usr/bin/env bash
# torch 2.13.0, torch.distributed.checkpoint.state_dict, in one process.
# Guess: get_optimizer_state_dict reads. Training goes on after it as if it had not been called, that of
#   torch.optim.SGD above all, whose only state is a momentum buffer that the first step makes.
# Seen: where an optimizer has no state yet and no gradients are there, it takes a step with zero gradients and lr =
#   0. Weight decay λ is no part of lr: the momentum buffers are λθ afterwards. And the first real step is not a first
#   one any more, so that dampening applies to it. Either changes the whole training; momentum alone does not, since
#   its buffers are zero. pytorch/pytorch#164929 reports the same of AdamW, which counts the step.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
"$python" -m venv env
env/bin/pip install -q "torch==2.13.0" numpy
cat >a.py <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

for options in ({}, {"weight_decay": 0.25}, {"dampening": 0.5}):
    for asked in (False, True):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(model.weight, 4.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5, **options)
        if asked:
            get_optimizer_state_dict(model, optimizer)
        buffer = [state["momentum_buffer"].item() for state in optimizer.state.values()]
        weights = []
        for _ in range(3):
            model.weight.grad = torch.ones(1, 1)
            optimizer.step()
            weights.append(model.weight.item())
        print(*options or ["momentum alone"], "asked:" if asked else "not asked:", *buffer, "then", *weights)
PY
env/bin/python a.py | tee seen
diff seen - <<'SEEN'
momentum alone not asked: then 3.5 2.75 1.875
momentum alone asked: 0.0 then 3.5 2.75 1.875
weight_decay not asked: then 3.0 1.625 0.234375
weight_decay asked: 1.0 then 2.75 1.28125 -0.11328125
dampening not asked: then 3.5 3.0 2.5
dampening asked: 0.0 then 3.75 3.375 2.9375
SEEN
