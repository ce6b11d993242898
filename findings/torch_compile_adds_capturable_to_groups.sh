#!/usr/bin/env bash
# torch 2.13.0, on the CPU, torch.compile with backend="eager".
# Guess: compiling a train step which writes group["lr"], as a schedule does, changes how it runs and not what the
#   groups hold. Keys that the optimizer does not have are no part of its state dict.
# Seen: where the compiled function assigns lr, "capturable" = True is written into the groups along with it.
#   torch.optim.SGD has no such option: the key goes into its state dict and into all that load it. Adam has it, and
#   refuses it on the CPU: after a compiled step that assigned lr, the next one that is not compiled raises an
#   AssertionError, and so does a step of an Adam that loads its state. pytorch/pytorch#184704 proposes to restore
#   what was there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
"$python" -m venv env
env/bin/pip install -q "torch==2.13.0" numpy
cat >a.py <<'PY'
import torch


def step(p, optimizer):
    (p * p).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def seen(make, writes):
    torch.compiler.reset()
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = make([p], lr=0.5)

    @torch.compile(backend="eager")
    def train(lr):
        if writes:
            for group in optimizer.param_groups:
                group["lr"] = lr
        step(p, optimizer)

    train(0.25)
    other = make([p], lr=0.5)
    other.load_state_dict(optimizer.state_dict())
    found = [group.get("capturable", "not there") for group in (optimizer.param_groups[0], other.param_groups[0])]
    then = []
    for each in (optimizer, other):
        try:
            step(p, each)
            then.append("fine")
        except AssertionError:
            then.append("AssertionError")
    print(make.__name__, "lr written:" if writes else "lr not written:", *found, "| a step of each:", *then)


for make in (torch.optim.SGD, torch.optim.Adam):
    for writes in (False, True):
        seen(make, writes)
PY
env/bin/python a.py | tee seen
diff seen - <<'SEEN'
SGD lr not written: not there not there | a step of each: fine fine
SGD lr written: True True | a step of each: fine fine
Adam lr not written: False False | a step of each: fine fine
Adam lr written: True True | a step of each: AssertionError AssertionError
SEEN
