#!/usr/bin/env bash
# transformers.get_scheduler("constant", ...) drops the warm-up that it is given, without a word.
#
# Behaviour: get_scheduler takes num_warmup_steps for every name. Under "constant" it is ignored: the
#   first update has the full learning rate, and there is no error and no warning. Under
#   "constant_with_warmup" and "linear" the first update has learning rate 0, because update k of W
#   warm-up updates has the factor (k - 1) / W: one update in W changes nothing.
# Expected: an error or a warning for a warm-up that a schedule does not have, as there is for a
#   warm-up that is missing ("constant_with_warmup requires `num_warmup_steps`").
# Consequence: recipes of this field say "constant learning rate, warm-up ratio 0.1". Passed on by
#   these names, such a run has no warm-up at all.
# Versions: transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11.
# Source: transformers/optimization.py, get_scheduler: the branch for SchedulerType.CONSTANT returns
#   before num_warmup_steps is looked at.
# Workaround: --warmup-ratio with --lr-schedule constant is rejected (infra/cli.py, check_settings).
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
$pip transformers==5.19.0 huggingface_hub==2.4.0 tokenizers==0.23.3 safetensors==0.8.0 \
    numpy==2.3.5 packaging==26.3 PyYAML==6.0.3 regex==2026.11.15 requests==2.34.2 tqdm==4.70.1 \
    filelock==4.2.11 fsspec==2026.9.0 hf-xet==1.8.0 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 h11==0.16.0 \
    anyio==4.16.0 certifi==2026.10.18 idna==3.20 typing_extensions==4.16.0 typer==0.29.2 \
    click==8.5.1 rich==15.0.0 shellingham==1.5.4 Pygments==2.21.0 markdown-it-py==4.3.0 \
    mdurl==0.1.2 annotated-doc==0.0.7 sympy==1.14.0 mpmath==1.3.0 networkx==3.6.1 Jinja2==3.1.6 \
    MarkupSafe==3.0.4 setuptools==78.1.1

cd "$folder"
cat > run.py <<'PYTHON'
import warnings

import torch
import transformers
from transformers import get_scheduler

WARMUP, UPDATES = 4, 8


def rates(name):
    """The learning rate of each update, as a factor of the optimiser's."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = get_scheduler(name, optimizer, WARMUP, UPDATES)
    found = []
    for _ in range(UPDATES):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


print("transformers", transformers.__version__, "torch", torch.__version__)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = {name: rates(name) for name in ("constant", "constant_with_warmup", "linear")}
for name, row in found.items():
    print(f"{name:22}", *(f"{rate:.2f}" for rate in row))
print("warnings about the warm-up:", [str(w.message) for w in caught if "warm" in str(w.message)])

as_described = (
    found["constant"] == [1.0] * UPDATES
    and found["constant_with_warmup"] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    and found["linear"][:4] == [0.0, 0.25, 0.5, 0.75]
    and not any("warm" in str(w.message) for w in caught)
)
print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" run.py
