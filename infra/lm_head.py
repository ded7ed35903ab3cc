"""Log-probability and entropy of tokens without the whole [tokens, V] logits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infra.models import base_model

# Logits in memory at once: tokens times the tile's columns. CPU caches prefer small tiles.
TILE_SIZE = 2**26 if torch.cuda.is_available() else 2**22


def lm_head(policy: nn.Module) -> tuple[Tensor, float, float]:
    """The LM head's weight, [V, D], the logit scale, and the soft cap before it (0: no cap)."""
    model = base_model(policy)
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", 1.0)  # Falcon-H1
    scale /= getattr(config, "logits_scaling", 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None) or 0.0  # Gemma 2
    return model.get_output_embeddings().weight, scale, cap


def head_logits(hidden: Tensor, weight: Tensor, cap: float) -> Tensor:
    """hidden @ weight.T in float32, as vLLM computes it, softly capped to ±cap."""
    if hidden.is_cuda and hidden.dtype is not torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = hidden.float() @ weight.T.float()
    if cap:
        logits = cap * (logits / cap).tanh()
    return logits


@dataclass
class Tile:
    """The logits of a slice of the vocabulary."""

    rows: slice  # of the LM head's weight
    weight: Tensor  # [width, D], those rows in the precision of the hidden states
    logits: Tensor  # [tokens, width], float32, capped and scaled
    column: Tensor  # [tokens, 1], the target's column; 0 if the target is not in this tile
    has_target: Tensor  # [tokens, 1], whether the target is in this tile


def tiles(
    hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, cap: float
) -> Iterator[Tile]:
    """The vocabulary in tiles of at most TILE_SIZE logits."""
    width = max(1, TILE_SIZE // len(hidden))
    for start in range(0, len(weight), width):
        rows = slice(start, min(start + width, len(weight)))
        part = weight[rows].to(hidden.dtype)
        logits = head_logits(hidden, part, cap).mul_(scale)
        column = (targets - start)[:, None]
        has_target = (column >= 0) & (column < len(part))
        yield Tile(rows, part, logits, column * has_target, has_target)


class HeadLogp(torch.autograd.Function):
    """`HeadLogp.apply(hidden, weight, targets, scale, cap)` -> log-probability, entropy.

    hidden: [tokens, D], in the precision of the forward pass; weight: [V, D]; targets: [tokens].
    Returns two [tokens] in float32: log p(target), and the entropy in nats, without a gradient.
    The plain version, which holds all logits:

        logits = scale * head_logits(hidden, weight, cap)
        logp = logits.log_softmax(-1)
        return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    Here the vocabulary is split into tiles. By the chain rule, with s the tile of token v,
        log p(v) = log p(s) + log p(v | s)      H(v) = H(s) + Σ_s p(s) H(v | s)
    The backward pass computes each tile's logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, cap: float
    ) -> tuple[Tensor, Tensor]:
        log_masses, target_logps, entropies = [], [], []  # [tokens] for each tile
        for tile in tiles(hidden, weight, targets, scale, cap):
            logp = tile.logits.log_softmax(-1)  # log p(v | s)
            # log Σ_v exp(logits) is logits - log p(v | s), the same for every token v of the tile.
            log_masses.append(tile.logits.amax(-1) - logp.amax(-1))
            target_logp = logp.gather(-1, tile.column)[:, 0]
            target_logps.append(target_logp.where(tile.has_target[:, 0], -torch.inf))
            entropies.append(-torch.linalg.vecdot(logp.exp(), logp))  # H(v | s)

        log_masses = torch.stack(log_masses)  # [tiles, tokens]
        target_logps = torch.stack(target_logps)
        entropies = torch.stack(entropies)
        ctx.save_for_backward(hidden, weight, targets, log_masses.logsumexp(0))
        ctx.scale, ctx.cap = scale, cap

        tile_logp = log_masses.log_softmax(0)  # log p(s)
        entropy = (tile_logp.exp() * (entropies - tile_logp)).sum(0)
        ctx.mark_non_differentiable(entropy)
        target_logp = (target_logps + tile_logp).amax(0)  # -inf in all tiles but the target's
        return target_logp, entropy

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_total = ctx.saved_tensors
        grad = grad_logp[:, None] * ctx.scale
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for tile in tiles(hidden, weight, targets, ctx.scale, ctx.cap):
            if ctx.cap:  # the cap's derivative, before the logits are overwritten
                slope = 1 - (tile.logits / (ctx.scale * ctx.cap)).square()

            # ∂ log p(target) / ∂ logits = 1[v = target] - p(v)
            d_logits = tile.logits.sub_(log_total[:, None]).exp_().mul_(-grad)
            d_logits = d_logits.scatter_add_(-1, tile.column, grad * tile.has_target)
            if ctx.cap:
                d_logits = d_logits * slope
            d_logits = d_logits.to(hidden.dtype)

            d_hidden += d_logits @ tile.weight
            if d_weight is not None:
                d_weight[tile.rows] = d_logits.T @ hidden
        return d_hidden.to(hidden.dtype), d_weight, None, None, None
