"""The true advantage of every token of a rollout, and measures of how close a credit comes to it.

V(prefix) is the probability that the policy, continuing from a prefix of a response, ends with the
right answer. The true advantage of token t is V(prefix with t) - V(prefix before t). At the end of
the response V is the reward. Before the end, with p the known probability of the sampled token,

    V(before) = p V(with the token) + (1 - p) V(before, another token next).

Only the last term is estimated by sampling: draw other tokens in place of the sampled token,
continue from each, and count the right answers. A token with p near 1 therefore has an advantage
near 0 with hardly any error. The difference of two independent estimates would have both errors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import common
from common import Engine, Grader, RunArgs, seed_for
from infra.models import base_model

CERTAIN = 1e-4  # if other tokens are rarer than this, the advantage is taken as 0
ESTIMATES = 2  # independent estimates; their agreement measures the error
Seed = tuple[int | str, ...]
Ids = list[int]  # token ids of a response or of its prefix


class Curves(NamedTuple):
    """Values and advantages of one rollout of T tokens, with standard errors."""

    values: np.ndarray  # [T + 1], V of the first t tokens; the last is the reward
    value_errors: np.ndarray  # [T + 1]
    advantages: np.ndarray  # [T]
    errors: np.ndarray  # [T]


def true_advantages(others: np.ndarray, wins: np.ndarray, count: int, reward: float) -> Curves:
    """Values and advantages along one rollout, computed from its end to its start.

    others: [T], 1 - p of each token. wins: [T], the number of right answers among `count`
    continuations with another token in that place. The errors are binomial, with half a win and
    half a loss added, so that zero wins do not give an error of zero.
    """
    elsewhere = wins / count
    smoothed = (wins + 0.5) / (count + 1)
    noise = smoothed * (1 - smoothed) / count
    values = np.full(len(others) + 1, float(reward))
    variance = np.zeros(len(others) + 1)
    for t in reversed(range(len(others))):
        p = 1 - others[t]
        values[t] = p * values[t + 1] + others[t] * elsewhere[t]
        variance[t] = p**2 * variance[t + 1] + others[t] ** 2 * noise[t]
    # A_t = (1 - p) (V(with the token) - V(with another)); the two values are independent.
    errors = others * np.sqrt(variance[1:] + noise)
    return Curves(values, np.sqrt(variance), np.diff(values), errors)


@torch.no_grad()
def distributions(policy: nn.Module, rollouts: common.Rollouts, args: RunArgs) -> list[Tensor]:
    """The distributions that the tokens of one group were drawn from: [T, V] for each rollout."""
    rows = torch.arange(rollouts.mask.shape[1])
    hidden = common.hidden_states(policy, rollouts, (torch.zeros_like(rows), rows), args)
    logits = base_model(policy).get_output_embeddings()(hidden)
    probabilities = (logits.double() / args.temperature).softmax(-1)
    lengths = rollouts.mask[0].sum(-1)
    return list(probabilities.cpu().split(lengths.tolist()))


def complete(
    engine: Engine,
    problem: common.Problem,
    prefixes: list[Ids],
    seed: int,
    args: RunArgs,
) -> list[Ids]:
    """Continue each prefix of a response to its end: token ids."""
    unfinished = []
    for i, prefix in enumerate(prefixes):
        ended = bool(prefix) and prefix[-1] in engine.stop_tokens
        if not ended and len(prefix) < args.max_new_tokens:
            unfinished.append(i)

    continuations = engine.generate(
        [problem.prompt + prefixes[i] for i in unfinished],
        [seed_for(seed, i) for i in unfinished],
        [args.max_new_tokens - len(prefixes[i]) for i in unfinished],
        args.temperature,
    )

    responses = list(prefixes)
    for i, (tokens, _) in zip(unfinished, continuations, strict=True):
        responses[i] = prefixes[i] + tokens
    return responses


def replace_tokens(
    responses: list[Ids],
    probabilities: list[Tensor],
    count: int,
    seed: Seed,
) -> tuple[list[list[float]], dict[tuple[int, ...], list[Ids]]]:
    """Draw other tokens in place of each token of a group.

    Returns 1 - p of each token (0 if it is certain), and by the tokens up to and including each
    uncertain token `count` prefixes that end in another token. Responses that begin alike share
    them.
    """
    others_of_group, drawn = [], {}
    for tokens, chances in zip(responses, probabilities, strict=True):
        chances = chances.scatter(-1, torch.tensor(tokens)[:, None], 0.0)
        others = chances.sum(-1)
        others[others < CERTAIN] = 0.0
        others_of_group.append(others.tolist())

        for t in others.nonzero()[:, 0].tolist():
            before, start = tokens[:t], tuple(tokens[: t + 1])
            if start not in drawn:
                generator = torch.Generator()
                generator.manual_seed(seed_for(*seed, "others", start))
                ids = chances[t].multinomial(count, replacement=True, generator=generator)
                drawn[start] = [[*before, token] for token in ids.tolist()]
    return others_of_group, drawn


def measure(
    engine: Engine,
    grader: Grader,
    policy: nn.Module,
    problem: common.Problem,
    args: RunArgs,
    continuations: int,
    seed: Seed,
) -> tuple[common.Group, dict[str, Any]]:
    """Roll out a group and continue from every prefix of it. Returns the group and plain values:

    others, wins: for each rollout and token, 1 - p and the right answers of each estimate.
    prompt: right answers and number of new responses, which are independent of the group.
    """
    group = common.roll_out(engine, [problem], args, (*seed, "rollouts"))[0]
    rollouts = common.stack([group], engine.stop_tokens, base_model(policy).device)
    count = ESTIMATES * continuations

    probabilities = distributions(policy, rollouts, args)
    others, drawn = replace_tokens(group.tokens, probabilities, count, seed)
    new = 4 * count  # responses
    prefixes = list(itertools.chain(*drawn.values()))
    prefixes += [[]] * new

    responses = complete(engine, problem, prefixes, seed_for(*seed, "finish"), args)
    texts = engine.decode(responses)
    distinct = list(dict.fromkeys([*group.texts, *texts]))
    verdicts = map(float, common.grade(grader, distinct, [problem] * len(distinct)))
    correct = dict(zip(distinct, verdicts, strict=True))
    right = np.array([correct[text] for text in texts], dtype=int)

    of_starts = right[:-new].reshape(-1, ESTIMATES, continuations).sum(-1)
    wins_after = dict(zip(drawn, of_starts.tolist(), strict=True))

    certain = [0] * ESTIMATES
    pieces, wins = [], []
    for tokens in group.tokens:
        pieces.append(engine.decode([[token] for token in tokens]))
        starts = [tuple(tokens[: t + 1]) for t in range(len(tokens))]
        wins.append([wins_after.get(start, certain) for start in starts])

    group.correct = [correct[text] for text in group.texts]
    return group, {
        "problem": problem.text,
        "tokens": group.tokens,
        "pieces": pieces,
        "correct": group.correct,
        "others": others,
        "wins": wins,
        "prompt": [int(right[-new:].sum()), new],
    }


# ------------------------------------------------------------------------------- measures
# Each measure compares the credit of one group with the truth and returns a numerator and a
# denominator. `estimate` sums both over problems before it divides them.

DECISIVE = 0.2  # a token is decisive if its true advantage is larger
CLEAR = 0.05  # a sign is clear if the advantage is larger than this and twice its standard error

Credit = list[np.ndarray]  # advantages by a method: [T] for each rollout
Share = tuple[float, float]


@dataclass
class Truth:
    """The truth about one group; each list has an entry for each rollout."""

    advantages: Credit
    clear: list[np.ndarray]  # [T], whether the sign of the advantage is clear
    correct: list[float]
    steps: list[list[tuple[slice, bool]]]  # tokens of each arithmetic step; whether it is right


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """Cosine similarity; 0 if one of the vectors is 0."""
    norm = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / norm) if norm else 0.0


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Rank correlation; 0 if one of the vectors is constant."""
    correlations = pd.DataFrame({"left": left, "right": right}).corr(method="spearman")
    return float(np.nan_to_num(correlations.loc["left", "right"]))  # NaN if one is constant


