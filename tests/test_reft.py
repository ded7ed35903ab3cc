"""REFT's choice of first tokens: which tokens, how evenly, and which numbers are rejected."""

from collections import Counter
from itertools import combinations
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from reft import allowed_openers, choose_openers, opener_metrics, pick_first_tokens


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(prompts: int = 50, vocabulary: int = 100) -> Tensor:
    return 3 * torch.randn(prompts, vocabulary, generator=seeded(1))


def pick(logits: Tensor, candidates: int, openers: int, group_size: int, seed: int = 0) -> Tensor:
    numbers = {"candidates": candidates, "openers": openers, "group_size": group_size}
    return pick_first_tokens(logits, **numbers, generator=seeded(seed))


@pytest.mark.parametrize(
    ("candidates", "openers", "group_size"),
    [(20, 4, 8), (20, 8, 8), (5, 5, 10), (7, 1, 4), (1, 1, 8)],  # the last: the likeliest token
)
def test_each_group_holds_its_openers_equally_often(candidates, openers, group_size):
    logits = random_logits()
    tokens = pick(logits, candidates, openers, group_size)
    assert tokens.shape == (50, group_size) and tokens.dtype == torch.int64
    for row, prompt_logits in zip(tokens.tolist(), logits.tolist(), strict=True):
        by_logit = sorted(range(100), key=prompt_logits.__getitem__, reverse=True)
        counts = Counter(row)
        assert len(counts) == openers
        assert set(counts.values()) == {group_size // openers}
        assert set(counts) <= set(by_logit[:candidates])


def test_defaults_are_four_of_twenty_for_eight():
    tokens = pick_first_tokens(random_logits(), generator=seeded())
    assert torch.equal(tokens, pick(random_logits(), 20, 4, 8))


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])  # equal, graded and all but certain
@pytest.mark.parametrize(
    ("candidates", "openers", "critical"),
    [(5, 2, 27.88), (6, 3, 43.82)],  # chi-square with 9 and 19 degrees of freedom at 0.001
)
def test_subsets_are_uniform_whatever_the_probabilities(scale, candidates, openers, critical):
    draws = 20_000
    vocabulary = candidates + 3
    logits = (-scale * torch.arange(vocabulary).float()).flip(0)
    if scale == 0.0:
        logits[:3] = -1.0  # the top N stay apart from the rest
    tokens = pick(logits.expand(draws, -1), candidates, openers, group_size=openers, seed=7)
    observed = Counter(tuple(sorted(row)) for row in tokens.tolist())
    subsets = list(combinations(range(3, vocabulary), openers))
    assert set(observed) == set(subsets)
    expected = draws / len(subsets)
    assert sum((observed[s] - expected) ** 2 / expected for s in subsets) < critical


def test_every_rollout_is_as_likely_to_get_every_candidate():
    """No place in the group is tied to a rank: 5 candidates, 4 degrees of freedom at 0.001."""
    draws = 20_000
    tokens = pick(torch.arange(5.0).expand(draws, -1), 5, 4, 8, seed=7)
    for place in range(8):
        counts = torch.bincount(tokens[:, place], minlength=5)
        assert ((counts - draws / 5).square() / (draws / 5)).sum() < 18.47


def test_the_generator_decides():
    logits = random_logits()
    first = pick_first_tokens(logits, generator=seeded(3))
    torch.manual_seed(99)
    assert torch.equal(pick_first_tokens(logits, generator=seeded(3)), first)
    assert not torch.equal(pick_first_tokens(logits, generator=seeded(4)), first)
    generator = seeded(3)
    assert torch.equal(pick_first_tokens(logits, generator=generator), first)
    assert not torch.equal(pick_first_tokens(logits, generator=generator), first)


class Tokenizer:
    """0 and 1 are special ids, 3 is a special added token, and 90 to 99 are not its tokens."""

    all_special_ids: ClassVar = [0, 1]
    added_tokens_decoder: ClassVar = {
        1: SimpleNamespace(special=True),
        3: SimpleNamespace(special=True),
        4: SimpleNamespace(special=False),
    }

    def __len__(self) -> int:
        return 90


# 2 ends a response, as does 200, which neither the tokenizer nor the model has.
ENGINE = SimpleNamespace(tokenizer=Tokenizer(), stop_tokens=[2, 200])
FORBIDDEN = [0, 1, 2, 3, *range(90, 100)]


