"""What a step does that no method changes, in the order in which it happens:

problems → rollouts → verdicts → scores under a model → micro-batches → evaluation.

Shapes: P problems, G rollouts of each (the group), T response tokens, D hidden width.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import data
from engine import (
    Engine,
    StopRun,
    autocast,
    base_model,
    is_recurrent,
    lm_head,
    precision,
    prompt_cache,
    refuse,
    seed_for,
)
from grading import Grader, last_boxed
from run import RunArgs

# ------------------------------------------------------------------------------- problems


@dataclass
class Problem:
    """A question as prompt tokens, and its gold answer."""

    text: str
    answer: str
    prompt: list[int]


class Problems(list[Problem]):
    """Problems in a shuffled order that depends on the seed and the epoch alone."""

    position = 0  # how many have been taken; a checkpoint holds it

    def take(self, count: int, seed: int) -> list[Problem]:
        """The next `count` problems; each epoch has its own order."""
        taken = []
        for place in range(self.position, self.position + count):
            epoch, offset = divmod(place, len(self))
            order = np.random.default_rng(seed_for(seed, "epoch", epoch)).permutation(len(self))
            taken.append(self[order[offset]])
        self.position += count
        return taken


def load_problems(args: RunArgs, flag: str, tokenizer: Any, grader: Grader) -> Problems:
    """Read the data set that --dataset or --eval-dataset names, as docs/data.md describes: what is
    dropped is counted, what cannot be used refused."""
    name = getattr(args, flag.strip("-").replace("-", "_"))

    def note(count: int, of: list[Any], what: str) -> None:
        if count and count == len(of):
            refuse(flag, name, f"{count} of {len(of)} {what}")
        if count:
            print(f"{flag} {name}: {count} of {len(of)} {what}", file=sys.stderr)

    arguments = data.template_arguments(args)
    rows = data.read_rows(flag, name, split="train" if flag == "--dataset" else "test")
    if not (rows := [data.flatten(row) for row in rows if row]):
        refuse(flag, name, "holds no problems")
    question, answer = (data.find_column(rows, args, flag, what) for what in data.COLUMNS)
    asked = [(chat, row.get(answer)) for row in rows if (chat := data.as_chat(row.get(question)))]
    note(len(rows) - len(asked), rows, f"problems have no text in {question!r} and are dropped")

    golds = [data.gold_answer(value) for _, value in asked]
    readable = grader.readable(golds)
    unread = [repr(asked[i][1])[:40] for i, fine in enumerate(readable) if not fine]
    what = "gold answers cannot be read and are dropped: " + ", ".join([*dict.fromkeys(unread)][:5])
    note(len(unread), asked, what)

    problems = []
    for (chat, _), gold in itertools.compress(zip(asked, golds, strict=True), readable):
        text = chat[-1]["content"]
        if args.instruction:
            chat[-1]["content"] += f"\n{args.instruction}"
        if args.system_prompt and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": args.system_prompt})
        try:
            problems.append(Problem(text, gold, data.prompt_tokens(tokenizer, chat, **arguments)))
        except ValueError as error:
            model = "--models" if flag == "--datasets" else "--model"
            given = {"--system-prompt": args.system_prompt, "--template-args": args.template_args}
            used = "".join(f", given {option} {value}" for option, value in given.items() if value)
            refuse(model, tokenizer.name_or_path, f"its chat template{used}: {error}")
    short = [problem for problem in problems if len(problem.prompt) <= args.max_prompt_tokens]
    what = f"prompts exceed --max-prompt-tokens {args.max_prompt_tokens} and are dropped"
    note(len(problems) - len(short), problems, what)
    different = {tuple(problem.prompt) for problem in short}
    note(len(short) - len(different), short, "problems repeat another and are kept")
    return Problems(short)


# ------------------------------------------------------------------------------- rollouts


@dataclass
class Group:
    """One problem and its G rollouts, as lists."""

    problem: Problem
    tokens: list[list[int]]  # response token ids, the end-of-sequence token included
    engine_logp: list[list[float]]  # of those tokens, as the engine computed them
    texts: list[str]
    correct: list[float] = field(default_factory=list)  # 1.0 or 0.0, once verified
    notes: list[Any] = field(default_factory=list)  # what the method keeps of each rollout


@dataclass
class Rollouts:
    """P whole groups, right-padded to the longest response."""

    problems: list[Problem]
    tokens: Tensor  # [P, G, T] token ids
    mask: Tensor  # [P, G, T] true on response tokens, the end-of-sequence token included
    engine_logp: Tensor  # [P, G, T] NaN on tokens that the engine did not sample, 0 in the padding
    truncated: Tensor  # [P, G] true where a response reached --max-new-tokens
    texts: list[list[str]]
    graph: tuple[Tensor, Tensor] | None = None  # log-probabilities and entropy with their graph


def roll_out(
    engine: Engine,
    problems: list[Problem],
    args: RunArgs,
    seed: tuple[int | str, ...],
    *,
    openers: Tensor | None = None,
    group_size: int | None = None,
    temperature: float | None = None,
) -> list[Group]:
    """G responses to each problem. A response is a function of the weights and its own seed.

    openers: [P, G] token ids that responses begin with; None: every token is sampled.
    group_size, temperature: others than those of the settings.
    """
    size = group_size or args.group_size
    heat = args.temperature if temperature is None else temperature
    places = [(p, g) for p in range(len(problems)) for g in range(size)]
    opened = [[] if openers is None else [int(openers[place])] for place in places]
    prompts = [problems[p].prompt + start for (p, _), start in zip(places, opened, strict=True)]
    seeds = [seed_for(*seed, p, g) for p, g in places]
    lengths = [args.max_new_tokens - len(start) for start in opened]
    responses = engine.generate(prompts, seeds, lengths, heat)
    groups = [Group(problem, [], [], []) for problem in problems]
    for (p, _), start, (tokens, logp) in zip(places, opened, responses, strict=True):
        groups[p].tokens.append(start + tokens)
        groups[p].engine_logp.append([math.nan] * len(start) + logp)
    for group in groups:
        group.texts = engine.decode(group.tokens)
    return groups


def verify(grader: Grader, groups: list[Group]) -> None:
    """Fill in `correct`: 1.0 where the response's last \\boxed{} equals the gold answer."""
    texts = [text for group in groups for text in group.texts]
    golds = [group.problem.answer for group in groups for _ in group.texts]
    verdicts = iter(grader.grade(texts, golds))
    for group in groups:
        group.correct = [float(next(verdicts)) for _ in group.texts]


