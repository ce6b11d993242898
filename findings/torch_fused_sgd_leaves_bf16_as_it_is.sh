#!/usr/bin/env bash
# torch 2.13.0, on the CPU (x86-64).
# Guess: torch.optim.SGD(fused=True) takes the step of torch.optim.SGD(foreach=False), but for rounding.
# Seen: of a parameter in bf16 or fp16 only the last elements change, those that do not fill a vector of the machine, and
#   of 64 elements none; momentum is wrong from the second step on. float32 is right. Reported as pytorch/pytorch#191763.
#   So a fused step in bf16 is nothing to compare results with on the CPU, nor times: it writes no parameters.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
"$python" -m venv env
env/bin/pip install -q "torch==2.13.0" numpy
cat >a.py <<'END'
import torch

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for options in ({"foreach": False}, {"fused": True}):
        p = torch.zeros(64, dtype=dtype, requires_grad=True)
        p.grad = torch.ones_like(p)
        torch.optim.SGD([p], lr=0.5, **options).step()
        print(dtype, *options, int((p == -0.5).sum()))
END
env/bin/python a.py | tee seen
diff seen - <<'END'
torch.float32 foreach 64
torch.float32 fused 64
torch.bfloat16 foreach 64
torch.bfloat16 fused 0
torch.float16 foreach 64
torch.float16 fused 0
END
