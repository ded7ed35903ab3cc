r"""ARCA: Adapter-Residual Credit Assignment (arXiv 2606.00257).

A response's GRPO advantage is distributed over its tokens, in proportion to a power of the distance
by which the LoRA adapter has moved the hidden state that predicts each. --credit selects another of
the paper's signals. Plain policy gradient, without ratio, clip and KL. Comments "Eq. ..." refer to
rows of docs/arca.md. [paper]: the paper; [code]: the authors' code; [open]: our choice.

    python arca.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python arca.py --model Qwen/Qwen3-1.7B-Base --dataset my/math.jsonl --eval-dataset \
        my/test.jsonl --prompts-per-step 8 --group-size 4 --max-new-tokens 512 --steps 100 \
        --lr 5e-6 --lr-schedule cosine --warmup-ratio 0.1 --lora-dropout 0.05

Shapes: P problems (p in a micro-batch), G rollouts of each (the group), T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import clip_grad_norm_

import common


# Below the imports, scripts may differ only between the marks <method> and </method>.
@dataclass
class Args(common.RunArgs):
    """Settings of the method. The string below each is its --help text."""

    # <method>
    scale_rewards: bool = True
    """divide the advantage by the group's standard deviation (Dr. GRPO: no)"""
    credit: Literal["uniform", "surprisal", "entropy", "divergence", "arca"] = "arca"
    """the signal that determines a token's credit: none, -log π, the fall in entropy to the next
    token, |log π - log π_ref|, or how far the adapter moves the hidden state"""
    sharpening: float = 2.0
    """power of the signal before it is normalised (paper: 1; released code: 2)"""
    lora_rank: int = 64
    """train LoRA adapters of this rank (paper: 4, 16, 64)"""
    loss_average: ClassVar[str] = "sequence"  # ClassVar: not a flag
    updates_per_rollout: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()  # the shared checks; no number may be negative
        why = "ARCA compares the model with and without LoRA"
        common.require(self.lora_rank > 0, "--lora-rank", self.lora_rank, why)
        if self.credit == "uniform" and self.sharpening != Args.sharpening:
            common.reject("--sharpening", self.sharpening, "has no effect with --credit uniform")

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
def credit_weights(
    score: Tensor, mask: Tensor, *, sharpening: float = 2.0, eps: float = 1e-8
) -> Tensor:
    """w, each token's share of its response's credit: (score + eps) ** sharpening, normalised.

    score: [..., T], non-negative. Returns [..., T], non-negative, 0 outside the mask, with sum 1
    over each response. If a response's powers sum to at most 1e-8, its weights are 1 / its length.
    """
    score = score.float().masked_fill(~mask, 0.0)
    uniform = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    log_power = sharpening * (score + eps).log()  # Eq. sharpening [code]
    log_power = log_power.masked_fill(~mask, -math.inf)
    # softmax(log x) is x / Σ x, and cannot overflow.
    weights = log_power.softmax(-1)  # Eq. weight [paper]
    enough = log_power.logsumexp(-1, keepdim=True) > math.log(1e-8)
    return torch.where(enough, weights, uniform)  # Eq. uniform fallback [code]


@torch.no_grad()
def residual_norm(adapted_hidden: Tensor, base_hidden: Tensor) -> Tensor:
    """How far the adapter has moved each hidden state: two [..., D] -> [...] in float32."""
    return (adapted_hidden.float() - base_hidden.float()).norm(dim=-1)  # Eq. residual [paper]


def arca_weights(
    adapted_hidden: Tensor,
    base_hidden: Tensor,
    mask: Tensor,
    *,
    sharpening: float = 2.0,
    eps: float = 1e-8,
) -> Tensor:
    """`credit_weights` of the residual norm, for other projects: two [N, T, D] -> [N, T]."""
    norm = residual_norm(adapted_hidden, base_hidden)
    return credit_weights(norm, mask, sharpening=sharpening, eps=eps)


