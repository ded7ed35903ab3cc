#!/usr/bin/env bash
# accelerate launches two independent trainings instead of one under FSDP, if its configuration says
# `use_cpu: true`, and ends with exit code 0.
#
# Behaviour: `accelerate launch` with distributed_type FSDP, use_cpu true and num_processes 2 starts
#   two processes. Each has num_processes 1, is the main process, has whole parameters and trains on
#   its own: after an update on different data their weights differ. There is no error and no
#   warning. If ACCELERATE_USE_CPU=true is exported in addition, the processes join, but as
#   MULTI_CPU: FSDP is not applied, and their parameters are whole as well, again without a warning.
# Expected: FSDP on the CPU (FSDP2 works there with gloo), or an error.
# Consequence: a test of an FSDP configuration on a CPU passes without FSDP, or without even two
#   processes that exchange gradients; each also writes its model to the same folder.
# Versions: accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
# Source: accelerate/commands/launch.py, launch_command: FSDP takes multi_gpu_launcher, which does
#   not pass use_cpu on. accelerate/state.py, PartialState._prepare_backend: without a GPU and
#   without `cpu`, the type is DistributedType.NO, whatever WORLD_SIZE is; AcceleratorState.__init__
#   looks at ACCELERATE_USE_FSDP for types of GPUs only.
# Workaround: the trainer rejects processes that did not join and parameters that are whole
#   (scale/trl_trainer.py, check_layout).
#
# Run without arguments: it installs the packages below into a temporary environment (about 1 GB).
# Exit code: 0 if accelerate behaves as described, else 1.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps"
$pip torch==2.13.0+cpu 2>/dev/null ||
    $pip --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
$pip accelerate==1.15.0 psutil==7.2.2 huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.3.5 \
    packaging==26.3 PyYAML==6.0.3 tqdm==4.70.1 filelock==4.2.11 fsspec==2026.9.0 hf-xet==1.8.0 \
    httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 h11==0.16.0 anyio==4.16.0 idna==3.20 \
    typing_extensions==4.16.0 typer==0.29.2 click==8.5.1 rich==15.0.0 shellingham==1.5.4 \
    Pygments==2.21.0 markdown-it-py==4.3.0 mdurl==0.1.2 annotated-doc==0.0.7 sympy==1.14.0 \
    mpmath==1.3.0 networkx==3.6.1 Jinja2==3.1.6 MarkupSafe==3.0.4 setuptools==78.1.1

cd "$folder"
cat > fsdp.yaml <<'YAML'
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: NO_WRAP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: true
YAML

cat > train.py <<'PYTHON'
import json
import os
from pathlib import Path

import torch
from accelerate import Accelerator

accelerator = Accelerator()
torch.manual_seed(0)
model = torch.nn.Linear(4, 1, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
rank = int(os.environ["RANK"])
data = torch.full((2, 4), 1.0 + rank)  # each process has its share
accelerator.backward(model(data).square().mean())
optimizer.step()
weight = next(model.parameters())
found = {
    "WORLD_SIZE": os.environ["WORLD_SIZE"],
    "num_processes": accelerator.num_processes,
    "is_main_process": accelerator.is_main_process,
    "distributed_type": accelerator.distributed_type.value,
    "parameter": type(weight).__name__,
    "weight": weight.flatten().tolist(),
}
Path(f"rank-{rank}.json").write_text(json.dumps(found))
PYTHON

cat > check.py <<'PYTHON'
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "fsdp.yaml"]
LAUNCH += ["--main_process_port", "0", "train.py"]


def launch(**exported):
    """What each of the two processes found."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | exported
    ended = subprocess.run(LAUNCH, env=env, capture_output=True, text=True)
    print(f"exported: {exported}, exit code {ended.returncode}")
    ranks = [json.loads(Path(f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for found in ranks:
        print(" ", found)
    warned = "FSDP" in ended.stdout + ended.stderr
    print("  a message about FSDP:", warned)
    return ended.returncode, ranks, warned


for name in ("accelerate", "torch"):
    print(name, importlib.metadata.version(name))
code, (first, second), warned = launch()
alone = code == 0 and not warned and first["weight"] != second["weight"]
for found in (first, second):
    alone = alone and found["WORLD_SIZE"] == "2" and found["num_processes"] == 1
    alone = alone and found["is_main_process"] and found["distributed_type"] == "NO"

code, (first, second), warned = launch(ACCELERATE_USE_CPU="true")
whole = code == 0 and not warned and first["weight"] == second["weight"]
for found in (first, second):
    whole = whole and found["num_processes"] == 2 and found["distributed_type"] == "MULTI_CPU"
    whole = whole and found["parameter"] == "Parameter"
print("as described" if alone and whole else "CHANGED")
raise SystemExit(not (alone and whole))
PYTHON
venv/bin/python check.py
