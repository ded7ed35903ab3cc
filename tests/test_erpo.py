"""ERPO's advantages: docs/erpo.md, by hand, token by token, and at the edges."""

import math

import pytest
import slow
import torch
import worked_example as example
from torch import Tensor
from worked_example import pad, tensors

from erpo import erpo_advantages


def on_example(rewards: Tensor = example.rewards, **settings: float) -> Tensor:
    return erpo_advantages(
        rewards, example.entropy, example.logp, example.ref_logp, example.mask, **settings
    )


@pytest.mark.parametrize(
    ("sigma_target", "expected"),
    [
        (1.0, [[1.1082, 0.7157, 0.7904], [0.7199, 1.0354], [-1.1614, -1.3826, -1.1553], [-0.6703]]),
        (0.5, [[1.0108, 0.8067, 0.8455], [0.8089, 0.9729], [-1.1470, -1.2621, -1.1439], [-0.8917]]),
    ],
)
def test_worked_example(sigma_target, expected):
    advantages = on_example(buckets=2, sigma_target=sigma_target, eps=0)
    torch.testing.assert_close(advantages, pad(expected), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gamma": 2.5, "buckets": 3}, {"eps": 0}, {"eta": 1, "sigma_target": 2}],
    ids=str,
)
def test_agrees_with_a_loop_over_tokens(settings):
    for seed in range(200):
        group = slow.random_group(seed)
        advantages = erpo_advantages(*tensors(group), **settings)
        expected = pad(slow.erpo(group, **settings))
        torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0, msg=f"group {seed}")


@pytest.mark.parametrize("left_out", ["signal", "eta"])
def test_without_progress_it_is_the_token_z_score_of_grpo(left_out):
    """Nine tokens: five of right answers and four of wrong ones, so 2/√5 and -√5/2."""
    if left_out == "eta":
        advantages = on_example(eta=0, eps=0)
    else:
        advantages = erpo_advantages(
            example.rewards, example.entropy, example.logp, example.logp, example.mask, eps=0
        )
    right, wrong = 2 / math.sqrt(5), math.sqrt(5) / 2
    expected = right * example.rewards - wrong * (1 - example.rewards)
    torch.testing.assert_close(advantages, expected[..., None] * example.mask)


def test_advantages_sum_to_zero_and_have_variance_one():
    contrasts = 0
    for seed in range(50):
        rewards, *rows, mask = tensors(slow.random_group(seed))
        advantages = erpo_advantages(rewards, *rows, mask, eps=0)[mask]
        if rewards.amax() > rewards.amin():
            assert advantages.sum().abs() < 1e-9
            assert advantages.var(correction=0) == pytest.approx(1)
            contrasts += 1
    assert contrasts > 10


@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (100.0, 0.0), (3.0, -0.7)])
def test_an_affine_change_of_the_signal_inside_a_bucket_cancels(scale, shift):
    for seed in range(20):
        group = slow.random_group(seed)
        rewards, entropy, logp, ref_logp, mask = tensors(group)
        once = erpo_advantages(rewards, entropy, logp, ref_logp, mask, eps=0)
        bucket = pad(slow.position_buckets(group.entropy, 10), fill=-1)
        changed = ref_logp + scale * (logp - ref_logp)
        if (logp != ref_logp).any():  # a shift of nothing is rounding, not a constant
            changed = changed + shift
        changed = torch.where(bucket == 0, changed, logp)
        again = erpo_advantages(rewards, entropy, changed, ref_logp, mask, eps=0)
        torch.testing.assert_close(again, once, atol=1e-6, rtol=0)


def test_eta_and_sigma_target_act_through_their_product():
    once = on_example(eta=0.2, sigma_target=1.5)
    torch.testing.assert_close(on_example(eta=0.6, sigma_target=0.5), once, atol=1e-12, rtol=0)
    assert (on_example(eta=0.2, sigma_target=0.5) - once).abs().max() > 0.01


def test_opposite_rewards_turn_every_sign():
    turned = on_example(1 - example.rewards)
    torch.testing.assert_close(turned, -on_example(), atol=1e-12, rtol=0)
