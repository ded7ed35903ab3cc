r"""STARE: Surprisal-Guided Token-Level Advantage Reweighting (arXiv 2606.19236).

grpo.py, except that in a step whose mean entropy is below a target, the most surprising tenth of
the tokens with a positive advantage counts more (the paper's variant O1). With --attenuate 0.9 the
most surprising tenth of those with a negative advantage also counts less (C2). Surprisal is -log π.
Comments "Eq. ..." refer to rows of docs/stare.md; numbers are the paper's sections, as the code
cites them. [paper]: the paper; [code]: the authors' code; [open]: our choice.

    python stare.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python stare.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \boxed{}.'

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
    top: float = 0.1
    """share of the tokens of each sign that counts as surprising (the paper's P)"""
    amplify: float = 1.1
    """W: weight of surprising tokens with a positive advantage (14B and 32B: 1.05)"""
    attenuate: float = 1.0
    """M: weight of surprising tokens with a negative advantage (variant C2: 0.9)"""
    target_entropy: float = 0.3
    """H_tgt, nats: the weights apply only in steps whose mean entropy is below it"""
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
        common.require(0 < self.top <= 1, "--top", self.top, "must be above 0 and at most 1")
        common.require(self.amplify >= 1, "--amplify", self.amplify, "must be at least 1")
        weight = self.attenuate
        common.require(0 < weight <= 1, "--attenuate", weight, "must be above 0 and at most 1")

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


def most_surprising(logp: Tensor, mask: Tensor, top: float) -> Tensor:
    """True on the tokens whose surprisal, -logp, is at least the k-th largest within the mask.

    logp, mask: [P, G, T]; k is the share `top` of the mask's tokens, rounded up. Ties are included.
    """
    count = int(mask.sum())
    if count == 0:
        return mask
    # In floats 0.07 × 100 is slightly above 7, which must not be rounded up to 8.
    k = max(1, math.ceil(top * count - 1e-6))  # Eq. 4.1 [code]
    threshold = logp[mask].kthvalue(k).values
    return mask & (logp <= threshold)  # Eq. ties [open]


@torch.no_grad()
def stare_weights(
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    top: float = 0.1,
    amplify: float = 1.1,
    attenuate: float = 1.0,
) -> Tensor:
    """The weight that each token's advantage is multiplied by, [P, G, T], 0 outside the mask.

    All [P, G, T]; logp of the policy that sampled. All tokens of the step are ranked together.
    """
    positive = most_surprising(logp, mask & (advantages > 0), top)
    negative = most_surprising(logp, mask & (advantages < 0), top)
    weights = torch.where(positive, amplify, mask.to(logp.dtype))  # Eq. 4.2 [paper]
    return torch.where(negative, attenuate, weights)  # Eq. 4.2, C2 [paper]


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
            # Always, because the weights compare the tokens of all groups.
            common.score_rollouts(policy, reference, rollouts, args)
            # </method>

        # 3. Compute the advantages.
        # <method>
        advantages = grpo_advantages(rewards, scale=args.scale_rewards)[..., None] * mask
        surprisal_weight = mask.float()
        below_target = rollouts.entropy[mask].mean() < args.target_entropy  # Eq. 4.3 [paper]
        if below_target:
            surprisal_weight = stare_weights(
                rollouts.old_logp,
                advantages,
                mask,
                top=args.top,
                amplify=args.amplify,
                attenuate=args.attenuate,
            )

        advantages = advantages * surprisal_weight  # Eq. objective [code]
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
        per_token["weight"] = surprisal_weight
        raised, lowered = surprisal_weight > 1, mask & (surprisal_weight < 1)
        metrics |= {"gate": below_target.float(), "weight": surprisal_weight[mask].mean()}
        metrics |= {
            "raised/share": raised.sum() / (advantages > 0).sum().clamp(min=1),
            "raised/surprisal": -rollouts.old_logp[raised].sum() / raised.sum().clamp(min=1),
            "lowered/share": lowered.sum() / (advantages < 0).sum().clamp(min=1),
            "lowered/surprisal": -rollouts.old_logp[lowered].sum() / lowered.sum().clamp(min=1),
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
