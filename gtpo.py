r"""GTPO and GRPO-S: reward shaping with policy entropy (arXiv 2508.04349).

GTPO (--level token) compares tokens at the same position of a group: those of correct rollouts
earn more if the policy was uncertain, those of wrong rollouts lose more if it was certain.
GRPO-S (--level sequence) shapes whole rollouts by their mean entropy, with one ratio per rollout.
Comments "Eq. ..." refer to rows of docs/gtpo.md. [paper]: the paper; [open]: our choice.

    python gtpo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python gtpo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \boxed{}.'

Shapes: P problems (p in a micro-batch), G rollouts of each (the group), T response tokens.
"""

from __future__ import annotations

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
    level: Literal["token", "sequence"] = "token"
    """token: GTPO; sequence: GRPO-S, which always uses --loss-average sequence"""
    alpha2: float = 0.1
    """α₂ (β₂ in GRPO-S): weight of the entropy; that of the verdict, α₁, is 1 [paper]"""
    normalize: Literal["with-zeros", "own-set", "joint"] = "with-zeros"
    """GTPO: shaped rewards are standardised over all tokens of the group, over those of the same
    verdict, or as one vector, see docs/gtpo.md [open]"""
    scope: Literal["group", "batch"] = "group"
    """compare the rollouts of a problem (Algorithm 1), or all rollouts of a step [open]"""
    overlong_gamma: float = 0.0
    """γ₁ of Appendix D's overlong punishment, such as 0.75, see docs/gtpo.md; 0: off"""
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
        gamma, why = self.overlong_gamma, "must lie in (0.5, 1], or be 0: off"
        common.require(not gamma or 0.5 < gamma <= 1, "--overlong-gamma", gamma, why)
        why = "changes rewards, but GTPO uses verdicts; use --overlong-gamma"
        common.require(not self.overlong_buffer, "--overlong-buffer", self.overlong_buffer, why)
        if self.level == "sequence":
            why = "has no effect with --level sequence"
            common.require(self.normalize == "with-zeros", "--normalize", self.normalize, why)
            common.require(self.loss_average != "constant", "--loss-average", "constant", why)
            self.loss_average = "sequence"

    # </method>


