"""Micro-batches of rollouts, and forward passes over prompts and responses with little padding.

A prompt can be computed once for all its responses, also in the transformers engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from infra.models import TokenIds, base_model, is_recurrent

# Below this size of a pass, less padding saves no time.
MIN_TOKENS = 1024


# ------------------------------------------------------------------ plan


class ForwardPass(NamedTuple):
    """Some rows of a micro-batch, computed together."""

    rows: list[int]
    share: bool  # whether each prompt is computed once for its rows
    tokens: int  # computed, padding included


def forward_passes(
    which: list[int], prompt_lengths: list[int], lengths: list[int], can_share: bool
) -> list[ForwardPass]:
    """Plan passes over rows of similar length.

    which: the prompt of each row, as a place in prompt_lengths; lengths: response tokens of each
    row. At most a tenth of a pass's tokens is padding, unless it has at most MIN_TOKENS or shares
    prompts.
    """
    totals = []
    for p, length in zip(which, lengths, strict=True):
        totals.append(prompt_lengths[p] + length)

    passes: list[list[int]] = [[]]  # the rows of each
    used = 0
    for row in sorted(range(len(totals)), key=totals.__getitem__):
        computed = totals[row] * (len(passes[-1]) + 1)
        used += totals[row]
        if computed > MIN_TOKENS and used < 0.9 * computed:
            passes.append([])
            used = totals[row]
        passes[-1].append(row)
    return [plan_pass(rows, which, prompt_lengths, lengths, can_share) for rows in passes]


def plan_pass(
    rows: list[int],
    which: list[int],
    prompt_lengths: list[int],
    lengths: list[int],
    can_share: bool,
) -> ForwardPass:
    """Share the prompts if that computes less than three quarters of the padded rows' tokens."""
    prompts = set()
    longest_prompt = longest_response = longest = 0
    for row in rows:
        prompt_length = prompt_lengths[which[row]]
        prompts.add(which[row])
        longest_prompt = max(longest_prompt, prompt_length)
        longest_response = max(longest_response, lengths[row])
        longest = max(longest, prompt_length + lengths[row])

    # A prompt's last token predicts the first response token, so it counts with the response. The
    # last response token predicts nothing.
    padded = len(rows) * (longest - 1)
    shared = len(prompts) * (longest_prompt - 1) + len(rows) * longest_response
    if can_share and shared < 0.75 * padded:
        return ForwardPass(sorted(rows), True, shared)
    return ForwardPass(sorted(rows), False, padded)


# ------------------------------------------------------------------ compute


def response_states(
    model: nn.Module,
    prompts: list[TokenIds],
    which: Tensor,
    tokens: Tensor,
    mask: Tensor,
    can_share: bool,
) -> Tensor:
    """Last hidden states that predict the response tokens of n rows: [tokens, D], in mask's order.

    which: [n], the prompt of each row, as a place in `prompts`; tokens, mask: [n, T].
    """
    lengths = mask.sum(-1).tolist()
    passes = forward_passes(which.tolist(), list(map(len, prompts)), lengths, can_share)
    states: dict[int, Tensor] = {}  # of each row, [tokens of the row, D]
    for rows, share, _ in passes:
        # in_pass: [rows], the place of each row's prompt among the prompts of this pass
        used, in_pass = which[rows].unique(return_inverse=True)
        pass_prompts = [prompts[p] for p in used.tolist()]

        row_lengths = mask[rows].sum(-1).tolist()
        longest = max(row_lengths)
        pass_tokens, pass_mask = tokens[rows, :longest], mask[rows, :longest]

        compute = shared_states if share else padded_states
        of_rows = compute(model, pass_prompts, in_pass.to(mask.device), pass_tokens, pass_mask)
        states.update(zip(rows, of_rows.split(row_lengths), strict=True))
    return torch.cat([states[row] for row in range(len(lengths))])


