"""Independent loops for the methods, one token at a time in Python floats, and random groups.

They follow the pages in docs/ and not the scripts, so that a shared mistake is unlikely.
A group is a list of rollouts, and a rollout is a list of its tokens' values.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, pstdev, stdev

Rows = list[list[float]]

LARGEST_ENTROPY = math.log(151936)  # of a uniform distribution over Qwen2.5's vocabulary


@dataclass
class Group:
    rewards: list[float]
    entropy: Rows
    logp: Rows
    ref_logp: Rows


def random_group(seed: int) -> Group:
    """Ragged lengths, single tokens, equal rewards, entropies of 0, a policy like the reference."""
    rng = random.Random(seed)
    lengths = [rng.choice([1, rng.randint(1, 12)]) for _ in range(rng.randint(1, 8))]
    size = len(lengths)
    rewards = {
        "verdicts": [float(rng.random() < 0.5) for _ in lengths],
        "all wrong": [0.0] * size,
        "all right": [1.0] * size,
        "no exact mean": [0.1] * size,
        "graded": [rng.random() for _ in lengths],
    }[rng.choice(["verdicts", "verdicts", "all wrong", "all right", "no exact mean", "graded"])]

    zeros = rng.choice([0.0, 0.0, 0.3, 1.0])
    largest = rng.choice([0.5, LARGEST_ENTROPY])

    def token_entropy() -> float:
        return 0.0 if rng.random() < zeros else rng.uniform(0, largest)

    entropy = [[token_entropy() for _ in range(length)] for length in lengths]
    logp = [[-rng.expovariate(1) for _ in range(length)] for length in lengths]
    shift = rng.choice([0.0, 0.2, 0.2])
    ref_logp = [[value + rng.gauss(0, shift) for value in row] for row in logp]
    return Group(rewards, entropy, logp, ref_logp)


def z_scores(values: list[float], eps: float, std: Callable = stdev) -> list[float]:
    if len(values) < 2 or len(set(values)) == 1:
        return [0.0] * len(values)
    mean, spread = fmean(values), std(values)
    return [(value - mean) / (spread + eps) for value in values]


def token_z_scores(rows: Rows, keep: list[list[bool]], eps: float, std: Callable = stdev) -> Rows:
    """z-scores over the tokens to keep, 0 elsewhere."""
    places = [(i, t) for i, row in enumerate(rows) for t in range(len(row)) if keep[i][t]]
    scores = [[0.0] * len(row) for row in rows]
    kept = z_scores([rows[i][t] for i, t in places], eps, std)
    for (i, t), score in zip(places, kept, strict=True):
        scores[i][t] = score
    return scores


def gates(entropy: Rows, gamma: float, eps: float) -> Rows:
    scores = token_z_scores(entropy, [[True] * len(row) for row in entropy], eps, pstdev)
    return [[1 / (1 + math.exp(-gamma * score)) for score in row] for row in scores]


def entropy_buckets(entropy: Rows, buckets: int) -> list[list[int]]:
    result = []
    for row in entropy:
        spent, numbers, total = 0.0, [], 0.0
        for value in row:  # sum() rounds in another order
            total += value
        for value in row:
            spent += value
            number = math.floor(buckets * spent / total) if total > 0 else 0
            numbers.append(min(number, buckets - 1))
        result.append(numbers)
    return result


def position_buckets(rows: Rows, buckets: int) -> list[list[int]]:
    return [[math.floor(buckets * t / len(row)) for t in range(len(row))] for row in rows]


def bucketed_z_scores(rows: Rows, bucket: list[list[int]], buckets: int, eps: float) -> Rows:
    result = [[0.0] * len(row) for row in rows]
    for k in range(buckets):
        scores = token_z_scores(rows, [[b == k for b in row] for row in bucket], eps, pstdev)
        result = [
            [a + b for a, b in zip(*pair, strict=True)] for pair in zip(result, scores, strict=True)
        ]
    return result


def sign(x: float) -> float:
    return 0.0 if x == 0 else math.copysign(1, x)


def ep_grpo(
    group: Group,
    *,
    gamma: float = 5.0,
    eta: float = 0.2,
    buckets: int = 10,
    reward_threshold: float = 0.5,
    eps: float = 1e-6,
) -> Rows:
    outcome = z_scores(group.rewards, eps)
    gate = gates(group.entropy, gamma, eps)
    equal = len(set(group.rewards)) == 1
    signal = []
    for i, reward in enumerate(group.rewards):
        direction = sign(reward - reward_threshold) if equal else sign(outcome[i])
        signal.append(
            [
                direction * (group.logp[i][t] - group.ref_logp[i][t])
                for t in range(len(group.logp[i]))
            ]
        )
    progress = bucketed_z_scores(signal, entropy_buckets(group.entropy, buckets), buckets, eps)
    return [
        [gate[i][t] * outcome[i] + eta * progress[i][t] for t in range(len(row))]
        for i, row in enumerate(signal)
    ]


def erpo(
    group: Group,
    *,
    gamma: float = 5.0,
    eta: float = 0.2,
    buckets: int = 10,
    sigma_target: float = 1.0,
    eps: float = 1e-6,
) -> Rows:
    outcome = z_scores(group.rewards, eps)
    gate = gates(group.entropy, gamma, eps)
    signal = [
        [a - b for a, b in zip(*rows, strict=True)]
        for rows in zip(group.logp, group.ref_logp, strict=True)
    ]
    progress = bucketed_z_scores(signal, position_buckets(signal, buckets), buckets, eps)
    psi = [
        [gate[i][t] * sign(outcome[i]) * value for t, value in enumerate(row)]
        for i, row in enumerate(progress)
    ]
    spread = pstdev([value for row in psi for value in row])
    if spread > 0:
        psi = [[sigma_target * value / (spread + eps) for value in row] for row in psi]
    total = [[outcome[i] + eta * value for value in row] for i, row in enumerate(psi)]
    return token_z_scores(total, [[True] * len(row) for row in total], eps, pstdev)


def gtpo_rewards(correct: list[bool], entropy: Rows, alpha1: float, alpha2: float) -> Rows:
    """r+ on the tokens of correct, r- on those of wrong rollouts."""
    result: Rows = [[] for _ in entropy]
    for i, row in enumerate(entropy):
        for t in range(len(row)):
            running = [
                k for k in range(len(entropy)) if correct[k] == correct[i] and len(entropy[k]) > t
            ]
            floored = {k: max(entropy[k][t], 1e-6) for k in running}
            if correct[i]:
                share = floored[i] / sum(floored.values())
                result[i].append(alpha1 + alpha2 * share * len(running))
            else:
                share = (1 / floored[i]) / sum(1 / value for value in floored.values())
                result[i].append(-alpha1 - alpha2 * share * len(running))
    return result


def gtpo(
    correct: list[bool],
    entropy: Rows,
    *,
    alpha1: float = 1.0,
    alpha2: float = 0.1,
    normalize: str = "with-zeros",
    eps: float = 1e-6,
) -> Rows:
    if len(set(correct)) == 1:
        return [[0.0] * len(row) for row in entropy]
    shaped = gtpo_rewards(correct, entropy, alpha1, alpha2)
    everything = [[True] * len(row) for row in entropy]
    if normalize == "joint":
        return token_z_scores(shaped, everything, eps)
    result: Rows = [[] for _ in entropy]
    for verdict in (True, False):
        of_verdict = [[correct[i] == verdict] * len(row) for i, row in enumerate(entropy)]
        signed = [
            row if correct[i] == verdict else [0.0] * len(row) for i, row in enumerate(shaped)
        ]
        population = everything if normalize == "with-zeros" else of_verdict
        scores = token_z_scores(signed, population, eps)
        result = [scores[i] if correct[i] == verdict else result[i] for i in range(len(correct))]
    return result


def grpo_s(
    correct: list[bool], entropy: Rows, *, beta1: float = 1.0, beta2: float = 0.1, eps: float = 1e-6
) -> list[float]:
    if len(set(correct)) == 1:
        return [0.0] * len(correct)
    mean = [max(fmean(row), 1e-6) for row in entropy]
    right = [i for i, verdict in enumerate(correct) if verdict]
    wrong = [i for i, verdict in enumerate(correct) if not verdict]
    positive, negative = [0.0] * len(correct), [0.0] * len(correct)
    for i in right:
        positive[i] = beta1 + beta2 * mean[i] / sum(mean[k] for k in right) * len(right)
    for j in wrong:
        share = (1 / mean[j]) / sum(1 / mean[k] for k in wrong)
        negative[j] = -beta1 - beta2 * share * len(wrong)
    up, down = z_scores(positive, eps), z_scores(negative, eps)
    return [up[i] if verdict else down[i] for i, verdict in enumerate(correct)]


def fipo(
    logp: Rows,
    old_logp: Rows,
    advantages: list[float],
    *,
    half_life: float = 32.0,
    low: float = 0.0,
    high: float = 0.2,
    ratio_cap: float = 10.0,
    safety: float = 10.0,
) -> Rows:
    result: Rows = []
    for new, old, advantage in zip(logp, old_logp, advantages, strict=True):
        ratio = [math.exp(a - b) for a, b in zip(new, old, strict=True)]
        weights = []
        for t in range(len(ratio)):
            future = 0.0
            for k in range(t, len(ratio)):
                if ratio[k] <= ratio_cap:
                    future += 2 ** (-(k - t) / half_life) * math.log(ratio[k])
            weight = min(max(math.exp(future), 1 - low), 1 + high)
            if advantage < 0 and ratio[t] > safety:
                weight = min(max(weight, 0.8), 1.0)
            weights.append(weight)
        if advantage < 0 and sum(value > ratio_cap for value in ratio) > 1:
            weights = [0.0] * len(ratio)
        result.append(weights)
    return result


def stare(
    logp: Rows,
    advantages: list[float],
    *,
    top: float = 0.1,
    amplify: float = 1.1,
    attenuate: float = 1.0,
) -> Rows:
    """The rollouts are those of all problems of a step."""
    result = [[1.0] * len(row) for row in logp]
    for direction, weight in ((1.0, amplify), (-1.0, attenuate)):
        of_sign = [i for i in range(len(logp)) if sign(advantages[i]) == direction]
        surprisals = sorted((-value for i in of_sign for value in logp[i]), reverse=True)
        least = surprisals[math.ceil(top * len(surprisals) - 1e-6) - 1] if surprisals else 0.0
        for i in of_sign:
            for t, value in enumerate(logp[i]):
                if -value >= least:
                    result[i][t] = weight
    return result
