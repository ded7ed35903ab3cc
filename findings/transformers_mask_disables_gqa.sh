#!/usr/bin/env bash
# One padded prompt in a batch makes generate copy keys and values for every query head.
#
# Behaviour: with grouped-query attention (here 8 query heads, 2 key-value heads) each decoding step
#   of a batch of equal prompts passes 2 key heads to scaled_dot_product_attention, with
#   enable_gqa=True. If the prompts differ in length, padding needs a mask, and each step of each
#   layer first repeats all cached keys and values to 8 heads. The tokens are the same.
# Expected: enable_gqa=True with a mask, which torch supports on a CPU with equal results.
# Consequence: each decoding step of a batch with padding copies its KV cache, once for each query
#   head of a key-value head: 3 times in SmolLM2-135M, 7 times in Qwen2.5-0.5B.
# Versions: transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11.
# Source: transformers/integrations/sdpa_attention.py, use_gqa_in_sdpa, which needs attention_mask
#   None except on XPU and MPS.
# Workaround: none here; vLLM reads grouped keys and values. It concerns the transformers engine.
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
import torch.nn.functional as F
import transformers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

print("transformers", transformers.__version__, "torch", torch.__version__)
config = Qwen3Config(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.15,
)
torch.manual_seed(0)
model = Qwen3ForCausalLM(config).eval()
model.generation_config = GenerationConfig(pad_token_id=0)
attention = F.scaled_dot_product_attention
calls = []


def recorded(query, key, value, **settings):
    calls.append((key.shape[1], settings.get("enable_gqa", False)))
    return attention(query, key, value, **settings)


F.scaled_dot_product_attention = recorded


def generate(prompts, mask):
    calls.clear()
    tokens = model.generate(
        torch.tensor(prompts), attention_mask=torch.tensor(mask), do_sample=False, max_new_tokens=8
    )
    print("key heads and enable_gqa of the calls:", *sorted(set(calls)))
    return tokens[0, -8:].tolist(), set(calls)


equal, without_padding = generate([[5, 6, 7], [8, 9, 10]], [[1, 1, 1], [1, 1, 1]])
padded, with_padding = generate([[5, 6, 7], [0, 9, 10]], [[1, 1, 1], [0, 1, 1]])

# torch itself takes a mask with grouped heads.
query, key, value = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
mask = torch.rand(2, 1, 1, 9) < 0.8
mask[..., 0] = True
grouped = attention(query, key, value, attn_mask=mask, enable_gqa=True)
copies = [x.repeat_interleave(4, dim=1) for x in (key, value)]
gap = (grouped - attention(query, *copies, attn_mask=mask)).abs().max().item()
print(f"enable_gqa with a mask differs from copies by {gap:.1g}")

as_described = without_padding == {(2, True)} and with_padding == {(8, False)}
as_described = as_described and equal == padded and gap < 1e-6
print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
