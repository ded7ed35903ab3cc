"""What a run shows of the way its method spreads credit. Nothing here changes what is learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common import Rollouts, micro_batches, token_logp
from settings import RunArgs


def credit(
    advantages: Tensor,
    progress: Tensor,
    gate: Tensor,
    bucket: Tensor,
    outcome: Tensor,
    entropy: Tensor,
    mask: Tensor,
    buckets: int,
) -> dict[str, Tensor]:
    """What EP-GRPO and ERPO make of GRPO's advantage, over the live tokens of the batch.

    outcome: [P, G], GRPO's advantage A_i; bucket: [P, G, T] whole numbers; the others [P, G, T].
    gate/*: mean gate of the fifth of the tokens with the least and with the most entropy.
    credit/*: mean size of the two terms that add up to the advantage. sign_differs: share of the
    tokens that are pushed against their rollout, of those whose rollout GRPO pushes at all.
    bucket/*: share of the tokens that lie in the emptiest and in the fullest bucket.
    """
    by_entropy = gate[mask][entropy[mask].argsort()]
    fifth = max(1, len(by_entropy) // 5)
    pushed = mask & (outcome != 0)[..., None]
    differs = advantages.sign() != outcome.sign()[..., None]
    occupancy = bucket[mask].bincount(minlength=buckets) / mask.sum()
    return {
        "gate/low_entropy": by_entropy[:fifth].mean(),
        "gate/high_entropy": by_entropy[-fifth:].mean(),
        "credit/outcome": (advantages - progress)[mask].abs().mean(),
        "credit/progress": progress[mask].abs().mean(),
        "sign_differs": (differs & pushed).sum() / pushed.sum().clamp(min=1),
        "bucket/smallest": occupancy.min(),
        "bucket/largest": occupancy.max(),
    }


def reward_spread(rewards: Tensor, correct: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Standard deviation of GTPO's shaped rewards over the batch's tokens of correct and of wrong
    rollouts. rewards, mask: [P, G, T]; correct: [P, G]."""
    right = mask & (correct > 0)[..., None]
    sets = {"spread/correct": rewards[right], "spread/wrong": rewards[mask & ~right]}
    return {name: values.std() if len(values) > 1 else 0.0 for name, values in sets.items()}


def gradient_norm_of(
    coefficients: Tensor, policy: nn.Module, rollouts: Rollouts, args: RunArgs
) -> float:
    """Norm of the gradient of Σ coefficients · log π, [P, G, T]: with advantages times token
    weights, what these tokens contribute to the first update of a step, where every ratio is 1.

    Costs one backward pass over the groups that have a coefficient. Gradients must be cleared
    before; they are cleared again, and the random state is put back.
    """
    groups = coefficients.flatten(1).any(-1).nonzero()[:, 0].cpu()
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    if len(groups) == 0:
        return 0.0
    with torch.random.fork_rng():
        for index in micro_batches(rollouts, args.token_budget, groups):
            logp, _ = token_logp(policy, rollouts, index, args)
            (coefficients[index] * logp).sum().backward()
    norm = nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
    for weight in weights:
        weight.grad = None
    return norm.item()
