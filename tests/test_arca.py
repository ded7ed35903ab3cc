"""ARCA's weights, the signals it is compared with and its diagnostics, by hand and by loops."""

import math

import pytest
import torch
import worked_example as example
from torch import Tensor
from worked_example import pad

from arca import (
    arca_weights,
    credit_weights,
    divergence,
    effective_fraction,
    entropy_reduction,
    gini,
    residual_norm,
    surprisal,
)

LENGTHS = [6, 1, 3, 4]
MASK = torch.arange(6) < torch.tensor(LENGTHS)[:, None]

# The worked example; 9 stands in the padding, where nothing may read it.
WORKED_MASK = example.mask[0]
WORKED_ENTROPY, WORKED_LOGP, WORKED_REF = (
    pad(rows, fill=9.0)[0].float() for rows in (example.ENTROPY, example.LOGP, example.REF_LOGP)
)


def hidden_states() -> tuple[Tensor, Tensor]:
    """Adapted and base states, [4, 6, 5]."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(4, 6, 5, generator=generator)
    return base + 0.1 * torch.randn(4, 6, 5, generator=generator), base


def slow_weights(scores: list[float], sharpening: float, eps: float = 1e-8) -> list[float]:
    """The weights of one completion, in Python's double precision."""
    powers = [(score + eps) ** sharpening for score in scores]
    if sum(powers) <= 1e-8:
        return [1 / len(scores)] * len(scores)
    return [power / sum(powers) for power in powers]


# Weights


