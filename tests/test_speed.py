"""That benchmark/speed.py measures real steps; and what a step costs beside wall time."""

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shared
import speed
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

import common
import grpo

# ------------------------------------------------------------------------------- the benchmark


def test_two_steps_do_the_work_that_is_compared(tiny_model: Path, tmp_path: Path):
    shape = speed.Shape("cpu", prompts=2, group=2, new_tokens=60, steps=1)  # answers end before
    measured = speed.ours("tiny", shape, "transformers", tmp_path)
    assert len((tmp_path / "problems.jsonl").read_text().splitlines()) == 2
    assert measured["tokens_a_step"].pop("prompt") > 2 * 2 * 5
    assert measured["tokens_a_step"] == {"generated": 2 * 2 * 60, "trained": 2 * 2 * 60}
    assert len(measured["seconds"]) == 1
    assert 0 < measured["parts"]["update"] < measured["parts"]["step"]
    assert measured["peak_bytes"] > 1e8


def test_the_page_shows_the_results_file():
    results = shared.read_json(shared.RESULTS / "speed.json")
    fresh = shared.filled(speed.PAGE, {"speed": speed.table(results)})
    stale = "docs/speed.md is stale: python benchmark/speed.py --write"
    assert speed.PAGE.read_text(encoding="utf-8") == fresh, stale


def test_the_page_quotes_the_slower_day():
    table = speed.table(shared.read_json(shared.RESULTS / "speed-slower-day.json"))
    row = next(line for line in table.splitlines() if "transformers on both sides: TRL's" in line)
    tiny, gsm8k, half_b = re.findall(r"= (\d\.\d\d)", row)
    said = f"gave {tiny} on tiny, {gsm8k} at GSM8K's lengths and {half_b} at 0.5B"
    assert said in " ".join(speed.PAGE.read_text(encoding="utf-8").split())


def test_a_section_that_is_missing_or_unequal_is_said():
    def side(seconds: float, trained: int) -> dict[str, Any]:
        return {"seconds": [seconds] * 3, "tokens_a_step": {"trained": trained}, "peak_bytes": 1e9}

    sections = {"ours: tiny: transformers": side(0.5, 10), "trl: tiny: transformers": side(1.0, 10)}
    results = {"cpu": {"sections": sections, "command": "", "machine": "", "versions": {}}}
    row = "transformers on both sides: TRL's step / ours"
    line = next(line for line in speed.table(results).splitlines() if row in line)
    assert (
        "1 / 0.5 s = 2.00" in line
        and line.count("not measured") == len(speed.SHAPES) - 1
        and "(!)" not in line
    )
    sections["trl: tiny: transformers"] = side(1.0, 11)
    assert "2.00 (!)" in speed.table(results)
    sections["trl: tiny: vllm"] = {"failed": "why"}
    assert "fails in TRL" in speed.table(results)


@pytest.mark.parametrize("name", ["nothing", "ours: tiny"])
def test_an_unknown_section_is_refused(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        speed.main(speed.Args(only=name))
    assert stop.value.code == 2 and f"--only {name}" in capsys.readouterr().err


# ------------------------------------------------------------------------------- memory, padding


class HeadOnly(nn.Module):
    """A language model whose hidden states are given: what is left is the LM head.

    width: of the hidden states; seen: token positions it was asked to compute; real: those of them
    that are no padding.
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
        truncated=torch.zeros(lengths.shape, dtype=torch.bool),
        texts=[[""] * lengths.shape[1] for _ in lengths],
    )


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of tensors that `work` holds at any time, beside those that were there."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        work()
    events = [e for e in log.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_peak_counts_what_is_alive_at_once():
    def work() -> None:
        for _ in range(3):
            torch.zeros(2**20).sum()  # 4 MiB, freed before the next
        both = torch.zeros(2**20), torch.zeros(2**20)
        del both

    assert 2**23 <= peak_bytes(work) < 2**23 + 2**16


def test_log_probs_in_chunks_need_an_eighth_of_the_memory_and_give_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
):
    """4 x 256 tokens of a vocabulary like Qwen2.5's, with narrow hidden states."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", common.LOGITS_AT_ONCE // 4)
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
            -(logps.exp() * logps).sum(-1)  # the entropy, which token_logp gives as well
        (logp * upstream).sum().backward()

    leaves, extra, gradients = [hidden, model.head.weight], [], []
    own = sum(leaf.numel() * 4 for leaf in leaves)  # bytes of the gradients, which both make
    for way in (chunked, plain):
        hidden.grad = model.head.weight.grad = None
        extra.append(peak_bytes(way) - own)
        gradients.append([leaf.grad for leaf in leaves])
    assert extra[0] <= extra[1] / 8
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_nine_tenths_of_computed_tokens_are_real():
    """Lengths as those of reasoning models: log-normal, cut off at 1,024."""
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
        for index in common.micro_batches(rollouts, args.token_budget, problems):
            logp, _ = common.token_logp(policy, rollouts, index, args)
            logp.sum().backward()

    few, many = (made_up_rollouts(torch.full((n, 8), 27), 36, 256) for n in (8, 64))
    update(few)  # the gradients are there from now on
    assert peak_bytes(lambda: update(many)) <= 1.01 * peak_bytes(lambda: update(few))