def in_group(credit: Credit, true: Truth, similarity: Callable[..., float]) -> Share:
    return similarity(np.concatenate(credit), np.concatenate(true.advantages)), 1


def rank_in_rollouts(credit: Credit, true: Truth, verdicts: tuple[float, ...] = (0, 1)) -> Share:
    """Mean over the rollouts with one of the verdicts: right (1) or wrong (0)."""
    total = count = 0
    for own, advantages, verdict in zip(credit, true.advantages, true.correct, strict=True):
        if verdict in verdicts:
            total += spearman(own, advantages)
            count += 1
    return total, count


def wrong_sign(credit: Credit, true: Truth) -> Share:
    """Share of wrong signs among the tokens with a clear true sign and a credit other than 0."""
    product = np.concatenate(credit) * np.concatenate(true.advantages)
    product = product[np.concatenate(true.clear)]
    return int((product < 0).sum()), int((product != 0).sum())


def on_decisive(credit: Credit, true: Truth) -> Share:
    """Share of the absolute credit that lies on decisive tokens."""
    size = np.abs(np.concatenate(credit))
    decisive = np.abs(np.concatenate(true.advantages)) > DECISIVE
    return float(size[decisive].sum()), float(size.sum())


def penalised(credit: Credit, true: Truth, gain: float = -np.inf) -> Share:
    """Share of the right steps of wrong rollouts whose credit sums to less than 0.

    gain: count only steps whose true advantages sum to more than this.
    """
    negative = count = 0
    for g, steps in enumerate(true.steps):
        for tokens, right in steps:
            gained = true.advantages[g][tokens].sum()
            if right and not true.correct[g] and gained > gain:
                negative += int(credit[g][tokens].sum() < 0)
                count += 1
    return negative, count