def stack(groups: list[Group], end_tokens: list[int], where: torch.device) -> Rollouts:
    """Groups as padded tensors; the mask comes from lengths, never from token ids."""

    def pad(rows: list[list[Any]], dtype: torch.dtype) -> Tensor:  # [P, G, T]
        padded = pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
        return padded.view(len(groups), -1, padded.shape[-1]).to(where)

    responses = [row for group in groups for row in group.tokens]
    ended = [row[-1] in end_tokens for row in responses]
    return Rollouts(
        problems=[group.problem for group in groups],
        tokens=pad(responses, torch.long),
        mask=pad([[True] * len(row) for row in responses], torch.bool),
        engine_logp=pad([row for group in groups for row in group.engine_logp], torch.float32),
        truncated=~torch.tensor(ended, device=where).view(len(groups), -1),
        texts=[group.texts for group in groups],
    )


# ------------------------------------------------------------------------------- scoring

# All logits at once could fill the memory. A GPU likes large tiles, a CPU's caches small ones.
LOGITS_AT_ONCE = 2**26 if torch.cuda.is_available() else 2**22
Index = tuple[Tensor, Tensor]  # (problem, rollout) indices of n rollouts: x[index] is [n, ...]


def micro_batches(rollouts: Rollouts, token_budget: int, problems: Tensor) -> Iterator[Index]:
    """The rollouts of some problems ([P'] indices), cut into batches of at most `token_budget`
    tokens, padding included. Sorted by length, so there is little of it."""
    group_size = rollouts.mask.shape[1]
    lengths = rollouts.mask.sum(-1).tolist()
    order = sorted(
        (len(rollouts.problems[p].prompt) + lengths[p][g], p, g)
        for p in problems.tolist()
        for g in range(group_size)
    )
    batch: list[tuple[int, int]] = []
    for length, p, g in order:
        if batch and length * (len(batch) + 1) > token_budget:
            yield tuple(torch.tensor(batch).T)
            batch = []
        batch.append((p, g))
    yield tuple(torch.tensor(batch).T)


