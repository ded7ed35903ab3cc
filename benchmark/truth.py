"""The true advantage of every token of a rollout, measured by going on from it; and how close a
method's credit comes to it. For credit.py.

V(prefix) is the probability that the policy, going on from a prefix of a response, ends with the
right answer; the true advantage of token t is V(prefix with t) - V(prefix before t). At the end of
the response V is its reward, exactly. Before that, with p the probability of the token that was
sampled, which the model tells exactly,

    V(before) = p V(with the token) + (1 - p) V(before, some other token next),

and only the last term needs sampling: draw other tokens in the sampled one's place, go on from
each, and see how many end right. So a token that was certain has an advantage near zero and hardly
any error, where the difference of two independent estimates would have the error of both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import common
from engine import Engine, base_model, seed_for
from grading import Grader
from run import RunArgs

CERTAIN = 1e-4  # no continuations where other tokens are rarer: the advantage is smaller than this
ESTIMATES = 2  # independent ones: how far they agree says how good the truth is


class Curves(NamedTuple):
    """Of one rollout of T tokens, with standard errors."""

    values: np.ndarray  # [T + 1], V of the first t tokens; the last is the reward
    value_errors: np.ndarray
    advantages: np.ndarray  # [T]
    errors: np.ndarray


def true_advantages(others: np.ndarray, wins: np.ndarray, count: int, reward: float) -> Curves:
    """Values and advantages along one rollout.

    others: [T], 1 - p of each token; wins: [T], of `count` continuations that put another token in
    its place, how many ended right. The errors are those of the continuations, as binomial counts
    with half a win and half a loss added, so that no wins at all are not taken for certainty.
    """
    elsewhere = wins / count
    smoothed = (wins + 0.5) / (count + 1)
    noise = smoothed * (1 - smoothed) / count
    values, variance = np.full(len(others) + 1, float(reward)), np.zeros(len(others) + 1)
    for t in reversed(range(len(others))):
        values[t] = (1 - others[t]) * values[t + 1] + others[t] * elsewhere[t]
        variance[t] = (1 - others[t]) ** 2 * variance[t + 1] + others[t] ** 2 * noise[t]
    # A_t = (1 - p) (V(with the token) - V(with another)), of which the two are independent.
    errors = others * np.sqrt(variance[1:] + noise)
    return Curves(values, np.sqrt(variance), np.diff(values), errors)


@torch.no_grad()
def distributions(policy: nn.Module, rollouts: common.Rollouts, args: RunArgs) -> list[Tensor]:
    """Of one group: the distribution that each token was drawn from, a [T, V] for each rollout."""
    rows = torch.arange(rollouts.mask.shape[1])
    hidden = common.hidden_states(policy, rollouts, (torch.zeros_like(rows), rows), args)
    logits = base_model(policy).get_output_embeddings()(hidden)
    chances = (logits.double() / args.temperature).softmax(-1)
    return list(chances.cpu().split(rollouts.mask[0].sum(-1).tolist()))


def finish(
    engine: Engine, problem: common.Problem, prefixes: list[list[int]], seed: int, args: RunArgs
) -> list[list[int]]:
    """Each prefix of a response, written to its end: token ids."""
    ended = [bool(p) and (p[-1] in engine.stops or len(p) == args.max_new_tokens) for p in prefixes]
    unfinished = [i for i, done in enumerate(ended) if not done]
    responses = engine.generate(
        [problem.prompt + prefixes[i] for i in unfinished],
        [seed_for(seed, i) for i in unfinished],
        [args.max_new_tokens - len(prefixes[i]) for i in unfinished],
        args.temperature,
    )
    whole = list(prefixes)
    for i, (tokens, _) in zip(unfinished, responses, strict=True):
        whole[i] = prefixes[i] + tokens
    return whole


def put_others(
    responses: list[list[int]], distributions: list[Tensor], count: int, seed: tuple[int | str, ...]
) -> tuple[list[list[float]], dict[tuple[int, ...], int], list[list[int]]]:
    """For every token of a group's responses, others in its place.

    Returns 1 - p of each token, 0 where it is certain; the prefixes that now end in another token,
    `count` in a row for each token that is not certain; and by the tokens up to and with that one,
    where they begin. What responses share is there once.
    """
    chances_of_others: list[list[float]] = []
    starts: dict[tuple[int, ...], int] = {}
    prefixes: list[list[int]] = []
    for tokens, chances in zip(responses, distributions, strict=True):
        chances = chances.scatter(-1, torch.tensor(tokens)[:, None], 0.0)
        others = chances.sum(-1)
        chances_of_others.append(torch.where(others < CERTAIN, 0.0, others).tolist())
        for t, token in enumerate(tokens):
            start = (*tokens[:t], token)
            if chances_of_others[-1][t] and start not in starts:
                starts[start] = len(prefixes)
                draw = torch.Generator().manual_seed(seed_for(*seed, "others", start))
                drawn = chances[t].multinomial(count, replacement=True, generator=draw)
                prefixes += [[*tokens[:t], other] for other in drawn.tolist()]
    return chances_of_others, starts, prefixes


def measure(
    engine: Engine,
    grader: Grader,
    policy: nn.Module,
    problem: common.Problem,
    args: RunArgs,
    *,
    continuations: int,
    seed: tuple[int | str, ...],
) -> dict[str, Any]:
    """Roll out a group and go on from every prefix of it; what came of it, as plain values.

    others and wins: of each rollout and token, 1 - p and the wins of each estimate. prompt: wins
    and count of whole new responses, which share nothing with the rest and so can contradict it.
    """
    group = common.roll_out(engine, [problem], args, (*seed, "rollouts"))[0]
    rollouts = common.stack([group], engine.stops, base_model(policy).device)
    count = ESTIMATES * continuations
    chances = distributions(policy, rollouts, args)
    others, starts, prefixes = put_others(group.tokens, chances, count, seed)
    new = len(prefixes)
    prefixes += [[] for _ in range(4 * count)]

    texts = engine.decode(finish(engine, problem, prefixes, seed_for(*seed, "finish"), args))
    kinds = list(dict.fromkeys([*group.texts, *texts]))
    verdicts = grader.grade(kinds, [problem.answer] * len(kinds))
    verdict = dict(zip(kinds, map(float, verdicts), strict=True))
    right = np.array([verdict[text] for text in texts], dtype=int)

    def wins(start: tuple[int, ...]) -> list[int]:
        if start not in starts:
            return [0] * ESTIMATES
        of_start = right[starts[start] : starts[start] + count]
        return of_start.reshape(ESTIMATES, continuations).sum(-1).tolist()

    return {
        "problem": problem.text,
        "tokens": group.tokens,
        "pieces": [engine.decode([[token] for token in tokens]) for tokens in group.tokens],
        "correct": [verdict[text] for text in group.texts],
        "others": others,
        "wins": [
            [wins(tuple(tokens[: t + 1])) for t in range(len(tokens))] for tokens in group.tokens
        ],
        "prompt": [int(right[new:].sum()), len(right[new:])],
    }


# ------------------------------------------------------------------------------- measures
# How close credit comes to the truth. Of one problem's group each returns a numerator and a
# denominator, to be summed over problems before they are divided: `estimate` does that.

DECISIVE = 0.2  # a token whose true advantage is larger decides
CLEAR = 0.05  # one whose advantage is larger, and twice its standard error, has a sign to get wrong

Credit = list[np.ndarray]  # a method's advantages: for each rollout [T]
Share = tuple[float, float]


@dataclass
class Truth:
    """Of one problem's group; each list has an entry for each rollout."""

    advantages: Credit
    clear: list[np.ndarray]  # [T], whether the sign is beyond doubt
    correct: list[float]
    steps: list[list[tuple[slice, bool]]]  # the tokens of each arithmetic step; is it right?


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    """0 where either is 0 throughout."""
    norm = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / norm) if norm else 0.0


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Rank correlation; 0 where either is constant, and so says nothing about the other."""
    left, right = ranks(left), ranks(right)
    return cosine(left - left.mean(), right - right.mean())


def rank_in_group(credit: Credit, true: Truth) -> Share:
    return spearman(np.concatenate(credit), np.concatenate(true.advantages)), 1


def rank_in_rollouts(credit: Credit, true: Truth, verdicts: tuple[float, ...] = (0, 1)) -> Share:
    """The mean over rollouts; of those alone that are right (1) or failed (0)."""
    chosen = [g for g, verdict in enumerate(true.correct) if verdict in verdicts]
    return sum(spearman(credit[g], true.advantages[g]) for g in chosen), len(chosen)


def cosine_in_group(credit: Credit, true: Truth) -> Share:
    return cosine(np.concatenate(credit), np.concatenate(true.advantages)), 1


def wrong_sign(credit: Credit, true: Truth) -> Share:
    """Of the tokens whose true sign is clear and that get credit: those with the other sign."""
    clear = np.concatenate(true.clear)
    product = (np.concatenate(credit) * np.concatenate(true.advantages))[clear]
    return int((product < 0).sum()), int((product != 0).sum())


def on_decisive(credit: Credit, true: Truth) -> Share:
    """Of all credit, whatever its sign: what lies on the tokens that decide."""
    size = np.abs(np.concatenate(credit))
    decisive = np.abs(np.concatenate(true.advantages)) > DECISIVE
    return float(size[decisive].sum()), float(size.sum())


def penalised(credit: Credit, true: Truth, gain: float = -np.inf) -> Share:
    """Of the right steps of failed rollouts, those whose tokens' credit sums to less than 0.

    gain: only of steps whose true advantages sum to more.
    """
    sums = [
        credit[g][tokens].sum()
        for g, steps in enumerate(true.steps)
        for tokens, right in steps
        if right and not true.correct[g] and true.advantages[g][tokens].sum() > gain
    ]
    return sum(total < 0 for total in sums), len(sums)


Measure = Callable[[Credit, Truth], Share]
MEASURES: dict[str, Measure] = {
    "rank, group": rank_in_group,
    "rank, right rollout": functools.partial(rank_in_rollouts, verdicts=(1,)),
    "rank, failed rollout": functools.partial(rank_in_rollouts, verdicts=(0,)),
    "cosine": cosine_in_group,
    "wrong sign": wrong_sign,
    "on decisive tokens": on_decisive,
    "right steps penalised": penalised,
    "helpful steps penalised": functools.partial(penalised, gain=CLEAR),  # made success likelier
}
SIGNAL_MEASURES = {"rank, rollout": rank_in_rollouts, "on decisive tokens": on_decisive}


def shares(measure: Measure, credits: list[Credit], truths: list[Truth]) -> np.ndarray:
    """A measure of every problem, [problems, 2]."""
    return np.array([measure(*pair) for pair in zip(credits, truths, strict=True)], dtype=float)


def estimate(shares: np.ndarray, baseline: np.ndarray) -> dict[str, Any] | None:
    """The ratio of sums over problems, its 95% interval by bootstrap over problems, and whether
    that of its difference to a baseline's leaves 0 out. Both [problems, 2]. None: nothing to
    divide by."""
    if not shares[:, 1].any():
        return None
    draws = np.random.default_rng(0).integers(len(shares), size=(2000, len(shares)))
    with np.errstate(invalid="ignore"):  # a draw may hold nothing to divide by
        drawn, base = (np.divide(*s[draws].sum(1).T) for s in (shares, baseline))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    difference = np.nan_to_num(drawn - base).round(6)  # from nothing there is none, nor by rounding
    below, above = np.quantile(difference, [0.025, 0.975])
    return {
        "value": float(np.divide(*shares.sum(0))),
        "interval": [float(low), float(high)],
        "differs": bool(below > 0 or above < 0),
    }


def facts(truths: list[Truth]) -> dict[str, float | None]:
    """About the rollouts, whatever the method; None for a share of nothing."""

    def share(values: Iterable[Any]) -> float | None:
        values = list(values)
        return float(np.mean(values)) if values else None

    rollouts = [
        (true, *rollout)
        for true in truths
        for rollout in zip(true.correct, true.advantages, true.clear, true.steps, strict=True)
    ]
    tokens = [  # advantage, whether its sign is clear, whether the rollout is right
        (*token, right) for _, right, *both, _ in rollouts for token in zip(*both, strict=True)
    ]
    steps = [  # whether it is right, whether the rollout is, what it gained, any success in group
        (fine, right, advantages[place].sum(), any(true.correct))
        for true, right, advantages, _, places in rollouts
        for place, fine in places
    ]
    size = np.abs([advantage for advantage, *_ in tokens])
    decisive = size[size > DECISIVE]
    first = sum(abs(advantages[0]) for _, _, advantages, *_ in rollouts)
    of_failed = [(gain, mixed) for fine, right, gain, mixed in steps if fine and not right]
    return {
        "rollouts that are right": share(right for _, right, *_ in rollouts),
        "groups all right": share(all(true.correct) for true in truths),
        "groups all wrong": share(not any(true.correct) for true in truths),
        "tokens": len(tokens),
        "tokens with a clear sign": share(clear for _, clear, _ in tokens),
        "of those in failed rollouts, helpful": share(a > 0 for a, c, r in tokens if c and not r),
        "of those in right rollouts, harmful": share(a < 0 for a, c, r in tokens if c and r),
        "decisive tokens": share(size > DECISIVE),
        "of the true advantages' size, on decisive tokens": decisive.sum() / size.sum(),
        "the same, on the first token of each rollout": first / size.sum(),
        "right steps in failed rollouts": len(of_failed),
        "of those, in groups that are not all wrong": share(mixed for _, mixed in of_failed),
        "of those, helpful": share(gain > CLEAR for gain, _ in of_failed),
        "of the steps in right rollouts, wrong": share(not fine for fine, r, *_ in steps if r),
    }
