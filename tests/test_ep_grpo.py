"""EP-GRPO's advantages: docs/ep_grpo.md, by hand, token by token, and at the edges."""

import pytest
import slow
import torch
import worked_example as example
from torch import Tensor
from worked_example import pad, pad_mask, tensors

from ep_grpo import ep_grpo_advantages, grpo_advantages


def on_example(rewards: Tensor = example.rewards, **settings: float) -> Tensor:
    return ep_grpo_advantages(
        rewards, example.entropy, example.logp, example.ref_logp, example.mask, **settings
    )


def equal_policies(**settings: float) -> Tensor:
    """The example's advantages when the policy equals the reference."""
    return ep_grpo_advantages(
        example.rewards, example.entropy, example.logp, example.logp, example.mask, **settings
    )


def test_worked_example():
    expected = [[0.8814, -0.2858, 0.5095], [-0.1876, 1.0420], [0.1987, -0.7848, 0.1711], [-0.6824]]
    torch.testing.assert_close(on_example(buckets=2, eps=0), pad(expected), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("reward", "direction"), [(0.0, 1), (1.0, -1)], ids=["wrong", "right"])
def test_worked_example_of_equal_rewards(reward, direction):
    expected = [[-0.1323, 0.1323, -0.1323], [-0.2, -0.2646], [0.2, -0.1323, 0.2646], [0.2646]]
    advantages = on_example(torch.full_like(example.rewards, reward), buckets=2, eps=0)
    torch.testing.assert_close(advantages, direction * pad(expected), atol=5e-5, rtol=0)


def test_worked_example_of_a_policy_equal_to_the_reference():
    expected = [[0.8584, 0.0124, 0.4866], [0.0124, 0.8584], [-0.0013, -0.4866, -0.0124], [-0.8659]]
    advantages = equal_policies(eps=0)
    torch.testing.assert_close(advantages, pad(expected), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gamma": 2.5, "buckets": 3, "eta": 1.0}, {"reward_threshold": 0.05, "eps": 0}],
    ids=str,
)
def test_agrees_with_a_loop_over_tokens(settings):
    for seed in range(200):
        group = slow.random_group(seed)
        advantages = ep_grpo_advantages(*tensors(group), **settings)
        expected = pad(slow.ep_grpo(group, **settings))
        torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0, msg=f"group {seed}")


@pytest.mark.parametrize("left_out", ["signal", "eta"])
def test_without_progress_the_gated_outcome_is_left(left_out):
    advantages = equal_policies(eps=0) if left_out == "signal" else on_example(eta=0, eps=0)
    gate = pad(slow.gates(example.ENTROPY, gamma=5, eps=0))
    outcome = grpo_advantages(example.rewards, eps=0)[..., None]
    torch.testing.assert_close(advantages, gate * outcome * example.mask)


def test_policy_equal_to_reference_and_no_gate_gives_exactly_half_of_grpo():
    advantages = equal_policies(gamma=0)
    half = grpo_advantages(example.rewards)[..., None] / 2 * example.mask
    assert torch.equal(advantages, half)


def test_an_equal_signal_is_not_noise_divided_by_eps():
    logp = torch.full_like(example.logp, -0.2)
    ref_logp = torch.full_like(example.logp, -0.1)
    wrong = torch.zeros_like(example.rewards)
    advantages = ep_grpo_advantages(wrong, example.entropy, logp, ref_logp, example.mask, eps=0)
    assert torch.equal(advantages, torch.zeros_like(advantages))


@pytest.mark.parametrize("factor", [0.01, 3.0, 100.0])
def test_the_scale_of_the_log_ratio_cancels(factor):
    for seed in range(20):
        rewards, entropy, logp, ref_logp, mask = tensors(slow.random_group(seed))
        once = ep_grpo_advantages(rewards, entropy, logp, ref_logp, mask, eps=0)
        scaled = ref_logp + factor * (logp - ref_logp)
        again = ep_grpo_advantages(rewards, entropy, scaled, ref_logp, mask, eps=0)
        torch.testing.assert_close(again, once, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eta", [0.2, 0.7])
def test_progress_has_mean_zero_and_deviation_eta_in_each_bucket(eta):
    spreads = 0
    for seed in range(50):
        group = slow.random_group(seed)
        rewards, entropy, logp, ref_logp, mask = tensors(group)
        settings = {"eta": eta, "eps": 0}
        whole = ep_grpo_advantages(rewards, entropy, logp, ref_logp, mask, **settings)
        outcome = ep_grpo_advantages(rewards, entropy, ref_logp, ref_logp, mask, **settings)
        bucket = pad(slow.entropy_buckets(group.entropy, 10), fill=-1)
        for k in range(10):
            progress = (whole - outcome)[bucket == k]
            assert progress.sum().abs() < 1e-9
            if progress.any():
                assert progress.std(correction=0) == pytest.approx(eta)
                spreads += 1
    assert spreads > 50


def test_all_wrong_and_all_right_are_opposite():
    wrong = on_example(torch.zeros_like(example.rewards))
    right = on_example(torch.ones_like(example.rewards))
    assert wrong.any()
    assert torch.equal(wrong, -right)


def test_rewards_at_the_threshold_have_no_polarity():
    advantages = on_example(torch.full_like(example.rewards, 0.5))
    assert torch.equal(advantages, torch.zeros_like(advantages))


@pytest.mark.parametrize("nothing", [0.0, -1e-8])  # rounding can leave an entropy below 0
def test_a_rollout_without_entropy_lies_in_the_first_bucket(nothing):
    # tau is 0 on both tokens of the first rollout, 1/2 and 1 on those of the others.
    rows = [[nothing, nothing], [1.0, 1.0], [1.0, 1.0]]
    logp = pad([[-0.1, -0.3], [-0.2, -0.4], [-0.5, -0.7]])
    wrong = torch.zeros(1, 3, dtype=torch.float64)
    advantages = ep_grpo_advantages(
        wrong, pad(rows), logp, torch.zeros_like(logp), pad_mask(rows), buckets=2, eps=0
    )
    pair = torch.tensor([-0.2, 0.2], dtype=torch.float64)  # two alone in a bucket: -η and η
    torch.testing.assert_close(advantages[0, 0], pair)
