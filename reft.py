"""REFT: first-token diversification of rollouts (arXiv 2605.28295).

GRPO or DAPO whose rollouts begin elsewhere: of the N tokens that the policy finds likeliest after
the prompt, K are drawn uniformly, and each opens G / K of the G rollouts. Verifier, advantage and
objective stay. Page: docs/reft.md.

    python reft.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python reft.py --model Qwen/Qwen2.5-3B-Instruct --lora-rank 64 --dataset openai/gsm8k:main \\
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \\boxed{}.'

Left out: correcting the opener's probability for the way it was drawn (the method does not).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
    clip_low: float = 0.2
    """ε_low: the ratio is clipped at 1 - ε_low"""
    clip_high: float = 0.2
    """ε_high: the ratio is clipped at 1 + ε_high (DAPO: 0.28)"""
    loss_average: Literal["token", "sequence", "constant"] = "token"
    """token: over all tokens (DAPO); sequence: over each response, then over responses
    (DeepSeekMath); constant: sum over tokens / --max-new-tokens (Dr. GRPO)"""
    kl: float = 0.0
    """β: weight of the KL penalty to the frozen initial policy (DeepSeekMath: 0.04)"""
    updates_per_rollout: int = 1
    """optimiser updates a step, each on its own share of the problems (DAPO: 16)"""
    lora_rank: int = 0
    """train LoRA adapters of this rank; 0: all weights"""
    candidates: int = 20
    """N: likeliest first tokens that openers are drawn from (paper: 20)"""
    openers: int = 4
    """K: different first tokens in a group (paper: 4)"""
    mask_opener: bool = False
    """leave the first token out of the loss"""
    base: Literal["grpo", "dapo"] = "grpo"
    """dapo: --dynamic-sampling, --clip-high 0.28 and --loss-average token"""

    def __post_init__(self) -> None:
        try:
            check_openers(
                candidates=self.candidates, openers=self.openers, group_size=self.group_size
            )
        except ValueError as error:
            flags, why = str(error).split(": ")
            refuse(*flags.rsplit(" ", 1), why)
        if self.max_new_tokens < 2:
            refuse("--max-new-tokens", self.max_new_tokens, "must leave room after the opener")
        if self.base == "dapo":
            if self.clip_high not in (Args.clip_high, 0.28) or self.loss_average != "token":
                refuse("--base", "dapo", "sets --clip-high and --loss-average: use --base grpo")
            self.dynamic_sampling, self.clip_high = True, 0.28

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


def check_openers(*, candidates: int, openers: int, group_size: int) -> None:
    """Raises ValueError for numbers that cannot be served; needs no model."""
    flags = f"--candidates {candidates} --openers {openers} --group-size {group_size}"
    if min(candidates, openers, group_size) < 1:
        raise ValueError(f"{flags}: each must be at least 1")
    if openers > candidates:
        raise ValueError(f"{flags}: --openers must not exceed --candidates")
    if group_size % openers:
        raise ValueError(f"{flags}: --group-size must be a multiple of --openers")


def pick_first_tokens(
    logits: Tensor,
    *,
    candidates: int = 20,
    openers: int = 4,
    group_size: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The first token of every rollout of every prompt: [P, V] -> [P, G] token ids.

    logits: whatever ranks tokens alike; -inf for a token that cannot be chosen. Raises ValueError
    as `check_openers` does, or where a prompt has fewer than `candidates` tokens to choose from.
    """
    check_openers(candidates=candidates, openers=openers, group_size=group_size)
    prompts, vocabulary = logits.shape
    if candidates > vocabulary:
        raise ValueError(f"--candidates {candidates} exceeds the vocabulary of {vocabulary} tokens")
    likeliest = logits.topk(candidates)  # Eq. candidates [paper]
    if not likeliest.values.isfinite().all():
        raise ValueError(f"--candidates {candidates}: a prompt has fewer allowed tokens")
    # The ranks of independent uniform numbers are a random permutation.
    shuffled = torch.rand(prompts, candidates, generator=generator).argsort(-1).to(logits.device)
    drawn = shuffled[:, :openers]  # Eq. distinct openers [second-hand]
    chosen = likeliest.indices.gather(-1, drawn)
    return chosen.repeat_interleave(group_size // openers, dim=-1)  # Eq. equal shares [paper]


def choose_openers(
    engine: Engine, problems: list[common.Problem], args: Args, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Every rollout's first token and its rank among the candidates, 1 the likeliest: two [P, G].
    Special tokens, and ids that the tokenizer does not know, never open."""
    added = engine.tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special}
    special.update(engine.stops, engine.tokenizer.all_special_ids)
    unknown = max(0, engine.vocabulary - len(engine.tokenizer))  # rows that pad the embedding
    count = args.candidates + len(special) + unknown
    prompts = [problem.prompt for problem in problems]
    tokens, logp = engine.top_tokens(prompts, count, args.temperature)  # [P, count]
    allowed = (tokens < len(engine.tokenizer)) & ~torch.isin(tokens, torch.tensor([*special]))
    places = pick_first_tokens(
        logp.masked_fill(~allowed, -math.inf),  # Eq. forbidden openers [open]
        candidates=args.candidates,
        openers=args.openers,
        group_size=args.group_size,
        generator=generator,
    )
    return tokens.gather(-1, places), allowed.cumsum(-1).gather(-1, places)


def opener_metrics(
    tokens: Tensor, ranks: Tensor, logp: Tensor, correct: Tensor, openers: int
) -> dict[str, float]:
    """Probability and success of openers by rank, and how often the same opener wins.

    All [P, G], of first tokens, rollouts of one opener side by side. An opener wins where its
    rollouts succeed more often than those of every other opener of its group.
    """
    metrics = {"opener/probability": logp.exp().mean().item()}
    for rank in ranks.unique().tolist():
        of_rank = ranks == rank
        metrics[f"opener/probability_of_rank_{rank:02}"] = logp[of_rank].exp().mean().item()
        metrics[f"opener/success_of_rank_{rank:02}"] = correct[of_rank].mean().item()
    success = correct.unflatten(-1, (openers, -1)).mean(-1)  # [P, K]
    best = success == success.amax(-1, keepdim=True)
    won = best.sum(-1) == 1
    if won.any():
        winners = tokens.unflatten(-1, (openers, -1))[..., 0][best & won[:, None]]
        counts = winners.unique(return_counts=True)[1]
        metrics["opener/same_winner"] = (counts.max() / counts.sum()).item()
    return metrics


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
            draw = torch.Generator().manual_seed(seed_for(*seed, "openers"))
            openers, ranks = choose_openers(engine, batch, args, draw)
            new = common.roll_out(engine, batch, args, seed, openers=openers)
            for group, of_group in zip(new, ranks.tolist(), strict=True):
                group.notes = of_group
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
    reference = Reference(policy, args) if args.kl else None
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
            if args.kl:
                with reference() as frozen:
                    ref_logp, _ = common.score(frozen, rollouts, args)
            # </method>
        gap = common.check_engine(rollouts, old_logp, args)

        # <method>
        advantages = grpo_advantages(rewards, scale=args.scale_rewards)  # [P, G]
        advantages = advantages[..., None] * mask  # [P, G, T]
        trained = torch.ones_like(old_logp)
        trained[..., 0] = not args.mask_opener  # Eq. masked opener [open]
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
                    loss = (loss * weights[index] * trained[index]).sum()
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
        ranks = torch.tensor([group.notes for group in groups], device=mask.device)
        first = (rollouts.tokens[..., 0], ranks, old_logp[..., 0], correct)
        metrics |= opener_metrics(*first, args.openers)
        if args.kl:
            metrics["kl_to_reference"] = kl_to_reference(old_logp, ref_logp)[mask].mean()
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