def hidden_states(model: nn.Module, rollouts: Rollouts, index: Index, args: RunArgs) -> Tensor:
    """Last hidden states (after the final norm) at the positions that predict the live response
    tokens of n rollouts, in the order of `mask[index]`: [tokens, D].

    Where that saves a quarter of the tokens, each prompt is computed once for all its rollouts."""
    body = base_model(model).base_model
    model.train(torch.is_grad_enabled())
    lengths = rollouts.mask[index].sum(-1)  # [n]
    longest = slice(lengths.max())
    tokens, mask = rollouts.tokens[index][:, longest], rollouts.mask[index][:, longest]  # [n, T]
    problems, which = index[0].unique(return_inverse=True)
    prompts, which = [rollouts.problems[p].prompt for p in problems], which.to(mask.device)
    # The prompt's last token predicts the response's first, which predicts the second, and so on.
    starts, last = [p[:-1] for p in prompts], tokens.new_tensor([p[-1] for p in prompts])
    inputs = torch.cat([last[which, None], tokens[:, :-1]], dim=1)  # [n, T]
    skipped = tokens.new_tensor([len(start) for start in starts])[which]  # [n]

    together = inputs.numel() + len(starts) * skipped.max()  # tokens to compute
    apart = len(inputs) * (skipped + lengths).max()
    shared = not args.gradient_checkpointing and not is_recurrent(model)
    with autocast(args):
        if together < 0.75 * apart and shared:
            cache, real = prompt_cache(model, starts, which)
            real = torch.cat([real, torch.ones_like(mask)], dim=1)
            places = (real.cumsum(-1) - 1)[:, -inputs.shape[1] :]
            context = {"attention_mask": real, "position_ids": places, "past_key_values": cache}
            return body(input_ids=inputs, **context)[0][mask]
        rows = zip(which, inputs, mask, strict=True)
        rows = [torch.cat([tokens.new_tensor(starts[p]), row[live]]) for p, row, live in rows]
        # Padding is on the right, where causal attention keeps every real token from seeing it.
        states = body(input_ids=pad_sequence(rows, batch_first=True), use_cache=False)[0]
        row, place = mask.nonzero().T
        return states[row, skipped[row] + place]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed up and returned in float32: as vLLM computes its logits."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class HeadLogp(torch.autograd.Function):
    """The LM head, up to the log-probability of each target and the entropy (nats; no gradient):
    two [tokens], float32. Logits exist for one tile of the vocabulary at a time, and are computed
    again in the backward pass.

    hidden: [tokens, D], in the precision of the body; weight: [V, D]; targets: [tokens]; scale:
    what logits are multiplied by; cap: what they are softly kept below (Gemma 2), 0: nothing.
    """

    @staticmethod
    def tiles(
        hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, cap: float
    ) -> Iterator[Any]:
        width = max(1, LOGITS_AT_ONCE // len(hidden))
        for start, w in zip(range(0, len(weight), width), weight.split(width), strict=True):
            w = w.to(hidden.dtype)
            column = (targets - start)[:, None]
            here = (column >= 0) & (column < len(w))  # whether the target lies in this tile
            logits = product(hidden, w.T)
            if cap:
                logits = cap * (logits / cap).tanh()
            yield slice(start, start + len(w)), w, logits.mul_(scale), column * here, here

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        masses, picked, entropies = [], [], []  # one value a token of each tile
        for _, _, logits, column, here in HeadLogp.tiles(*inputs):
            logp = logits.log_softmax(-1)
            masses.append(logits.amax(-1) - logp.amax(-1))  # log Σ exp(logits)
            picked.append(logp.gather(-1, column)[:, 0].where(here[:, 0], -torch.inf))
            entropies.append(-torch.linalg.vecdot(logp.exp(), logp))
        masses, picked, entropies = (torch.stack(x) for x in (masses, picked, entropies))
        *tensors, ctx.scale, ctx.cap = inputs
        ctx.save_for_backward(*tensors, masses.logsumexp(0))
        # A token is drawn by drawing its tile first: probabilities multiply, entropies add up.
        tile_logp = masses.log_softmax(0)
        entropy = (tile_logp.exp() * (entropies - tile_logp)).sum(0)
        ctx.mark_non_differentiable(entropy)
        return (picked + tile_logp).amax(0), entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, log_total = ctx.saved_tensors
        hidden, weight, _ = inputs
        scale = grad[:, None] * ctx.scale
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for rows, w, logits, column, here in HeadLogp.tiles(*inputs, ctx.scale, ctx.cap):
            slope = 1 - (logits / (ctx.scale * ctx.cap)).square() if ctx.cap else 1  # of the tanh
            # ∂ log p_target / ∂ logits = 1[target] - p
            d_logits = logits.sub_(log_total[:, None]).exp_().mul_(-scale)
            d_logits = d_logits.scatter_add_(-1, column, scale * here)
            d_logits = (d_logits * slope).to(hidden.dtype)
            d_hidden += d_logits @ w
            if d_weight is not None:
                d_weight[rows] = d_logits.T @ hidden
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def token_logp(
    model: nn.Module, rollouts: Rollouts, index: Index, args: RunArgs
) -> tuple[Tensor, Tensor]:
    """Log-probability of each response token of n rollouts, and the entropy of the distribution
    it was drawn from (nats, no gradient): two [n, T], 0 outside the mask, float32."""
    if rollouts.graph and torch.is_grad_enabled():
        scores, rollouts.graph = rollouts.graph, None  # one backward pass uses it up
        return tuple(values[index] for values in scores)
    mask = rollouts.mask[index]
    hidden = hidden_states(model, rollouts, index, args).to(precision(args))
    weight, scale, cap = lm_head(model)
    targets = rollouts.tokens[index][mask]
    scores = HeadLogp.apply(hidden, weight, targets, scale / args.temperature, cap)
    nothing = torch.zeros(mask.shape, device=mask.device)
    return tuple(nothing.masked_scatter(mask, values) for values in scores)


def drops_out(model: nn.Module, args: Any) -> bool:
    """Whether the model gives other values in training, by dropout of its own or of LoRA."""
    config = base_model(model).config.get_text_config().to_dict()
    return any([args.lora_dropout, *(rate for name, rate in config.items() if "drop" in name)])


@torch.no_grad()
def score(
    model: nn.Module, rollouts: Rollouts, args: Any, *, reuse: bool = False
) -> tuple[Tensor, Tensor]:
    """`token_logp` of every rollout, without a gradient: two [P, G, T].

    reuse: where one micro-batch holds all rollouts of the only update to come, that update need not
    compute the same again: the rollouts keep the graph, for the next `token_logp` to go back from.
    """
    logp, entropy = (torch.zeros_like(rollouts.engine_logp) for _ in range(2))
    everything = torch.arange(len(rollouts.problems))
    batches = list(micro_batches(rollouts, args.token_budget, everything))
    keep = reuse and len(batches) == args.updates_per_rollout == 1
    keep = keep and not drops_out(model, args)
    if not keep:  # without activations to keep, more tokens fit
        batches = list(micro_batches(rollouts, 4 * args.token_budget, everything))
    with torch.set_grad_enabled(keep):
        for index in batches:
            logp[index], entropy[index] = token_logp(model, rollouts, index, args)
    if keep:
        rollouts.graph = logp, entropy
    return logp.detach(), entropy.detach()


def boxed(rollouts: Rollouts) -> float:
    """Share of the responses with a \\boxed{} answer."""
    return float(np.mean([last_boxed(text) is not None for row in rollouts.texts for text in row]))


def check_engine(rollouts: Rollouts, old_logp: Tensor, args: RunArgs) -> dict[str, float]:
    """How far the engine's log-probabilities are from the trainer's, mean and largest, in nats.

    Raises StopRun where that is more than rounding explains: then ratios and rewards are those of
    another policy than the one that is trained.
    """
    if not old_logp[rollouts.mask].isfinite().all():
        raise StopRun("the policy's log-probabilities are not finite")
    sampled = rollouts.mask & rollouts.engine_logp.isfinite()
    gap = (rollouts.engine_logp - old_logp)[sampled].abs()
    mean, most = gap.mean().item(), gap.max().item()
    exact = precision(args) is torch.float32 and not gap.is_cuda
    allowed = args.max_logp_gap or (1e-4 if exact else 0.2)
    far = f"engine and trainer differ by {mean:.2g} nats a token on average, {most:.2g} at most"
    if not mean <= allowed:
        raise StopRun(f"{far}: more than --max-logp-gap {allowed:g}")
    if mean > 0.05:
        print(f"warning: {far}", file=sys.stderr)
    return {"logp_gap/mean": mean, "logp_gap/max": most}


def group_moments(x: Tensor, mask: Tensor, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x over the live entries of each group.

    x and mask are [..., G, T]; the results [..., 1, 1]. correction: 1 divides by the count less 1
    (unbiased), 0 by the count (the population's). Fewer than two live entries, or equal ones, have
    a deviation of exactly 0: that is tested on the values, because the mean of equal floats can
    miss them by an ulp.
    """
    group = {"dim": (-2, -1), "keepdim": True}
    count = mask.sum(**group)
    mean = torch.where(mask, x, 0.0).sum(**group) / count.clamp(min=1)
    squares = torch.where(mask, x - mean, 0.0).square().sum(**group)
    lowest = torch.where(mask, x, torch.inf).amin(**group)
    highest = torch.where(mask, x, -torch.inf).amax(**group)
    std = (squares / (count - correction).clamp(min=1)).sqrt()
    return mean, torch.where(lowest < highest, std, 0.0)


def standardize(x: Tensor, mask: Tensor, eps: float, correction: int = 1) -> Tensor:
    """z-score of x over the live entries of each group, by `group_moments`.

    x and mask are [..., G, T]; the result too, 0 outside the mask and in a group without spread.
    """
    mean, std = group_moments(x, mask, correction)
    return torch.where(mask & (std > 0), (x - mean) / (std + eps), 0.0)


class Means:
    """Running means over live tokens, across micro-batches."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = 0.0

    @torch.no_grad()
    def add(self, mask: Tensor, **values: Tensor) -> None:
        self.count += mask.sum().item()
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value[mask].float().sum().item()

    def result(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.sums.items()}


def importance_weights(rollouts: Rollouts, old_logp: Tensor, cap: float) -> Tensor:
    """min(π_old / π_engine, cap) of each token, [P, G, T]: truncated importance sampling between
    engine and trainer. 1 where cap is 0, and where the engine did not sample the token."""
    if not cap:
        return torch.ones_like(old_logp)
    ratio = (old_logp - rollouts.engine_logp).exp().clamp(max=cap)
    return torch.where(ratio.isnan(), 1.0, ratio)


# ------------------------------------------------------------------------------- evaluation


def evaluate(engine: Engine, grader: Grader, problems: Problems, args: RunArgs) -> dict[str, float]:
    """Held-out accuracy over samples with a 95% interval over problems, greedy accuracy, length."""
    chosen, samples = problems[: args.eval_problems], args.eval_samples
    groups = roll_out(engine, chosen, args, (args.seed, "evaluation"), group_size=samples)
    once = {"group_size": 1, "temperature": 0.0}
    greedy = roll_out(engine, chosen, args, (args.seed, "greedy"), **once)
    verify(grader, groups + greedy)
    accuracy = np.array([np.mean(group.correct) for group in groups])
    low, high = bootstrap_interval(accuracy)
    return {
        "eval/accuracy": accuracy.mean(),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/greedy": np.mean([group.correct[0] for group in greedy]),
        "eval/length": np.mean([len(row) for group in groups for row in group.tokens]),
    }


def bootstrap_interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile interval of the mean of [problems] values, resampling problems."""
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(-1), [0.025, 0.975])
    return float(low), float(high)
