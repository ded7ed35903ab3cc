"""How close credit comes to the true advantages: pure functions of one problem's group.

Each measure returns a numerator and a denominator, to be summed over problems before they are
divided; `estimate` does that and puts an interval around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

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


def rank_in_right(credit: Credit, true: Truth) -> Share:
    return rank_in_rollouts(credit, true, (1,))


def rank_in_failed(credit: Credit, true: Truth) -> Share:
    return rank_in_rollouts(credit, true, (0,))


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


def helpful_penalised(credit: Credit, true: Truth) -> Share:
    """`penalised`, of the steps alone that made a right answer likelier."""
    return penalised(credit, true, CLEAR)


Measure = Callable[[Credit, Truth], Share]
MEASURES: dict[str, Measure] = {
    "rank, group": rank_in_group,
    "rank, right rollout": rank_in_right,
    "rank, failed rollout": rank_in_failed,
    "cosine": cosine_in_group,
    "wrong sign": wrong_sign,
    "on decisive tokens": on_decisive,
    "right steps penalised": penalised,
    "helpful steps penalised": helpful_penalised,
}
SIGNAL_MEASURES = {"rank, rollout": rank_in_rollouts, "on decisive tokens": on_decisive}


def shares(measure: Measure, credits: list[Credit], truths: list[Truth]) -> np.ndarray:
    """A measure of every problem, [problems, 2]."""
    pairs = zip(credits, truths, strict=True)
    return np.array([measure(*pair) for pair in pairs], dtype=float)


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
    difference = np.nan_to_num(drawn - base)  # from nothing there is none
    below, above = np.quantile(difference, [0.025, 0.975])
    return {
        "value": float(np.divide(*shares.sum(0))),
        "interval": [float(low), float(high)],
        "differs": bool(below > 0 or above < 0),
    }


def facts(truths: list[Truth]) -> dict[str, float | None]:
    """About the rollouts, whatever the method; None for a share of nothing."""

    def share(parts: Iterable[Any]) -> float | None:
        values = [value for part in parts for value in np.ravel(part)]
        return float(np.mean(values)) if values else None

    everything = [
        (true, reward, advantages, clear, steps)
        for true in truths
        for reward, advantages, clear, steps in zip(
            true.correct, true.advantages, true.clear, true.steps, strict=True
        )
    ]
    size = np.abs(np.concatenate([advantages for _, _, advantages, *_ in everything]))
    right_of_failed = [  # steps: what they gained, and whether another rollout succeeded
        (advantages[tokens].sum(), any(true.correct))
        for true, reward, advantages, _, steps in everything
        for tokens, right in steps
        if right and not reward
    ]
    return {
        "rollouts that are right": share(true.correct for true in truths),
        "groups all right": share(all(true.correct) for true in truths),
        "groups all wrong": share(not any(true.correct) for true in truths),
        "tokens": len(size),
        "tokens with a clear sign": share(clear for _, _, _, clear, _ in everything),
        "of those in failed rollouts, helpful": share(
            a[clear] > 0 for _, reward, a, clear, _ in everything if not reward
        ),
        "of those in right rollouts, harmful": share(
            a[clear] < 0 for _, reward, a, clear, _ in everything if reward
        ),
        "decisive tokens": share(size > DECISIVE),
        "of the true advantages' size, on decisive tokens": float(
            size[size > DECISIVE].sum() / size.sum()
        ),
        "the same, on the first token of each rollout": float(
            sum(abs(advantages[0]) for _, _, advantages, *_ in everything) / size.sum()
        ),
        "right steps in failed rollouts": len(right_of_failed),
        "of those, in groups that are not all wrong": share(mixed for _, mixed in right_of_failed),
        "of those, helpful": share(gain > CLEAR for gain, _ in right_of_failed),
        "of the steps in right rollouts, wrong": share(
            not right for _, reward, _, _, steps in everything if reward for _, right in steps
        ),
    }
