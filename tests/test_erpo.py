"""ERPO's advantages: docs/erpo.md, by hand, token by token, and at the edges."""

import math

import pytest
import slow
import torch
import worked_example as example
from torch import Tensor
from worked_example import pad, pad_mask

from erpo import erpo_advantages, grpo_advantages


def tensors(group: slow.Group, fill: float = 0.0) -> tuple[Tensor, ...]:
    """rewards [1, G]; entropy, logp, ref_logp and mask [1, G, T]."""
    rewards = torch.tensor([group.rewards], dtype=torch.float64)
    rows = (pad(values, fill) for values in (group.entropy, group.logp, group.ref_logp))
    return rewards, *rows, pad_mask(group.entropy)


def on_example(rewards: Tensor = example.rewards, **settings: float) -> Tensor:
    return erpo_advantages(
        rewards, example.entropy, example.logp, example.ref_logp, example.mask, **settings
    )


def test_worked_example():
    expected = [[1.37, 0.1061, 0.1816], [0.4911, 2.0136], [-0.9584, -1.8752, -1.3293], [0.8663]]
    torch.testing.assert_close(on_example(buckets=2, eps=0), pad(expected), atol=5e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"gamma": 2.5, "buckets": 3}, {"eps": 0}], ids=str)
def test_agrees_with_a_loop_over_tokens(settings: dict):
    for seed in range(200):
        group = slow.random_group(seed)
        advantages = erpo_advantages(*tensors(group), **settings)
        expected = pad(slow.erpo(group, **settings))
        torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0, msg=f"group {seed}")


def test_policy_equal_to_reference_is_exactly_grpo():
    advantages = erpo_advantages(
        example.rewards, example.entropy, example.logp, example.logp, example.mask
    )
    assert torch.equal(advantages, grpo_advantages(example.rewards)[..., None] * example.mask)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_gives_exact_zeros(reward: float):
    advantages = on_example(torch.full_like(example.rewards, reward), eps=0)
    assert torch.equal(advantages, torch.zeros_like(advantages))


def test_progress_has_mean_zero_in_each_bucket():
    for seed in range(50):
        group = slow.random_group(seed)
        rewards, entropy, logp, ref_logp, mask = tensors(group)
        advantages = erpo_advantages(rewards, entropy, logp, ref_logp, mask)
        progress = advantages - grpo_advantages(rewards)[..., None]
        bucket = pad(slow.position_buckets(group.entropy, 10), fill=-1)
        for k in range(10):
            assert progress[bucket == k].sum().abs() < 1e-9


def test_finite_in_float32():
    grid = torch.tensor([-1e-7, 0.0, 1e-45, 1e-30, 1e-6, 1.0, slow.LARGEST_ENTROPY])
    generator = torch.Generator().manual_seed(0)
    entropy = grid[torch.randint(len(grid), (64, 8, 16), generator=generator)]
    logp, ref_logp = -10 * torch.rand(2, 64, 8, 16, generator=generator)
    mask = torch.arange(16) < torch.randint(1, 17, (64, 8, 1), generator=generator)
    rewards = torch.randint(2, (64, 8), generator=generator).float()
    advantages = erpo_advantages(rewards, entropy, logp, ref_logp, mask)
    assert advantages.dtype == torch.float32
    assert advantages.isfinite().all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_nothing_outside_the_mask_is_read(garbage: float):
    for seed in range(20):
        group = slow.random_group(seed)
        clean, dirty = (erpo_advantages(*tensors(group, fill)) for fill in (0.0, garbage))
        assert torch.equal(clean, dirty)
        assert not dirty[~pad_mask(group.entropy)].any()


def test_no_gradient():
    inputs = [x.clone().requires_grad_() for x in (example.rewards, example.entropy, example.logp)]
    advantages = erpo_advantages(*inputs, example.ref_logp.clone().requires_grad_(), example.mask)
    assert not advantages.requires_grad


def test_inputs_are_left_alone():
    inputs = tensors(slow.random_group(1), fill=7.0)
    before = [x.clone() for x in inputs]
    erpo_advantages(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_groups_do_not_mix():
    first = example.rewards, example.entropy, example.logp, example.ref_logp, example.mask
    second = (
        1 - example.rewards,
        example.entropy.flip(1),
        example.ref_logp,
        example.logp,
        example.mask,
    )
    both = erpo_advantages(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    apart = torch.cat([erpo_advantages(*first), erpo_advantages(*second)])
    torch.testing.assert_close(both, apart, atol=1e-12, rtol=0)
