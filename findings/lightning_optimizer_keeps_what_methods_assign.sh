#!/usr/bin/env bash
# lightning 2.6.6, with torch 2.13.0, on the CPU.
# Guess: self.optimizers() wraps the optimizer's step and passes on all else, so that methods called on it act on the
#   optimizer that trains; it is even an instance of the optimizer's class.
# Seen: being one, it has the methods itself, and runs them with itself as self. What they read comes from the
#   optimizer, what they assign stays in the wrapper. A counter in a method counts there alone. torch's own
#   load_state_dict assigns groups and state: called on the wrapper, it changes nothing in the optimizer, and from
#   then on an lr that is written by way of self.optimizers() is not the one that trains.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
"$python" -m venv env
env/bin/pip install -q "torch==2.13.0" numpy "lightning==2.6.6"
cat >a.py <<'PY'
import lightning.pytorch as pl
import torch


class SGD(torch.optim.SGD):
    count = 0

    def tick(self):
        self.count += 1


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def configure_optimizers(self):
        return SGD([self.w], lr=0.25)

    def training_step(self, batch, i):
        return (self.w * batch).sum()

    def show(self, what, value):
        both = [self.optimizers(), self.optimizers(use_pl_optimizer=False)]
        print(f"{what}: self.optimizers() {value(both[0])}, the optimizer {value(both[1])}")

    def on_train_batch_end(self, outputs, batch, i):
        wrapper = self.optimizers()
        wrapper.tick()
        if i == 1:
            self.show("an SGD", lambda o: isinstance(o, SGD))
            self.show("ticks", lambda o: o.count)
            wrapper.param_groups[0]["lr"] = 0.5
            self.show("lr, written", lambda o: o.param_groups[0]["lr"])
            state = wrapper.state_dict()
            state["param_groups"][0]["lr"] = 1.0
            wrapper.load_state_dict(state)
            self.show("lr, loaded", lambda o: o.param_groups[0]["lr"])
            wrapper.param_groups[0]["lr"] = 2.0
            self.show("lr, written then", lambda o: o.param_groups[0]["lr"])
        print(f"w after step {i + 1}: {self.w.item()}")


quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
trainer = pl.Trainer(max_steps=3, accelerator="cpu", **dict.fromkeys(quiet, False))
trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(3, 1)))
PY
env/bin/python a.py 2>log | tee seen || { cat log; exit 1; }
diff seen - <<'SEEN'
w after step 1: -0.25
an SGD: self.optimizers() True, the optimizer True
ticks: self.optimizers() 2, the optimizer 0
lr, written: self.optimizers() 0.5, the optimizer 0.5
lr, loaded: self.optimizers() 1.0, the optimizer 0.5
lr, written then: self.optimizers() 2.0, the optimizer 0.5
w after step 2: -0.5
w after step 3: -1.0
SEEN
