"""Metrics of sampled responses: pass@k, mean, majority; their confidence intervals and table.

A record holds one problem's results, as evaluate.py makes them: `correct`, `lengths` and
`truncated` with one entry per sample, `majority`, and `greedy` with the same lists for one greedy
response. Formulas and sources: docs/evaluation.md.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from common import bootstrap_interval
from grading import Grader
from grading.answers import plain_number

Record = dict[str, Any]
Estimate = dict[str, float]  # value, low, high


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, Eq. 1): the probability that
    k of n samples, drawn without replacement, include a correct one. Exact up to one rounding.

    Raises ValueError unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k of n={n}, correct={correct}, k={k}")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - correct, k)) / subsets  # 1 - C(n-c, k) / C(n, k), in integers


def majority(grader: Grader, answers: Sequence[str | None], correct: Sequence[float]) -> float:
    """Whether the most frequent answer is correct. A tie of m answers, one of them correct, is 1/m.

    answers: the answer of each response, None (no vote) if there is none; correct: their verdicts.
    math-verify decides which answers are equal. Correct answers count as one answer,
    so only incorrect ones are compared with each other, and only if the result depends on it.
    """
    right = sum(map(bool, correct))
    texts: dict[Any, str] = {}  # the first spelling of each incorrect answer
    votes: Counter[str] = Counter()
    for answer, verdict in zip(answers, correct, strict=True):
        if answer is not None and not verdict:
            number = plain_number(answer)
            key = " ".join(answer.split()) if number is None else number
            votes[texts.setdefault(key, answer)] += 1

    if right == 0:
        return 0.0
    if right > votes.total():  # even if all incorrect answers are equal
        return 1.0
    if max(votes.values()) > right:
        return 0.0

    ranked = [text for text, _ in votes.most_common()]
    readable = [t for t, fine in zip(ranked, grader.readable(ranked), strict=True) if fine]
    pairs = list(itertools.combinations(readable, 2))
    responses = [rf"Answer: \boxed{{{second}}}" for _, second in pairs]  # in every --answer-format
    verdicts = grader.grade(responses, [first for first, _ in pairs])
    same = {pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict}

    groups: Counter[str] = Counter()
    for text in ranked:
        equal = [first for first in groups if (first, text) in same]
        groups[equal[0] if equal else text] += votes[text]

    sizes = list(groups.values())
    return 0.0 if max(sizes) > right else 1 / (1 + sizes.count(right))


def metric_values(records: Sequence[Record], ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Every metric as one value per problem, [problems]."""
    n = len(records[0]["correct"])
    per_problem = {
        f"mean@{n}": [np.mean(r["correct"]) for r in records],
        **{f"pass@{k}": [pass_at_k(n, int(sum(r["correct"])), k) for r in records] for k in ks},
        f"majority@{n}": [r["majority"] for r in records],
        "greedy": [r["greedy"]["correct"][0] for r in records],
        "length": [np.mean(r["lengths"]) for r in records],
        "truncated": [np.mean(r["truncated"]) for r in records],
    }
    return {name: np.array(values, dtype=float) for name, values in per_problem.items()}


def estimates(values: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """The mean over problems of each metric, with its 95% bootstrap interval."""
    result = {}
    for name, value in values.items():
        low, high = bootstrap_interval(value)
        result[name] = {"value": float(value.mean()), "low": low, "high": high}
    return result


def summary(records: Sequence[Record], ks: Sequence[int]) -> dict[str, Any]:
    """One model's results on one data set: {"problems", "samples", "metrics": {name: Estimate}}."""
    metrics = estimates(metric_values(records, ks))
    return {"problems": len(records), "samples": len(records[0]["correct"]), "metrics": metrics}


def difference(
    records: Sequence[Record], baseline: Sequence[Record], ks: Sequence[int]
) -> dict[str, Estimate]:
    """Each metric minus the baseline's, over the problems that both have. Intervals are paired:
    they resample problems, so that differences in difficulty cancel."""
    theirs, ours = by_problem(baseline), by_problem(records)
    both = [key for key in ours if key in theirs]
    if not both:
        return {}
    before = metric_values([theirs[key] for key in both], ks)
    after = metric_values([ours[key] for key in both], ks)
    return estimates({name: value - before[name] for name, value in after.items()})


def by_problem(records: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """Records by problem text and the number of its occurrence in the data set, from 1."""
    seen: Counter[str] = Counter()
    keyed = {}
    for record in records:
        seen[record["problem"]] += 1
        keyed[record["problem"], seen[record["problem"]]] = record
    return keyed


def table(report: dict[str, Any]) -> str:
    """The report of evaluate.py as text.

    A block per dataset, a line per metric, a column per model and per difference.
    """
    blocks = []
    for dataset in dict.fromkeys(row["dataset"] for row in report["results"]):
        rows = report["results"] + report["differences"]
        first, *others = [row for row in rows if row["dataset"] == dataset]
        columns = [["", *first["metrics"]]]
        for row in (first, *others):
            columns.append(table_column(row))
        widths = [max(len(cell) for cell in column) for column in columns]
        lines = [f"{dataset}: {first['problems']} problems, {first['samples']} samples of each"]
        for metric, *cells in zip(*columns, strict=True):
            line = f"{metric:{widths[0]}}"
            for cell, width in zip(cells, widths[1:], strict=True):
                line += f"   {cell:>{width}}"
            lines.append(line)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def table_column(row: dict[str, Any]) -> list[str]:
    """A name, and below it cells such as `0.750 [0.700, 0.800]`; differences have signs."""
    name, sign = row["model"], ""
    if "baseline" in row:
        name, sign = f"{row['model']} - {row['baseline']}", "+"
    cells = [name]
    for metric, estimate in row["metrics"].items():
        digits = sign + (".1f" if metric == "length" else ".3f")
        value, low, high = (format(estimate[part], digits) for part in ("value", "low", "high"))
        cells.append(f"{value} [{low}, {high}]")
    return cells
