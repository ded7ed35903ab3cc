"""HölderPO's ratio, loss and schedule against the paper's equations, by hand and by slow loops."""

import math
from itertools import pairwise

import pytest
import torch
import worked_example as example
from torch import Tensor

from holderpo import (
    anneal_p,
    gradient_weights,
    holder_loss,
    holder_ratio,
    holder_surrogate,
)

POWERS = [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]
LENGTHS = [7, 1, 4, 2]
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
ADVANTAGES = torch.tensor([1.5, -0.5, -1.0, 0.75], dtype=torch.float64)


def random_logp(spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Log-probabilities [4, 7] of the new (a leaf with gradient) and the old policy."""
    generator = torch.Generator().manual_seed(3)
    old_logp = -torch.rand(4, 7, generator=generator, dtype=torch.float64) - 0.1
    logp = old_logp + spread * torch.randn(4, 7, generator=generator, dtype=torch.float64)
    return logp.requires_grad_(), old_logp


def token_ratios(logp: Tensor, old_logp: Tensor) -> list[list[float]]:
    """The ratios of the response tokens of each rollout, as Python floats."""
    difference = (logp - old_logp).tolist()
    return [[math.exp(d) for d in row[:n]] for row, n in zip(difference, LENGTHS, strict=True)]


def slow_mean(ratios: list[float], p: float) -> float:
    if p == 0:
        return math.prod(ratios) ** (1 / len(ratios))
    return (sum(r**p for r in ratios) / len(ratios)) ** (1 / p)


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf)[0]


# The ratio


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (-2, [1.0244, 1.0942, 0.9216, 0.8187]),
        (-1, [1.0292, 1.0997, 0.9284, 0.8187]),
        (0, [1.0339, 1.1052, 0.9355, 0.8187]),
        (1, [1.0384, 1.1107, 0.9429, 0.8187]),
        (2, [1.0427, 1.1162, 0.9505, 0.8187]),
    ],
)
def test_worked_example(p, expected):
    """With ref_logp as the old policy."""
    logp, old_logp = example.logp[0].float(), example.ref_logp[0].float()
    ratio = holder_ratio(logp, old_logp, example.mask[0], p)
    torch.testing.assert_close(ratio, torch.tensor(expected), atol=6e-5, rtol=0)
    assert ratio.dtype == logp.dtype


@pytest.mark.parametrize("p", POWERS)
def test_ratio_equals_a_slow_loop(p):
    logp, old_logp = random_logp()
    expected = [slow_mean(ratios, p) for ratios in token_ratios(logp, old_logp)]
    torch.testing.assert_close(
        holder_ratio(logp, old_logp, MASK, p).tolist(), expected, atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("p", POWERS)
def test_autograd_equals_equation_3(p):
    logp, old_logp = random_logp()
    ratio = holder_ratio(logp, old_logp, MASK, p)
    expected = torch.zeros_like(logp)
    for i, ratios in enumerate(token_ratios(logp, old_logp)):
        total = sum(r**p for r in ratios)
        for t, r in enumerate(ratios):
            expected[i, t] = slow_mean(ratios, p) * r**p / total
    torch.testing.assert_close(gradient(ratio.sum(), logp), expected, atol=1e-9, rtol=0)
    weights = gradient_weights(logp, old_logp, MASK, p)
    torch.testing.assert_close(ratio[:, None].detach() * weights, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("p", [*POWERS, 0.3, -0.004, 1e-5])
@pytest.mark.parametrize("clip_level", ["sequence", "token"])
def test_on_policy_every_p_is_the_plain_policy_gradient(p, clip_level):
    old_logp = random_logp()[1].float()
    logp = old_logp.clone().requires_grad_()
    ratio = holder_ratio(logp, old_logp, MASK, p)
    torch.testing.assert_close(ratio, torch.ones(4), atol=1e-6, rtol=0)
    advantages = ADVANTAGES.float()
    loss = holder_loss(logp, old_logp, MASK, advantages, p, clip_level=clip_level)
    # GRPO averaged per sequence: -1/N sum_i A_i / |y_i| sum_t log pi_t, every ratio being 1.
    expected = torch.zeros(4, 7)
    for i, length in enumerate(LENGTHS):
        expected[i, :length] = -advantages[i] / length / 4
    torch.testing.assert_close(gradient(loss, logp), expected, atol=1e-6, rtol=0)


def test_ratio_rises_with_p_between_the_extreme_token_ratios():
    logp, old_logp = (x.detach() for x in random_logp(spread=2.0))
    powers = [-300, -20, -2, -1, -0.1, -1e-3, 0, 1e-3, 0.1, 0.5, 1, 2, 3, 20, 300]
    ratios = torch.stack([holder_ratio(logp, old_logp, MASK, p) for p in powers])
    assert (ratios.diff(dim=0) >= -1e-12).all()
    assert (ratios.diff(dim=0)[:, [0, 2, 3]] > 0).all()  # rollout 1 has a single token
    live = [torch.tensor(row) for row in token_ratios(logp, old_logp)]
    # (1/|y|)^(1/p) of the extreme ratio is the most that p = ±300 can be away from it.
    torch.testing.assert_close(ratios[0], torch.stack([r.min() for r in live]).double(), **LIMIT)
    torch.testing.assert_close(ratios[-1], torch.stack([r.max() for r in live]).double(), **LIMIT)


LIMIT = {"atol": 0.0, "rtol": 7 ** (1 / 300) - 1 + 1e-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_p_is_the_geometric_mean(dtype):
    logp, old_logp = (x.detach().to(dtype) for x in random_logp())
    geometric = holder_ratio(logp, old_logp, MASK, 0.0)
    assert torch.equal(holder_ratio(logp, old_logp, MASK, 1e-7), geometric)
    assert torch.equal(holder_ratio(logp, old_logp, MASK, -1e-7), geometric)
    # The ratio is continuous at the branch: single precision would be off by about 0.1 here.
    for p in (2e-6, -2e-6):
        near = holder_ratio(logp, old_logp, MASK, p)
        torch.testing.assert_close(near, geometric, atol=1e-6, rtol=0)


@pytest.mark.parametrize("p", [*POWERS, 3.0, 1e-3, -1e-3])
@pytest.mark.parametrize("extremes", [(80.0, -80.0), (80.0, 80.0), (-80.0, -80.0), (50.0, 0.0)])
def test_no_overflow(p, extremes):
    logp = torch.tensor([[*extremes, 0.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])
    old_logp = torch.zeros(1, 4)
    ratio = holder_ratio(logp, old_logp, mask, p)
    # In logarithms the largest term r^p / n gives the mean, up to log n / |p|.
    exponents = [p * d for d in (*extremes, 0.0)]
    top = max(exponents)
    log_ratio = (
        sum((*extremes, 0.0)) / 3
        if p == 0
        else (top + math.log(sum(math.exp(e - top) for e in exponents) / 3)) / p
    )
    assert ratio.item() == pytest.approx(math.exp(log_ratio), rel=2e-5)
    assert gradient(ratio.sum(), logp).isfinite().all()
    assert gradient_weights(logp, old_logp, mask, p).isfinite().all()
    for clip_level in ("sequence", "token"):
        for advantage in (1.0, -1.0):
            arguments = (logp, old_logp, mask, torch.tensor([advantage]), p)
            loss = holder_loss(*arguments, clip_level=clip_level)
            assert loss.isfinite() and gradient(loss, logp).isfinite().all()


# The loss


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "flows"),
    [
        (1.5, 2.0, 2.4, False),  # raised enough: clipped at 1.2
        (0.5, 2.0, 1.0, True),  # has fallen: pull it back up
        (1.5, -2.0, -3.0, True),  # has risen: push it back down
        (0.5, -2.0, -1.6, False),  # lowered enough: clipped at 0.8
        (1.1, 2.0, 2.2, True),
        (0.9, -2.0, -1.8, True),
    ],
)
@pytest.mark.parametrize("clip_level", ["sequence", "token"])
@pytest.mark.parametrize("p", POWERS)
def test_clip_by_hand(ratio, advantage, value, flows, clip_level, p):
    """All tokens share one ratio, so every p gives that ratio and both clips agree."""
    logp = torch.full((1, 3), math.log(ratio), dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    arguments = (logp, torch.zeros(1, 3), mask, advantages, p)
    loss, clipped = holder_surrogate(*arguments, clip_level=clip_level)
    assert loss.item() == pytest.approx(-value)
    expected = -ratio * advantage / 3 if flows else 0.0
    torch.testing.assert_close(gradient(loss.sum(), logp).tolist(), [[expected] * 3])
    assert clipped.tolist() == [[not flows] * 3]


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("clip_level", ["sequence", "token"])
def test_loss_equals_a_slow_loop(p, clip_level):
    logp, old_logp = random_logp(spread=0.4)
    expected, cut = [], []
    for ratios, advantage in zip(token_ratios(logp, old_logp), ADVANTAGES.tolist(), strict=True):
        if clip_level == "sequence":
            rho = slow_mean(ratios, p)
            bounded = min(max(rho, 0.7), 1.3)
            expected.append(min(rho * advantage, bounded * advantage))
            past = [rho > 1.3 if advantage > 0 else rho < 0.7] * len(ratios)
        else:
            better = min if advantage > 0 else max
            rho = slow_mean([better(r, min(max(r, 0.7), 1.3)) for r in ratios], p)
            expected.append(rho * advantage)
            past = [r > 1.3 if advantage > 0 else r < 0.7 for r in ratios]
        cut.append(past + [False] * (7 - len(ratios)))
    arguments = (logp, old_logp, MASK, ADVANTAGES, p)
    losses, clipped = holder_surrogate(*arguments, clip=0.3, clip_level=clip_level)
    torch.testing.assert_close(losses.tolist(), [-x for x in expected], atol=1e-12, rtol=0)
    assert clipped.tolist() == cut
    loss = holder_loss(*arguments, clip=0.3, clip_level=clip_level)
    assert loss.item() == pytest.approx(-sum(expected) / 4, abs=1e-12)


def test_default_clip_is_per_sequence_at_one_fifth():
    arguments = (*random_logp(spread=0.6), MASK, ADVANTAGES, 1.0)
    default = holder_loss(*arguments)
    assert torch.equal(default, holder_loss(*arguments, clip=0.2, clip_level="sequence"))
    assert not torch.isclose(default, holder_loss(*arguments, clip_level="token"))
    assert not torch.isclose(default, holder_loss(*arguments, clip=0.3))


def test_p_0_with_the_token_clip_is_gmpo():
    """GMPO, arXiv 2507.20673: the geometric mean of token ratios clipped toward the advantage.

    Written as in that paper, with the sign of the advantage moved into the logarithm.
    """
    logp, old_logp = random_logp(spread=0.5)
    loss = holder_loss(logp, old_logp, MASK, ADVANTAGES, 0.0, clip_level="token")
    low, high = math.log(0.8), math.log(1.2)
    terms = []
    for i, length in enumerate(LENGTHS):
        sign = 1 if ADVANTAGES[i] > 0 else -1
        signed = sign * (logp - old_logp)[i, :length]
        bounds = (low, high) if sign == 1 else (-high, -low)
        smaller = torch.minimum(signed, signed.clamp(*bounds))
        terms.append(-ADVANTAGES[i] * torch.exp(sign * smaller.sum() / length))
    gmpo = torch.stack(terms).mean()
    assert loss.item() == pytest.approx(gmpo.item(), abs=1e-12)
    expected = gradient(gmpo, logp)
    assert (expected[MASK] == 0).any() and (expected[MASK] != 0).any()  # some tokens are clipped
    torch.testing.assert_close(gradient(loss, logp), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("p", POWERS)
def test_padding_changes_no_loss(p, garbage):
    logp, old_logp = random_logp(spread=0.5)
    dirty = logp.detach().masked_fill(~MASK, garbage).requires_grad_()
    dirty_old = old_logp.masked_fill(~MASK, -garbage)
    for clip_level in ("sequence", "token"):
        loss = holder_loss(logp, old_logp, MASK, ADVANTAGES, p, clip_level=clip_level)
        same = holder_loss(dirty, dirty_old, MASK, ADVANTAGES, p, clip_level=clip_level)
        assert torch.equal(loss, same)
        assert torch.equal(gradient(loss, logp), gradient(same, dirty))


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("clip_level", ["sequence", "token"])
def test_a_rollout_without_live_tokens_adds_no_gradient(p, clip_level):
    logp, old_logp = random_logp()
    mask = MASK.clone()
    mask[2] = False
    loss = holder_loss(logp, old_logp, mask, ADVANTAGES, p, clip_level=clip_level)
    direction = gradient(loss, logp)
    assert loss.isfinite() and direction.isfinite().all()
    assert (direction[2] == 0).all() and (direction[0] != 0).any()
    assert holder_ratio(logp, old_logp, mask, p)[2] == 1
    assert (gradient_weights(logp, old_logp, mask, p)[2] == 0).all()


def test_unknown_clip_level_is_rejected():
    with pytest.raises(ValueError, match=r"--clip-level.*'tokens'"):
        holder_loss(*random_logp(), MASK, ADVANTAGES, 1.0, clip_level="tokens")


# The schedule

SHAPES = ["linear", "cosine", "quadratic", "cubic"]


@pytest.mark.parametrize(
    ("schedule", "quarter", "half", "three_quarters"),
    [
        ("linear", 1.0, 0.0, -1.0),
        ("cosine", math.sqrt(2), 0.0, -math.sqrt(2)),
        ("quadratic", 1.75, 1.0, -0.25),
        ("cubic", 0.25, 0.0, -0.25),
        ("constant", 2.0, 2.0, 2.0),
    ],
)
def test_schedule_by_hand(schedule, quarter, half, three_quarters):
    values = [anneal_p(step, 8, schedule=schedule) for step in (2, 4, 6)]
    assert values == pytest.approx([quarter, half, three_quarters], abs=1e-12)


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize(("p_start", "p_end"), [(2.0, -2.0), (1.0, -1.0), (3.0, 0.5), (-1.0, 2.0)])
def test_schedule_runs_from_start_to_end_and_stays(schedule, p_start, p_end):
    values = [
        anneal_p(step, 50, p_start=p_start, p_end=p_end, schedule=schedule) for step in range(80)
    ]
    assert values[0] == p_start
    assert values[50:] == pytest.approx([p_end] * 30, abs=1e-12)
    falls = [(a - b) * (p_start - p_end) for a, b in pairwise(values)]
    assert min(falls) >= 0 and min(falls[:24]) > 0


def test_schedule_edges():
    assert anneal_p(0, 10) == 2.0 and anneal_p(10, 10) == -2.0  # the paper's, for mathematics
    assert anneal_p(5, 10) == anneal_p(5, 10, p_start=2.0, p_end=-2.0, schedule="linear")
    assert anneal_p(99, 10, p_start=0.5, schedule="constant") == 0.5
    assert anneal_p(0, 0) == 2.0  # nothing to anneal over
    with pytest.raises(KeyError, match="square"):
        anneal_p(0, 10, schedule="square")
