"""What all scripts share of a training step, by topic:

settings, rollouts and verification, scoring in micro-batches, statistics and loss weights, metrics
and evaluation.

Shapes: P problems, G rollouts of each (the group), T tokens of the longest response, D hidden
width; n rollouts of a micro-batch, P' problems of an update.
Everything else is in infra/ (models, forward passes, engines, data, run folder, command line) and
in grading/. From this project a script imports only this module, which re-exports what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grading import Grader
from infra.cli import StopRun, check_settings, launch, reject, require
from infra.data import Problem, Problems, grade, load_problems
from infra.forward import can_share_prompts, micro_batches, response_states
from infra.lm_head import HeadLogp, lm_head
from infra.models import (
    Reference,
    autocast,
    base_model,
    device,
    get_scheduler,
    load_policy,
    load_tokenizer,
    precision,
    seed_for,
)
from infra.run import Run, TokenValues, bootstrap_interval
from infra.vllm_engine import Engine, make_engine

# ------------------------------------------------------------------ settings

# transformers' names of its learning-rate schedules
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]


@dataclass
class RunArgs:
    """The settings that all methods share. A script's `Args` adds those of its method."""

    # Model and problems
    model: str = "tiny"  # folder or hub name of a causal language model
    dataset: str = "tiny/train.jsonl"  # file, folder or hub name[:config][@split]; no split: train
    eval_dataset: str = "tiny/test.jsonl"  # held-out problems, in the same form; no split: test
    question_column: str = ""  # column of the problem; empty: found by its name, see docs/data.md
    answer_column: str = ""  # column of the reference answer; empty: found by its name
    references: Literal["any", "all"] = "any"  # of several reference answers, how many must match
    system_prompt: str = ""  # for problems without a system message
    instruction: str = ""  # appended to each problem, for example to ask for a \boxed{} answer
    answer_format: Literal["boxed", "line", "auto"] = "boxed"  # line: `Answer: 7`; auto: either
    template_args: str = ""  # JSON for the chat template, such as {"enable_thinking": false}
    max_prompt_tokens: int = 1024  # longer prompts are discarded
    trust_remote_code: bool = False  # run Python code that comes with the model

    # Rollouts
    prompts_per_step: int = 16  # P: problems per step
    group_size: int = 8  # G: rollouts per problem
    max_new_tokens: int = 1024  # limit on a response's length
    temperature: float = 1.0  # logits are divided by it, in sampling and in scoring
    stop_tokens: tuple[str, ...] = ()  # tokens that end a response, in addition to the model's own
    dynamic_sampling: bool = False  # replace groups with equal verdicts by new ones (DAPO)
    generation_rounds: int = 10  # maximum rounds of rollouts per step with --dynamic-sampling
    overlong_buffer: int = 0  # B: the reward falls by up to 1/2 in the last B tokens allowed (DAPO)
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vLLM where it can be used
    gpu_memory: float = 0.3  # vLLM's share of the GPU's memory
    max_logp_gap: float = 0.0  # stop if logp_gap/mean exceeds it; 0 means 0.2 (CPU float32: 1e-4)
    importance_cap: float = 0.0  # weigh tokens by min(π_old / π_engine, cap); 0: off

    # Optimisation
    steps: int = 150  # training steps, each with new rollouts
    updates_per_rollout: int = 1  # optimiser updates per step, each on its share of the problems
    lr: float = 1e-6  # AdamW's learning rate
    lr_schedule: Schedule = "constant"  # after the warm-up; linear and cosine fall to 0
    warmup_ratio: float = 0.0  # share of updates with linear warm-up; rejected with constant
    weight_decay: float = 0.0  # AdamW's
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    lora_rank: int = 0  # train LoRA adapters of this rank; 0: all weights
    lora_alpha: int = 0  # adapters are scaled by alpha / rank; 0: twice the rank
    lora_dropout: float = 0.0  # dropout of the adapters' inputs
    token_budget: int = 8192 if torch.cuda.is_available() else 16384  # tokens per micro-batch
    gradient_checkpointing: bool = False  # less memory, about a third more time
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the policy
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of passes; auto: bfloat16 on CUDA

    # Run
    seed: int = 1  # of everything random
    run_dir: str = ""  # the run's folder; empty: runs/<script>-<seed>-<date>
    resume: str = ""  # folder of an interrupted run; its settings are the defaults
    eval_every: int = 50  # steps between evaluations; 0: only before and after training
    eval_problems: int = 200  # number of held-out problems used, the first ones
    eval_samples: int = 4  # samples per problem, in addition to a greedy response
    save_every: int = 50  # steps between checkpoints; 0: only after the last step
    keep_checkpoints: int = 2  # latest checkpoints kept, in addition to the best by eval/accuracy
    log_rollouts: int = 1  # groups per step written to rollouts.jsonl
    wandb_project: str = ""  # also log to this project of Weights & Biases

    signed: ClassVar[tuple[str, ...]] = ()  # settings that may be negative

    def __post_init__(self) -> None:
        check_settings(self)

    def depends_on_steps(self) -> bool:
        """Whether training depends on --steps, so that a resumed run may not change it."""
        return self.lr_schedule != "constant"

    @property
    def updates(self) -> int:
        """Optimiser updates of the whole run."""
        return self.steps * self.updates_per_rollout

    @property
    def warmup_updates(self) -> int:
        """The first updates, over which the learning rate rises from 0."""
        return math.ceil(self.warmup_ratio * self.updates)


