#!/usr/bin/env bash
# disable_adapter() unfreezes every adapter weight when it ends.
#
# Behaviour: with lora_A and lora_B of one layer frozen by requires_grad_(False), as one does with a
#   mixture's router, a pass under `with model.disable_adapter()` leaves them trainable: they get a
#   gradient in the next backward pass. No warning.
# Expected: requires_grad is afterwards what it was before.
# Consequence: the reference pass of a KL penalty undoes the freezing. An optimiser that is made
#   after such a pass, or that holds all weights, trains the frozen ones; else their gradients add up
#   unseen, because its zero_grad() does not know them.
# Versions: peft 0.21.2, transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11.
# Source: peft/tuners/tuners_utils.py, enable_adapters calls set_adapter, which makes all weights of
#   the active adapter trainable; https://github.com/huggingface/peft/issues/3447 reports it for
#   adapters loaded with inference_mode=True.
# Workaround: infra/models.py freezes routers again after each reference pass.
#
# Run without arguments: it installs the packages below into a temporary environment (about 1 GB).
# Exit code: 0 if peft behaves as described, else 1.
set -euo pipefail

PINNED="
    accelerate==1.15.0 annotated-doc==0.0.7 anyio==4.16.0 certifi==2026.10.18 click==8.5.1
    filelock==4.2.11 fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2
    huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 markdown-it-py==4.3.0 MarkupSafe==3.0.4
    mdurl==0.1.2 mpmath==1.3.0 networkx==3.6.1 numpy==2.3.5 packaging==26.3 peft==0.21.2
    psutil==7.2.2 Pygments==2.21.0 PyYAML==6.0.3 regex==2026.11.15 requests==2.34.2 rich==15.0.0
    safetensors==0.8.0 setuptools==78.1.1 shellingham==1.5.4 sympy==1.14.0 tokenizers==0.23.3
    tqdm==4.70.1 transformers==5.19.0 truststore==0.10.5 typer==0.29.2 typing_extensions==4.16.0
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
import peft
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
config = Qwen3Config(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)
torch.manual_seed(0)
lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
model = peft.get_peft_model(Qwen3ForCausalLM(config), lora)
frozen = [weight for name, weight in model.named_parameters() if "gate_proj.lora" in name]
for weight in frozen:
    weight.requires_grad_(False)
tokens = torch.tensor([[5, 6, 7]])


def have_gradients():
    model.zero_grad()
    model(tokens).logits.logsumexp(-1).sum().backward()
    return [weight.grad is not None for weight in frozen]


before = have_gradients()
with torch.no_grad(), model.disable_adapter():
    model(tokens)
after = have_gradients()
print("frozen weights with a gradient, before a reference pass:", before, "after it:", after)
as_described = before == [False, False] and after == [True, True]

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
