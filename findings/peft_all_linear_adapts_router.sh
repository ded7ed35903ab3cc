#!/usr/bin/env bash
# peft's all-linear adapts the router and the experts of a mixture of experts, which are not linear
# layers, and warns of the opposite of what it does with their rank.
#
# Behaviour: with target_modules="all-linear" and r=4 on a Qwen3-MoE, whose router and experts are
#   parameters of custom modules, peft adapts them too. The experts' gate_up_proj gets rank 8, by a
#   rank_pattern that peft itself adds, and a warning says that this rank_pattern "did not match any
#   targeted module and were ignored". The two adapters of one module of experts are two nested
#   wrappers, so the names have base_layer in them.
# Expected: the documented choice, all linear layers except the output layer, and no warning about a
#   pattern that is applied.
# Consequence: the router is trained without load balancing, an adapter is larger than planned, and
#   merging weights by their names misses the nested ones.
# Versions: peft 0.21.2, transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11.
# Source: peft/utils/transformers_weight_conversion.py, _convert_peft_config_moe, which keeps what
#   all-linear meant for transformers 4.
# Workaround: merged_weights in infra/models.py reads the wrappers' own tensor names;
#   tests/test_engine.py, test_a_family_is_rolled_out_synced_and_saved.
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
import warnings

import peft
import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
config = Qwen3MoeConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_experts=4,
    num_experts_per_tok=2,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
)
model = Qwen3MoeForCausalLM(config)
linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
print("linear layers:", linear)
lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    adapted = peft.get_peft_model(model, lora)
ranks = {}
for name, part in adapted.named_modules():
    if hasattr(part, "get_delta_weight"):
        ranks[name.partition("layers.0.")[2]] = part.r["default"]
ignored = [str(w.message) for w in caught if "rank_pattern" in str(w.message)]
print("ranks:", ranks)
print("warnings:", ignored)

as_described = (
    not any("mlp" in name for name in linear)
    and ranks.pop("mlp.gate", 0) == ranks.pop("mlp.experts", 0) == 4
    and ranks.pop("mlp.experts.base_layer", 0) == 8
    and len(ranks) == 4
    and "gate_up_proj" in str(ignored)
    and "were ignored" in str(ignored)
)

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