@torch.no_grad()
def residuals(
    policy: nn.Module,
    reference: common.Reference,
    rollouts: common.Rollouts,
    index: common.Index,
    args: Args,
    adapted: Tensor | None = None,
) -> Tensor:
    """`residual_norm` of the hidden states that predict the tokens of n rollouts: [tokens].

    adapted: the policy's `hidden_states`, [tokens, D]; None: computed here, without dropout.
    """
    if adapted is None:
        adapted = common.hidden_states(policy, rollouts, index, args)
    with reference() as frozen:
        base = common.hidden_states(frozen, rollouts, index, args)
    return residual_norm(adapted, base)


def surprisal(logp: Tensor) -> Tensor:
    """High if the sampled token was unlikely: [..., T] -> [..., T]."""
    return (-logp).clamp(min=0.0)  # Eq. surprisal [paper]


def entropy_reduction(entropy: Tensor, mask: Tensor) -> Tensor:
    """High if the next token is more certain than this one; 0 on the last: [..., T]."""
    fall = (entropy[..., :-1] - entropy[..., 1:]).clamp(min=0.0)  # Eq. entropy reduction [paper]
    return pad(fall.masked_fill(~mask[..., 1:], 0.0), (0, 1))


def divergence(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """High if training has changed the sampled token's probability: [..., T]."""
    return (logp - ref_logp).abs()  # Eq. divergence [paper]


def gini(weights: Tensor, mask: Tensor) -> Tensor:
    """Concentration of credit, [..., T] -> [...]: 0 if uniform, (T - 1) / T if on one token."""
    ordered = weights.masked_fill(~mask, 0.0).sort(-1).values  # zeros of the padding come first
    padding = (~mask).sum(-1, keepdim=True)
    length = mask.sum(-1)
    rank = torch.arange(1, mask.shape[-1] + 1, device=mask.device) - padding
    area = (rank * ordered).sum(-1) / (length * ordered.sum(-1))
    return 2 * area - (length + 1) / length  # Eq. Gini [open]


def effective_fraction(weights: Tensor, mask: Tensor) -> Tensor:
    """The effective number of tokens over T, [..., T] -> [...]: 1 if uniform, 1 / T if on one."""
    squares = weights.masked_fill(~mask, 0.0).square().sum(-1)
    return 1 / (mask.sum(-1) * squares)  # Eq. effective fraction [paper]


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
    base = common.Reference(policy, args)  # the policy with its adapters off
    reference = base if args.credit == "divergence" else None  # needs its log-probabilities
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
                    match args.credit:
                        case "uniform":
                            signal = torch.zeros_like(batch.old_logp)
                        case "surprisal":
                            signal = surprisal(batch.old_logp)
                        case "entropy":
                            signal = entropy_reduction(batch.entropy, batch.mask)
                        case "divergence":
                            signal = divergence(batch.old_logp, batch.ref_logp)
                        case "arca":
                            # The update's hidden states, unless they have dropout
                            hidden = None if args.lora_dropout else batch.hidden
                            norms = residuals(policy, base, rollouts, batch.index, args, hidden)
                            # one norm for each token of batch.trained, row by row
                            signal = torch.zeros_like(batch.old_logp)
                            signal = signal.masked_scatter(batch.trained, norms)

                    credit = credit_weights(signal, batch.mask, sharpening=args.sharpening)
                    per_token.add(batch, credit=credit)

                    # The loss is averaged over each response: its length cancels.
                    length = batch.mask.sum(-1, keepdim=True)
                    advantage = advantages[batch.problems] * credit * length
                    loss = -advantage * batch.logp  # Eq. gradient [paper]
                    clipped = torch.zeros_like(batch.mask)  # there is no ratio to clip
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
        metrics["gini"] = gini(per_token["credit"], mask).mean()
        metrics["effective_fraction"] = effective_fraction(per_token["credit"], mask).mean()
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
