#!/usr/bin/env bash
# Triton 3.8.0 and 3.9.0, in its interpreter (TRITON_INTERPRET=1), with torch 2.13.0.
# Guess: n != 0 is a mask wherever it stands, of the type int1 and fit for tl.load, in a kernel and in the interpreter.
# Seen: the interpreter gives a comparison of int64 scalars the type int64. Broadcast to a block, "& mask" makes a block of
#   int64 of it. tl.load of 3.8.0 takes it for a mask; 3.9.0 raises "mask has unsupported dtype". Compiled for a GPU,
#   both take the kernel, where the comparison is an int1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
"$python" -m venv env
env/bin/pip install -q "torch==2.13.0" numpy
cat >a.py <<'END'
import torch, triton, triton.language as tl


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    wanted = tl.load(n) != 0
    tl.store(y + i, tl.load(x + i, (i < BLOCK - 1) & wanted, other=0.0))


x, y, n = torch.ones(8), torch.zeros(8), torch.ones(1, dtype=torch.int64)
copy[(1,)](x, y, n, 8)
print(y.tolist())
END
declare -A seen
for version in 3.8.0 3.9.0; do
  env/bin/pip install -q --no-deps --target "triton-$version" "triton==$version"
  seen[$version]=$(PYTHONPATH=triton-$version TRITON_INTERPRET=1 env/bin/python a.py 2>&1 | tail -n 1) || true
  echo "Triton $version: ${seen[$version]}"
done
[[ ${seen[3.8.0]} == "[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]" ]]
[[ ${seen[3.9.0]} == *"dtype"* ]]
