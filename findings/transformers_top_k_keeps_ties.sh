#!/usr/bin/env bash
# top_k=20 keeps up to 24 tokens of bfloat16 logits, and torch.topk picks among ties by no rule.
#
# Behaviour: bfloat16 has eight significant bits, so some of 50,000 logits are equal. transformers'
#   TopKLogitsWarper(20) keeps every token that equals the 20th: 20.6 on average over 500 rows of
#   random logits, up to 24. In float32 it keeps 20. torch.topk(20) takes exactly 20, but which of
#   the equal ones depends on unrelated elements: without the first 1,000 columns, none of which was
#   among the 20, it returns another set in one row of eight. In 5% of the rows two tokens share
#   the highest logit.
# Expected: k tokens, the same ones whatever the columns that are not among them.
# Consequence: two engines that load one checkpoint in bfloat16 sample from different sets, and a
#   method that draws from the N likeliest tokens draws from others once special tokens are removed
#   from the logits rather than masked. If two share the highest logit, even greedy responses
#   differ.
# Versions: transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11.
# Source: transformers/generation/logits_process.py, TopKLogitsWarper, which removes scores below
#   the k-th; the documentation of torch.topk says that ties have no stable order.
# Workaround: none here; the draw of reft.py depends on topk, as docs/reft.md says.
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
from transformers import TopKLogitsWarper

print("transformers", transformers.__version__, "torch", torch.__version__)
ROWS, VOCABULARY, K, REMOVED = 500, 50_000, 20, 1_000
torch.manual_seed(0)
logits = 4 * torch.randn(ROWS, VOCABULARY)


def measure(dtype):
    scores = logits.to(dtype)
    kept = TopKLogitsWarper(K)(None, scores).isfinite().sum(-1)

    scores = scores.float()  # exact, so ties stay ties
    all_columns = scores.topk(K).indices
    later_columns = scores[:, REMOVED:].topk(K).indices + REMOVED
    changed = 0
    for before, after in zip(all_columns.tolist(), later_columns.tolist(), strict=True):
        if min(before) >= REMOVED and set(before) != set(after):
            changed += 1

    highest = scores == scores.amax(-1, keepdim=True)
    tied = (highest.sum(-1) > 1).sum().item()
    print(
        f"{dtype}: kept {kept.float().mean():.1f} on average and {kept.max()} at most; "
        f"other {K} of topk in {changed} rows, ties for the highest in {tied}, of {ROWS}"
    )
    return kept.max().item(), changed, tied


exact = measure(torch.float32)
most, changed, tied = measure(torch.bfloat16)
as_described = exact == (K, 0, 0) and most > K and changed > 0 and tied > 0

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