# ------------------------------------------------------------------ rollouts


@dataclass
class Group:
    """One problem and its G rollouts, as lists."""

    problem: Problem
    tokens: list[list[int]] = field(default_factory=list)  # response ids, the EOS token included
    engine_logp: list[list[float]] = field(default_factory=list)  # of each token, by the engine
    texts: list[str] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)  # 1.0 or 0.0, once verified
    notes: list[Any] = field(default_factory=list)  # per rollout, for the method's own use


@dataclass
class Rollouts:
    """P whole groups, right-padded to the longest response."""

    problems: list[Problem]
    tokens: Tensor  # [P, G, T] token ids
    mask: Tensor  # [P, G, T] true on response tokens, the EOS token included
    engine_logp: Tensor  # [P, G, T] as the engine computed it; NaN if not sampled; padding: 0
    correct: Tensor  # [P, G] 1.0 or 0.0
    truncated: Tensor  # [P, G] true if a response does not end in a stop token
    texts: list[list[str]]

    # [P, G, T] once scored, 0 outside the mask
    old_logp: Tensor | None = None  # under the policy that sampled, as the trainer computes it
    entropy: Tensor | None = None  # of that policy's distribution, in nats
    ref_logp: Tensor | None = None  # log-probability under the reference, if there is one


def roll_out(
    engine: Engine,
    problems: list[Problem],
    args: RunArgs,
    seed: tuple[int | str, ...],
    *,
    first_tokens: Tensor | None = None,
    group_size: int | None = None,
    temperature: float | None = None,
) -> list[Group]:
    """G responses to each problem, each sampled with its own seed: a hash of `seed`, p and g.

    first_tokens: [P, G] token ids that the responses begin with; None: every token is sampled.
    group_size, temperature: override those of `args`.
    """
    group_size = group_size or args.group_size
    if temperature is None:
        temperature = args.temperature

    prompts, seeds, starts = [], [], []
    for p, problem in enumerate(problems):
        for g in range(group_size):
            start = [] if first_tokens is None else [int(first_tokens[p, g])]
            starts.append(start)
            prompts.append(problem.prompt + start)
            seeds.append(seed_for(*seed, p, g))
    lengths = [args.max_new_tokens - len(start) for start in starts]
    responses = engine.generate(prompts, seeds, lengths, temperature)

    groups = [Group(problem) for problem in problems]
    for i, (tokens, logp) in enumerate(responses):
        group = groups[i // group_size]
        group.tokens.append(starts[i] + tokens)
        group.engine_logp.append([math.nan] * len(starts[i]) + logp)
    for group in groups:
        group.texts = engine.decode(group.tokens)
    return groups


def verify(grader: Grader, groups: list[Group]) -> None:
    """Set `correct`: 1.0 if the answer of the response equals a reference answer."""
    texts, problems = [], []
    for group in groups:
        texts += group.texts
        problems += [group.problem] * len(group.texts)
    verdicts = iter(grade(grader, texts, problems))
    for group in groups:
        group.correct = [float(next(verdicts)) for _ in group.texts]


def collect(
    args: RunArgs,
    step: int,
    problems: Problems,
    engine: Engine,
    grader: Grader,
    run: Run,
    generate: Callable[..., list[Group]] = roll_out,
) -> list[Group]:
    """P verified groups for one step.

    generate: rolls out groups; REFT passes its own.
    Dynamic sampling discards groups whose verdicts are all equal, and rolls out as many new
    problems. Its last round keeps them, so that there are P groups.
    """
    groups: list[Group] = []
    rounds = args.generation_rounds if args.dynamic_sampling else 1
    for attempt in range(rounds):
        batch = problems.take(args.prompts_per_step - len(groups), args.seed)
        with run.time("rollout"):
            new = generate(engine, batch, args, (args.seed, step, attempt))
        with run.time("verify"):
            verify(grader, new)

        if attempt < rounds - 1:
            new = [group for group in new if 0 < sum(group.correct) < args.group_size]
        groups += new
        if len(groups) == args.prompts_per_step:
            break
    return groups


def stack(groups: list[Group], stop_tokens: list[int], target: torch.device) -> Rollouts:
    """Groups as padded tensors. The mask comes from lengths, never from token ids.

    Two rollouts [5, 2] and [5, 6, 2] of one problem give tokens [[[5, 2, 0], [5, 6, 2]]] and
    mask [[[1, 1, 0], [1, 1, 1]]].
    """

    def pad(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:
        padded = pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
        return padded.view(len(groups), -1, padded.shape[-1]).to(target)  # [P, G, T]

    tokens = [row for group in groups for row in group.tokens]
    logp = [row for group in groups for row in group.engine_logp]
    truncated = [row[-1] not in stop_tokens for row in tokens]
    return Rollouts(
        problems=[group.problem for group in groups],
        tokens=pad(tokens, torch.long),
        mask=pad([[True] * len(row) for row in tokens], torch.bool),
        engine_logp=pad(logp, torch.float32),
        correct=torch.tensor([group.correct for group in groups], device=target),
        truncated=torch.tensor(truncated, device=target).view(len(groups), -1),
        texts=[group.texts for group in groups],
    )


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """0 up to max_length - buffer, then linearly down to -1/2 at max_length (DAPO Eq. 13).

    lengths: [P, G] tokens. Half of DAPO's penalty: DAPO's rewards are 1 and -1, ours 1 and 0.
    """
    if not buffer:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0) / 2


# ------------------------------------------------------------------ scoring
# Log-probabilities and entropies of response tokens. `can_share`: whether a group's rollouts share
# one forward pass over their prompt, through its KV cache.

Index = tuple[Tensor, Tensor]  # (problem, rollout) indices of n rollouts: x[index] is [n, ...]


def hidden_states(model: nn.Module, rollouts: Rollouts, index: Index, args: RunArgs) -> Tensor:
    """Last hidden states, after the final norm, that predict the response tokens of n rollouts.

    Returns [tokens, D], in the order of `rollouts.mask[index]`.
    """
    scoring = not torch.is_grad_enabled()
    was_training = model.training
    model.train(not scoring)  # dropout only in the update
    prompts = [problem.prompt for problem in rollouts.problems]
    tokens, mask = rollouts.tokens[index], rollouts.mask[index]
    can_share = can_share_prompts(model, args)
    with autocast(args):
        states = response_states(model, prompts, index[0], tokens, mask, can_share)
    # The update stays in train mode: with gradient checkpointing, backward() repeats the pass, with
    # the same dropout.
    if scoring:
        model.train(was_training)
    return states


def token_logp(
    model: nn.Module, rollouts: Rollouts, index: Index, args: RunArgs
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token of n rollouts, and entropy of the distribution there.

    Two float32 tensors [n, T], 0 outside the mask. The entropy is in nats and has no gradient.
    """
    hidden = hidden_states(model, rollouts, index, args)
    return head_logp(model, rollouts, index, hidden, args)


def head_logp(
    model: nn.Module, rollouts: Rollouts, index: Index, hidden: Tensor, args: RunArgs
) -> tuple[Tensor, Tensor]:
    """`token_logp` from hidden states, [tokens, D]."""
    mask = rollouts.mask[index]
    weight, logit_scale, soft_cap = lm_head(model)
    scale = logit_scale / args.temperature  # logits = scale × soft cap of (hidden @ weight.T)
    targets = rollouts.tokens[index][mask]
    hidden = hidden.to(precision(args))  # autocast leaves the final norm's output in float32
    logp, entropy = HeadLogp.apply(hidden, weight, targets, scale, soft_cap)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, logp), zeros.masked_scatter(mask, entropy)


@torch.no_grad()
def score(model: nn.Module, rollouts: Rollouts, args: RunArgs) -> tuple[Tensor, Tensor]:
    """`token_logp` of all rollouts: two [P, G, T] that carry no gradient."""
    logp = torch.zeros_like(rollouts.engine_logp)
    entropy = torch.zeros_like(logp)
    everything = torch.arange(len(rollouts.problems))
    token_budget = 4 * args.token_budget  # no activations are kept
    can_share = can_share_prompts(model, args)
    for index in micro_batches(rollouts, token_budget, everything, can_share):
        logp[index], entropy[index] = token_logp(model, rollouts, index, args)
    return logp, entropy


def score_rollouts(
    policy: nn.Module, reference: Reference | None, rollouts: Rollouts, args: RunArgs
) -> None:
    """Set old_logp, entropy and ref_logp of all rollouts, in a forward pass of their own."""
    rollouts.old_logp, rollouts.entropy = score(policy, rollouts, args)
    if reference:
        with reference() as frozen:
            rollouts.ref_logp, _ = score(frozen, rollouts, args)


def needs_scoring_pass(policy: nn.Module, rollouts: Rollouts, args: RunArgs) -> bool:
    """Whether the rollouts need a forward pass of their own before the update.

    They do if a step has several updates, because the policy then moves between them; with LoRA
    dropout, because scoring is without it; and if a group exceeds a micro-batch, because its
    advantages need all its rollouts.
    """
    if args.updates_per_rollout > 1 or args.lora_dropout:
        return True
    everything, group_size = torch.arange(len(rollouts.problems)), rollouts.mask.shape[1]
    can_share = can_share_prompts(policy, args)
    batches = micro_batches(rollouts, args.token_budget, everything, can_share)
    # A batch holds whole groups, or a part of one.
    return any(len(problem_of_row) % group_size for problem_of_row, _ in batches)


@dataclass
class MicroBatch:
    """The whole groups of p problems, scored. Tensors are [p, G, T], 0 outside the mask.

    If a group exceeds the token budget, several micro-batches hold it. Each computes the loss of
    the rollouts in `index`.
    """

    problems: Tensor  # [p] their indices
    mask: Tensor  # true on response tokens
    logp: Tensor  # log-probability under the policy; has a gradient on `trained`
    old_logp: Tensor  # under the policy that sampled, as the trainer computes it
    entropy: Tensor  # of that policy's distribution, in nats
    ref_logp: Tensor | None  # log-probability under the reference, if there is one
    engine_logp: Tensor  # under the policy that sampled, as the engine computed it

    trained: Tensor  # true on the response tokens whose loss this micro-batch computes
    index: Index  # of the n rollouts with these tokens
    hidden: Tensor  # [tokens, D] the policy's hidden states that predict them, no gradient


def scored_micro_batches(
    policy: nn.Module,
    reference: Reference | None,
    rollouts: Rollouts,
    problems: Tensor,
    args: RunArgs,
) -> Iterator[MicroBatch]:
    """The micro-batches of some problems, [P'] indices, each after a forward pass with gradients.

    If the rollouts are not scored yet, the pass also sets their old_logp, entropy and ref_logp.
    """
    scored = rollouts.old_logp is not None
    if not scored:
        rollouts.old_logp = torch.zeros_like(rollouts.engine_logp)
        rollouts.entropy = torch.zeros_like(rollouts.engine_logp)
        rollouts.ref_logp = torch.zeros_like(rollouts.engine_logp) if reference else None

    can_share = can_share_prompts(policy, args)
    for index in micro_batches(rollouts, args.token_budget, problems, can_share):
        if reference and not scored:
            with torch.no_grad(), reference() as frozen:
                rollouts.ref_logp[index], _ = token_logp(frozen, rollouts, index, args)
        hidden = hidden_states(policy, rollouts, index, args)
        logp, entropy = head_logp(policy, rollouts, index, hidden, args)
        if not scored:
            rollouts.old_logp[index] = logp.detach()
            rollouts.entropy[index] = entropy

        chosen = index[0].unique()  # [p], the problems of this batch
        trained = torch.zeros_like(rollouts.mask)
        trained[index] = rollouts.mask[index]
        # Rollouts of these groups that this batch does not train keep old_logp.
        all_logp = rollouts.old_logp.index_put(index, logp)
        yield MicroBatch(
            problems=chosen,
            mask=rollouts.mask[chosen],
            logp=all_logp[chosen],
            old_logp=rollouts.old_logp[chosen],
            entropy=rollouts.entropy[chosen],
            ref_logp=rollouts.ref_logp[chosen] if reference else None,
            engine_logp=rollouts.engine_logp[chosen],
            trained=trained[chosen],
            index=index,
            hidden=hidden.detach(),
        )


def check_engine(rollouts: Rollouts, args: RunArgs) -> dict[str, float]:
    """Absolute difference of engine and trainer log-probabilities, mean and maximum in nats.

    Raises StopRun if the mean exceeds --max-logp-gap, because then the engine probably sampled from
    other weights than those being trained, or if a log-probability is not finite.
    """
    if not rollouts.old_logp[rollouts.mask].isfinite().all():
        raise StopRun("the policy's log-probabilities are not finite")

    sampled = rollouts.mask & ~rollouts.engine_logp.isnan()  # NaN: the engine did not sample it
    gap = (rollouts.engine_logp - rollouts.old_logp)[sampled].abs()
    mean = gap.mean().item()
    maximum = gap.max().item() if len(gap) else math.nan

    exact = precision(args) is torch.float32 and not gap.is_cuda
    allowed = args.max_logp_gap or (1e-4 if exact else 0.2)
    if math.isnan(mean) or mean > allowed:  # NaN: the engine sampled no token
        raise StopRun(
            f"engine and trainer differ by {mean:.2g} nats per token on average and {maximum:.2g} "
            f"at most, more than --max-logp-gap {allowed:g}"
        )
    return {"logp_gap/mean": mean, "logp_gap/max": maximum}


# ------------------------------------------------------------------ statistics and loss weights


def group_moments(x: Tensor, mask: Tensor, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x over the tokens of each group at which the mask is true.

    x and mask are [..., G, T], the results [..., 1, 1]. correction: 1 divides by the count minus 1
    (unbiased), 0 by the count. The standard deviation of equal values, or of fewer than two, is
    exactly 0: it is set to 0 if lowest == highest, because rounding would leave a remainder.
    """
    over_group = {"dim": (-2, -1), "keepdim": True}
    count = mask.sum(**over_group)
    mean = torch.where(mask, x, 0.0).sum(**over_group) / count.clamp(min=1)
    squares = torch.where(mask, x - mean, 0.0).square().sum(**over_group)
    std = (squares / (count - correction).clamp(min=1)).sqrt()

    lowest = torch.where(mask, x, torch.inf).amin(**over_group)
    highest = torch.where(mask, x, -torch.inf).amax(**over_group)
    return mean, torch.where(lowest < highest, std, 0.0)


def standardize(x: Tensor, mask: Tensor, eps: float, correction: int = 1) -> Tensor:
    """The z-score of x over the tokens of each group at which the mask is true.

    x and mask are [..., G, T]. Returns the same shape, 0 outside the mask and in groups whose
    values are all equal.
    """
    mean, std = group_moments(x, mask, correction)
    return torch.where(mask & (std > 0), (x - mean) / (std + eps), 0.0)


def importance_weights(old_logp: Tensor, engine_logp: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling between engine and trainer: min(π_old / π_engine, cap).

    Both [..., T]. 1 if cap is 0, and on tokens that the engine did not sample (NaN). The weights
    multiply the whole loss of a token, its KL term included.
    """
    if not cap:
        return torch.ones_like(old_logp)
    ratio = (old_logp - engine_logp).exp().clamp(max=cap)
    return torch.where(ratio.isnan(), 1.0, ratio)


def shuffled_shares(count: int, shares: int, seed: int) -> tuple[Tensor, ...]:
    """The numbers 0 ... count - 1 in random order, in equal shares. `shares` divides `count`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).chunk(shares)


def token_weights(mask: Tensor, share: Tensor, average: str, max_new_tokens: int) -> Tensor:
    """The weight of each token in the loss of one optimiser update, [P, G, T].

    mask: [P, G, T]; share: [P'], the update's problems, all others weigh 0. The weights are those
    of the whole update, so the gradient does not depend on the size of micro-batches.
    average: "token" is the mean over all tokens (DAPO Eq. 8); "sequence" the mean over each
    response's tokens, then over responses (DeepSeekMath Eq. 3); "constant" divides the sum by the
    number of responses × max_new_tokens (Dr. GRPO).
    """
    update_mask = torch.zeros_like(mask)
    update_mask[share] = mask[share]
    responses = update_mask.any(-1).sum()
    if average == "token":
        return update_mask / update_mask.sum()
    if average == "sequence":
        return update_mask / update_mask.sum(-1, keepdim=True).clamp(min=1) / responses
    return update_mask / (responses * max_new_tokens)


# ------------------------------------------------------------------ metrics and evaluation


def rollout_metrics(rollouts: Rollouts, rewards: Tensor) -> dict[str, Any]:
    """Means over a step's rollouts; zero_variance is the share of groups with equal rewards.

    rewards: [P, G].
    """
    lengths = rollouts.mask.sum(-1).float()
    equal_rewards = rewards.amax(-1) == rewards.amin(-1)
    boxed = [Grader.boxed(text) is not None for row in rollouts.texts for text in row]
    return {
        "reward": rewards.mean(),
        "accuracy": rollouts.correct.mean(),
        "zero_variance": equal_rewards.float().mean(),
        "length": lengths.mean(),
        "truncated": rollouts.truncated.float().mean(),
        "boxed": np.mean(boxed),
        "entropy": rollouts.entropy[rollouts.mask].mean(),
    }


def evaluate(engine: Engine, grader: Grader, problems: Problems, args: RunArgs) -> dict[str, Any]:
    """On held-out problems: accuracy of samples, greedy accuracy, length.

    The 95% interval of the accuracy is bootstrapped over problems.
    """
    chosen = problems[: args.eval_problems]
    seed = (args.seed, "evaluation")
    sampled = roll_out(engine, chosen, args, seed, group_size=args.eval_samples)
    seed = (args.seed, "greedy")
    greedy = roll_out(engine, chosen, args, seed, group_size=1, temperature=0.0)
    verify(grader, sampled + greedy)

    accuracy = np.array([np.mean(group.correct) for group in sampled])
    low, high = bootstrap_interval(accuracy)
    return {
        "eval/accuracy": accuracy.mean(),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/greedy": np.mean([group.correct[0] for group in greedy]),
        "eval/length": np.mean([len(row) for group in sampled for row in group.tokens]),
    }
