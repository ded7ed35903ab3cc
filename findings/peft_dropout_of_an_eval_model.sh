#!/usr/bin/env bash
# get_peft_model leaves the adapters' dropout on if the model is in eval mode.
#
# Behaviour: from_pretrained and eval() give a model without dropout. After get_peft_model with
#   lora_dropout=0.5 the model inside still says training=False, but the new dropout layers are in
#   train mode, and two forward passes of one input differ. No warning.
# Expected: new layers take the mode of the module that they are added to.
# Consequence: log-probabilities of a policy that is adapted for evaluation or as a reference are
#   random.
# Versions: peft 0.21.2, transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11.
# Source: peft/tuners/lora/layer.py, update_layer: nn.Dropout is made in train mode, as every module
#   is.
# Workaround: every pass of ours sets the mode of the whole policy: eval() in infra/hf_engine.py,
#   train() in common.py.
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
model = Qwen3ForCausalLM(config).eval()
lora = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM")
adapted = peft.get_peft_model(model, lora)
inner = adapted.get_base_model()
modes = {part.training for part in adapted.modules() if isinstance(part, torch.nn.Dropout)}
for name, weight in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight)
tokens = torch.tensor([[5, 6, 7]])


def repeats():
    with torch.no_grad():
        return inner(tokens).logits.equal(inner(tokens).logits)


print("the model is in train mode:", inner.training, "its dropout:", modes)
before = repeats()
adapted.eval()
after = repeats()
print("two passes are equal:", before, "and after another eval():", after)
as_described = not inner.training and modes == {True} and not before and after

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