Measure = Callable[[Credit, Truth], Share]
MEASURES: dict[str, Measure] = {
    "rank, group": functools.partial(in_group, similarity=spearman),
    "rank, right rollout": functools.partial(rank_in_rollouts, verdicts=(1,)),
    "rank, failed rollout": functools.partial(rank_in_rollouts, verdicts=(0,)),
    "cosine": functools.partial(in_group, similarity=cosine),
    "wrong sign": wrong_sign,
    "on decisive tokens": on_decisive,
    "right steps penalised": penalised,
    "helpful steps penalised": functools.partial(penalised, gain=CLEAR),  # they raised V
}
SIGNAL_MEASURES: dict[str, Measure] = {
    "rank, rollout": rank_in_rollouts,
    "on decisive tokens": on_decisive,
}


def estimates(
    measures: dict[str, Measure],
    credits: list[Credit],
    truths: list[Truth],
    baseline: list[Credit],
) -> dict[str, Any]:
    """Each measure of the credits of all problems, compared with the baseline's."""
    found = {}
    for label, measure in measures.items():
        shares = np.array(list(map(measure, credits, truths)), dtype=float)
        base = np.array(list(map(measure, baseline, truths)), dtype=float)
        found[label] = estimate(shares, base)
    return found


def estimate(shares: np.ndarray, baseline: np.ndarray) -> dict[str, Any] | None:
    """Ratio of sums over problems, with a 95% bootstrap interval over problems.

    Both inputs are [problems, 2]. `differs` is true if the interval of the difference between the
    ratio and the baseline's ratio excludes 0. Returns None if the denominator is 0.
    """
    if not shares[:, 1].any():
        return None
    draws = np.random.default_rng(0).integers(len(shares), size=(2000, len(shares)))
    numerator, denominator = shares[draws].sum(1).T
    base_numerator, base_denominator = baseline[draws].sum(1).T
    with np.errstate(invalid="ignore"):  # a draw may have a denominator of 0
        ratio = numerator / denominator
        base_ratio = base_numerator / base_denominator

    low, high = np.nanquantile(ratio, [0.025, 0.975])
    # Such a draw counts as no difference; so do differences that are rounding errors.
    difference = np.nan_to_num(ratio - base_ratio).round(6)
    below, above = np.quantile(difference, [0.025, 0.975])

    total, count = shares.sum(0)
    return {
        "value": float(total / count),
        "interval": [float(low), float(high)],
        "differs": bool(below > 0 or above < 0),
    }


def facts(truths: list[Truth]) -> dict[str, float]:
    """Properties of the rollouts, which no method changes. A share of nothing is NaN."""
    token_parts, step_rows = [], []
    for true in truths:
        for g, right in enumerate(true.correct):
            columns = {"advantage": true.advantages[g], "clear": true.clear[g]}
            token_parts.append(pd.DataFrame(columns).assign(right=right))
            for place, fine in true.steps[g]:
                helpful = true.advantages[g][place].sum() > CLEAR
                step_rows.append((right, any(true.correct), fine, helpful))

    tokens = pd.concat(token_parts)  # the index is the position in the rollout
    steps = pd.DataFrame(step_rows, columns=["right", "mixed", "fine", "helpful"])
    tokens["size"] = tokens.advantage.abs()
    size = tokens["size"].sum()

    failed = tokens.query("clear and right == 0").advantage
    succeeded = tokens.query("clear and right == 1").advantage
    decisive = tokens[tokens["size"] > DECISIVE]
    right_steps = steps.query("fine and right == 0")
    correct = [true.correct for true in truths]
    return {
        "rollouts that are right": np.mean(correct),
        "groups all right": np.mean(list(map(all, correct))),
        "groups all wrong": 1 - np.mean(list(map(any, correct))),
        "tokens": len(tokens),
        "tokens with a clear sign": tokens.clear.mean(),
        "of those in failed rollouts, helpful": (failed > 0).mean(),
        "of those in right rollouts, harmful": (succeeded < 0).mean(),
        "decisive tokens": len(decisive) / len(tokens),
        "of the true advantages' size, on decisive tokens": decisive["size"].sum() / size,
        "the same, on the first token of each rollout": tokens["size"].loc[0].sum() / size,
        "right steps in failed rollouts": len(right_steps),
        "of those, in groups that are not all wrong": right_steps.mixed.mean(),
        "of the right steps in failed rollouts, helpful": right_steps.helpful.mean(),
        "of the steps in right rollouts, wrong": 1 - steps.query("right == 1").fine.mean(),
    }
