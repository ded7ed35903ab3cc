"""FIPO's weights: docs/fipo.md, by hand, token by token, and as updates of a run."""

import math

import pytest
import slow
import torch
import worked_example as example
from one_step import (
    assert_same_gradient,
    gradient_of,
    places,
    plain_advantages,
    plain_logp,
    plain_losses,
)
from torch import Tensor
from worked_example import pad, tensors

import fipo
import grpo
from fipo import clipped_loss, fipo_weights, grpo_advantages


def token_advantages(rewards: Tensor, mask: Tensor) -> Tensor:
    return grpo_advantages(rewards, eps=0.0)[..., None] * mask


def weights_of(ratios: list[float], advantage: float, **settings: float) -> Tensor:
    """The weights of one response with these ratios, [T]."""
    logp = torch.tensor(ratios, dtype=torch.float64).log()
    mask = torch.ones(len(ratios), dtype=torch.bool)
    return fipo_weights(logp, torch.zeros_like(logp), advantage * mask, mask, **settings)


# ------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[1.1029, 1, 1.1052], [1.2, 1.2], [1, 1, 1], [1]]),
        ({"low": 0.2}, [[1.1029, 0.9979, 1.1052], [1.2, 1.2], [0.8239, 0.9087, 0.8187], [0.8187]]),
        ({"half_life": 1}, [[1.0779, 1, 1.1052], [1.1052, 1.2], [1, 1, 1], [1]]),
        (
            {"half_life": 1, "low": 0.2},
            [[1.0779, 0.9512, 1.1052], [1.1052, 1.2], [0.9048, 1, 0.8187], [0.8187]],
        ),
    ],
    ids=str,
)
def test_worked_example(settings, expected):
    advantages = token_advantages(example.rewards, example.mask)
    given = example.logp, example.ref_logp, advantages, example.mask
    torch.testing.assert_close(fipo_weights(*given, **settings), pad(expected), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("low", "high", "expected"), [(0.2, 0.2, -0.2482), (0.0, 0.0, -0.1625)])
def test_loss_of_the_worked_example(low, high, expected):
    advantages = token_advantages(example.rewards, example.mask)
    given = example.logp, example.ref_logp, advantages, example.mask
    weighted = advantages * fipo_weights(*given, half_life=1, low=low, high=high)
    loss, _ = clipped_loss(example.logp, example.ref_logp, weighted, 0.2, 0.28)
    assert loss[example.mask].mean().item() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("ratios", "advantage", "settings", "expected", "loss"),
    [
        ([12, 0.5, 2], -1, {}, [1, 1, 1.2], 4.4),
        ([12, 0.5, 2], -1, {"low": 0.2}, [0.8409, 0.8, 1.2], 3.8163),
        ([12, 0.5, 2], 1, {"low": 0.2}, [0.8409, 0.8, 1.2], -1.0041),
        ([12, 11, 2], -1, {"low": 0.2}, [0, 0, 0], 0),
        ([12, 11, 2], 1, {"low": 0.2}, [1.1892, 1.2, 1.2], -1.5314),
        ([4, 0.5, 2], -1, {"low": 0.2}, [1.2, 0.8, 1.2], 2.6133),
        ([4, 0.5, 2], -1, {"low": 0.2, "safety": 3.0}, [1, 0.8, 1.2], 2.3467),
    ],
    ids=str,
)
def test_second_example(ratios, advantage, settings, expected, loss):
    weights = weights_of(ratios, advantage, half_life=1.0, **settings)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(weights, expected, atol=5e-5, rtol=0)
    logp = torch.tensor(ratios, dtype=torch.float64).log()
    capped = logp.clamp(max=math.log(10))
    losses, _ = clipped_loss(capped, torch.zeros_like(logp), advantage * weights, 0.2, 0.28)
    assert losses.mean().item() == pytest.approx(loss, abs=5e-5)