class Policy:
    """Its logits of first tokens: forbidden tokens are the likeliest, then 4."""

    def __init__(self) -> None:
        self.logits = random_logits()
        self.logits[:, [0, 1, 2, 3, 90, 91, 4]] = torch.tensor([20.0, 19, 18, 17, 16, 15, 14])
        self.rows = iter(self.logits)  # one per prompt

    def eval(self) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(logits=next(self.rows)[None, None].clone())


def chosen(**numbers: int) -> tuple[Tensor, Tensor]:
    args = SimpleNamespace(candidates=20, openers=4, group_size=8)
    vars(args).update(numbers, device="cpu", precision="float32")
    return choose_openers(Policy(), ENGINE, [[5]] * 50, args, seeded())


def test_special_and_unknown_tokens_never_open():
    logits = Policy().logits
    allowed = [i for i in range(100) if i not in FORBIDDEN]
    assert allowed_openers(ENGINE, 100) == allowed
    # A tokenizer may have more tokens than the model.
    assert allowed_openers(ENGINE, 50) == [i for i in allowed if i < 50]
    tokens, ranks = chosen(candidates=10)
    assert not torch.isin(tokens, torch.tensor(FORBIDDEN)).any()
    # The next-likeliest tokens take their places, and ranks count only the allowed ones.
    allowed = logits.index_fill(-1, torch.tensor(FORBIDDEN), -torch.inf)
    order = allowed.argsort(-1, descending=True)
    assert torch.equal(order.gather(-1, ranks - 1), tokens)
    assert ranks.min() == 1 and ranks.max() == 10
    one, ranks = chosen(candidates=1, openers=1)
    assert (one == 4).all() and (ranks == 1).all()


@pytest.mark.parametrize(
    ("candidates", "openers", "group_size", "named"),
    [
        (20, 3, 8, "group_size=8 must be a multiple of openers=3"),
        (3, 4, 8, "openers=4 <= candidates=3"),
        (20, 0, 8, "1 <= openers=0"),
        (0, 1, 8, "openers=1 <= candidates=0"),
        (20, 4, 0, "group_size=0 must be a multiple"),
        (20, 16, 8, "group_size=8 must be a multiple of openers=16"),
        (101, 4, 8, "candidates=101 <= vocabulary=100"),
    ],
)
def test_impossible_numbers_are_rejected(candidates, openers, group_size, named):
    numbers = {"candidates": candidates, "openers": openers, "group_size": group_size}
    with pytest.raises(ValueError, match=named):
        pick_first_tokens(random_logits(), **numbers)


def test_too_few_candidates_are_rejected():
    logits = random_logits()
    pick_first_tokens(logits, candidates=100)
    one_forbidden = logits.index_fill(-1, torch.tensor([0]), -torch.inf)
    with pytest.raises(ValueError, match="fewer than candidates=100"):
        pick_first_tokens(one_forbidden, candidates=100)
    for value in (-torch.inf, torch.nan):
        logits[7, 19:] = value
        with pytest.raises(ValueError, match="fewer than candidates=20"):
            pick_first_tokens(logits)
    logits[7, 19] = 0.0
    pick_first_tokens(logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf))


def test_metrics_by_hand():
    """Two prompts with two openers of two rollouts each, then a tie, which no opener wins."""
    tokens = torch.tensor([[7, 7, 8, 8], [9, 9, 7, 7], [7, 7, 8, 8]])
    ranks = torch.tensor([[1, 1, 2, 2], [1, 1, 3, 3], [1, 1, 2, 2]])
    logp = torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.6, 0.6, 0.1, 0.1], [0.4, 0.4, 0.2, 0.2]]).log()
    correct = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
    rollouts = SimpleNamespace(tokens=tokens[..., None], old_logp=logp[..., None], correct=correct)
    metrics = opener_metrics(rollouts, ranks, openers=2)
    assert metrics == pytest.approx(
        {
            "opener/probability": 2.1 / 6,
            "opener/probability_of_rank_01": 0.5,
            "opener/probability_of_rank_02": 0.25,
            "opener/probability_of_rank_03": 0.1,
            "opener/success_of_rank_01": 2 / 6,
            "opener/success_of_rank_02": 1 / 4,
            "opener/success_of_rank_03": 1.0,
            "opener/same_winner": 1.0,  # 7 wins both groups that have a winner
        }
    )
    correct[1] = torch.tensor([1.0, 0, 0, 0])
    assert opener_metrics(rollouts, ranks, openers=2)["opener/same_winner"] == 0.5
    assert "opener/same_winner" not in opener_metrics(rollouts, ranks, openers=1)
    rollouts.correct = correct * 0
    assert "opener/same_winner" not in opener_metrics(rollouts, ranks, openers=2)