@pytest.mark.parametrize(
    ("sharpening", "expected"), [(2.0, [1 / 30, 4 / 30, 25 / 30]), (1.0, [0.125, 0.25, 0.625])]
)
def test_worked_example(sharpening, expected):
    adapted = torch.tensor([[[1.0, 0], [0, 2], [3, 4]]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights = arca_weights(adapted, torch.zeros(1, 3, 2), mask, sharpening=sharpening)
    torch.testing.assert_close(weights, torch.tensor([expected]))


def test_default_sharpening_is_2():
    adapted, base = hidden_states()
    default = arca_weights(adapted, base, MASK)
    assert torch.equal(default, arca_weights(adapted, base, MASK, sharpening=2.0))
    assert torch.equal(default, credit_weights(residual_norm(adapted, base), MASK))


@pytest.mark.parametrize("sharpening", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_weights_equal_a_slow_loop(sharpening):
    adapted, base = hidden_states()
    weights = arca_weights(adapted, base, MASK, sharpening=sharpening)
    for i, length in enumerate(LENGTHS):
        scores = [math.dist(adapted[i, t].tolist(), base[i, t].tolist()) for t in range(length)]
        expected = slow_weights(scores, sharpening) + [0.0] * (6 - length)
        torch.testing.assert_close(weights[i].tolist(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 10.0, 1e4])
def test_the_scale_of_the_residual_does_not_matter(scale):
    adapted, base = hidden_states()
    scaled = arca_weights(scale * (adapted - base), torch.zeros_like(base), MASK)
    torch.testing.assert_close(scaled, arca_weights(adapted, base, MASK), atol=2e-5, rtol=0)


def test_the_powers_of_large_scores_do_not_overflow():
    score = torch.tensor([[1e5, 3e5, 2e5, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    weights = credit_weights(score, mask, sharpening=8.0)  # 1e40 is infinite in single precision
    expected = slow_weights([1e5, 3e5, 2e5], 8.0)
    torch.testing.assert_close(weights[0, :3].tolist(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1))


def test_identical_states_give_exactly_uniform_weights():
    base = hidden_states()[1]
    weights = arca_weights(base.clone(), base, MASK)
    assert torch.equal(weights, MASK / MASK.sum(-1, keepdim=True))
    assert torch.equal(credit_weights(torch.full((4, 6), 0.7), MASK), weights)


def test_uniform_only_where_the_sharpened_scores_sum_to_at_most_1e_8():
    """The scores' own sum is above 1e-8 in all rows but the last."""
    score = torch.tensor([[3e-5, 9e-5, 0.0], [4e-5, 12e-5, 0.0], [2e-9, 6e-9, 0.0]])
    mask = torch.tensor([[True, True, False]]).expand(3, 3)
    even = [0.5, 0.5, 0]
    # Squares: 0.9e-9 + 8.1e-9, just below; 1.6e-9 + 14.4e-9, just above.
    expected = torch.tensor([even, [0.1, 0.9, 0], even])
    torch.testing.assert_close(credit_weights(score, mask), expected, atol=1e-3, rtol=0)
    assert torch.equal(credit_weights(score, mask)[0], torch.tensor(even))
    # eps = 1e-8 joins each score, in the sum too: 1.2 to 1.6.
    expected = torch.tensor([[0.25, 0.75, 0], [0.25, 0.75, 0], [3 / 7, 4 / 7, 0]])
    blunt = credit_weights(score, mask, sharpening=1.0)
    torch.testing.assert_close(blunt, expected, atol=1e-3, rtol=0)
    of_eps = credit_weights(score, mask, eps=1.0)
    torch.testing.assert_close(of_eps, torch.tensor([even] * 3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_changes_no_diagnostic(garbage):
    clean = arca_weights(*hidden_states(), MASK)
    dirty = clean.masked_fill(~MASK, garbage)
    for diagnostic in (gini, effective_fraction):
        assert torch.equal(diagnostic(dirty, MASK), diagnostic(clean, MASK))


def test_a_row_without_response_tokens_has_no_weight():
    mask = MASK.clone()
    mask[2] = False
    weights = arca_weights(*hidden_states(), mask)
    assert (weights[2] == 0).all()
    torch.testing.assert_close(weights[[0, 1, 3]].sum(-1), torch.ones(3))


def test_half_precision_states_are_compared_in_single_precision():
    base = torch.full((1, 2, 64), 8.0, dtype=torch.bfloat16)
    adapted = base.clone()
    adapted[0, 0, :] += 0.0625
    adapted[0, 1, 0] += 100.0
    norm = residual_norm(adapted, base)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, torch.tensor([[0.5, 100.0]]))


# The signals that ARCA is compared with


def test_signals_of_the_worked_group():
    mask = WORKED_MASK
    expected = torch.tensor([[0.1, 0.5, 0.2], [0.3, 0.1, 0], [0.2, 0.9, 0.4], [1.2, 0, 0]])
    torch.testing.assert_close(surprisal(WORKED_LOGP)[mask], expected[mask])
    expected = torch.tensor([[2.0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(entropy_reduction(WORKED_ENTROPY, mask)[mask], expected[mask])
    expected = torch.tensor([[0.1, 0.1, 0.1], [0, 0.2, 0], [0.1, 0.1, 0.2], [0.2, 0, 0]])
    torch.testing.assert_close(divergence(WORKED_LOGP, WORKED_REF)[mask], expected[mask])


def test_weights_of_the_worked_group():
    mask = WORKED_MASK
    weights = credit_weights(surprisal(WORKED_LOGP), mask)
    expected = [[1 / 30, 25 / 30, 4 / 30], [0.9, 0.1, 0], [4 / 101, 81 / 101, 16 / 101], [1, 0, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=0)
    weights = credit_weights(entropy_reduction(WORKED_ENTROPY, mask), mask)
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [1, 0, 0]]  # no drop at all: uniform
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=0)
    weights = credit_weights(divergence(WORKED_LOGP, WORKED_REF), mask, sharpening=1.0)
    expected = [[1 / 3, 1 / 3, 1 / 3], [0, 1, 0], [0.25, 0.25, 0.5], [1, 0, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_last_live_token_reduces_no_entropy():
    """Not even in a full row, nor where the padding's entropy is lower."""
    entropy = torch.tensor([[2.0, 1.0, 5.0], [2.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    expected = torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    assert torch.equal(entropy_reduction(entropy, mask), expected)


def test_a_certain_token_has_no_surprisal():
    logp = torch.tensor([[1e-7, -1.0]])  # rounding puts a log-probability above 0
    assert surprisal(logp).tolist() == [[0.0, 1.0]]
    assert credit_weights(surprisal(logp), torch.ones(1, 2, dtype=torch.bool)).isfinite().all()


# Diagnostics


def test_diagnostics_by_hand():
    weights = torch.tensor(
        [
            [0.25, 0.25, 0.25, 0.25, 0],
            [0, 1, 0, 0, 0],
            [0.5, 0, 0.5, 0, 0],
            [1, 0, 0, 0, 0],
            [25 / 30, 1 / 30, 4 / 30, 0, 0],
        ]
    )
    mask = torch.arange(5) < torch.tensor([4, 4, 4, 1, 3])[:, None]
    # Worked example: 2 (1/30 + 2 * 4/30 + 3 * 25/30) / 3 - 4/3 = 8/15; 1 / (3 * 642/900).
    expected = torch.tensor([0, 3 / 4, 1 / 2, 0, 8 / 15])
    torch.testing.assert_close(gini(weights, mask), expected, atol=1e-6, rtol=0)
    expected = torch.tensor([1, 1 / 4, 1 / 2, 1, 900 / (3 * 642)])
    torch.testing.assert_close(effective_fraction(weights, mask), expected)


def test_diagnostics_equal_slow_loops():
    weights = arca_weights(*hidden_states(), MASK)
    for i, length in enumerate(LENGTHS):
        w = weights[i, :length].tolist()
        # The Gini coefficient's definition: the mean absolute difference over twice the mean.
        differences = sum(abs(a - b) for a in w for b in w) / length**2
        assert gini(weights, MASK)[i].item() == pytest.approx(
            differences / (2 * sum(w) / length), abs=1e-6
        )
        assert effective_fraction(weights, MASK)[i].item() == pytest.approx(
            1 / (length * sum(x * x for x in w)), abs=1e-6
        )