# ------------------------------------------------------------------------------- token by token


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"half_life": 2.0, "low": 0.2, "high": 0.5},
        {"low": 0.3, "ratio_cap": 1.3, "safety": 1.1},
        {"half_life": 0.5, "low": 0.0, "ratio_cap": 1.3, "safety": 1.1},
    ],
    ids=str,
)
def test_agrees_with_a_loop_over_tokens(settings):
    dropped, filtered = 0, 0
    for seed in range(200):
        group = slow.random_group(seed)
        rewards, _, logp, old_logp, mask = tensors(group)
        advantages = token_advantages(rewards, mask)
        weights = fipo_weights(logp, old_logp, advantages, mask, **settings)
        of_rollouts = grpo_advantages(rewards, eps=0.0)[0].tolist()
        expected = slow.fipo(group.logp, group.ref_logp, of_rollouts, **settings)
        torch.testing.assert_close(weights, pad(expected), atol=1e-12, rtol=0, msg=f"group {seed}")
        dropped += int((mask & (weights == 0)).any())
        filtered += int(((logp - old_logp)[mask] > math.log(1.3)).any())
    assert filtered > 20
    assert (dropped > 5) is ("ratio_cap" in settings)


def test_a_long_response_at_a_half_life_of_one_token():
    """2^-t underflows after 1,074 tokens; the weights of the last tokens must not depend on t."""
    ratios = [1.05, 0.9, 1.1] * 1000
    weights = weights_of(ratios, 1.0, half_life=1.0, low=0.5, high=0.5)
    assert torch.equal(
        weights[-300:], weights_of(ratios[-300:], 1.0, half_life=1.0, low=0.5, high=0.5)
    )
    torch.testing.assert_close(weights[:300], weights[900:1200], atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("settings", [{}, {"low": 0.5, "high": 3.0, "half_life": 1e9}], ids=str)
def test_all_weights_are_1_before_the_policy_moves(settings):
    advantages = token_advantages(example.rewards, example.mask)
    given = example.logp, example.logp.clone(), advantages, example.mask
    assert torch.equal(fipo_weights(*given, **settings), example.mask.double())


def test_a_change_at_the_distance_of_the_half_life_counts_half():
    weights = weights_of([1, 1, 1, 1, 1.1], 1.0, half_life=4.0)
    assert weights[0].item() == pytest.approx(1.1**0.5)
    weights = weights_of([1.02, 0.97, 1.05], 1.0, half_life=1e9, low=0.2)
    expected = torch.tensor([1.02 * 0.97 * 1.05, 0.97 * 1.05, 1.05], dtype=torch.float64)
    torch.testing.assert_close(weights, expected)


def test_a_ratio_above_the_cap_changes_no_weight():
    for advantage in (1.0, -1.0):
        above = weights_of([1.0, 2.1, 1.05], advantage, ratio_cap=2.0)
        assert torch.equal(above, weights_of([1.0, 1.0, 1.05], advantage, ratio_cap=2.0))
        at_the_cap = weights_of([1.0, 2.0, 1.05], advantage, ratio_cap=2.0, high=9.0)
        assert at_the_cap[1] > 2


def test_a_response_is_dropped_for_its_second_ratio_above_the_cap():
    for ratios, advantage, kept in [
        ([3.0, 3.0, 1.0], -1.0, False),
        ([3.0, 1.0, 1.0], -1.0, True),
        ([3.0, 3.0, 1.0], 1.0, True),
        ([3.0, 3.0, 1.0], 0.0, True),
    ]:
        assert weights_of(ratios, advantage, ratio_cap=2.0).all().item() is kept
        assert weights_of(ratios, advantage, ratio_cap=2.0).any().item() is kept


def test_weights_lie_in_the_band_and_an_overflow_is_clipped():
    settings = {"low": 0.2, "ratio_cap": 1e301, "half_life": 1e9}
    assert weights_of([1e300, 1e300], 1.0, **settings).tolist() == pytest.approx([1.2, 1.2])
    assert weights_of([1e-300, 1e-300], 1.0, **settings).tolist() == pytest.approx([0.8, 0.8])
    assert weights_of([0.5, 0.9], 1.0).tolist() == [1, 1]


def test_padding_and_empty_responses():
    logp = torch.tensor([[0.1, math.nan, math.inf], [math.nan, -math.inf, math.inf]])
    mask = torch.tensor([[True, False, False], [False, False, False]])
    weights = fipo_weights(logp, torch.zeros_like(logp), -mask.float(), mask)
    expected = torch.tensor([[math.exp(0.1), 0, 0], [0, 0, 0]])
    torch.testing.assert_close(weights, expected)


def test_a_capped_log_ratio_is_the_dual_clip():
    """In value and gradient: where A < 0, the surrogate is at least c A."""
    generator = torch.Generator().manual_seed(0)
    old_logp = torch.zeros(400, dtype=torch.float64)
    logp = torch.randn(400, generator=generator, dtype=torch.float64).requires_grad_()
    advantages = torch.randn(400, generator=generator, dtype=torch.float64)
    capped = torch.minimum(logp, old_logp + math.log(1.5))
    ours, _ = clipped_loss(capped, old_logp, advantages, 0.2, 0.28)
    loss, _ = clipped_loss(logp, old_logp, advantages, 0.2, 0.28)
    bound = torch.minimum(loss, -1.5 * advantages)
    explicit = torch.where(advantages < 0, bound, loss)
    assert (explicit < loss).sum() > 20
    torch.testing.assert_close(ours, explicit)
    gradients = [torch.autograd.grad(x.sum(), logp, retain_graph=True)[0] for x in (ours, explicit)]
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------- a run


def test_the_first_update_is_that_of_dapo(record):
    settings = {"updates_per_rollout": 2, "lr": 1e-2, "max_grad_norm": 1.0}
    ours = record(fipo, **settings)
    theirs = record(grpo, clip_high=0.28, **settings)
    assert_same_gradient(ours.updates[0].gradient, theirs.updates[0].gradient, 1e-6)
    gap = ours.updates[1].gradient - theirs.updates[1].gradient
    assert gap.norm() > 1e-3 * theirs.updates[1].gradient.norm()


def test_a_later_update_is_the_plain_one(record):
    """From the definition, with constant weights: all of filter, cap, safety and drop occur."""
    weighting = {"half_life": 3.0, "ratio_cap": 1.35, "safety": 1.25}
    bounds = {"influence_low": 0.2, "influence_high": 0.3, "clip_high": 0.3}
    settings = {"updates_per_rollout": 2, "seed": 3, "token_budget": 100, "log_rollouts": 4}
    recording = record(fipo, **weighting, **bounds, **settings)
    rollouts, (first, second) = recording.rollouts[0], recording.updates
    advantages, weighted = plain_advantages(recording), {}
    for place in places(rollouts):
        if place[0] in second.problems:
            new, old = (plain_logp(x.policy, rollouts, *place).tolist() for x in (second, first))
            rows = [new], [old], [advantages[place].item()]
            [weights] = slow.fipo(*rows, low=0.2, high=0.3, **weighting)
            logged = recording.lines[4 * place[0] + place[1]]["influence"]
            assert logged == pytest.approx(weights, abs=1e-4)
            weighted[place] = advantages[place] * torch.tensor(weights)

    losses, capped, dropped = [], 0, 0
    for place, loss in plain_losses(recording, second, weighted).items():
        dual = torch.minimum(loss, -1.35 * weighted[place])
        losses.append(torch.where(weighted[place] < 0, dual, loss))
        capped += int((losses[-1] < loss).any())
        dropped += not weighted[place].any()
    assert capped and dropped
    plain = gradient_of(torch.cat(losses).mean(), second.policy)
    assert_same_gradient(second.gradient, plain, 1e-3)
    metrics = recording.metrics[1]
    assert metrics["influence/dropped"] == dropped / 16
    assert 0 < metrics["influence/high"] < 1
    assert 0 < metrics["influence/low"] < 1
    assert metrics["influence/mean"] == pytest.approx(
        torch.cat([torch.tensor(line["influence"]) for line in recording.lines]).mean().item()
    )
