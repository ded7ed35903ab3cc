r"""VinePPO: Monte Carlo values in place of PPO's value network (arXiv 2410.01679).

A response is split into steps, such as sentences. From the start of each step the policy samples K
continuations, whose mean reward is the value there. The advantage of a step's tokens is the value
after the step minus the value before it; the value after the last step is the reward.
Comments "Eq. ..." refer to rows of docs/vineppo.md. [code]: the authors' code.

    python vineppo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python vineppo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \boxed{}.'

Shapes: P problems (p in a micro-batch), G rollouts of each (the group), T response tokens, S steps.
"""

from __future__ import annotations

import re
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
    continuations: int = 9
    """K: sampled from the start of each step to estimate the value there (released code: 9)"""
    step_end: str = r"\n|[.;]\s"
    """regular expression; the token in which a match ends is the last of its step"""
    whiten: bool = True
    """standardise advantages over all tokens of a training step (released code: of each update)"""
    clip_low: float = 0.2
    """ε_low: the ratio is clipped at 1 - ε_low"""
    clip_high: float = 0.2
    """ε_high: the ratio is clipped at 1 + ε_high (DAPO: 0.28)"""
    loss_average: Literal["token", "sequence", "constant"] = "token"
    """token: over all tokens (DAPO); sequence: over each response, then over responses
    (DeepSeekMath); constant: over responses × --max-new-tokens (Dr. GRPO)"""
    kl: float = 1e-4
    """β: weight of the KL to the initial policy, summed over a response (released code: 1e-4)"""

    def __post_init__(self) -> None:
        super().__post_init__()  # the shared checks; no number may be negative
        common.require(self.continuations, "--continuations", self.continuations, "must be above 0")
        try:
            re.compile(self.step_end)
        except (re.error, OverflowError) as error:
            common.reject("--step-end", self.step_end, f"is not a regular expression: {error}")

    # </method>


# <method>
def step_ends(pieces: list[str], step_end: str) -> list[int]:
    """The number of tokens up to the end of each step. The last is the response's length.

    pieces: each token's text, empty for EOS. The token in which a match of `step_end` ends is the
    last of its step, unless no text follows: ["2", ".", " So", " 4"] and "[.]\\s" give [3, 4].
    """
    token_of_character = []
    for t, piece in enumerate(pieces):
        token_of_character += [t] * len(piece)

    last = max(token_of_character, default=0)  # the last token with text
    ends = {len(pieces)}
    for match in re.finditer(step_end, "".join(pieces)):
        if match.end() > 0 and token_of_character[match.end() - 1] < last:
            ends.add(token_of_character[match.end() - 1] + 1)
    return sorted(ends)


def vineppo_advantages(
    values: Tensor, steps: Tensor, rewards: Tensor, mask: Tensor, *, whiten: bool = True
) -> Tensor:
    """The change of value over its step, for each token: [P, G, T], 0 outside the mask.

    values: [P, G, S], the value before each step; rewards: [P, G], the value after the last step;
    steps: [P, G, T], each token's step, from 0. whiten: z-scores over all tokens of [P, G, T].
    """
    steps = torch.where(mask, steps, 0)
    last = steps.amax(-1, keepdim=True)  # [P, G, 1]
    # The value after a step is that before the next one, after the last step the reward.
    after = values.roll(-1, dims=-1).scatter(-1, last, rewards[..., None])  # [P, G, S]
    advantages = (after - values).gather(-1, steps) * mask  # Eq. 6 [code]
    if whiten:  # all P × G rollouts as one group
        rows, is_token = advantages.flatten(0, 1), mask.flatten(0, 1)
        advantages = common.standardize(rows, is_token, eps=1e-8)  # Eq. whitening [code]
    return advantages.view_as(mask)


def kl_penalty(logp: Tensor, ref_logp: Tensor, weights: Tensor) -> Tensor:
    """The KL estimate of each response, summed over its tokens: three [..., T] -> [...].

    weights: 0 outside the response, on its tokens 1 or their importance weight.
    """
    return (kl_estimate(logp, ref_logp).clamp(0, 10) * weights).sum(-1)  # Eq. KL [code]


