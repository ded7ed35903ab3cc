r"""EP-GRPO: Entropy-Progress Aligned Group Relative Policy Optimization (arXiv 2605.04960).

grpo.py with a KL penalty by default, and with another advantage: outcome + progress, per token.
- Outcome: gate × GRPO's advantage A. The gate is sigmoid(γ × z-score of the token's entropy in its
  group).
- Progress: η × z-score of sign(A) (log π_old - log π_ref) over the group's tokens in the same
  bucket. A token's bucket is floor(K τ), where τ is the share of the rollout's total entropy up to
  and including the token.
In a group of equal rewards A is 0, but progress can train the policy: there the sign is that of
reward - θ. Progress is 0 until the policy differs from the initial one. γ, η, K, θ: see Args.
Comments "Eq. ..." refer to rows of docs/ep_grpo.md. [paper]: the paper; [open]: our choice.

    python ep_grpo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python ep_grpo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \boxed{}.'

Shapes: P problems (p in a micro-batch), G rollouts of each (the group), T response tokens.
Left out: several GPUs, asynchronous rollouts, reward models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import common
from common import standardize


# Below the imports, scripts may differ only between the marks <method> and </method>.
@dataclass
class Args(common.RunArgs):
    """Settings of the method. The string below each is its --help text."""

    # <method>
    gamma: float = 5.0
    """γ: steepness of the entropy gate (paper: 5); 0: the gate is 1/2"""
    eta: float = 0.2
    """η: weight of progress (paper: 0.2); 0: only the outcome"""
    buckets: int = 10
    """K: buckets of cumulative entropy in which progress is standardised (paper: 10)"""
    reward_threshold: float = 0.5
    """θ: in a group of equal rewards the sign is that of reward - θ (paper: 0.5)"""
    clip_low: float = 0.2
    """ε_low: the ratio is clipped at 1 - ε_low"""
    clip_high: float = 0.2
    """ε_high: the ratio is clipped at 1 + ε_high (DAPO: 0.28)"""
    loss_average: Literal["token", "sequence", "constant"] = "token"
    """token: over all tokens (DAPO); sequence: over each response, then over responses
    (DeepSeekMath); constant: over responses × --max-new-tokens (Dr. GRPO)"""
    kl: float = 0.001
    """β: weight of the KL penalty to the frozen initial policy (paper: 0.001)"""

    def __post_init__(self) -> None:
        super().__post_init__()  # the shared checks; no number may be negative
        common.require(self.buckets > 0, "--buckets", self.buckets, "must be above 0")

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


def entropy_gate(entropy: Tensor, mask: Tensor, *, gamma: float = 5.0, eps: float = 1e-6) -> Tensor:
    """sigmoid(γ × z-score of the entropy in its group): 1/2 at the group's mean. [P, G, T].

    The z-score divides by the population standard deviation (correction=0).
    """
    return torch.sigmoid(gamma * standardize(entropy, mask, eps, correction=0))  # Eq. 16-18 [paper]


def entropy_buckets(entropy: Tensor, mask: Tensor, buckets: int) -> Tensor:
    """Each token's bucket, 0 ... buckets - 1: [P, G, T].

    The bucket is floor(buckets × τ), where τ is the rollout's entropy up to and including the
    token, divided by its total; τ = 1 is in the last bucket. With 3 buckets, the entropies
    [3, 1, 2] have τ = [1/2, 2/3, 1] and are in the buckets [1, 2, 2].
    """
    running = torch.where(mask, entropy, 0.0).cumsum(-1)
    total = running[..., -1:].clamp(min=torch.finfo(running.dtype).tiny)  # all entropies may be 0
    position = buckets * running / total  # K τ  # Eq. 23 [paper]
    # Rounding can make an entropy slightly negative; a total near 0 can make a position too large
    # for an integer.
    return position.clamp(0, buckets - 1).long()  # Eq. 23, last bucket [open]


@torch.no_grad()
def ep_grpo_advantages(
    rewards: Tensor,
    entropy: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    gamma: float = 5.0,
    eta: float = 0.2,
    buckets: int = 10,
    reward_threshold: float = 0.5,
    eps: float = 1e-6,
) -> Tensor:
    """Outcome plus progress of each token: [P, G, T], 0 outside the mask.

    rewards: [P, G]; the others [P, G, T]. entropy (nats) and old_logp are of the policy that
    sampled, ref_logp of the frozen initial policy. The paper also multiplies the log-ratio by
    λ = 0.1, which the z-score cancels up to eps, so it is not a setting here.
    Progress has mean 0 in each bucket of a group. It is 0 in a bucket with one token or with equal
    signed log-ratios [open].
    """
    advantages = grpo_advantages(rewards, eps=eps)  # [P, G]
    gate = entropy_gate(entropy, mask, gamma=gamma, eps=eps)  # [P, G, T]

    # The sign of the advantage, or of reward - threshold in a group of equal rewards.
    varied = rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True)
    sign = torch.where(varied, advantages, rewards - reward_threshold).sign()  # Eq. 21 [paper]
    signal = sign[..., None] * (old_logp - ref_logp)  # Eq. 20, 22 [paper]

    # A bucket holds tokens of all rollouts of the group, and each token is in one bucket.
    # `standardize` is 0 outside its mask.
    z = torch.zeros_like(signal)
    bucket = entropy_buckets(entropy, mask, buckets)
    for k in range(buckets):
        z += standardize(signal, mask & (bucket == k), eps, correction=0)  # Eq. 24 [paper]

    outcome, progress = gate * advantages[..., None], eta * z
    return torch.where(mask, outcome + progress, 0.0)  # Eq. 19, 25, 26 [paper]


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
    reference = common.Reference(policy, args)
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
        # Done in phase 4, whose forward pass may be the first to compute what they need.
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
                    group_rewards = rewards[batch.problems]
                    advantage = ep_grpo_advantages(
                        group_rewards,
                        batch.entropy,
                        batch.old_logp,
                        batch.ref_logp,
                        batch.mask,
                        gamma=args.gamma,
                        eta=args.eta,
                        buckets=args.buckets,
                        reward_threshold=args.reward_threshold,
                    )

                    # For the log: the two terms. Progress is the advantage minus the outcome.
                    gate = entropy_gate(batch.entropy, batch.mask, gamma=args.gamma)
                    outcome = gate * grpo_advantages(group_rewards)[..., None]
                    per_token.add(batch, outcome=outcome, progress=advantage - outcome)

                    loss, clipped = clipped_loss(
                        batch.logp, batch.old_logp, advantage, args.clip_low, args.clip_high
                    )
                    if args.kl:
                        loss = loss + args.kl * kl_estimate(batch.logp, batch.ref_logp)
                    loss = (loss * loss_weights).sum()
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
        log_ratio = rollouts.old_logp - rollouts.ref_logp
        flipped = per_token["advantage"] * per_token["outcome"] < 0  # progress reversed the sign
        metrics |= {
            "kl_to_reference": kl_estimate(rollouts.old_logp, rollouts.ref_logp)[mask].mean(),
            "credit/outcome": per_token["outcome"][mask].abs().mean(),
            "credit/progress": per_token["progress"][mask].abs().mean(),
            "credit/log_ratio": log_ratio[mask].abs().mean(),
            "credit/sign_differs": flipped[mask].float().mean(),
        }
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
