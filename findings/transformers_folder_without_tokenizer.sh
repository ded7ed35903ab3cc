#!/usr/bin/env bash
# AutoTokenizer makes an empty tokenizer of a folder that has none.
#
# Behaviour: for a folder that holds only a config.json, AutoTokenizer.from_pretrained returns a
#   tokenizer with one token, and encode of any text is an empty list. There is no error and no
#   warning.
# Expected: an error that names the missing files, as for a folder without config.json.
# Consequence: a model that was saved without its tokenizer is trained on empty prompts.
# Versions: transformers 5.19.0, tokenizers 0.23.3, Python 3.11, without torch.
# Source: the class follows from the config's model type
#   (transformers/models/auto/tokenization_auto.py), and no file is asked for.
# Workaround: load_tokenizer in infra/models.py rejects a tokenizer that encodes 1 as nothing;
#   tests/test_engine.py, test_a_model_that_cannot_be_trained_is_rejected.
#
# Run without arguments: it installs the packages below into a temporary environment (about 150 MB).
# Exit code: 0 if transformers behaves as described, else 1.
set -euo pipefail

PINNED="
    annotated-doc==0.0.7 anyio==4.16.0 certifi==2026.10.18 click==8.5.1 filelock==4.2.11
    fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2
    huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 markdown-it-py==4.3.0 MarkupSafe==3.0.4
    mdurl==0.1.2 numpy==2.3.5 packaging==26.3 Pygments==2.21.0 PyYAML==6.0.3 regex==2026.11.15
    requests==2.34.2 rich==15.0.0 safetensors==0.8.0 shellingham==1.5.4 tokenizers==0.23.3
    tqdm==4.70.1 transformers==5.19.0 truststore==0.10.5 typer==0.29.2 typing_extensions==4.16.0
"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
pip() {
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}
# shellcheck disable=SC2086
pip $PINNED

cd "$folder"
cat > check.py <<'PYTHON'
import logging
import os

import tokenizers
import transformers
from transformers import AutoTokenizer, Qwen3Config

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
transformers.logging.get_logger("transformers").addHandler(handler)

Qwen3Config().save_pretrained("model")
print("files:", os.listdir("model"))
tokenizer = AutoTokenizer.from_pretrained("model")
encoded = tokenizer.encode("What is 1+1?")
print(type(tokenizer).__name__, "of length", len(tokenizer), "encodes a question as", encoded)
print("messages:", messages)
as_described = len(tokenizer) == 1 and encoded == [] and not messages

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
export HF_HUB_OFFLINE=1
"$folder/venv/bin/python" check.py