def token_texts(engine: common.Engine, tokens: set[int]) -> dict[int, str]:
    """The text of each token as it reads after "1": some tokenizers drop a leading space."""
    first = engine.tokenizer.encode("1", add_special_tokens=False)[-1]
    alone, *pairs = engine.decode([[first]] + [[first, token] for token in tokens])
    return {token: pair[len(alone) :] for token, pair in zip(tokens, pairs, strict=True)}


def estimate_values(
    engine: common.Engine,
    grader: common.Grader,
    groups: list[common.Group],
    args: Args,
    seed: tuple[int | str, ...],
) -> tuple[Tensor, Tensor, int]:
    """The mean reward of K continuations of the prefix before each step of each rollout.

    Returns the step of each token, [P, G, T], the value before each step, [P, G, S], and how many
    tokens were sampled. Rollouts of a group that share a prefix share its continuations.
    """
    vocabulary = set()  # the tokens that occur
    for group in groups:
        vocabulary.update(*group.tokens)
    texts = token_texts(engine, vocabulary)

    # Split each rollout into steps, and number the different prefixes (p, tokens) before steps.
    longest = max(len(row) for group in groups for row in group.tokens)
    steps = torch.zeros(len(groups), len(groups[0].tokens), longest, dtype=torch.long)
    prefix_before = torch.zeros_like(steps)  # [P, G, S] number of the prefix before a step; S = T
    ids = {}  # the number of each prefix
    for p, group in enumerate(groups):
        for g, row in enumerate(group.tokens):
            start = 0
            pieces = [texts[token] for token in row]
            for s, end in enumerate(step_ends(pieces, args.step_end)):
                steps[p, g, start:end] = s
                prefix = p, tuple(row[:start])
                prefix_before[p, g, s] = ids.setdefault(prefix, len(ids))
                start = end

    # Continue each prefix K times.
    prompts, seeds, limits = [], [], []
    for p, prefix in ids:
        for k in range(args.continuations):
            prompts.append(groups[p].problem.prompt + list(prefix))
            seeds.append(common.seed_for(*seed, "value", p, prefix, k))
            limits.append(args.max_new_tokens - len(prefix))
    continuations = engine.generate(prompts, seeds, limits, args.temperature)

    # Each prefix and continuation are graded as one response. Their mean reward is its value.
    prefixes = list(ids)
    responses, problems = [], []
    for i, (tokens, _) in enumerate(continuations):
        p, prefix = prefixes[i // args.continuations]
        responses.append([*prefix, *tokens])
        problems.append(groups[p].problem)
    verdicts = common.grade(grader, engine.decode(responses), problems)

    lengths = torch.tensor([len(row) for row in responses])
    penalty = common.overlong_penalty(lengths, args.max_new_tokens, args.overlong_buffer)
    rewards = torch.tensor(verdicts).float() + penalty
    values = rewards.view(-1, args.continuations).mean(-1)  # Eq. 5 [code]

    sampled = sum(len(tokens) for tokens, _ in continuations)
    device = common.device(args)
    return steps.to(device), values[prefix_before].to(device), sampled


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
        with run.time("rollout"):
            seed = args.seed, step, 0  # as collect's first round has
            step_of_token, values, sampled = estimate_values(engine, grader, groups, args, seed)
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
        advantages = vineppo_advantages(values, step_of_token, rewards, mask, whiten=args.whiten)
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
                    loss = (loss * loss_weights).sum()
                    if args.kl:
                        kl_weights = importance * batch.trained
                        penalty = kl_penalty(batch.logp, batch.ref_logp, kl_weights).sum()
                        loss = loss + args.kl * penalty / (len(share) * args.group_size)
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
        per_token["value"] = values.gather(-1, step_of_token)  # before the token's step
        metrics["value/prompt"] = values[..., 0].mean()
        metrics["value/steps"] = (step_of_token.amax(-1) + 1.0).mean()
        metrics["value/tokens"] = float(sampled)

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
