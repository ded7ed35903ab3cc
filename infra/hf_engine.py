"""The transformers engine: rolls out the policy itself. Slower than vLLM, with nothing to sync."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from infra.cli import progress_bar
from infra.forward import left_pad, positions, prompt_cache
from infra.models import TokenIds, autocast, base_model, is_recurrent
from infra.vllm_engine import Engine, Response

CACHE_NAMES = ("past_key_values", "cache_params")  # the second is Mamba's


class HFEngine(Engine):
    """A decode loop over the policy's forward pass."""

    def __init__(self, args: Any, policy: nn.Module, tokenizer: Any, context: int) -> None:
        """context: longest prompt plus --max-new-tokens. Not needed here: the cache grows."""
        super().__init__(args, policy, tokenizer)
        self.args, self.policy = args, policy
        self.batch_size = args.prompts_per_step * args.group_size

    def sync(self, policy: nn.Module) -> None:
        self.policy = policy

    def generate(
        self, prompts: list[TokenIds], seeds: list[int], lengths: list[int], temperature: float
    ) -> list[Response]:
        """As VLLMEngine.generate, in batches of as many responses as a step has rollouts."""
        responses = []
        bar = progress_bar(total=len(prompts), desc="responses")
        for start in range(0, len(prompts), self.batch_size):
            batch = slice(start, start + self.batch_size)
            responses += self.generate_batch(
                prompts[batch], seeds[batch], lengths[batch], temperature
            )
            bar.update(len(responses) - start)
        bar.close()
        return responses

    @torch.no_grad()
    def generate_batch(
        self, prompts: list[TokenIds], seeds: list[int], lengths: list[int], temperature: float
    ) -> list[Response]:
        """Forward, sample, append, until every response has ended.

        Each response has a generator of its own, which gives one uniform number per token.
        """
        model = base_model(self.policy.eval())
        longest = max(lengths)
        uniform = [uniform_numbers(seed, longest) for seed in seeds]
        uniform = torch.stack(uniform, dim=1).to(model.device)  # [T, n]

        limits = torch.tensor(lengths, device=model.device)
        counts = torch.zeros_like(limits)  # tokens of each response
        stop_tokens = torch.tensor(self.stop_tokens, dtype=torch.long, device=model.device)

        sampled: list[Tensor] = []
        logps: list[Tensor] = []
        ended = torch.zeros_like(limits, dtype=torch.bool)
        with autocast(self.args):
            inputs, is_token, cache = self.prefill(model, prompts)
            while not ended.all():
                logits, cache = decode_step(model, inputs, is_token, cache)
                token, logp = sample(logits, temperature, uniform[len(sampled)])
                sampled.append(token)
                logps.append(logp)
                counts += ~ended
                ended |= torch.isin(token, stop_tokens) | (counts == limits)
                inputs = token[:, None]
                is_token = pad(is_token, (0, 1), value=True)

        rows = torch.stack(sampled, dim=1).tolist()
        logps = torch.stack(logps, dim=1).tolist()
        responses = []
        for row, logp, count in zip(rows, logps, counts.tolist(), strict=True):
            responses.append((row[:count], logp[:count]))
        return responses

    def prefill(self, model: nn.Module, prompts: list[TokenIds]) -> tuple[Tensor, Tensor, Any]:
        """The first inputs, a mask of the positions that are tokens, and the cache before them.

        Each different prompt is computed once, except its last token, which is the first input.
        A recurrent model has no cache that rows could share: its first inputs are whole prompts.
        """
        if is_recurrent(model):
            inputs, is_token, _ = left_pad(prompts, model.device)
            return inputs, is_token, {}
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        which = [distinct.index(tuple(prompt)) for prompt in prompts]
        which = torch.tensor(which, device=model.device)
        cache, is_token = prompt_cache(model, [prompt[:-1] for prompt in distinct], which)
        inputs = torch.tensor([[prompt[-1]] for prompt in prompts], device=model.device)
        is_token = pad(is_token, (0, 1), value=True)
        return inputs, is_token, {"past_key_values": cache}


def decode_step(
    model: nn.Module, inputs: Tensor, is_token: Tensor, cache: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """One forward pass: the next token's logits, [n, V], and the cache with the inputs added.

    inputs: [n, width]; is_token: [n, L], which positions of cache and inputs are tokens.
    """
    width = inputs.shape[1]
    mask = is_token
    if "cache_params" in cache:  # Mamba's state has no positions
        mask = is_token[:, -width:]

    position_ids = positions(is_token)
    outputs = model(
        input_ids=inputs,
        attention_mask=mask,
        position_ids=position_ids[:, -width:],
        use_cache=True,
        logits_to_keep=1,
        **cache,
    )

    cache = {name: outputs[name] for name in CACHE_NAMES if name in outputs}
    return outputs.logits[:, -1].float(), cache


def uniform_numbers(seed: int, count: int) -> Tensor:
    """The numbers of a response's own generator, one per token: [T]."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    return torch.rand(count, generator=generator)


def sample(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability, [n] each; temperature 0 takes the most likely.

    logits: [n, V]. The token is the first whose cumulative probability exceeds uniform, [n].
    """
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logp.argmax(-1, keepdim=True)
    else:
        cumulative = logp.exp().cumsum(-1)
        # Rounding keeps the total from being exactly 1.
        threshold = uniform[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True)
        token = token.clamp(max=logits.shape[-1] - 1)
    return token[:, 0], logp.gather(-1, token)[:, 0]
