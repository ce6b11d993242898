#!/usr/bin/env bash
# transformers 5.24.0, with accelerate 1.15.0, schedulefree 1.4.1 and torch 2.13.0, on the CPU.
# Guess: the Trainer, which has optim="schedule_free_sgd" and calls optimizer.train() and eval() by itself, saves the
#   weights that are meant for use, those after optimizer.eval(), as schedulefree asks for; or the same ones always.
# Seen: it calls eval() before an evaluation alone. A checkpoint that comes right after one holds the weights for use,
#   any other the point at which gradients are computed: of two runs that train alike, the saved models differ by
#   whether they were evaluated at that step. model.safetensors does not tell which; optimizer.pt does, by
#   "train_mode".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python=${PYTHON:-python3}
"$python" -m venv env
env/bin/pip install -q "torch==2.13.0" numpy "transformers==5.24.0" "accelerate==1.15.0" "schedulefree==1.4.1"
cat >a.py <<'PY'
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([4.0]))

    def forward(self, x):
        return {"loss": (self.w * x).sum(), "w": self.w * x}


data = [{"x": torch.ones(1)}] * 4
for evaluates in ("no", "steps"):
    model = Model()
    arguments = TrainingArguments(
        evaluates, optim="schedule_free_sgd", learning_rate=0.5, lr_scheduler_type="constant", max_steps=4,
        per_device_train_batch_size=1, save_steps=1, eval_strategy=evaluates, eval_steps=2, use_cpu=True,
        label_names=[], report_to=[], disable_tqdm=True, logging_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    print("evaluated every 2 steps" if evaluates == "steps" else "not evaluated")
    for i in range(1, 5):
        folder = f"{evaluates}/checkpoint-{i}"
        w = load_file(f"{folder}/model.safetensors")["w"].item()
        group = torch.load(f"{folder}/optimizer.pt")["param_groups"][0]
        print(f"  checkpoint {i}: w {w:.4f}, train_mode {group['train_mode']}")
    trainer.optimizer.eval()
    print(f"  after optimizer.eval(): w {model.w.item():.4f}")
PY
env/bin/python a.py 2>log | grep -v '^{' | tee seen || { cat log; exit 1; }
diff seen - <<'SEEN'
not evaluated
  checkpoint 1: w 3.5000, train_mode True
  checkpoint 2: w 3.2250, train_mode True
  checkpoint 3: w 2.9500, train_mode True
  checkpoint 4: w 2.6750, train_mode True
  after optimizer.eval(): w 2.7500
evaluated every 2 steps
  checkpoint 1: w 3.5000, train_mode True
  checkpoint 2: w 3.2500, train_mode False
  checkpoint 3: w 2.9500, train_mode True
  checkpoint 4: w 2.7500, train_mode False
  after optimizer.eval(): w 2.7500
SEEN
