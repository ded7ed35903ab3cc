#!/usr/bin/env bash
# A mask with four dimensions turns sliding-window attention off.
#
# Behaviour: a Mistral or Gemma 3 model with a window of 4 gets 12 tokens. Without a mask, and with
#   a two-dimensional mask of ones, its logits are equal. With the causal mask in four dimensions,
#   [1, 1, 12, 12], they differ from the fifth token on: every layer attends to all earlier tokens.
#   There is no message.
# Expected: the window applies to what the mask allows, as it does with a two-dimensional mask.
# Consequence: masks in four dimensions are how sequences are packed, or a prompt is shared by
#   several responses, without FlashAttention. Beyond the window the trainer's log-probabilities are
#   then not those of the policy that vLLM samples from.
# Versions: transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11.
# Source: transformers/masking_utils.py, _preprocess_mask_arguments, which returns such a mask as it
#   is, for every type of layer.
# Workaround: the window in the mask itself; for Gemma 3 a dict with a mask for each type of layer;
#   or masks in two dimensions only, as here.
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
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
)

print("transformers", transformers.__version__, "torch", torch.__version__)
sizes = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.15,
    "sliding_window": 4,
}
layer_types = ["sliding_attention", "full_attention"]
torch.manual_seed(0)
mistral = MistralForCausalLM(MistralConfig(**sizes)).eval()
gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=layer_types)).eval()

tokens = torch.arange(10, 22)[None]
causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
window = causal.triu(-3)  # each token sees itself and the three before it


@torch.no_grad()
def difference(model, mask):
    """Of each token's logits from those without a mask."""
    logits = model(tokens, attention_mask=mask).logits
    return (logits - model(tokens).logits).abs().amax(-1)[0]


as_described = True
masks_with_window = {
    mistral: window,
    gemma: {"sliding_attention": window, "full_attention": causal},
}
for model, mask_with_window in masks_with_window.items():
    two, four = difference(model, torch.ones_like(tokens)), difference(model, causal)
    by_hand = difference(model, mask_with_window)
    print(f"{type(model).__name__}: two dimensions {two.max():.1g}, four dimensions")
    print("   ", *(f"{value:.1g}" for value in four.tolist()))
    print(f"    with the window in the mask {by_hand.max():.1g}")
    as_described = as_described and max(two.max(), by_hand.max(), four[:4].max()) < 1e-5
    as_described = as_described and four[4:].min().item() > 1e-3
print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
