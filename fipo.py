r"""FIPO: Future-KL Influenced Policy Optimization (arXiv 2603.19835).

grpo.py with DAPO's clip, except that each advantage is multiplied by a weight near 1. The weight is
exp(F), clipped, where F sums how far earlier updates of the step have raised the log-probability of
the token and of later tokens; a later token counts less with its distance. In a step's first update
all weights are 1, up to rounding. Ratios are capped (dual clip), and a wrong response with several
ratios above the cap is dropped.
Comments "Eq. ..." refer to rows of docs/fipo.md. [paper]: the paper; [code]: the authors' code.

    python fipo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python fipo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \boxed{}.'

The paper does this in DAPO, whose --dynamic-sampling and --overlong-buffer are off by default here.
Shapes: P problems (p in a micro-batch), G rollouts of each (the group), T response tokens.
Left out: several GPUs, asynchronous rollouts, reward models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import common


# Below the imports, scripts may differ only between the marks <method> and </method>.
@dataclass
class Args(common.RunArgs):
    """Settings of the method. The string below each is its --help text."""

    # <method>
    updates_per_rollout: int = 4
    """optimiser updates per step, each on its share of the problems (paper: 8)"""
    half_life: float = 32.0
    """τ: distance, in tokens, at which a later token's change counts half"""
    influence_low: float = 0.0
    """e_low: weights are clipped at 1 - e_low (paper, 7B: 0.2)"""
    influence_high: float = 0.2
    """e_high: weights are clipped at 1 + e_high"""
    ratio_cap: float = 10.0
    """c: a token whose ratio exceeds c is left out of the sums F; the loss caps its ratio at c; two
    such tokens drop a response with a negative advantage"""
    safety: float = 10.0
    """s: if a ratio exceeds s, the weight of a negative advantage is kept in [0.8, 1] (7B: 3)"""
    scale_rewards: bool = True
    """divide the advantage by the group's standard deviation (Dr. GRPO: no)"""
    clip_low: float = 0.2
    """ε_low: the ratio is clipped at 1 - ε_low"""
    clip_high: float = 0.28
    """ε_high: the ratio is clipped at 1 + ε_high (DAPO: 0.28)"""
    loss_average: Literal["token", "sequence", "constant"] = "token"
    """token: over all tokens (DAPO); sequence: over each response, then over responses
    (DeepSeekMath); constant: over responses × --max-new-tokens (Dr. GRPO)"""
    kl: float = 0.0
    """β: weight of the KL penalty to the frozen initial policy (DeepSeekMath: 0.04)"""

    def __post_init__(self) -> None:
        super().__post_init__()  # the shared checks; no number may be negative
        updates, low, cap = self.updates_per_rollout, self.influence_low, self.ratio_cap
        common.require(updates > 1, "--updates-per-rollout", updates, "is DAPO: all weights are 1")
        common.require(self.half_life > 0, "--half-life", self.half_life, "must be above 0")
        common.require(self.safety > 0, "--safety", self.safety, "must be above 0")
        common.require(low < 1, "--influence-low", low, "must be below 1")
        why = f"must exceed 1 + --clip-high {self.clip_high}"
        common.require(cap > 1 + self.clip_high, "--ratio-cap", cap, why)

    # </method>


# <method>
def grpo_advantages(rewards: Tensor, *, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """Each reward's z-score in its group, (r - mean(r)) / std(r) (DeepSeekMath, section 4.1.2).

    rewards: [P, G]. Returns [P, G]: the advantage of every token of that rollout.
    scale: divide by the unbiased standard deviation (Dr. GRPO does not).
    A group of equal rewards, or of one rollout, gives exact zeros.
    """
    advantages = rewards - rewards.mean(-1, keepdim=True)
    if scale and rewards.shape[-1] > 1:
        advantages = advantages / (rewards.std(-1, keepdim=True) + eps)
    varied = rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True)
    return torch.where(varied, advantages, 0.0)


