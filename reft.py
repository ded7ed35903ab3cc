r"""REFT: first-token diversification (arXiv 2605.28295; we read its abstract and slides).

grpo.py, except that a group's rollouts begin with K different tokens, the openers, drawn uniformly
from the N most likely ones. Each opens G / K of the G rollouts. Comments "Eq. ..." refer to rows of
docs/reft.md. [paper]: the paper; [second-hand]: others' summaries or code; [open]: our choice.

    python reft.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python reft.py --model Qwen/Qwen2.5-3B-Instruct --lora-rank 64 --lr 1e-5 --dataset \
        openai/gsm8k:main --eval-dataset openai/gsm8k:main --instruction 'Answer in \boxed{}.'

Shapes: P problems (p in a micro-batch), G rollouts of each (the group), T response tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
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
    candidates: int = 20
    """N: most likely first tokens, from which openers are drawn (paper: 20)"""
    openers: int = 4
    """K: different first tokens in a group (paper: 4)"""
    mask_opener: bool = False
    """leave the first token of each response out of the loss"""

    def __post_init__(self) -> None:
        super().__post_init__()  # the shared checks; no number may be negative
        why = f"must be from 1 to --candidates {self.candidates}"
        common.require(1 <= self.openers <= self.candidates, "--openers", self.openers, why)
        why = f"must be a multiple of --openers {self.openers}"
        common.require(self.group_size % self.openers == 0, "--group-size", self.group_size, why)
        why = "must leave room after the first token"
        common.require(self.max_new_tokens > 1, "--max-new-tokens", self.max_new_tokens, why)

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


def pick_first_tokens(
    logits: Tensor,
    *,
    candidates: int = 20,
    openers: int = 4,
    group_size: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The first token of every rollout of every prompt: [P, V] -> [P, G] token ids.

    logits: of the token after the prompt, V the vocabulary; -inf for tokens that cannot be chosen.
    generator: on the CPU. Raises ValueError if the numbers do not fit, or candidates are too few.
    """
    prompts, vocabulary = logits.shape
    if not 1 <= openers <= candidates <= vocabulary:
        raise ValueError(f"1 <= {openers=} <= {candidates=} <= {vocabulary=} does not hold")
    if group_size < 1 or group_size % openers:
        raise ValueError(f"{group_size=} must be a multiple of {openers=}")

    likeliest = logits.topk(candidates)  # Eq. candidates [paper]
    if not likeliest.values.isfinite().all():
        raise ValueError(f"a prompt has fewer than {candidates=} tokens to choose from")

    # Sorting independent uniform numbers gives a random permutation.
    permutation = torch.rand(prompts, candidates, generator=generator).argsort(-1)
    drawn = permutation[:, :openers].to(logits.device)  # Eq. distinct openers [second-hand]
    chosen = likeliest.indices.gather(-1, drawn)
    return chosen.repeat_interleave(group_size // openers, dim=-1)  # Eq. equal shares [paper]


def allowed_openers(engine: common.Engine, vocabulary: int) -> list[int]:
    """The tokenizer's ids below `vocabulary`, without special tokens and stop tokens."""
    special = {i for i, token in engine.tokenizer.added_tokens_decoder.items() if token.special}
    special.update(engine.tokenizer.all_special_ids, engine.stop_tokens)
    return [i for i in range(min(vocabulary, len(engine.tokenizer))) if i not in special]


@torch.no_grad()
def choose_openers(
    policy: nn.Module,
    engine: common.Engine,
    prompts: list[list[int]],
    args: Args,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Every rollout's first token, and its rank among those allowed, from 1: two [P, G]."""
    policy.eval()
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=common.device(args))  # [1, tokens]
        with common.autocast(args):
            outputs = policy(ids, use_cache=False, logits_to_keep=1)
        rows.append(outputs.logits[0, -1].float().cpu())

    logits = torch.stack(rows)  # [P, V] of the token after each prompt

    allowed = torch.tensor(allowed_openers(engine, logits.shape[-1]))
    logits = logits[:, allowed]  # Eq. allowed openers [open]

    flags = {"candidates": args.candidates, "openers": args.openers, "group_size": args.group_size}
    picked = pick_first_tokens(logits, **flags, generator=generator)  # [P, G]
    higher = logits[:, None] > logits.gather(-1, picked)[..., None]  # [P, G, allowed tokens]
    return allowed[picked], 1 + higher.sum(-1)


def roll_out_openers(
    policy: nn.Module,
    engine: common.Engine,
    problems: list[common.Problem],
    args: Args,
    seed: tuple[int | str, ...],
) -> list[common.Group]:
    """`common.roll_out` with chosen first tokens. Each rollout's note is its first token's rank."""
    generator = torch.Generator().manual_seed(common.seed_for(*seed, "openers"))
    tokens, ranks = choose_openers(policy, engine, [p.prompt for p in problems], args, generator)
    groups = common.roll_out(engine, problems, args, seed, first_tokens=tokens)
    for group, group_ranks in zip(groups, ranks.tolist(), strict=True):
        group.notes = group_ranks
    return groups


def opener_metrics(rollouts: common.Rollouts, ranks: Tensor, openers: int) -> dict[str, float]:
    """Probability and success of openers by rank, and how often the same opener wins.

    ranks: [P, G]. An opener's rollouts are adjacent. It wins if no other succeeds as often.
    """
    tokens, logp, correct = rollouts.tokens[..., 0], rollouts.old_logp[..., 0], rollouts.correct
    metrics = {"opener/probability": logp.exp().mean().item()}
    for rank in ranks.unique().tolist():
        of_rank = ranks == rank
        metrics[f"opener/probability_of_rank_{rank:02}"] = logp[of_rank].exp().mean().item()
        metrics[f"opener/success_of_rank_{rank:02}"] = correct[of_rank].mean().item()

    success = correct.unflatten(-1, (openers, -1)).mean(-1)  # [P, K]
    best = success == success.amax(-1, keepdim=True)
    won = best & (best.sum(-1, keepdim=True) == 1)

    winners = tokens.unflatten(-1, (openers, -1))[..., 0][won]
    if openers > 1 and len(winners):
        metrics["opener/same_winner"] = (winners.bincount().max() / len(winners)).item()
    return metrics


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
    allowed = len(allowed_openers(engine, len(policy.get_output_embeddings().weight)))
    why = f"only {allowed} tokens can begin a response"
    common.require(args.candidates <= allowed, "--candidates", args.candidates, why)
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
        roll_out = functools.partial(roll_out_openers, policy)
        groups = common.collect(args, step, train, engine, grader, run, roll_out)
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
                if args.mask_opener:
                    weights[..., 0] = 0.0  # Eq. masked opener [open]
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
        ranks = torch.tensor([group.notes for group in groups], device=mask.device)
        metrics |= opener_metrics(rollouts, ranks, args.openers)

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
