"""ERPO: Token-Level Entropy-Regulated Policy Optimization (arXiv 2603.28204).

grpo.py, but each token has an advantage of its own. To GRPO's comes progress: the log-ratio of
policy to frozen reference as a z-score among the group's tokens at the same stage (relative
position) of their rollouts, signed by the verdict, through a gate that opens where the token's
entropy stands out in its group. The sum is standardised over the group's tokens: docs/erpo.md.

    python erpo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python erpo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \\
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \\boxed{}.'

Left out: several GPUs, asynchronous rollouts, reward models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common
from common import group_moments, standardize
from engine import (
    Engine,
    Reference,
    device,
    load_policy,
    load_tokenizer,
    make_engine,
    seed_for,
)
from grading import Grader
from run import Run, RunArgs, launch, learning_rate, make_optimizer


@dataclass
class Args(RunArgs):
    """method and optimiser"""

    # <method>
    gamma: float = 5.0
    """γ: steepness of the entropy gate (paper: 5); 0: every token is gated by 1/2"""
    eta: float = 0.2
    """η: weight of the progress term (paper: 0.2)"""
    buckets: int = 10
    """K: windows of relative position in which progress is compared [second-hand]"""
    sigma_target: float = 1.0
    """σ_target: standard deviation that progress is rescaled to [open]"""
    clip_low: float = 0.2
    """ε_low: the ratio is clipped at 1 - ε_low"""
    clip_high: float = 0.2
    """ε_high: the ratio is clipped at 1 + ε_high (DAPO: 0.28)"""
    loss_average: Literal["token", "sequence", "constant"] = "token"
    """token: over all tokens (DAPO); sequence: over each response, then over responses
    (DeepSeekMath); constant: sum over tokens / --max-new-tokens (Dr. GRPO)"""
    kl: float = 0.001
    """β: weight of the KL penalty to the frozen initial policy (paper: 0.001)"""
    updates_per_rollout: int = 1
    """optimiser updates a step, each on its own share of the problems (DAPO: 16)"""
    lora_rank: int = 0
    """train LoRA adapters of this rank; 0: all weights"""
    # </method>
    lora_alpha: int = 0
    """adapters are scaled by alpha / rank; 0: alpha is twice the rank"""
    lora_dropout: float = 0.0
    """share of adapter inputs dropped in the update"""
    dynamic_sampling: bool = False
    """replace groups that are all right or all wrong by new ones (DAPO)"""
    generation_rounds: int = 10
    """most rounds of rollouts in a step under --dynamic-sampling (DAPO: 10)"""
    overlong_buffer: int = 0
    """L_cache: the reward falls by up to 1/2 over the last L_cache tokens (DAPO); 0: off"""
    importance_cap: float = 0.0
    """C: weigh tokens by min(π_old / π_engine, C), truncated importance sampling; 0: off"""
    lr: float = 1e-6
    """AdamW's learning rate"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """after the warm-up; linear and cosine fall to 0 at the last step"""
    warmup_steps: int = 0
    """steps of linear warm-up"""
    warmup_ratio: float = 0.0
    """the same as a share of all steps"""
    weight_decay: float = 0.0
    """AdamW's"""
    max_grad_norm: float = 1.0
    """a longer gradient is scaled down to this norm"""


# <method>
def grpo_advantages(rewards: Tensor, *, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """Each reward's z-score within its group (DeepSeekMath, section 4.1.2).

    rewards: [P, G]. Returns [P, G]: the advantage of every token of that rollout.
    scale: divide by the unbiased standard deviation (Dr. GRPO does not).
    A group of equal rewards, or of one rollout, gives exact zeros.
    """
    advantages = rewards - rewards.mean(-1, keepdim=True)  # A_i = (r_i - mean(r)) / std(r)
    if scale and rewards.shape[-1] > 1:
        advantages = advantages / (rewards.std(-1, keepdim=True) + eps)
    varied = rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True)
    return torch.where(varied, advantages, 0.0)


def entropy_gate(entropy: Tensor, mask: Tensor, *, gamma: float = 5.0, eps: float = 1e-6) -> Tensor:
    """(0, 1), and 1/2 for the mean entropy of the group's live tokens. [P, G, T]."""
    return torch.sigmoid(gamma * standardize(entropy, mask, eps, correction=0))  # Eq. 8 [paper]


def position_buckets(mask: Tensor, buckets: int) -> Tensor:
    """0 ... buckets - 1 by the share of the rollout's tokens before a token. [P, G, T]."""
    position = torch.arange(mask.shape[-1], device=mask.device)  # from 0 [open]
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    return buckets * position // length  # Eq. line 7 [paper]


