"""VinePPO: Monte Carlo values in the place of PPO's value network (arXiv 2410.01679).

grpo.py, but the advantage of a step is what it changed: the chance of a right answer after it less
the chance before it. A chance is measured. From the start of each step of each rollout the policy
writes K fresh continuations to their ends, and their mean reward is the value. Nothing is learned
to estimate it; the price is tokens. Equations and marks: docs/vineppo.md.

    python vineppo.py --lr 2e-4 --max-new-tokens 64        # the tiny model, on a laptop
    python vineppo.py --model Qwen/Qwen2.5-1.5B-Instruct --dataset openai/gsm8k:main \\
        --eval-dataset openai/gsm8k:main --instruction 'Put your final answer in \\boxed{}.'

Left out: several GPUs, asynchronous rollouts, reward models.
"""

from __future__ import annotations

import bisect
import itertools
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    continuations: int = 9
    """K: drawn from the start of each step to measure its value (VinePPO: 9)"""
    step_end: str = r"[.;]?\s*\n\s*|[.;](?=\s+\S)"
    """regular expression that steps end with"""
    whiten: bool = True
    """standardise advantages over all tokens of the step's rollouts (VinePPO: yes)"""
    clip_low: float = 0.2
    """ε_low: the ratio is clipped at 1 - ε_low"""
    clip_high: float = 0.2
    """ε_high: the ratio is clipped at 1 + ε_high (DAPO: 0.28)"""
    loss_average: Literal["token", "sequence", "constant"] = "token"
    """token: over all tokens (DAPO); sequence: over each response, then over responses
    (DeepSeekMath); constant: sum over tokens / --max-new-tokens (Dr. GRPO)"""
    kl: float = 1e-4
    """β: weight of the KL penalty to the frozen initial policy (VinePPO: 1e-4)"""
    updates_per_rollout: int = 1
    """optimiser updates a step, each on its own share of the problems (VinePPO: 8, twice over)"""
    lora_rank: int = 0
    """train LoRA adapters of this rank; 0: all weights"""

    def __post_init__(self) -> None:
        if self.continuations < 1:
            refuse("--continuations", self.continuations, "must be at least 1")
        try:
            re.compile(self.step_end)
        except re.error as error:
            refuse("--step-end", self.step_end, f"is no regular expression: {error}")

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
def step_ends(pieces: list[str], step_end: str) -> list[int]:
    """Where the steps of a response end, as counts of its tokens; the last is all of them.

    pieces: the text of each token. A step ends with the token that a match of `step_end` ends in;
    what follows the last match, if it has any text, is the last step.
    """
    reached = list(itertools.accumulate(map(len, pieces)))  # [T] characters up to and with a token
    matches = (match.end() for match in re.finditer(step_end, "".join(pieces)))
    ends = {bisect.bisect_left(reached, end) + 1 for end in matches if 0 < end < reached[-1]}
    return [*sorted(ends - {len(pieces)}), len(pieces)]


def vineppo_advantages(
    values: Tensor, steps: Tensor, rewards: Tensor, mask: Tensor, *, whiten: bool = True
) -> Tensor:
    """The change of value over its step, for each token: [P, G, T], 0 outside the mask.

    values: [P, G, S], of the prefix before each step; steps: [P, G, T], which step a token is in,
    from 0; rewards: [P, G], the value after the last step. whiten: z-scores over all live tokens.
    """
    last = steps.amax(-1, keepdim=True)  # [P, G, 1]
    after = values.roll(-1, dims=-1).scatter(-1, last, rewards[..., None])  # [P, G, S]
    advantages = (after - values).gather(-1, steps) * mask  # Eq. 6 [code]
    if not whiten:
        return advantages
    together = advantages.flatten(0, 1), mask.flatten(0, 1)  # [P G, T]
    return common.standardize(*together, eps=1e-8).view_as(advantages)  # Eq. whitening [code]


