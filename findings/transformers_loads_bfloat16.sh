#!/usr/bin/env bash
# AdamW at a learning rate of 1e-6 moves almost no weight of a model that from_pretrained loads.
#
# Behaviour: from_pretrained without a dtype loads a checkpoint that is saved in bfloat16, as most
#   are, in bfloat16. After 20 steps of AdamW at 1e-6, each of which should move a weight by about
#   1e-6, 98% of the weights are what they were: the spacing of bfloat16 at 0.02 is 1.2e-4, and
#   smaller steps round to nothing. With dtype=torch.float32 all weights have moved.
# Expected: float32 weights, as before transformers 5, or a message.
# Consequence: a training loop from the time of transformers 4 runs, logs a gradient norm and a
#   learning rate, and trains 2% of the weights. 1e-6 is GRPO's usual learning rate.
# Versions: transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11.
# Source: transformers/modeling_utils.py, from_pretrained: dtype "auto" is the default; in version 4
#   it was float32.
# Workaround: dtype=torch.float32 and autocast for the passes (infra/models.py, load_policy).
#
# Run without arguments: it installs the packages below into a temporary environment (about 1 GB).
# Exit code: 0 if transformers behaves as described, else 1.
set -euo pipefail

PINNED="
    annotated-doc==0.0.7 anyio==4.16.0 certifi==2026.10.18 click==8.5.1 filelock==4.2.11
    fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2
    huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 markdown-it-py==4.3.0 MarkupSafe==3.0.4
    mdurl==0.1.2 mpmath==1.3.0 networkx==3.6.1 numpy==2.3.5 packaging==26.3 Pygments==2.21.0
    PyYAML==6.0.3 regex==2026.11.15 requests==2.34.2 rich==15.0.0 safetensors==0.8.0
    setuptools==78.1.1 shellingham==1.5.4 sympy==1.14.0 tokenizers==0.23.3 tqdm==4.70.1
    transformers==5.19.0 truststore==0.10.5 typer==0.29.2 typing_extensions==4.16.0
"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
pip() {
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}
pip torch==2.13.0+cpu 2>/dev/null ||
    pip torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
# shellcheck disable=SC2086
pip $PINNED

cd "$folder"
cat > check.py <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
config = Qwen3Config(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)
torch.manual_seed(0)
Qwen3ForCausalLM(config).bfloat16().save_pretrained("model")
text = torch.arange(10, 60)[None]


def moved(**settings):
    """The dtype, and the share of matrix entries that differ after 20 steps at 1e-6."""
    model = AutoModelForCausalLM.from_pretrained("model", **settings)
    weights = [weight for weight in model.parameters() if weight.dim() == 2]
    before = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    for _ in range(20):
        model(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    used = changed = 0
    for weight, old in zip(weights, before, strict=True):
        with_gradient = optimizer.state[weight]["exp_avg"] != 0
        used += with_gradient.sum().item()
        changed += (weight != old)[with_gradient].sum().item()
    print(f"{settings}: {model.dtype}, {changed / used:.2%} of the weights with a gradient moved")
    return model.dtype, changed / used


default, share = moved()
_, share_float32 = moved(dtype=torch.float32)
as_described = default is torch.bfloat16 and share < 0.05 and share_float32 > 0.99
print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
