"""EP-GRPO: Entropy-Progress Aligned Group Relative Policy Optimization (arXiv 2605.04960).

grpo.py, but each token's advantage is a sum of two. GRPO's, through a gate that opens where the
token's entropy stands out in its group; and progress: the log-ratio of policy to frozen reference,
signed by the verdict, as a z-score among the group's tokens at which a like share of the rollout's
entropy is spent. Groups of equal rewards keep the second. Equations and marks: docs/ep_grpo.md.

    python ep_grpo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python ep_grpo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \\
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \\boxed{}.'

Left out: several GPUs, asynchronous rollouts, reward models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import common
from common import standardize
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
    """η: weight of the progress term (paper: 0.2); 0: the gated outcome alone"""
    buckets: int = 10
    """K: windows of accumulated entropy in which progress is compared (paper: 10)"""
    reward_threshold: float = 0.5
    """θ: what a reward must exceed to be good, in a group of equal rewards (paper: 0.5)"""
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
    return torch.sigmoid(gamma * standardize(entropy, mask, eps, correction=0))  # Eq. 16-18 [paper]


def entropy_buckets(entropy: Tensor, mask: Tensor, buckets: int) -> Tensor:
    """0 ... buckets - 1 by the share of the rollout's entropy spent up to a token. [P, G, T]."""
    spent = torch.where(mask, entropy, 0.0).cumsum(-1)
    total = spent[..., -1:].clamp(min=torch.finfo(spent.dtype).tiny)
    position = buckets * spent / total  # Eq. 23 [paper]
    return position.clamp(0, buckets - 1).long()  # Eq. last bucket [open]


@torch.no_grad()
def ep_grpo_advantages(
    rewards: Tensor,
    entropy: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    gamma: float = 5.0,
    eta: float = 0.2,
    buckets: int = 10,
    reward_threshold: float = 0.5,
    eps: float = 1e-6,
) -> Tensor:
    """Gated outcome plus progress advantage of each token, [P, G, T], 0 outside the mask.

    rewards: [P, G]; the others [P, G, T]: entropy (nats) and logp of the policy that sampled,
    ref_logp of the frozen initial policy. The scale of the log-ratio (the paper's λ) cancels.
    Progress has mean 0 in each bucket of a group, and is 0 for a token alone there [open].
    """
    outcome = grpo_advantages(rewards, eps=eps)  # [P, G]
    gate = entropy_gate(entropy, mask, gamma=gamma, eps=eps)
    bucket = entropy_buckets(entropy, mask, buckets)

    varied = rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True)
    anchor = torch.where(varied, outcome, rewards - reward_threshold).sign()  # Eq. 21 [paper]
    signal = anchor[..., None] * (logp - ref_logp)  # Eq. 20, 22 [paper]
    parts = [mask & (bucket == k) for k in range(buckets)]
    z_scores = sum(standardize(signal, part, eps, correction=0) for part in parts)  # Eq. 24 [paper]
    advantages = gate * outcome[..., None] + eta * z_scores  # Eq. 19, 25, 26 [paper]
    return torch.where(mask, advantages, 0.0)


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
        shaping["reward_threshold"] = args.reward_threshold
        advantages = ep_grpo_advantages(  # [P, G, T]
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
        # The two terms of the advantage.
        gate = entropy_gate(entropy, mask, gamma=args.gamma)
        outcome = gate * grpo_advantages(rewards)[..., None] * mask
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
