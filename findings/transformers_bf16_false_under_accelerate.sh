#!/usr/bin/env bash
# TrainingArguments(bf16=False) trains in bfloat16 if accelerate launch has mixed_precision bf16.
#
# Behaviour: under `accelerate launch --mixed_precision bf16` (or a configuration file that says so) a
#   Trainer with bf16=False and fp16=False computes its forward pass in bfloat16. Its own arguments
#   still say bf16=False. There is no error and no warning. With --mixed_precision no the same
#   program computes in float32.
# Expected: the explicit setting, or an error because the two contradict each other.
# Consequence: TRL's trainers take these arguments. A GRPO run that asks for float32, for instance
#   because the log-ratios of new to old policy are then exact, has ratios with bfloat16's rounding.
# Versions: transformers 5.19.0, accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
# Source: transformers/training_args.py: mixed precision is read from ACCELERATE_MIXED_PRECISION, which
#   the launcher sets, and changed only if bf16 or fp16 is True.
# Workaround: float32 under such a launcher is rejected (scale/trl_trainer.py, check_layout).
#
# Run without arguments: it installs the packages below into a temporary environment (about 1 GB).
# Exit code: 0 if transformers behaves as described, else 1.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps"
$pip torch==2.13.0+cpu 2>/dev/null ||
    $pip --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
$pip transformers==5.19.0 accelerate==1.15.0 psutil==7.2.2 huggingface_hub==2.4.0 \
    tokenizers==0.23.3 safetensors==0.8.0 numpy==2.3.5 packaging==26.3 PyYAML==6.0.3 \
    regex==2026.11.15 requests==2.34.2 tqdm==4.70.1 filelock==4.2.11 fsspec==2026.9.0 \
    hf-xet==1.8.0 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 h11==0.16.0 anyio==4.16.0 \
    certifi==2026.10.18 idna==3.20 typing_extensions==4.16.0 typer==0.29.2 click==8.5.1 \
    rich==15.0.0 shellingham==1.5.4 Pygments==2.21.0 markdown-it-py==4.3.0 mdurl==0.1.2 \
    annotated-doc==0.0.7 sympy==1.14.0 mpmath==1.3.0 networkx==3.6.1 Jinja2==3.1.6 \
    MarkupSafe==3.0.4 setuptools==78.1.1

cd "$folder"
cat > train.py <<'PYTHON'
import json
import warnings
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments


class Model(torch.nn.Module):
    """A linear layer that notes the type of its output."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)
        self.computed = None

    def forward(self, x, labels=None):
        output = self.linear(x)
        self.computed = str(output.dtype)
        return {"loss": output.float().square().mean()}


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    settings = {"use_cpu": True, "max_steps": 1, "report_to": [], "save_strategy": "no"}
    args = TrainingArguments("out", bf16=False, fp16=False, **settings)
    model = Model()
    rows = [{"x": torch.ones(4), "labels": torch.ones(1)}] * 8
    Trainer(model, args, train_dataset=rows).train()
about = [str(warning.message) for warning in caught if "precision" in str(warning.message)]
found = {"bf16": args.bf16, "fp16": args.fp16, "computed": model.computed, "warnings": about}
Path("found.json").write_text(json.dumps(found))
PYTHON

cat > check.py <<'PYTHON'
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
for name in ("transformers", "accelerate", "torch"):
    print(name, importlib.metadata.version(name))
results = {}
for precision in ("no", "bf16"):
    command = [*LAUNCH, "--mixed_precision", precision, "train.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    results[precision] = json.loads(Path("found.json").read_text())
    print(f"--mixed_precision {precision}:", results[precision])
plain = {"bf16": False, "fp16": False, "warnings": []}
as_described = results == {
    "no": plain | {"computed": "torch.float32"},
    "bf16": plain | {"computed": "torch.bfloat16"},
}
print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
venv/bin/python check.py
