"""benchmark/speed.py measures real steps; the memory and the padding of a step."""

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import speed
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

import common
import grpo
from infra import lm_head

# ------------------------------------------------------------------------------- the benchmark


def test_two_steps_do_the_work_that_is_compared(tiny_model, tmp_path):
    # EOS would come earlier: `ours` asserts the length. The budget holds one group.
    shape = speed.Shape("tiny", "cpu", 2, 3, new_tokens=60, steps=1, token_budget=300)
    measured = speed.ours(shape, "transformers", tmp_path)
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == 2
    assert measured["at_once"] == 3
    assert len(measured["seconds"]) == 1
    assert 0 < measured["parts"]["update"] < measured["parts"]["step"]
    assert measured["peak_bytes"] > 1e8


def test_ratios_are_medians_over_the_rounds():
    def side(seconds: float, update: float = 0.0, **more: Any) -> dict[str, Any]:
        parts = dict.fromkeys((*speed.PARTS, "step"), 0.1) | {"update": update}
        return {"seconds": [seconds] * 3, "parts": parts, "peak_bytes": 1e9, "at_once": 64} | more

    rounds = []
    for theirs, before in ((1.0, 0.4), (1.5, 0.9), (0.9, 0.8)):
        sides = {"ours": side(0.5, 0.3), "trl": side(theirs), "before": side(0.7, before)}
        rounds.append(sides)
    sections = {"tiny 2048: transformers": rounds}
    cells = speed.column(sections, "tiny 2048")
    assert cells["micro-batches"] == "2"
    assert cells["TRL's step / ours"] == "2.00 (1.80 to 3.00)"
    # 0.1 + 0.3 against 0.1 + 0.4, 0.1 + 0.9 and 0.1 + 0.8
    assert cells["our score + update / before"] == "0.44 (0.40 to 0.80)"
    assert cells["our peak memory / TRL's"] == "1.00 (1.00 to 1.00)"
    assert cells["with vLLM: our step, s"] == "not measured"
    sections["tiny 2048: vllm"] = [{"ours": side(0.25)}]
    assert speed.column(sections, "tiny 2048")["with vLLM: our step, s"] == "0.25"
    about = {"sections": sections, "versions": {}, "command": "it", "machine": "m"}
    _, missing, table = speed.table({"cpu": about}).split("\n\n")
    assert table.startswith("|  | goal | tiny 2048, cpu |\n")
    assert missing.startswith("Not measured: *tiny 16384* (cpu), *tiny 1024* (cpu), ")