# <method>
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where the mask is true, NaN if nowhere: two [..., T] -> [..., 1]."""
    return torch.where(mask, x, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


@torch.no_grad()
def shaped_rewards(
    correct: Tensor, entropy: Tensor, mask: Tensor, alpha1: Tensor | float, alpha2: float
) -> tuple[Tensor, Tensor]:
    """r+ of the correct rollouts' tokens and r- of the wrong ones', 0 elsewhere: two [P, G, T].

    r+ = alpha1 + alpha2 H / mean(H) and r- = -alpha1 - alpha2 (1/H) / mean(1/H); means are over the
    rollouts of the same verdict that have a token at this position.
    correct: [P, G], right if above 0; entropy H (nats), mask: [P, G, T]; alpha1 may be [P, G, 1].
    """
    right = mask & (correct > 0)[..., None]
    wrong = mask & ~right

    entropy = entropy.clamp(min=1e-6)  # keeps 1 / entropy finite [open]
    bonus = torch.where(right, entropy, 0.0)
    penalty = torch.where(wrong, 1 / entropy, 0.0)

    # 0 / 0 = NaN where no rollout of this verdict has a token, which torch.where drops.
    bonus = alpha2 * bonus / bonus.sum(-2, keepdim=True) * right.sum(-2, keepdim=True)
    penalty = alpha2 * penalty / penalty.sum(-2, keepdim=True) * wrong.sum(-2, keepdim=True)

    positive = torch.where(right, alpha1 + bonus, 0.0)  # Eq. 3 [paper]
    negative = torch.where(wrong, -alpha1 - penalty, 0.0)  # Eq. 5 [paper]
    return positive, negative


def gtpo_advantages(
    correct: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    alpha1: Tensor | float = 1.0,
    alpha2: float = 0.1,
    normalize: Literal["with-zeros", "own-set", "joint"] = "with-zeros",
    eps: float = 1e-6,
) -> Tensor:
    """GTPO's advantages, [P, G, T], 0 outside the mask and in groups of equal verdicts [open].

    Arguments as in `shaped_rewards`. normalize: over which tokens r+ and r- are standardised.
    with-zeros: all of the group, 0 on those of the other verdict; own-set: those of its own
    verdict; joint: r+ + r- as one vector, over all of the group.
    """
    right = mask & (correct > 0)[..., None]
    wrong = mask & ~right
    positive, negative = shaped_rewards(correct, entropy, mask, alpha1, alpha2)
    if normalize == "joint":
        positive = negative = positive + negative

    own_set = normalize == "own-set"
    plus = common.standardize(positive, right if own_set else mask, eps)
    minus = common.standardize(negative, wrong if own_set else mask, eps)

    advantages = torch.where(right, plus, minus)  # Eq. 6 [paper]
    both_verdicts = right.any((-2, -1), keepdim=True) & wrong.any((-2, -1), keepdim=True)
    return torch.where(both_verdicts, advantages, 0.0)


def grpo_s_advantages(
    correct: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    beta1: Tensor | float = 1.0,
    beta2: float = 0.1,
    eps: float = 1e-6,
) -> Tensor:
    """GRPO-S's advantage of each rollout, [P, G]: GTPO's, with each rollout as a single token."""
    entropy = masked_mean(entropy, mask)  # [P, G, 1]  # Eq. 8 [paper]
    one_token = mask.any(-1, keepdim=True)
    settings = {"alpha1": beta1, "alpha2": beta2, "eps": eps}
    return gtpo_advantages(correct, entropy, one_token, **settings)[..., 0]  # Eq. 9 [paper]


def overlong_punishment(correct: Tensor, lengths: Tensor, *, gamma: float) -> Tensor:
    """Length punishment of each rollout, from 0 down to -1/2 (Appendix D): two [P, G] -> [P, G].

    It depends on the group's accuracy. From gamma, in (1/2, 1]: correct rollouts above a limit from
    the correct lengths are punished. Up to 1 - gamma: none. In between: the correct ones if they
    are the majority, else the wrong ones [open], above a limit from all lengths.
    """
    right, wrong = correct > 0, correct <= 0
    accuracy = right.float().mean(-1, keepdim=True)
    hard = wrong.float().mean(-1, keepdim=True) >= gamma
    measured = right | (accuracy < gamma)
    punished = torch.where(accuracy > 0.5, right, wrong) & ~hard

    shortest = torch.where(measured, lengths, torch.inf).amin(-1, keepdim=True)
    longest = torch.where(measured, lengths, -torch.inf).amax(-1, keepdim=True)
    limit = torch.maximum((shortest + longest) / 2, masked_mean(lengths, measured))
    punishment = ((limit - lengths) / (2 * limit)).clamp(max=0)  # Eq. D [paper]
    return torch.where(punished, punishment, 0.0)


def token_advantages(rollouts: common.Rollouts, args: Args) -> Tensor:
    """The advantage of each token under the script's settings, [P, G, T]."""
    correct, entropy, mask = rollouts.correct, rollouts.entropy, rollouts.mask
    alpha1 = torch.ones_like(correct)
    if args.overlong_gamma:
        punishment = overlong_punishment(correct, mask.sum(-1), gamma=args.overlong_gamma)
        alpha1 = torch.where(correct > 0, 1 + punishment, 1 - punishment)  # Eq. D+ [open]

    if args.scope == "batch":  # all rollouts of the step are one group
        tensors = correct, entropy, mask, alpha1
        correct, entropy, mask, alpha1 = (x.flatten(0, 1)[None] for x in tensors)
    if args.level == "sequence":
        weights = {"beta1": alpha1[..., None], "beta2": args.alpha2}
        advantages = grpo_s_advantages(correct, entropy, mask, **weights)[..., None] * mask
    else:
        weights = {"alpha1": alpha1[..., None], "alpha2": args.alpha2}
        advantages = gtpo_advantages(correct, entropy, mask, normalize=args.normalize, **weights)

    return advantages.view_as(rollouts.mask)


def rollout_logp(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """old_logp + log of the rollout's mean ratio, [..., T]: each token then has this ratio."""
    return old_logp + masked_mean((logp - old_logp).exp(), mask).log()  # Eq. 10 [paper]


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
            if args.scope == "batch" or common.needs_scoring_pass(policy, rollouts, args):
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
                    advantage = token_advantages(rollouts, args)[batch.problems]

                    logp = batch.logp
                    if args.level == "sequence":
                        logp = rollout_logp(logp, batch.old_logp, batch.mask)
                    loss, clipped = clipped_loss(  # Eq. 7, 11 [paper]
                        logp, batch.old_logp, advantage, args.clip_low, args.clip_high
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
