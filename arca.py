"""ARCA: Adapter-Residual Credit Assignment (arXiv 2606.00257).

GRPO's advantage, shared out over a response's tokens in proportion to how far the LoRA adapter has
moved the hidden state that predicts each of them. --credit names the signals that the paper
compares with. Plain policy gradient: one on-policy update, no ratio. Page: docs/arca.md.

    python arca.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python arca.py --model Qwen/Qwen3-1.7B-Base --dataset my/math.jsonl --eval-dataset \\
        my/test.jsonl --prompts-per-step 8 --group-size 4 --max-new-tokens 512 --steps 100 \\
        --lr 5e-6 --lr-schedule cosine --warmup-steps 10 --lora-dropout 0.05

Left out beside grpo.py: the clip, the KL penalty, several updates, other averages of the loss,
training all weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import common
from engine import (
    Engine,
    Reference,
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
    credit: Literal["uniform", "surprisal", "entropy", "divergence", "arca"] = "arca"
    """what a response's credit is shared out by: nothing, -log π, the fall of entropy,
    |log π - log π_ref|, or the adapter's residual"""
    sharpening: float = 2.0
    """power of the signal before it is normalised (paper: 1; released code: 2)"""
    lora_rank: int = 64
    """train LoRA adapters of this rank (paper: 4, 16, 64)"""
    loss_average: ClassVar[str] = "sequence"
    updates_per_rollout: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            refuse("--lora-rank", self.lora_rank, "ARCA compares the model with and without LoRA")
        if not 0 <= self.sharpening < math.inf:
            refuse("--sharpening", self.sharpening, "must be at least 0 and finite")
        if self.credit == "uniform" and self.sharpening != Args.sharpening:
            refuse("--sharpening", self.sharpening, "changes nothing with --credit uniform")

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


@torch.no_grad()
def credit_weights(
    score: Tensor, mask: Tensor, *, sharpening: float = 2.0, eps: float = 1e-8
) -> Tensor:
    """w, each token's share of its response's credit, in proportion to a score to a power.

    score: [..., T], non-negative. Returns [..., T]: at least 0, 0 outside the mask, sum 1 over
    each response, and exactly 1 / T where a response's sharpened scores sum to at most 1e-8.
    """
    score = score.float().masked_fill(~mask, 0.0)
    uniform = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    log_power = sharpening * (score + eps).log()  # Eq. sharpening [code]
    log_power = log_power.masked_fill(~mask, -math.inf)
    # The softmax of the logarithm is the quotient, and no power overflows.
    weights = log_power.softmax(-1)  # Eq. weight [paper]
    moved = log_power.logsumexp(-1, keepdim=True) > math.log(1e-8)
    return torch.where(moved, weights, uniform)  # Eq. uniform fallback [code]


@torch.no_grad()
def residual_norm(adapted_hidden: Tensor, base_hidden: Tensor) -> Tensor:
    """How far the adapter has moved each hidden state, in float32: [..., D] twice -> [...]."""
    return (adapted_hidden.float() - base_hidden.float()).norm(dim=-1)  # Eq. residual [paper]


def arca_weights(
    adapted_hidden: Tensor,
    base_hidden: Tensor,
    mask: Tensor,
    *,
    sharpening: float = 2.0,
    eps: float = 1e-8,
) -> Tensor:
    """`credit_weights` of the residual norm, [N, T, D] twice -> [N, T]."""
    alpha = residual_norm(adapted_hidden, base_hidden)
    return credit_weights(alpha, mask, sharpening=sharpening, eps=eps)


@torch.no_grad()
def residuals(
    policy: nn.Module, reference: Reference, rollouts: common.Rollouts, args: Args
) -> Tensor:
    """`residual_norm` at the position that predicts each response token, [P, G, T], dropout off.
    Hidden states exist for one micro-batch at a time, of four times the tokens that an update's may
    have: no activations are kept (as in `common.score`)."""
    alpha = torch.zeros(rollouts.mask.shape, device=rollouts.mask.device)
    everything = torch.arange(len(rollouts.problems))
    for index in common.micro_batches(rollouts, 4 * args.token_budget, everything):
        adapted = common.hidden_states(policy, rollouts, index, args)  # [tokens, D]
        with reference() as base:
            norm = residual_norm(adapted, common.hidden_states(base, rollouts, index, args))
        alpha[index] = alpha[index].masked_scatter(rollouts.mask[index], norm)
    return alpha


def surprisal(logp: Tensor) -> Tensor:
    """High where the sampled token was unlikely: [..., T] -> [..., T]."""
    return (-logp).clamp(min=0.0)  # Eq. surprisal [paper]


def entropy_reduction(entropy: Tensor, mask: Tensor) -> Tensor:
    """High where the next token is more certain than this one; 0 on the last: [..., T]."""
    fall = (entropy[..., :-1] - entropy[..., 1:]).clamp(min=0.0)  # Eq. entropy reduction [paper]
    return pad(fall.masked_fill(~mask[..., 1:], 0.0), (0, 1))


def divergence(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """High where training has changed the sampled token's probability: [..., T]."""
    return (logp - ref_logp).abs()  # Eq. divergence [paper]


def gini(weights: Tensor, mask: Tensor) -> Tensor:
    """Concentration of credit, [..., T] -> [...]: 0 is uniform, (T - 1) / T all on one token."""
    ordered = weights.masked_fill(~mask, 0.0).sort(-1).values  # padding goes first, and adds 0
    padding, length = (~mask).sum(-1, keepdim=True), mask.sum(-1)
    rank = torch.arange(1, mask.shape[-1] + 1, device=mask.device) - padding
    area = (rank * ordered).sum(-1) / (length * ordered.sum(-1))
    return 2 * area - (length + 1) / length  # Eq. Gini [open]


def effective_fraction(weights: Tensor, mask: Tensor) -> Tensor:
    """EffN / T, [..., T] -> [...]: 1 is uniform, 1 / T all on one token."""
    squares = weights.masked_fill(~mask, 0.0).square().sum(-1)
    return 1 / (mask.sum(-1) * squares)  # Eq. effective fraction [paper]


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
            match args.credit:
                case "uniform":
                    signal = torch.zeros_like(old_logp)
                case "surprisal":
                    signal = surprisal(old_logp)
                case "entropy":
                    signal = entropy_reduction(entropy, mask)
                case "divergence":
                    with reference() as frozen:
                        signal = divergence(old_logp, common.score(frozen, rollouts, args)[0])
                case "arca":
                    signal = residuals(policy, reference, rollouts, args)
            credit = credit_weights(signal, mask, sharpening=args.sharpening)  # [P, G, T]
            # </method>
        gap = common.check_engine(rollouts, old_logp, args)

        # <method>
        advantages = grpo_advantages(rewards, scale=args.scale_rewards)  # [P, G]
        # The update averages over each response, that is, divides by its length.
        advantages = advantages[..., None] * credit * mask.sum(-1, keepdim=True)  # [P, G, T]
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
                    loss = -advantages[index] * logp  # Eq. gradient [paper]
                    loss = (loss * weights[index]).sum()
                    clipped = torch.zeros_like(logp)  # there is no ratio to clip
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
        signals = {"advantage": advantages, "credit": credit}
        metrics["gini"] = gini(credit, mask).mean()
        metrics["effective_fraction"] = effective_fraction(credit, mask).mean()
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
