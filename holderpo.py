r"""HölderPO: Hölder Policy Optimisation (arXiv 2605.12058).

GRPO with one ratio per response, the power mean of its tokens' ratios, clipped once. The exponent
p falls over training. With p > 0 the tokens that became more likely have the largest gradient,
with p < 0 those that became less likely. The advantage is GRPO's.
Comments "Eq. ..." refer to rows of docs/holderpo.md. [paper]: the paper; [code]: the authors' code.

    python holderpo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python holderpo.py --model Qwen/Qwen2.5-Math-7B --lora-rank 64 --dataset my/math.jsonl \
        --eval-dataset my/test.jsonl --instruction 'Put your final answer in \boxed{}.'

GSPO is --schedule constant --p-start 0, GMPO is that with --clip-level token.
Shapes: P problems, G rollouts of each (the group), T response tokens. p is the exponent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import common


# Below the imports, scripts may differ only between the marks <method> and </method>.
@dataclass
class Args(common.RunArgs):
    """Settings of the method. The string below each is its --help text."""

    # <method>
    scale_rewards: bool = True
    """divide the advantage by the group's standard deviation (Dr. GRPO: no)"""
    p_start: float = 2.0
    """p at the start of the schedule (paper: 2 for mathematics, 1 for ALFWorld)"""
    p_end: float = -2.0
    """p at the end of the schedule (paper: -2 for mathematics, -1 for ALFWorld)"""
    schedule: Literal["linear", "cosine", "quadratic", "cubic", "constant"] = "linear"
    """how p goes from start to end over --steps; constant: it stays at --p-start"""
    clip: float = 0.2
    """ε: the ratio is clipped to [1 - ε, 1 + ε] (released code: 0.2)"""
    clip_level: Literal["sequence", "token"] = "sequence"
    """clip a response's ratio once (Eq. 2), or each token's before the mean (Eq. 11)"""
    updates_per_rollout: int = 4
    """optimiser updates per step (paper: 8); with 1 every ratio is 1 and p has no effect"""
    loss_average: ClassVar[str] = "sequence"  # ClassVar: not a flag
    signed: ClassVar[tuple[str, ...]] = ("p_start", "p_end")

    def __post_init__(self) -> None:
        super().__post_init__()  # the shared checks; no number may be negative
        common.require(0 < self.clip < 1, "--clip", self.clip, "must be above 0 and below 1")
        if self.schedule == "constant" and self.p_end != Args.p_end:
            common.reject("--p-end", self.p_end, "has no effect with --schedule constant")

    def depends_on_steps(self) -> bool:
        return self.schedule != "constant" or super().depends_on_steps()

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


def holder_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, p: float) -> Tensor:
    """ρ, a response's ratio of new to old policy: the power mean of its tokens' ratios.

    logp, old_logp, mask: [..., T]. Returns [...]. It rises with p, from the smallest token ratio
    (p = -∞) to the largest (p = ∞). Computed in log space, so that r^p cannot overflow. A response
    without tokens has ratio 1 and no gradient.
    """
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).double()  # p near 0 needs float64
    mask = mask | ~mask.any(-1, keepdim=True)  # an empty response counts as tokens of ratio 1
    if abs(p) < 1e-6:  # Eq. geometric branch [code]
        log_mean = log_ratio.sum(-1) / mask.sum(-1)
    else:
        log_sum = (p * log_ratio).masked_fill(~mask, -math.inf).logsumexp(-1)
        log_mean = (log_sum - mask.sum(-1).double().log()) / p  # Eq. 1 [paper]
    return log_mean.exp().to(logp.dtype)


