r"""λ-GRPO: each token's loss divided by how many rollouts share its prefix (arXiv 2509.21154).

grpo.py, except that the loss of each token is divided by the number of rollouts of its group that
have the same tokens up to and including it. In GRPO a token that k rollouts share is trained with
the sum of their advantages, here with the mean. The paper calls these k rollouts a process set.
Not GRPO-λ (arXiv 2510.00194) nor the λ-GRPO of arXiv 2510.06870.
Comments "Eq. ..." refer to rows of docs/lambda_grpo.md. [code]: the authors' code.

    python lambda_grpo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python lambda_grpo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \
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


# Below the imports, scripts may differ only between the marks <method> and </method>.
@dataclass
class Args(common.RunArgs):
    """Settings of the method. The string below each is its --help text."""

    # <method>
    scale_rewards: bool = True
    """divide the advantage by the group's standard deviation (Dr. GRPO: no)"""
    clip_low: float = 0.2
    """ε_low: the ratio is clipped at 1 - ε_low"""
    clip_high: float = 0.2
    """ε_high: the ratio is clipped at 1 + ε_high (DAPO: 0.28)"""
    loss_average: Literal["token", "sequence", "constant"] = "token"
    """token: over all tokens (DAPO); sequence: over each response, then over responses
    (DeepSeekMath); constant: over responses × --max-new-tokens (Dr. GRPO)"""
    kl: float = 0.0
    """β: weight of the KL penalty to the frozen initial policy (DeepSeekMath: 0.04)"""
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
def lambda_weights(tokens: Tensor, mask: Tensor) -> Tensor:
    """1 / the number of rollouts of the group that share a token's whole prefix: [P, G, T].

    tokens: [P, G, T] ids; mask: [P, G, T]. A rollout shares a token with the rollouts of its group
    that begin with the same tokens up to and including it, itself among them. Padding is never
    shared and weighs 0. The tokens [5, 6], [5, 7] and [8] have the weights [1/2, 1], [1/2, 1]
    and [1].
    """
    sharing = torch.zeros_like(tokens)  # |λ(i, t)|: rollouts with the same tokens up to t
    for i in range(tokens.shape[1]):
        same = mask & mask[:, i, None] & (tokens == tokens[:, i, None])
        sharing += same.cumprod(-1)  # Eq. process set [code]
    return mask / sharing.clamp(min=1)  # Eq. 9 [code]


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
        process_weight = lambda_weights(rollouts.tokens, mask)  # [P, G, T] 1 / |λ(i, t)|
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
                    loss = loss * process_weight[batch.problems]  # the KL term too
                    loss = (loss * loss_weights).sum()  # Eq. average [code]
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
        per_token["process_weight"] = process_weight
        metrics["process/shared"] = (process_weight[mask] < 1).float().mean()
        metrics["process/weight"] = process_weight[mask].mean()

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
