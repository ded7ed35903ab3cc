"""Pieces of a step on their own, for speed.py and the tests: LM head, micro-batches, methods."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from our_side import ROOT, VOCABULARY, long_tailed, timed
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import arca
import common
import ep_grpo
import erpo
import grpo
import gtpo
import holderpo
import reft


class HeadOnly(nn.Module):
    """A language model whose hidden states are given: what is left is the LM head.

    width: of the hidden states; seen: token positions it was asked to compute; real: those of them
    that are no padding.
    """

    def __init__(self, vocabulary: int, width: int, hidden: Tensor | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.hidden, self.width, self.seen, self.real = hidden, width, 0, 0

    def base_model(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        self.seen += input_ids.numel()
        self.real += int(input_ids.count_nonzero())
        shape = *input_ids.shape, self.width
        states = torch.zeros(shape) if self.hidden is None else self.hidden.view(shape)
        return BaseModelOutputWithPast(states, past_key_values=DynamicCache())

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def made_up_rollouts(lengths: Tensor, prompt_tokens: int, vocabulary: int) -> Any:
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


def head_variants(vocabulary: int, width: int, tokens: int) -> tuple[Callable, Callable, list]:
    """Forward and backward of token_logp's LM head and of its plain version, and the leaves."""

    torch.manual_seed(0)
    hidden = torch.randn(4 * tokens, width, requires_grad=True)
    model = HeadOnly(vocabulary, width, hidden)
    rollouts = made_up_rollouts(torch.full((1, 4), tokens), 1, vocabulary)
    index = (torch.zeros(4, dtype=torch.long), torch.arange(4))
    upstream = torch.randn(4, tokens)
    args = grpo.Args(device="cpu")

    def chunked() -> tuple[Tensor, Tensor]:
        logp, entropy = common.token_logp(model, rollouts, index, args)
        (logp * upstream).sum().backward()
        return logp.detach(), entropy

    def plain() -> tuple[Tensor, Tensor]:
        logps = (model.head(hidden) / args.temperature).log_softmax(-1)
        logp = logps.gather(-1, rollouts.tokens.view(-1, 1)).view(4, tokens)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1).view(4, tokens)
        (logp * upstream).sum().backward()
        return logp.detach(), entropy

    return chunked, plain, [hidden, model.head.weight]


def chunked(
    vocabulary: int = VOCABULARY, width: int = 896, tokens: int = 1024, rounds: int = 1
) -> dict[str, Any]:
    """Log-probs and entropy of 4 x `tokens` tokens, forward and backward, in both ways."""
    *ways, leaves = head_variants(vocabulary, width, tokens)
    own = sum(leaf.numel() * 4 for leaf in leaves)  # bytes of the gradients, which both make
    result: dict[str, Any] = {name: {"seconds": []} for name in ("chunked", "plain")}
    gradients = {}
    for _ in range(rounds):
        for name, way in zip(result, ways, strict=True):
            for leaf in leaves:
                leaf.grad = None

            def work(name: str = name, way: Callable = way) -> None:
                result[name]["seconds"].append(timed(way, "cpu"))

            result[name]["extra_bytes"] = peak_bytes(work) - own
            gradients[name] = [leaf.grad for leaf in leaves]
    for measured in result.values():
        measured["seconds"] = statistics.median(measured["seconds"])
    both = zip(gradients["chunked"], gradients["plain"], strict=True)
    result["gradient_difference"] = max(float((a - b).norm() / b.norm()) for a, b in both)
    return result


def packing(prompts: int = 64, group: int = 8, longest: int = 1024) -> dict[str, Any]:
    """Real tokens over tokens that common.score has the model compute."""
    lengths = torch.tensor(long_tailed(prompts * group, longest)).view(prompts, group)
    rollouts = made_up_rollouts(lengths, 100, 16)
    model = HeadOnly(16, 8)
    common.score(model, rollouts, grpo.Args(device="cpu"))
    whole = int((lengths + 100 - 1).sum())  # the last token predicts nothing
    rectangle = prompts * group * (longest + 99)
    return {"efficiency": model.real / model.seen, "unsorted": whole / rectangle}


def update_bytes(rollouts: int, token_budget: int = 2048) -> int:
    """Peak bytes of the log-probs' forward and backward passes over a step's micro-batches."""

    args = grpo.Args(device="cpu", token_budget=token_budget)
    policy = AutoModelForCausalLM.from_pretrained(ROOT / "tiny", dtype=torch.float32)
    data = made_up_rollouts(torch.full((rollouts // 8, 8), 27), 36, 256)

    def update() -> None:
        for index in common.micro_batches(data, args.token_budget, torch.arange(rollouts // 8)):
            logp, _ = common.token_logp(policy, data, index, args)
            logp.sum().backward()

    return peak_bytes(update)


def methods(prompts: int = 64, group: int = 8, tokens: int = 1024) -> dict[str, Any]:
    """Seconds of each method's own functions on one step of [P, G, T]."""
    torch.manual_seed(0)
    shape = prompts, group, tokens
    rewards = torch.randint(2, (prompts, group)).float()
    entropy, logp, ref_logp = torch.rand(shape), -torch.rand(shape), -torch.rand(shape)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (prompts, group, 1))
    flat = logp.view(-1, tokens), ref_logp.view(-1, tokens), mask.view(-1, tokens)
    logits = torch.randn(prompts, VOCABULARY)
    calls = {
        "GRPO": lambda: grpo.grpo_advantages(rewards),
        "EP-GRPO": lambda: ep_grpo.ep_grpo_advantages(rewards, entropy, logp, ref_logp, mask),
        "ERPO": lambda: erpo.erpo_advantages(rewards, entropy, logp, ref_logp, mask),
        "GTPO": lambda: gtpo.gtpo_advantages(rewards, entropy, mask),
        "GRPO-S": lambda: gtpo.grpo_s_advantages(rewards, entropy, mask),
        "HölderPO": lambda: holderpo.holder_surrogate(*flat, rewards.view(-1), 2.0),
        "ARCA": lambda: arca.credit_weights(entropy, mask),
        "REFT": lambda: reft.pick_first_tokens(logits),
    }
    seconds = {}
    for name, call in calls.items():
        call()
        seconds[name] = statistics.median(timed(call, "cpu") for _ in range(5))
    return {"seconds": seconds}