def padded_states(
    model: nn.Module, prompts: list[TokenIds], which: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """`response_states` with prompt and response in one right-padded sequence per row.

    A causal model never attends to padding on the right.
    """
    # The prompt's last token predicts response token 0, which predicts token 1, and so on. The last
    # response token predicts nothing and is left out.
    sequences = []
    for p, response, length in zip(which, tokens, mask.sum(-1), strict=True):
        prompt = tokens.new_tensor(prompts[p])
        sequences.append(torch.cat([prompt, response[: length - 1]]))
    body = base_model(model).base_model  # without LoRA's wrapper, then without the LM head
    states = body(input_ids=pad_sequence(sequences, batch_first=True), use_cache=False)[0]

    prompt_lengths = tokens.new_tensor([len(prompt) for prompt in prompts])[which]
    row, position = mask.nonzero().T
    return states[row, prompt_lengths[row] - 1 + position]


def shared_states(
    model: nn.Module, prompts: list[TokenIds], which: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """`response_states` with each prompt computed once."""
    # A prompt's last token is an input of its rows: it predicts the first response token.
    cache, is_prompt = prompt_cache(model, [prompt[:-1] for prompt in prompts], which)
    last = tokens.new_tensor([prompt[-1] for prompt in prompts])
    inputs = torch.cat([last[which, None], tokens[:, :-1]], dim=1)  # [n, T]
    # Padding on the right counts as tokens, because a causal model never attends to it.
    is_token = torch.cat([is_prompt, torch.ones_like(mask)], dim=1)  # [n, L + T]
    position_ids = positions(is_token)
    position_ids = position_ids[:, is_prompt.shape[1] :]  # [n, T]

    body = base_model(model).base_model
    outputs = body(
        input_ids=inputs,
        attention_mask=is_token,
        position_ids=position_ids,
        past_key_values=cache,
    )
    return outputs[0][mask]


def prompt_cache(model: nn.Module, prompts: list[TokenIds], which: Tensor) -> tuple[Any, Tensor]:
    """Keys and values of prompts, each computed once, for n rows.

    which: [n], the prompt that each row continues. Prompts are padded on the left to length L.
    Returns transformers' cache with n rows, and [n, L], true on positions that are not padding.
    """
    ids, is_token, position_ids = left_pad(prompts, which.device)
    body = base_model(model).base_model
    outputs = body(
        input_ids=ids, attention_mask=is_token, position_ids=position_ids, use_cache=True
    )
    # reorder_cache uses index_select. The gradient of x[which] would add up in another order at
    # each run.
    outputs.past_key_values.reorder_cache(which)
    return outputs.past_key_values, is_token[which]


def left_pad(prompts: list[TokenIds], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Three [n, L]: token ids padded on the left, a mask of the tokens, and position ids.

    L is at least 1: a pass needs a position, even if all prompts are empty.
    """
    longest = max(1, *map(len, prompts))
    rows = []
    for prompt in prompts:
        rows.append([-1] * (longest - len(prompt)) + list(prompt))
    ids = torch.tensor(rows, device=device)
    is_token = ids >= 0
    ids = ids.clamp(min=0)
    return ids, is_token, positions(is_token)


def positions(is_token: Tensor) -> Tensor:
    """Position ids, [n, L]: 0 for the first token of each row, then 1, 2, and so on."""
    return (is_token.cumsum(-1) - 1).clamp(min=0)


# ------------------------------------------------------------------ micro-batches


def micro_batches(
    rollouts: Any, token_budget: int, problems: Tensor, can_share: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """The rollouts of some problems, [P'] indices, in batches of at most `token_budget` tokens.

    rollouts: common.Rollouts. Yields (problem, rollout) indices of the n rollouts of a batch.
    A batch holds whole groups. A group that exceeds the budget is split; a rollout that exceeds it
    is a batch of its own. Padding counts. A prompt counts once if its rollouts can share it.
    """
    prompt_lengths = [len(problem.prompt) for problem in rollouts.problems]
    lengths = rollouts.mask.sum(-1).tolist()  # [P, G]

    def fits(rows: list[tuple[int, int]]) -> bool:
        which, of_rows = [], []
        for p, g in rows:
            which.append(p)
            of_rows.append(lengths[p][g])
        tokens = 0
        for part in forward_passes(which, prompt_lengths, of_rows, can_share):
            tokens += part.tokens
        return tokens <= token_budget

    groups = []
    for p in sorted(problems.tolist(), key=lambda p: sum(lengths[p])):
        # neighbours of similar length, for little padding if the group has to be split
        by_length = sorted(range(len(lengths[p])), key=lengths[p].__getitem__)
        groups.append([(p, g) for g in by_length])
    for batch in pack(groups, fits):
        parts = [batch] if fits(batch) else pack([[row] for row in batch], fits)
        for part in parts:
            yield tuple(torch.tensor(sorted(part)).T)  # pairs (p, g) as two index tensors, [n]


def pack(pieces: list[list[Any]], fits: Callable[[list[Any]], bool]) -> list[list[Any]]:
    """Join consecutive pieces for as long as they fit."""
    packed = pieces[:1]
    for piece in pieces[1:]:
        joined = packed[-1] + piece
        if fits(joined):
            packed[-1] = joined
        else:
            packed.append(piece)
    return packed


def can_share_prompts(model: nn.Module, args: Any) -> bool:
    """Whether the rollouts of a problem can share one pass over its prompt, through its KV cache.

    Not with a recurrent state, nor with checkpointing, which would append to the cache again.
    """
    return not args.gradient_checkpointing and not is_recurrent(model)
