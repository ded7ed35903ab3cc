#!/usr/bin/env bash
# TRL's GRPOTrainer with fewer prompts than one step takes trains nothing and ends normally.
#
# Behaviour: a step takes 16 rollouts in groups of 4, so 4 prompts. With 3 prompts train() returns
#   after 0 of 3 steps: no rollout, no reward call, no weight changed. There is a warning of the
#   Trainer about an iterable data set, which this is not, and no error. With 4 prompts it trains.
# Expected: an error, or steps that reuse prompts.
# Consequence: a trial run on a handful of problems, or a small data set with a large batch, ends with
#   exit code 0 and the model it began with.
# Versions: trl 1.16.0, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Source: trl/trainer/utils.py, RepeatSampler, which drops chunks of less than
#   generation_batch_size / num_generations prompts.
# Workaround: pass as many prompts as all steps take, repeated as needed (scale/trl_trainer.py,
#   make_trainer).
#
# Run without arguments: it installs the packages below into a temporary environment (about 1.5 GB).
# Exit code: 0 if TRL behaves as described, else 1.
set -euo pipefail

PINNED="
    trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6
    safetensors==0.8.0 annotated-doc==0.0.7 anyio==4.16.0 click==8.5.1 dill==0.4.1 filelock==4.2.11
    fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2
    huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 markdown-it-py==4.3.0 MarkupSafe==3.0.4
    mdurl==0.1.2 mpmath==1.3.0 multiprocess==0.70.19 networkx==3.6.1 packaging==26.3 pandas==3.1.1
    psutil==7.2.2 pyarrow==26.0.1 Pygments==2.21.0 python-dateutil==4.0.0 PyYAML==6.0.3
    regex==2026.11.15 rich==15.0.0 setuptools==80.10.2 shellingham==1.5.4
    sympy==1.14.0 tokenizers==0.23.3 tqdm==4.70.1 truststore==0.10.5 typer==0.29.2
    typing_extensions==4.16.0 tzdata==2026.6 xxhash==4.1.0
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
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
words = {word: i for i, word in enumerate(["<end>", "<pad>", "add", *map(str, range(10))])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", padding_side="left"
)
config = Qwen3Config(
    vocab_size=len(words),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    eos_token_id=0,
    pad_token_id=1,
)
settings = GRPOConfig(
    output_dir="out",
    use_cpu=True,
    bf16=False,
    per_device_train_batch_size=16,
    num_generations=4,
    max_completion_length=4,
    max_steps=3,
    learning_rate=1e-3,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


def train(count):
    """Steps done, different prompts seen, and whether a weight changed."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    before = [weight.detach().clone() for weight in model.parameters()]
    seen = []

    def reward(prompts, completions, **_):
        seen.extend(prompts)
        return [float(i % 2) for i in range(len(completions))]

    prompts = Dataset.from_list([{"prompt": f"add {i} {i}"} for i in range(count)])
    trainer = GRPOTrainer(
        model, reward, settings, train_dataset=prompts, processing_class=tokenizer
    )
    steps = trainer.train().global_step
    weights = zip(trainer.model.parameters(), before, strict=True)
    changed = any((new != old).any().item() for new, old in weights)
    print(f"{count} prompts: {steps} steps, {len(set(seen))} prompts seen, changed: {changed}")
    return steps, len(set(seen)), changed


as_described = train(3) == (0, 0, False) and train(4) == (3, 4, True)
print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" check.py
