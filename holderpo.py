"""HölderPO: Hölder Policy Optimisation (arXiv 2605.12058).

GRPO with one ratio a response, the power mean of its tokens' ratios, clipped once. Its exponent p
falls over training: p > 0 learns most from the tokens that the policy has made likelier, p < 0
from those that it has made rarer. The advantage is GRPO's. Page: docs/holderpo.md.

    python holderpo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python holderpo.py --model Qwen/Qwen2.5-Math-7B --lora-rank 64 --dataset my/math.jsonl \\
        --eval-dataset my/test.jsonl --instruction 'Put your final answer in \\boxed{}.'

GSPO: --schedule constant --p-start 0; GMPO: --clip-level token as well.
Left out beside grpo.py: the KL penalty, the asymmetric clip, other averages of the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

import common
from engine import (
    Engine,
    device,
    load_policy,
    load_tokenizer,
    make_engine,
    refuse,
    seed_for,
)
from grading import Grader
from run import Run, RunArgs, launch, learning_rate, make_optimizer


@dataclass
class Args(RunArgs):
    """method and optimiser"""

    # <method>
    scale_rewards: bool = True
    """divide the advantage by the group's standard deviation (Dr. GRPO: no)"""
    p_start: float = 2.0
    """p that the schedule starts from (paper: 2 for mathematics, 1 for ALFWorld)"""
    p_end: float = -2.0
    """p that the schedule ends at (paper: -2 for mathematics, -1 for ALFWorld)"""
    schedule: Literal["linear", "cosine", "quadratic", "cubic", "constant"] = "linear"
    """how p goes from start to end over --steps; constant: it stays at --p-start"""
    clip: float = 0.2
    """ε: the ratio is clipped to [1 - ε, 1 + ε] (released code: 0.2)"""
    clip_level: Literal["sequence", "token"] = "sequence"
    """clip a response's ratio once (Eq. 2), or each token's before the mean (Eq. 11)"""
    updates_per_rollout: int = 4
    """optimiser updates a step, each on its own share of the problems (paper: 8); with 1 every
    ratio is 1, and p changes nothing"""
    lora_rank: int = 0
    """train LoRA adapters of this rank; 0: all weights"""
    loss_average: ClassVar[str] = "sequence"

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            refuse("--clip", self.clip, "must be above 0 and below 1")
        for flag, p in (("--p-start", self.p_start), ("--p-end", self.p_end)):
            if not math.isfinite(p):
                refuse(flag, p, "must be finite")
        if self.schedule == "constant" and self.p_end != Args.p_end:
            refuse("--p-end", self.p_end, "p stays at --p-start with --schedule constant")

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


def holder_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor, p: float) -> Tensor:
    """ρ, a response's ratio of new to old policy: the power mean of its tokens' ratios.

    logp, old_logp, mask: [N, T]. Returns [N]. Rises with p from the smallest token ratio (-∞)
    to the largest (∞). In log space, so that it cannot overflow. No live token: 1, no gradient.
    """
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).double()  # float32 fails a small p
    live = mask | ~mask.any(-1, keepdim=True)
    if abs(p) < 1e-6:  # Eq. geometric branch [code]
        log_mean = log_ratio.sum(-1) / live.sum(-1)
    else:
        log_sum = (p * log_ratio).masked_fill(~live, -math.inf).logsumexp(-1)
        log_mean = (log_sum - live.sum(-1).double().log()) / p  # Eq. 1 [paper]
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
    """Each response's loss, [N], and where the clip cuts its gradient off, [N, T].

    logp, old_logp, mask: [N, T]; advantages: [N]. The loss of a step is the mean over responses.
    """
    if clip_level == "sequence":
        rho = holder_ratio(logp, old_logp, mask, p)
        zero = torch.zeros_like(rho)
        loss, cut = clipped_loss(rho.log(), zero, advantages, clip, clip)  # Eq. 2 [paper]
        return loss, cut[:, None] & mask  # Eq. 16 [paper]
    if clip_level == "token":
        log_ratio, up, down = logp - old_logp, math.log1p(clip), math.log1p(-clip)
        rises = advantages[:, None] > 0
        kept = torch.where(rises, log_ratio.clamp(max=up), log_ratio.clamp(min=down))
        rho = holder_ratio(kept, torch.zeros_like(kept), mask, p)  # Eq. 11 [paper]
        return -rho * advantages, mask & (kept != log_ratio) & (advantages != 0)[:, None]
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
    """The mean of `holder_surrogate` over the responses, a scalar."""
    clips = {"clip": clip, "clip_level": clip_level}
    return holder_surrogate(logp, old_logp, mask, advantages, p, **clips)[0].mean()


@torch.no_grad()
def gradient_weights(logp: Tensor, old_logp: Tensor, mask: Tensor, p: float) -> Tensor:
    """W, each token's share of its response's gradient, [N, T]: ∇ρ = ρ Σ W_t ∇log π_t."""
    powers = p * (logp - old_logp).masked_fill(~mask, 0.0)  # log r_t^p
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
    shape = {
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
            # </method>
        gap = common.check_engine(rollouts, old_logp, args)

        # <method>
        advantages = grpo_advantages(rewards, scale=args.scale_rewards)  # [P, G]
        advantages = advantages[..., None] * mask  # [P, G, T]
        schedule = {"p_start": args.p_start, "p_end": args.p_end, "schedule": args.schedule}
        p = anneal_p(step, args.steps, **schedule)  # Eq. p is held for a step [code]
        rhos, entropies = [], []
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
                    new_and_old = logp, old_logp[index], mask[index]
                    of_response = advantages[index][:, 0]  # the same on every token
                    clips = {"clip": args.clip, "clip_level": args.clip_level}
                    loss, clipped = holder_surrogate(*new_and_old, of_response, p, **clips)
                    loss = (loss * weights[index].sum(-1)).sum()
                    rhos.append(holder_ratio(*new_and_old, p).detach())
                    entropies.append(torch.special.entr(gradient_weights(*new_and_old, p)).sum(-1))
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
        signals = {"advantage": advantages}
        rho, metrics["p"] = torch.cat(rhos), p
        metrics |= {"rho/min": rho.min(), "rho/max": rho.max(), "rho/std": rho.std()}
        metrics["weight_entropy"] = torch.cat(entropies).mean()
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
