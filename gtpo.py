"""GTPO and GRPO-S: reward shaping with policy entropy (arXiv 2508.04349).

A token of a correct rollout earns more where the policy was uncertain, one of a wrong rollout loses
more where it was sure, compared with the same position of its group (GTPO, --level token). GRPO-S
(--level sequence) does this to whole rollouts by their mean entropy, with one ratio a rollout.

    python gtpo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python gtpo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \\
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \\boxed{}.'

What the paper leaves open is a flag: see docs/gtpo.md.
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
    refuse,
    seed_for,
)
from grading import Grader
from run import Run, RunArgs, launch, learning_rate, make_optimizer


@dataclass
class Args(RunArgs):
    """method and optimiser"""

    # <method>
    level: Literal["token", "sequence"] = "token"
    """token: GTPO; sequence: GRPO-S, averaged over rollouts whatever --loss-average says"""
    alpha2: float = 0.1
    """α₂ (β₂ in GRPO-S): weight of the entropy beside the verdict's α₁ = 1 [paper]"""
    normalize: Literal["with-zeros", "own-set", "joint"] = "with-zeros"
    """GTPO: the tokens over which r+ and r- are standardised [open]"""
    entropy_clamp: tuple[float, float] | None = None
    """LOW HIGH: bounds on the entropy before shaping (another reading: 0.2 0.28) [open]"""
    overlong_gamma: float = 0.0
    """γ₁: accuracy from which long correct rollouts are punished, such as 0.75; 0: off [open]"""
    clip_low: float = 0.2
    """ε_low: the ratio is clipped at 1 - ε_low"""
    clip_high: float = 0.28
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

    def __post_init__(self) -> None:
        if self.entropy_clamp and not 0 <= self.entropy_clamp[0] <= self.entropy_clamp[1]:
            refuse("--entropy-clamp", self.entropy_clamp, "needs 0 <= LOW <= HIGH")
        if self.overlong_gamma and not 0.5 < self.overlong_gamma <= 1:
            refuse("--overlong-gamma", self.overlong_gamma, "must lie in (0.5, 1], or be 0: off")
        if not 0 <= self.alpha2 < torch.inf:
            refuse("--alpha2", self.alpha2, "must be at least 0 and finite")
        # What would change nothing.
        if self.overlong_buffer:
            why = "changes no verdict, and only verdicts count here; use --overlong-gamma"
            refuse("--overlong-buffer", self.overlong_buffer, why)
        if self.entropy_clamp and not self.alpha2:
            refuse("--entropy-clamp", self.entropy_clamp, "changes nothing with --alpha2 0")
        if self.level == "sequence":
            if self.normalize != "with-zeros":
                refuse("--normalize", self.normalize, "is for --level token alone")
            if self.loss_average == "constant":
                refuse("--loss-average", self.loss_average, "is for --level token alone")
            self.loss_average = "sequence"

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
def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the live tokens of each rollout. Both are [..., T]; the result is [..., 1]."""
    return torch.where(mask, x, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


@torch.no_grad()
def shaped_rewards(
    correct: Tensor, entropy: Tensor, mask: Tensor, alpha1: Tensor | float, alpha2: float
) -> tuple[Tensor, Tensor]:
    """r+ of the correct rollouts' tokens and r- of the wrong ones', 0 elsewhere: two [P, G, T].

    correct: [P, G] verdicts; entropy (nats; 1e-6 at least [open]), mask: [P, G, T]. alpha1 weighs
    the verdict, alpha2 the token's share of the entropy, or of 1 / entropy, at its position.
    """
    right = mask & (correct > 0)[..., None]
    wrong = mask & ~right
    entropy, over = entropy.clamp(min=1e-6), {"dim": -2, "keepdim": True}
    unsure, sure = torch.where(right, entropy, 0.0), torch.where(wrong, 1 / entropy, 0.0)
    positive = alpha1 + alpha2 * unsure / unsure.sum(**over) * right.sum(**over)  # Eq. 3 [paper]
    negative = -alpha1 - alpha2 * sure / sure.sum(**over) * wrong.sum(**over)  # Eq. 5 [paper]
    return torch.where(right, positive, 0.0), torch.where(wrong, negative, 0.0)


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
    """GTPO's advantage of each token, [P, G, T], 0 outside the mask; arguments as above.

    normalize: r+ and r- are standardised each over all the group's tokens, those of the other
    verdict as zeros; each over its own; or both as one. A group of one verdict gets zeros [open].
    """
    right = mask & (correct > 0)[..., None]
    sets = {"with-zeros": (mask, mask), "own-set": (right, mask & ~right), "joint": (mask, mask)}
    over_right, over_wrong = sets[normalize]
    positive, negative = shaped_rewards(correct, entropy, mask, alpha1, alpha2)
    if normalize == "joint":
        positive = negative = positive + negative
    plus, minus = standardize(positive, over_right, eps), standardize(negative, over_wrong, eps)
    varied = ((correct > 0).any(-1) & (correct <= 0).any(-1))[..., None, None]  # [P, 1, 1]
    return torch.where(mask & varied, torch.where(right, plus, minus), 0.0)  # Eq. 6 [paper]


def grpo_s_advantages(
    correct: Tensor,
    entropy: Tensor,
    mask: Tensor,
    *,
    beta1: Tensor | float = 1.0,
    beta2: float = 0.1,
    eps: float = 1e-6,
) -> Tensor:
    """GRPO-S's advantage of each rollout, [P, G]: GTPO's, of rollouts taken as one token each."""
    entropy, mask = masked_mean(entropy, mask), mask.any(-1, keepdim=True)  # Eq. 8 [paper]
    shaping = {"alpha1": beta1, "alpha2": beta2, "eps": eps}
    return gtpo_advantages(correct, entropy, mask, **shaping)[..., 0]  # Eq. 9 [paper]


def overlong_punishment(correct: Tensor, lengths: Tensor, *, gamma: float) -> Tensor:
    """Group-relative length punishment: 0 down to -1/2 (Appendix D).

    correct: [P, G] verdicts; lengths: [P, G] in tokens. Returns [P, G]; zeros where gamma is 0.
    gamma, in (1/2, 1], is the accuracy from which a group is easy: there, long correct rollouts
    are punished, by the lengths of the correct ones. At 1 - gamma or less, none is. Between, those
    of the majority are, by the lengths of all, and the wrong ones on a tie [open].
    """
    if not gamma:
        return torch.zeros_like(lengths, dtype=torch.float32)
    correct = correct > 0
    accuracy = correct.float().mean(-1, keepdim=True)
    easy, hard = accuracy >= gamma, (~correct).float().mean(-1, keepdim=True) >= gamma
    measured = correct | ~easy
    punished = torch.where(accuracy > 0.5, correct, ~correct) & ~hard

    shortest = torch.where(measured, lengths, torch.inf).amin(-1, keepdim=True)
    longest = torch.where(measured, lengths, -torch.inf).amax(-1, keepdim=True)
    mean = torch.where(measured, lengths, 0).sum(-1, keepdim=True) / measured.sum(-1, keepdim=True)
    limit = torch.maximum((shortest + longest) / 2, mean)
    # No measured length reaches 2 * limit, where the paper's slope would end at -1/2.
    punishment = ((limit - lengths) / (2 * limit)).clamp(max=0)  # Eq. D [paper]
    return torch.where(punished, punishment, 0.0)


def rollout_logp(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """logp that gives all tokens their rollout's ratio, the mean of its token ratios. [n, T]."""
    return old_logp + masked_mean((logp - old_logp).exp(), mask).log()  # Eq. 10 [paper]


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
        doubt = entropy.clamp(*args.entropy_clamp) if args.entropy_clamp else entropy
        punishment = overlong_punishment(correct, mask.sum(-1), gamma=args.overlong_gamma)
        alpha1 = 1 + torch.where(correct > 0, punishment, -punishment)[..., None]  # Eq. D+ [open]
        if args.level == "token":
            shaped = shaped_rewards(correct, doubt, mask, alpha1, args.alpha2)
            shaping = {"alpha1": alpha1, "alpha2": args.alpha2, "normalize": args.normalize}
            advantages = gtpo_advantages(correct, doubt, mask, **shaping)  # [P, G, T]
        else:
            rollout = masked_mean(doubt, mask), mask.any(-1, keepdim=True)  # as one token
            shaped = shaped_rewards(correct, *rollout, alpha1, args.alpha2)
            advantages = grpo_s_advantages(correct, doubt, mask, beta1=alpha1, beta2=args.alpha2)
            advantages = advantages[..., None] * mask  # [P, G, T]
        shaped = sum(shaped) * mask  # [P, G, T]: r+ and r-
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
                    old, live = old_logp[index], mask[index]
                    new = logp if args.level == "token" else rollout_logp(logp, old, live)
                    loss, clipped = clipped_loss(  # Eq. 7, 11 [paper]
                        new, old, advantages[index], args.clip_low, args.clip_high
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
        signals = {"advantage": advantages, "shaped_reward": shaped}
        for name, verdict in (("correct", 1), ("wrong", 0)):
            chosen = shaped[mask & (correct == verdict)[..., None]]
            metrics[f"spread/{name}"] = chosen.std() if len(chosen) > 1 else 0.0
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