@torch.no_grad()
def erpo_advantages(
    rewards: Tensor,
    entropy: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    gamma: float = 5.0,
    eta: float = 0.2,
    buckets: int = 10,
    sigma_target: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Each token's advantage, [P, G, T], 0 outside the mask; over a group mean 0 and variance 1.

    rewards: [P, G]; the others [P, G, T]: entropy (nats) and logp of the policy that sampled,
    ref_logp of the frozen initial policy. The scale of the log-ratio (the paper's β_progress)
    cancels. A group of equal rewards gives exact zeros.
    """
    outcome = grpo_advantages(rewards, eps=eps)[..., None]  # [P, G, 1]
    gate = entropy_gate(entropy, mask, gamma=gamma, eps=eps)
    bucket = position_buckets(mask, buckets)

    signal = logp - ref_logp  # Eq. 7 [paper]
    parts = [mask & (bucket == k) for k in range(buckets)]
    z_scores = sum(standardize(signal, part, eps, correction=0) for part in parts)  # Eq. 9 [paper]
    anchored = gate * outcome.sign() * z_scores  # Eq. line 12 [paper]
    _, spread = group_moments(anchored, mask, correction=0)
    scale = torch.where(spread > 0, sigma_target / (spread + eps), 0.0)  # Eq. line 13 [paper]
    advantages = outcome + eta * scale * anchored
    return standardize(advantages, mask, eps, correction=0)  # Eq. 10 [paper]


# </method>
def clipped_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, negated (DeepSeekMath Eq. 3; asymmetric: DAPO Eq. 8).

    All [n, T]. Returns each token's loss, [n, T], and where the clip cuts its gradient off, [n, T].
    Gradient flows through logp alone.
    """
    ratio = (logp - old_logp).exp()  # w = π / π_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.min(ratio * advantages, clipped * advantages)
    return -surrogate, clipped * advantages < ratio * advantages


def kl_to_reference(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The k3 estimate of KL(π ‖ π_ref) at each sampled token (DeepSeekMath Eq. 4). All [n, T]."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - log_ratio - 1


def token_weights(mask: Tensor, average: str, max_new_tokens: int) -> Tensor:
    """What each token counts in the loss of one optimiser update; zero outside the mask.

    mask: [P, G, T], true on the live tokens of the *whole* update, so that the gradient does not
    depend on how the update is cut into micro-batches.
    """
    responses = mask.any(-1).sum()
    if average == "token":  # DAPO Eq. 8
        return mask / mask.sum()
    if average == "sequence":  # DeepSeekMath Eq. 3
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / responses
    return mask / (responses * max_new_tokens)  # Dr. GRPO


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """0 up to max_length - buffer, then down to -1/2 at max_length (DAPO Eq. 13). [P, G] tokens.

    Half of DAPO's: it adds the penalty to rewards of 1 and -1, which lie twice as far apart.
    """
    if not buffer:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0) / 2


def collect(
    args: Args, step: int, problems: common.Problems, engine: Engine, grader: Grader, run: Run
) -> list[common.Group]:
    """P verified groups. Under dynamic sampling, groups that are all right or all wrong are
    replaced by new ones; what is still missing after the last round is filled up with them."""
    groups: list[common.Group] = []
    for attempt in range(args.generation_rounds if args.dynamic_sampling else 1):
        batch = problems.take(args.prompts_per_step - len(groups), args.seed)
        with run.time("rollout"):
            seed = (args.seed, step, attempt)
            # <method>
            new = common.roll_out(engine, batch, args, seed)
            # </method>
        with run.time("verify"):
            common.verify(grader, new)
        varied = [group for group in new if 0 < sum(group.correct) < args.group_size]
        groups += varied if args.dynamic_sampling else new
        if len(groups) == args.prompts_per_step:
            return groups
    rest = [group for group in new if sum(group.correct) in (0, args.group_size)]
    return groups + rest[: args.prompts_per_step - len(groups)]


def main(args: Args) -> None:
    run = Run(args)
    grader = Grader()
    tokenizer = load_tokenizer(args)
    train = common.load_problems(args, "--dataset", tokenizer, grader)
    held_out = common.load_problems(args, "--eval-dataset", tokenizer, grader)
    policy = load_policy(args)
    engine = make_engine(args, policy, tokenizer, train, held_out)
    # <method>
    reference = Reference(policy, args)
    # </method>
    optimizer = make_optimizer(policy, args)
    train.position = run.restore(policy, optimizer=optimizer).get("position", 0)

    if run.step == 0:
        engine.sync(policy)
        run.log(0, common.evaluate(engine, grader, held_out, args))

    for step in run.steps():
        # Roll out and verify whole groups: P problems, G responses each.
        with run.time("sync"):
            engine.sync(policy)
        groups = collect(args, step, train, engine, grader, run)
        engine.sleep()
        rollouts = common.stack(groups, engine.stops, device(args))
        mask = rollouts.mask  # [P, G, T]
        correct = torch.tensor([group.correct for group in groups], device=mask.device)  # [P, G]
        rewards = correct + overlong_penalty(
            mask.sum(-1), args.max_new_tokens, args.overlong_buffer
        )

        # Score every token under the policy that produced it, and check that it is that policy.
        with run.time("score"):
            old_logp, entropy = common.score(policy, rollouts, args, reuse=True)  # [P, G, T] each
            # <method>
            with reference() as frozen:
                ref_logp, _ = common.score(frozen, rollouts, args)
            # </method>
        gap = common.check_engine(rollouts, old_logp, args)

        # <method>
        shaping = {"gamma": args.gamma, "eta": args.eta, "buckets": args.buckets}
        shaping["sigma_target"] = args.sigma_target
        advantages = erpo_advantages(  # [P, G, T]
            rewards, entropy, old_logp, ref_logp, mask, **shaping
        )
        # </method>

        # Update on shares of the problems, each in micro-batches that fit the memory.
        lr = learning_rate(step, args)
        means = common.Means()
        with run.time("update"):
            importance = common.importance_weights(rollouts, old_logp, args.importance_cap)
            shuffle = torch.Generator().manual_seed(seed_for(args.seed, step, "updates"))
            order = torch.randperm(len(groups), generator=shuffle)
            for share in order.chunk(args.updates_per_rollout):
                live = torch.zeros_like(mask)
                live[share] = mask[share]
                weights = token_weights(live, args.loss_average, args.max_new_tokens) * importance
                update_loss = 0.0
                for index in common.micro_batches(rollouts, args.token_budget, share):
                    logp, _ = common.token_logp(policy, rollouts, index, args)  # [n, T]
                    # <method>
                    loss, clipped = clipped_loss(
                        logp, old_logp[index], advantages[index], args.clip_low, args.clip_high
                    )
                    if args.kl:
                        loss = loss + args.kl * kl_to_reference(logp, ref_logp[index])
                    loss = (loss * weights[index]).sum()
                    # </method>
                    loss.backward()
                    update_loss += loss.item()
                    drift = kl_to_reference(old_logp[index], logp.detach())
                    means.add(mask[index], clip_fraction=clipped, kl_to_old=drift)
                grad_norm = run.update(optimizer, lr, update_loss)

        metrics = {
            "reward": rewards.mean(),
            "accuracy": correct.mean(),
            "zero_variance": (rewards.amax(-1) == rewards.amin(-1)).float().mean(),
            "length": mask.sum(-1).float().mean(),
            "truncated": rollouts.truncated.float().mean(),
            "boxed": common.boxed(rollouts),
            "entropy": entropy[mask].mean(),
            "loss": update_loss,
            "grad_norm": grad_norm,
            "lr": lr,
            **gap,
            **means.result(),
        }
        # <method>
        # What the advantage would be without progress, and what progress makes of it.
        outcome = standardize(grpo_advantages(rewards)[..., None] * mask, mask, 1e-6, correction=0)
        progress = advantages - outcome
        signals = {"advantage": advantages, "outcome": outcome, "progress": progress}
        metrics |= {
            "kl_to_reference": kl_to_reference(old_logp, ref_logp)[mask].mean(),
            "credit/outcome": outcome[mask].abs().mean(),
            "credit/progress": progress[mask].abs().mean(),
            "credit/log_ratio": (old_logp - ref_logp)[mask].abs().mean(),
            "credit/sign_differs": (advantages * outcome < 0)[mask].float().mean(),
        }
        # </method>
        run.log_rollouts(step, rollouts, rewards, logp=old_logp, entropy=entropy, **signals)
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with run.time("evaluate"):
                engine.sync(policy)
                metrics |= common.evaluate(engine, grader, held_out, args)
        run.log(step, metrics, tokens=int(mask.sum()))
        run.save(step, policy, tokenizer, optimizer=optimizer, position=train.position)

    grader.close()
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    launch(main, Args)