@torch.no_grad()
def fipo_weights(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    half_life: float = 32.0,
    low: float = 0.0,
    high: float = 0.2,
    ratio_cap: float = 10.0,
    safety: float = 10.0,
) -> Tensor:
    """The weight that each token's advantage is multiplied by, 0 outside the mask. All [..., T].

    logp is the current policy's, old_logp that of the policy that sampled. A response with a
    negative advantage and more than one ratio above `ratio_cap` is dropped: its weights are 0.
    """
    shift = torch.where(mask, logp - old_logp, 0.0)  # Eq. 3 [paper]
    above_cap = shift > math.log(ratio_cap)
    future = shift.masked_fill(above_cap, 0.0)  # Eq. 5 [paper]
    # F_t = Σ_k γ^(k-t) shift_k over all k >= t, with γ = 0.5^(1/τ). `future` holds the sums over
    # n tokens. The sum over 2n tokens is the one over the first n, plus γ^n × that over the next n.
    n = 1
    while n < mask.shape[-1]:
        future[..., :-n] += 0.5 ** (n / half_life) * future[..., n:]  # Eq. 6 [paper]
        n *= 2
    weights = future.exp().clamp(1 - low, 1 + high)  # Eq. 7 [paper]

    negative = advantages < 0
    unsafe = negative & (shift > math.log(safety))
    weights = torch.where(unsafe, weights.clamp(0.8, 1.0), weights)  # Eq. safety [code]
    dropped = (negative & above_cap).sum(-1, keepdim=True) > 1  # Eq. dropped [code]
    return torch.where(mask & ~dropped, weights, 0.0)


# </method>
def clipped_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, negated (DeepSeekMath Eq. 3; asymmetric clip: DAPO Eq. 8).

    All [..., T]; only logp has a gradient. Returns each token's loss, and where the clip is active:
    there the minimum is the clipped term, which has no gradient.
    """
    ratio = (logp - old_logp).exp()  # w = π / π_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.min(ratio * advantages, clipped * advantages)
    return -surrogate, clipped * advantages < ratio * advantages


def kl_estimate(logp: Tensor, other_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(π ‖ π_other) at each token sampled from π (DeepSeekMath Eq. 4)."""
    log_ratio = other_logp - logp
    return log_ratio.exp() - log_ratio - 1