def token_texts(engine: Engine, tokens: set[int]) -> dict[int, str]:
    """The text of each token as it reads after another: some tokenizers drop the space that a
    text begins with."""
    other = engine.tokenizer.encode("1", add_special_tokens=False)[-1]
    alone, *pairs = engine.decode([[other], *([other, token] for token in tokens)])
    return {token: pair[len(alone) :] for token, pair in zip(tokens, pairs, strict=True)}


def estimate_values(
    engine: Engine,
    grader: Grader,
    groups: list[common.Group],
    args: Args,
    seed: tuple[int | str, ...],
) -> None:
    """Note of each rollout: which step each token is in, the value of the prefix before each step,
    and how many tokens were drawn to measure it.

    A value is the mean reward of K continuations, drawn once for all rollouts of a group that begin
    with the same prefix: the empty one is the prefix of all.
    """
    texts = token_texts(engine, {t for group in groups for row in group.tokens for t in row})
    rollouts = [(p, tuple(row)) for p, group in enumerate(groups) for row in group.tokens]
    ends = [step_ends([texts[token] for token in row], args.step_end) for _, row in rollouts]
    prefixes = [
        [(p, row[:start]) for start in (0, *of_row[:-1])]
        for (p, row), of_row in zip(rollouts, ends, strict=True)
    ]
    different = dict.fromkeys(itertools.chain.from_iterable(prefixes))
    drawn = [(*prefix, k) for prefix in different for k in range(args.continuations)]
    responses = engine.generate(
        [groups[p].problem.prompt + list(prefix) for p, prefix, _ in drawn],
        [seed_for(*seed, "value", *place) for place in drawn],
        [args.max_new_tokens - len(prefix) for _, prefix, _ in drawn],
        args.temperature,
    )
    new = [tokens for tokens, _ in responses]
    whole = [[*prefix, *tokens] for (_, prefix, _), tokens in zip(drawn, new, strict=True)]
    golds = [groups[p].problem.answer for p, _, _ in drawn]
    correct = torch.tensor(grader.grade(engine.decode(whole), golds), dtype=torch.float32)
    lengths = torch.tensor([len(row) for row in whole])
    rewards = correct + overlong_penalty(lengths, args.max_new_tokens, args.overlong_buffer)
    means = rewards.view(-1, args.continuations).mean(-1)  # Eq. 5 [code]
    values = dict(zip(different, means.tolist(), strict=True))
    spent = dict.fromkeys(different, 0)
    for (p, prefix, _), tokens in zip(drawn, new, strict=True):
        spent[p, prefix] += len(tokens)

    # Rollouts that share a prefix share its value; its tokens are counted with one of them alone.
    for (p, row), of_row, starts in zip(rollouts, ends, prefixes, strict=True):
        steps = [bisect.bisect_right(of_row, t) for t in range(len(row))]
        before = [values[start] for start in starts]
        groups[p].notes.append((steps, before, sum(spent.pop(start, 0) for start in starts)))


def stack_values(groups: list[common.Group], where: torch.device) -> tuple[Tensor, Tensor]:
    """What `estimate_values` noted: the step that each token is in, [P, G, T], and the value of the
    prefix before each step, [P, G, S]."""
    steps, values, _ = zip(*(note for group in groups for note in group.notes), strict=True)
    rows = [pad_sequence([*map(torch.tensor, x)], batch_first=True) for x in (steps, values)]
    return tuple(x.view(len(groups), -1, x.shape[-1]).to(where) for x in rows)


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
            estimate_values(engine, grader, new, args, seed)
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
        steps, values = stack_values(groups, mask.device)  # [P, G, T], [P, G, S]
        advantages = vineppo_advantages(values, steps, rewards, mask, whiten=args.whiten)
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
        value = values.gather(-1, steps) * mask  # before the step that a token is in
        signals = {"advantage": advantages, "value": value}
        metrics |= {
            "value/prompt": values[..., 0].mean(),
            "value/steps": (steps.amax(-1) + 1.0).mean(),
            "value/tokens": float(sum(spent for group in groups for *_, spent in group.notes)),
        }
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