@pytest.mark.parametrize("name", ["nothing", "tiny 2048"])
def test_an_unknown_section_is_rejected(name, rejection):
    assert rejection(speed.main, speed.Args(only=name)).startswith(f"--only {name}: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_the_cuda_shape_needs_cuda(rejection):
    line = rejection(speed.main, speed.Args(only="1.5B 8192: vllm"))
    assert "known are tiny 16384: transformers, " in line


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_round_has_the_sides_of_the_table(engine, monkeypatch):
    measured = []

    def measure(name: str, tree: Path = ROOT) -> dict[str, Any]:
        measured.append((name, tree))
        return {"at_once": 64}

    monkeypatch.setattr(speed, "measure_in_process", measure)
    sides = speed.measure_round(f"tiny 2048: {engine}", Path("older"))
    ours = f"ours: tiny 2048: {engine}", ROOT
    if engine == "vllm":
        assert list(sides) == ["ours"] and measured == [ours]
    else:
        assert list(sides) == ["ours", "before", "trl"]
        assert measured == [ours, (ours[0], Path("older")), ("trl: tiny 2048: 64", ROOT)]


def test_gpu_memory_is_that_after_the_last_call(monkeypatch):
    """By hand, with an engine that takes 3 GiB when it syncs and 1 GiB when it sleeps."""
    used = 0

    def use(gib: int) -> None:
        nonlocal used
        used = gib

    engine = SimpleNamespace(sync=lambda policy: use(policy), sleep=lambda: use(1))
    monkeypatch.setattr(speed, "VLLMEngine", engine)
    monkeypatch.setattr(speed.threading, "Thread", MagicMock())  # which watches all the time
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((8 - used) * 2**30, 8 * 2**30))
    gib = speed.watch_gpu_memory()
    for size in (4, 3):
        engine.sync(size)
        engine.sleep()
    assert [gib[moment] for moment in speed.GPU_MOMENTS] == [3.0, 1.0, 4.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")
@pytest.mark.parametrize("length", [192, 640, 704])
def test_attention_with_a_mask_has_finite_gradients(length):
    """cuDNN's attention has not; the scripts disable it."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    inputs = torch.randn(3, 8, 12, length, 128, device="cuda", dtype=torch.bfloat16)
    query, key, value = inputs.requires_grad_()
    mask = torch.ones(8, 1, length, length, dtype=torch.bool, device="cuda").tril()
    scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    assert inputs.grad.isfinite().all()


# ------------------------------------------------------------------------------- memory, padding


class HeadOnly(nn.Module):
    """A language model with given hidden states, so only the LM head is computed.

    width: size of the hidden states; seen: token positions it received, padding included; real: the
    same without padding.
    """

    _is_stateful = False

    def __init__(self, vocabulary: int, width: int, hidden: Tensor | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.hidden, self.width, self.seen, self.real = hidden, width, 0, 0
        self.config = PreTrainedConfig()

    def base_model(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        self.seen += input_ids.numel()
        self.real += int(input_ids.count_nonzero())
        shape = *input_ids.shape, self.width
        states = torch.zeros(shape) if self.hidden is None else self.hidden.view(shape)
        return BaseModelOutputWithPast(states, past_key_values=DynamicCache())

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def made_up_rollouts(lengths: Tensor, prompt_tokens: int, vocabulary: int) -> common.Rollouts:
    """Random tokens in responses of these lengths, [P, G]; only padding is 0."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(int(lengths.max())) < lengths[..., None]
    return common.Rollouts(
        problems=[common.Problem("", "", [1] * prompt_tokens) for _ in lengths],
        tokens=torch.randint(1, vocabulary, mask.shape, generator=generator) * mask,
        mask=mask,
        engine_logp=torch.zeros(mask.shape),
        correct=torch.zeros(lengths.shape),
        truncated=torch.zeros(lengths.shape, dtype=torch.bool),
        texts=[[""] * lengths.shape[1] for _ in lengths],
    )


def peak_bytes(work: Callable[[], Any]) -> int:
    """Peak bytes of tensors that `work` allocates in addition to the existing ones."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        work()
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_peak_counts_tensors_alive_at_the_same_time():
    def work() -> None:
        for _ in range(3):
            torch.zeros(2**20).sum()  # 4 MiB, freed before the next
        both = torch.zeros(2**20), torch.zeros(2**20)
        del both

    assert 2**23 <= peak_bytes(work) < 2**23 + 2**16


def test_log_probs_in_chunks_need_an_eighth_of_the_memory_and_give_the_same_gradients(monkeypatch):
    """4 x 256 tokens of a vocabulary like Qwen2.5's, with narrow hidden states."""
    monkeypatch.setattr(lm_head, "TILE_SIZE", lm_head.TILE_SIZE // 4)
    tokens, vocabulary, width = 256, 151936, 64
    torch.manual_seed(0)
    hidden = torch.randn(4 * tokens, width, requires_grad=True)
    model = HeadOnly(vocabulary, width, hidden)
    rollouts = made_up_rollouts(torch.full((1, 4), tokens), 1, vocabulary)
    index = (torch.zeros(4, dtype=torch.long), torch.arange(4))
    upstream = torch.randn(4, tokens)
    args = grpo.Args(device="cpu")

    def chunked() -> None:
        logp, _ = common.token_logp(model, rollouts, index, args)
        (logp * upstream).sum().backward()

    def plain() -> None:
        logps = model.head(hidden).log_softmax(-1)
        logp = logps.gather(-1, rollouts.tokens.view(-1, 1)).view(4, tokens)
        with torch.no_grad():
            -(logps.exp() * logps).sum(-1)  # the entropy, which token_logp also returns
        (logp * upstream).sum().backward()

    leaves, extra, gradients = [hidden, model.head.weight], [], []
    own = sum(leaf.numel() * 4 for leaf in leaves)  # bytes of the gradients, which both allocate
    for way in (chunked, plain):
        hidden.grad = model.head.weight.grad = None
        extra.append(peak_bytes(way) - own)
        gradients.append([leaf.grad for leaf in leaves])
    assert extra[0] <= extra[1] / 8
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_at_most_a_tenth_of_the_computed_tokens_is_padding():
    """Lengths like those of reasoning models: log-normal, truncated at 1,024."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.empty(64, 8).log_normal_(0, 0.8, generator=draw) * 256 + 1
    rollouts = made_up_rollouts(lengths.long().clamp(max=1024), 100, 16)
    model = HeadOnly(16, 8)
    common.score(model, rollouts, grpo.Args(device="cpu", token_budget=4096))
    assert model.real / model.seen >= 0.9


def test_the_update_needs_no_more_memory_for_more_rollouts():
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    args = grpo.Args(device="cpu", token_budget=2048)

    def update(rollouts: common.Rollouts) -> None:
        problems = torch.arange(len(rollouts.problems))
        for batch in common.scored_micro_batches(policy, None, rollouts, problems, args):
            batch.logp.sum().backward()

    few, many = (made_up_rollouts(torch.full((n, 8), 27), 36, 256) for n in (8, 64))
    update(few)  # allocates the gradients
    assert peak_bytes(lambda: update(many)) <= 1.02 * peak_bytes(lambda: update(few))
