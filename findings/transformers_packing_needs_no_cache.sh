#!/usr/bin/env bash
# Sequences packed into one row are separated only without a mask and without a cache.
#
# Behaviour: two sequences stand in one row, and position_ids start again at 0. With use_cache=False
#   and no attention_mask the second sequence does not see the first. With use_cache left at its
#   default, in train mode too, or with an attention_mask of ones, it attends to the first: its
#   logits are those of one long sequence with repeated positions. There is no message.
# Expected: the same logits in all three calls, those of each sequence alone.
# Consequence: a trainer that packs responses, and passes the mask that its padded batches need or
#   forgets use_cache=False, trains on log-probabilities of another context. The loss still falls.
# Versions: transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11, attention "sdpa" and "eager".
# Source: transformers/masking_utils.py, _preprocess_mask_arguments, which looks for packed sequences
#   only if attention_mask and past_key_values are None; with use_cache the model makes a cache
#   first. For the mask: pull request 46634 of huggingface/transformers.
# Workaround: use_cache=False and no mask; or padding, as here.
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
from transformers import Qwen3Config, Qwen3ForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
config = Qwen3Config(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.15,
)
torch.manual_seed(0)
model = Qwen3ForCausalLM(config).train()
first, second = torch.arange(10, 16), torch.arange(20, 28)
row = torch.cat([first, second])[None]
position_ids = torch.cat([torch.arange(6), torch.arange(8)])[None]
ones = torch.ones_like(row)

as_described = True
for attention in ("sdpa", "eager"):
    model.set_attn_implementation(attention)

    def difference(**settings):
        """Of the second sequence's logits, packed, from those of the sequence alone."""
        with torch.no_grad():
            alone = model(second[None]).logits
            packed = model(row, position_ids=position_ids, **settings).logits[:, 6:]
        return (packed - alone).abs().max().item()

    separate = difference(use_cache=False)
    default = difference()
    masked = difference(use_cache=False, attention_mask=ones)
    print(f"{attention}: without cache {separate:.1g}, default {default:.2g}, ones {masked:.2g}")
    as_described = as_described and separate < 1e-5 and default > 0.1 and masked > 0.1
print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
