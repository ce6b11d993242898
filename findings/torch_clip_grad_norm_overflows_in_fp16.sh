#!/usr/bin/env bash
# torch 2.13.0, on the CPU (x86-64).
# Guess: torch.nn.utils.clip_grad_norm_ measures gradients in float32 whatever their dtype, so that those in fp16 and bf16
#   are clipped as well as others.
# Seen: the norm has the dtype of the gradients, with foreach and without. In fp16 it is infinite from 65,520 on, and
#   finite gradients are then multiplied by 0: all of them are lost, and nothing says so but the norm that is returned. In
#   bf16 the norm and the factor are rounded to 8 bits, and gradients stay longer than max_norm by half a percent.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
"$python" -m venv env
env/bin/pip install -q "torch==2.13.0" numpy
cat >a.py <<'END'
import torch

for foreach in (True, False):
    p = torch.zeros(70_000, dtype=torch.float16, requires_grad=True)
    p.grad = torch.full_like(p, 300.0)  # of norm 79,373
    norm = torch.nn.utils.clip_grad_norm_([p], 1.0, foreach=foreach)
    print(foreach, norm.dtype, norm.item(), int((p.grad == 0).sum()))

for foreach in (True, False):
    p = torch.zeros(1003, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)  # of norm 31.67
    norm = torch.nn.utils.clip_grad_norm_([p], 8.0, foreach=foreach)
    print(foreach, norm.dtype, norm.item(), f"{p.grad.double().norm().item():.4f}")
END
env/bin/python a.py | tee seen
diff seen - <<'END'
True torch.float16 inf 70000
False torch.float16 inf 70000
True torch.bfloat16 31.625 8.0413
False torch.bfloat16 31.625 8.0413
END
