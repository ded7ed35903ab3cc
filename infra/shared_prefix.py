"""A prompt computed once for all its responses, in the update and in the transformers engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from infra.models import TokenIds, base_model


def left_pad(prompts: list[TokenIds], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids padded on the left to length L, which are tokens, their positions: three [n, L]."""
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


def saves_tokens(prompts: list[TokenIds], which: Tensor, lengths: Tensor) -> bool:
    """Whether sharing prompts computes less than three quarters of the padded batch's tokens.

    which: [n], the prompt of each row; lengths: [n], response tokens of each row.
    """
    prompt_lengths = which.new_tensor(list(map(len, prompts))) - 1
    row_lengths = prompt_lengths[which]
    rows, longest = len(which), lengths.max()
    shared = len(prompts) * row_lengths.max() + rows * longest
    padded = rows * (row_lengths + lengths).max()
    return bool(shared < 0.75 * padded)


def shared_hidden_states(
    model: nn.Module, prompts: list[TokenIds], which: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """As `common.padded_hidden_states`, with each prompt computed once."""
    # A prompt's last token is an input of its rows: it predicts the first response token.
    cache, is_prompt = prompt_cache(model, [prompt[:-1] for prompt in prompts], which)
    last = tokens.new_tensor([prompt[-1] for prompt in prompts])
    inputs = torch.cat([last[which, None], tokens[:, :-1]], dim=1)  # [n, T]
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
