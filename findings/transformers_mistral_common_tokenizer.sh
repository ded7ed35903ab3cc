#!/usr/bin/env bash
# Installing mistral-common, as vLLM does, takes the chat template away from Mistral folders.
#
# Behaviour: a folder with model_type "mistral", tokenizer.json, a chat template and tekken.json,
#   as Mistral's own repositories have them, loads with its chat template. Once mistral-common is
#   installed, AutoTokenizer returns a MistralCommonBackend instead: chat_template is None, encode()
#   gives ids of tekken.json, and added_tokens_decoder, elsewhere a dictionary, is a method.
# Expected: the same tokenizer whatever other packages are installed.
# Consequence: code that asks whether chat_template is None trains on bare questions, without
#   [INST]; loops over added_tokens_decoder end in an AttributeError. Only in those with vLLM,
#   which requires mistral-common.
# Versions: transformers 5.19.0, tokenizers 0.23.3, mistral-common 1.13.1, Python 3.11.
# Source: transformers/models/auto/tokenization_auto.py, AutoTokenizer.from_pretrained, which asks
#   for mistral_format, by default true if mistral-common is installed.
# Workaround: mistral_format=False (load_tokenizer in infra/models.py); tests/test_engine.py,
#   test_tekken_json_does_not_replace_the_chat_template.
#
# Run without arguments: it installs the packages below into a temporary environment (0.3 GB).
# Exit code: 0 if transformers behaves as described, else 1.
set -euo pipefail

BEFORE="
    annotated-doc==0.0.7 anyio==4.16.0 certifi==2026.10.18 click==8.5.1 filelock==4.2.11
    fsspec==2026.9.0 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpx2==2.16.2
    huggingface_hub==2.4.0 idna==3.20 Jinja2==3.1.6 markdown-it-py==4.3.0 MarkupSafe==3.0.4
    mdurl==0.1.2 numpy==2.3.5 packaging==26.3 Pygments==2.21.0 PyYAML==6.0.3 regex==2026.11.15
    requests==2.34.2 rich==15.0.0 safetensors==0.8.0 shellingham==1.5.4 tokenizers==0.23.3
    tqdm==4.70.1 transformers==5.19.0 truststore==0.10.5 typer==0.29.2 typing_extensions==4.16.0
"
WITH_VLLM="
    mistral_common==1.13.1 annotated-types==0.8.0 attrs==26.1.0 charset-normalizer==3.5.2
    jsonschema==4.26.0 jsonschema-specifications==2025.9.1 pillow==13.0.0 pycountry==26.2.16
    pydantic==2.14.3 pydantic-extra-types==2.11.1 pydantic_core==2.50.4 referencing==0.37.0
    rpds-py==2026.9.1 tiktoken==0.14.0 typing-inspection==0.4.5 urllib3==2.8.0
"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
pip() {
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}
# shellcheck disable=SC2086
pip $BEFORE $WITH_VLLM
cp -r "$folder"/venv/lib/python*/site-packages/mistral_common/data "$folder/data"
"$folder/venv/bin/python" -m pip uninstall --quiet --yes mistral_common

cd "$folder"
cat > check.py <<'PYTHON'
import importlib.util
import os
import shutil

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, MistralConfig, PreTrainedTokenizerFast

installed = importlib.util.find_spec("mistral_common") is not None
versions = f"transformers {transformers.__version__} tokenizers {tokenizers.__version__}"
print(versions, "with mistral-common" if installed else "without mistral-common")
if not os.path.exists("model"):
    MistralConfig().save_pretrained("model")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "What": 3, "is": 4, "1": 5, "+": 6, "?": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    tokenizer.chat_template = "[INST]{{ messages[-1].content }}[/INST]"
    tokenizer.save_pretrained("model")
    shutil.copy("data/tekken_240911.json", "model/tekken.json")

tokenizer = AutoTokenizer.from_pretrained("model")
template, added = tokenizer.chat_template, type(tokenizer.added_tokens_decoder).__name__
encoded = tokenizer.encode("What is 1+1?")
print(type(tokenizer).__name__, "chat_template:", template, "added_tokens_decoder:", added)
print("encode:", encoded)
if installed:
    as_described = template is None and added == "method" and 3 not in encoded
else:
    as_described = template is not None and added == "dict" and encoded[:2] == [3, 4]

print("as described" if as_described else "CHANGED")
raise SystemExit(not as_described)
PYTHON
"$folder/venv/bin/python" check.py
# shellcheck disable=SC2086
pip $WITH_VLLM
"$folder/venv/bin/python" check.py