def holder_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    advantages: Tensor,
    p: float,
    *,
    clip: float = 0.2,
    clip_level: str = "sequence",
) -> tuple[Tensor, Tensor]:
    """Each response's loss, [...], and where the clip removes its gradient, [..., T].

    logp, old_logp, mask: [..., T]; advantages: [...]. A step's loss is the mean over responses.
    """
    if clip_level == "sequence":
        rho = holder_ratio(logp, old_logp, mask, p)
        zero = torch.zeros_like(rho)  # clipped_loss takes log-probabilities
        loss, clipped = clipped_loss(rho.log(), zero, advantages, clip, clip)  # Eq. 2 [paper]
        return loss, clipped[..., None] & mask  # Eq. 16 [paper]
    if clip_level == "token":
        log_ratio = logp - old_logp
        from_above = log_ratio.clamp(max=math.log1p(clip))
        from_below = log_ratio.clamp(min=math.log1p(-clip))
        kept = torch.where(advantages[..., None] > 0, from_above, from_below)
        rho = holder_ratio(kept, torch.zeros_like(kept), mask, p)  # Eq. 11 [paper]
        return -rho * advantages, mask & (kept != log_ratio) & (advantages != 0)[..., None]
    raise ValueError(f"--clip-level must be sequence or token, not {clip_level!r}")


def holder_loss(
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    advantages: Tensor,
    p: float,
    *,
    clip: float = 0.2,
    clip_level: str = "sequence",
) -> Tensor:
    """The mean of `holder_surrogate` over the responses, a scalar, for other projects."""
    loss, _ = holder_surrogate(
        logp, old_logp, mask, advantages, p, clip=clip, clip_level=clip_level
    )
    return loss.mean()


@torch.no_grad()
def gradient_weights(logp: Tensor, old_logp: Tensor, mask: Tensor, p: float) -> Tensor:
    """W, each token's share of its response's gradient, [..., T]: ∇ρ = ρ Σ W_t ∇log π_t."""
    powers = p * (logp - old_logp).masked_fill(~mask, 0.0)  # logarithms of r_t^p
    weights = powers.masked_fill(~mask, -math.inf).softmax(-1)  # Eq. 3 [paper]
    return weights.masked_fill(~mask, 0.0)


def anneal_p(
    step: int,
    total_steps: int,
    *,
    p_start: float = 2.0,
    p_end: float = -2.0,
    schedule: str = "linear",
) -> float:
    """p at a step: p_start at step 0, p_end from `total_steps` on (section 3.4)."""
    u = min(max(step / max(total_steps, 1), 0.0), 1.0)
    shape = {  # falls from 1, where p is p_start, to -1, where it is p_end
        "linear": 1 - 2 * u,  # Eq. linear [paper]
        "cosine": math.cos(math.pi * u),  # Eq. cosine [code]
        "quadratic": 1 - 2 * u**2,  # Eq. quadratic [code]
        "cubic": (1 - 2 * u) ** 3,  # Eq. cubic [code]
        "constant": 1.0,
    }
    return (p_start + p_end) / 2 + (p_start - p_end) / 2 * shape[schedule]


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
    reference = None
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
        p = anneal_p(  # Eq. held p [code]
            step, args.steps, p_start=args.p_start, p_end=args.p_end, schedule=args.schedule
        )

        rhos, entropies = [], []
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
                    inputs = batch.logp, batch.old_logp, batch.mask
                    response_advantage = advantage[..., 0]  # the same on all tokens
                    clip = {"clip": args.clip, "clip_level": args.clip_level}
                    loss, clipped = holder_surrogate(*inputs, response_advantage, p, **clip)
                    loss = (loss * loss_weights.sum(-1)).sum()  # mean importance / responses

                    trained = batch.trained.any(-1)  # [problems, G] responses, for the log
                    rhos.append(holder_ratio(*inputs, p).detach()[trained])
                    token_shares = gradient_weights(*inputs, p)[trained]
                    entropies.append(torch.special.entr(token_shares).sum(-1))
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
        rho = torch.cat(rhos)
        metrics |= {"p": p, "weight_entropy": torch.cat(entropies).mean()}
        metrics |= {"rho/min": rho.min(), "rho/max": rho.max(), "rho/std": rho.std()}
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
