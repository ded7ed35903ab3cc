#!/usr/bin/env bash
# generate gives wrong tokens in train mode with gradient checkpointing.
#
# Behaviour: with gradient_checkpointing_enable() and train(), the first greedy token is right and
#   later ones are not: each sees only the token before it. The same model generates the right
#   tokens in eval mode, and in train mode without checkpointing. The log says that the cache is
#   switched off, once, and nothing of the tokens.
# Expected: the same tokens, computed without a cache, or an error.
# Consequence: a policy that is rolled out between two updates without eval() samples from another
#   distribution, and every importance ratio is wrong.
# Versions: transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11.
# Source: transformers/modeling_layers.py, GradientCheckpointingLayer sets past_key_values to None,
#   while generate goes on to pass one new token at a time.
# Workaround: infra/hf_engine.py calls eval() and has a decode loop of its own;
#   tests/test_engine.py, test_tokens_and_logps_are_the_policys.
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
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

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
model = Qwen3ForCausalLM(config)
model.generation_config = GenerationConfig(pad_token_id=0)
prompt = torch.tensor([[5, 6, 7]])


def greedy(train, checkpointing):
    model.train(train)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    tokens = model.generate(prompt, do_sample=False, max_new_tokens=12)[0, 3:].tolist()
    print(f"train {train!s:5} checkpointing {checkpointing!s:5}", *tokens)
    return tokens


right = greedy(False, False)
wrong = greedy(True, True)
others = [greedy(True, False), greedy(False, True)]
as_described = others == [right, right] and wrong[0] == right[0] and wrong[1:] != right[1:]

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