def main(args: Args) -> None:
    run = common.Run(args)
    grader = common.Grader(args.answer_format)
    tokenizer = common.load_tokenizer(args)
    train = common.load_problems(args, "--dataset", tokenizer, grader)
    held_out = common.load_problems(args, "--eval-dataset", tokenizer, grader)
    policy = common.load_policy(args)
    engine = common.make_engine(args, policy, tokenizer, train, held_out)
    # <method>
    reference = common.Reference(policy, args) if args.kl else None
    # </method>

    parameters = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True
    )
    scheduler = common.get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.updates)
    state = {"optimizer": optimizer, "scheduler": scheduler, "problems": train}
    run.restore(policy, **state)

    if run.step == 0:
        engine.sync(policy)
        run.log(0, common.evaluate(engine, grader, held_out, args))

    for step in run.steps():
        # 1. Roll out and verify P groups of G responses.
        with run.time("sync"):
            engine.sync(policy)
        # <method>
        groups = common.collect(args, step, train, engine, grader, run)
        # </method>
        engine.sleep()  # frees memory until the next sync

        rollouts = common.stack(groups, engine.stop_tokens, common.device(args))
        mask = rollouts.mask  # [P, G, T], true on response tokens
        rewards = rollouts.correct + common.overlong_penalty(
            mask.sum(-1), args.max_new_tokens, args.overlong_buffer
        )

        # 2. Score the rollouts, unless phase 4's forward pass does it.
        with run.time("score"):
            # <method>
            if common.needs_scoring_pass(policy, rollouts, args):
                common.score_rollouts(policy, reference, rollouts, args)
            # </method>

        # 3. Compute the advantages.
        # <method>
        advantages = grpo_advantages(rewards, scale=args.scale_rewards)[..., None] * mask
        # </method>

        # 4. Update on one share of the problems at a time.
        per_token = common.TokenValues(mask)  # for the log: [P, G, T] by name
        with run.time("update"):
            seed = common.seed_for(args.seed, step, "updates")
            for share in common.shuffled_shares(len(groups), args.updates_per_rollout, seed):
                # <method>
                weights = common.token_weights(mask, share, args.loss_average, args.max_new_tokens)
                # </method>
                update_loss = 0.0

                # Forward passes with gradients. A group above --token-budget takes several of them.
                for batch in common.scored_micro_batches(policy, reference, rollouts, share, args):
                    importance = common.importance_weights(
                        batch.old_logp, batch.engine_logp, args.importance_cap
                    )
                    loss_weights = importance * weights[batch.problems] * batch.trained

                    # <method>
                    advantage = advantages[batch.problems]
                    influence = fipo_weights(
                        batch.logp,
                        batch.old_logp,
                        advantage,
                        batch.mask,
                        half_life=args.half_life,
                        low=args.influence_low,
                        high=args.influence_high,
                        ratio_cap=args.ratio_cap,
                        safety=args.safety,
                    )
                    advantage = advantage * influence  # Eq. 7, advantage [paper]

                    # If A > 0, the clip at 1 + ε_high < c already caps the ratio.
                    cap = batch.old_logp + math.log(args.ratio_cap)
                    logp = torch.minimum(batch.logp, cap)  # Eq. dual clip [paper]
                    loss, clipped = clipped_loss(
                        logp, batch.old_logp, advantage, args.clip_low, args.clip_high
                    )
                    if args.kl:
                        loss = loss + args.kl * kl_estimate(batch.logp, batch.ref_logp)
                    loss = (loss * loss_weights).sum()
                    per_token.add(batch, influence=influence)
                    # </method>

                    loss.backward()
                    update_loss += loss.item()

                    kl = kl_estimate(batch.old_logp, batch.logp)  # KL(π_old ‖ π)
                    per_token.add(batch, advantage=advantage, clip_fraction=clipped, kl_to_old=kl)

                gap = common.check_engine(rollouts, args)  # all scored by now; may stop the run
                grad_norm = clip_grad_norm_(parameters, args.max_grad_norm).item()
                if run.update_is_finite(update_loss, grad_norm):
                    optimizer.step()
                optimizer.zero_grad()

                lr = scheduler.get_last_lr()[0]
                scheduler.step()

        # 5. Log metrics, evaluate, save a checkpoint. Loss and gradient are the last update's.
        metrics = common.rollout_metrics(rollouts, rewards) | gap
        metrics |= per_token.means("clip_fraction", "kl_to_old")
        metrics |= {"loss": update_loss, "grad_norm": grad_norm, "lr": lr}
        # <method>
        influence = per_token["influence"]
        # `clamp` returns its bounds exactly, so that == finds the tokens at a bound.
        metrics |= {
            "influence/mean": influence[mask].mean(),
            "influence/high": (influence[mask] == 1 + args.influence_high).float().mean(),
            "influence/low": (influence[mask] == 1 - args.influence_low).float().mean(),
            "influence/dropped": (influence.amax(-1) == 0).float().mean(),
        }

        if args.kl:
            kl = kl_estimate(rollouts.old_logp, rollouts.ref_logp)
            metrics["kl_to_reference"] = kl[mask].mean()
        # </method>

        run.log_rollouts(step, rollouts, rewards, per_token)
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with run.time("evaluate"):
                engine.sync(policy)
                metrics |= common.evaluate(engine, grader, held_out, args)
        run.log(step, metrics, tokens=int(mask.sum()))
        run.save(step, policy, tokenizer, **state)

    grader.close()
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    common.launch(main, Args)
