"""The true advantage of every token of a rollout, measured by going on from it.

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

from typing import Any, NamedTuple

import numpy as np
import torch
from models import Engine, base_model
from settings import RunArgs, seed_for
from torch import Tensor, nn

import common
from verifier import Grader

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
        args.max_new_tokens,
        args.temperature,
    )
    whole = list(prefixes)
    for i, (tokens, _) in zip(unfinished, responses, strict=True):
        whole[i] = (prefixes[i] + tokens)[: args.max_new_tokens]
    return whole


def put_others(
    responses: list[list[int]],
    distributions: list[Tensor],
    count: int,
    seed: tuple[int | str, ...],
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
