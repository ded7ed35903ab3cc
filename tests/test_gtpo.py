"""GTPO's and GRPO-S's advantages: docs/gtpo.md, by hand, token by token, and at the edges."""

from types import SimpleNamespace
from typing import Any

import pytest
import slow
import torch
import worked_example as example
from torch import Tensor
from worked_example import pad, pad_mask

from grpo import grpo_advantages
from gtpo import (
    Args,
    clipped_loss,
    grpo_s_advantages,
    gtpo_advantages,
    overlong_punishment,
    rollout_logp,
    shaped_rewards,
    token_advantages,
)

NORMALIZATIONS = ["with-zeros", "own-set", "joint"]


EXAMPLE = (example.correct, example.entropy, example.mask)


def verdicts(group: slow.Group) -> list[bool]:
    return [reward > 0.5 for reward in group.rewards]


def tensors(group: slow.Group) -> tuple[Tensor, Tensor, Tensor]:
    """correct [1, G]; entropy and mask [1, G, T]."""
    return torch.tensor([verdicts(group)]), pad(group.entropy), pad_mask(group.entropy)


def batch_advantages(correct: Tensor, entropy: Tensor, mask: Tensor, **settings: Any) -> Tensor:
    """With --scope batch: all rollouts are one group."""
    rollouts = SimpleNamespace(correct=correct.to(entropy.dtype), entropy=entropy, mask=mask)
    return token_advantages(rollouts, Args(scope="batch", **settings))


def test_worked_example_rewards():
    positive, negative = shaped_rewards(*EXAMPLE, 1, 0.1)
    expected_positive = pad([[1.15, 1.05, 1.10], [1.05, 1.15], [0.0], [0.0]])
    expected_negative = pad([[0.0], [0.0], [-1.1778, -1.1, -1.1], [-1.0222]])
    torch.testing.assert_close(positive, expected_positive, atol=5e-5, rtol=0)
    torch.testing.assert_close(negative, expected_negative, atol=5e-5, rtol=0)


def test_worked_example_advantages():
    expected = [[0.9278, 0.7556, 0.8417], [0.7556, 0.9278], [-1.1856, -1.0517, -1.0517], [-0.9179]]
    advantages = gtpo_advantages(*EXAMPLE, eps=0)
    torch.testing.assert_close(advantages, pad(expected), atol=5e-5, rtol=0)


# Groups with both verdicts, only right rollouts and only wrong ones, of one token each.
THREE_GROUPS = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)
THREE_ENTROPIES = torch.tensor([[3, 1, 0.5, 1], [3, 1, 2, 2], [0.5, 1, 2, 2]]).double()[..., None]


def test_scope_by_hand():
    """Under batch scope the six right rollouts share 12 nats: r+ = 1 + 0.1 x 6 H / 12. With six
    zeros their mean is 0.55 and their standard deviation is the root of 3.64 / 11, 0.5752. The six
    wrong ones share 7 / nat: r- = -1 - 0.1 x 6 / 7H, of mean -0.55; the root of 3.6471 / 11 is
    0.5758.
    """
    example = THREE_GROUPS, THREE_ENTROPIES, torch.ones(3, 4, 1, dtype=torch.bool)
    mixed, *equal = gtpo_advantages(*example, eps=0)
    assert mixed.all() and not any(group.any() for group in equal)

    batch = batch_advantages(*example)[..., 0]
    expected = [[1.0430, 0.8692, -1.0792, -0.9304], [1.0430, 0.8692, 0.9561, 0.9561]]
    expected.append([-1.0792, -0.9304, -0.8559, -0.8559])
    torch.testing.assert_close(batch, torch.tensor(expected).double(), atol=5e-5, rtol=0)
    rollouts = batch_advantages(*example, level="sequence")[..., 0]
    torch.testing.assert_close(rollouts, batch)  # a token each


def test_batch_scope_agrees_with_a_loop_over_all_rollouts():
    compared = 0
    for seed in range(200):
        group = slow.random_group(seed)
        if len(group.rewards) % 2:
            continue
        both = [x.unflatten(1, (2, -1))[0] for x in tensors(group)]  # as two groups
        advantages = batch_advantages(*both, alpha2=0.3).flatten(0, 1)
        expected = pad(slow.gtpo(verdicts(group), group.entropy, alpha2=0.3))[0]
        torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0, msg=f"group {seed}")
        rollouts = batch_advantages(*both, level="sequence")[..., 0].flatten()
        expected = pad([slow.grpo_s(verdicts(group), group.entropy)])[0, 0]
        torch.testing.assert_close(rollouts, expected, atol=1e-6, rtol=0, msg=f"group {seed}")
        compared += 1
    assert compared > 50


def test_worked_example_grpo_s():
    expected = torch.tensor([[0.866, 0.866, -0.950, -0.7777]], dtype=torch.float64)
    advantages = grpo_s_advantages(*EXAMPLE, eps=0)
    torch.testing.assert_close(advantages, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("settings", [{}, {"alpha1": 0.9, "alpha2": 0.3}], ids=str)
def test_gtpo_agrees_with_a_loop_over_tokens(normalize, settings):
    for seed in range(200):
        group = slow.random_group(seed)
        advantages = gtpo_advantages(*tensors(group), normalize=normalize, **settings)
        expected = pad(slow.gtpo(verdicts(group), group.entropy, normalize=normalize, **settings))
        torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0, msg=f"group {seed}")


@pytest.mark.parametrize("settings", [{}, {"beta1": 0.9, "beta2": 0.3}], ids=str)
def test_grpo_s_agrees_with_a_loop_over_rollouts(settings):
    for seed in range(200):
        group = slow.random_group(seed)
        advantages = grpo_s_advantages(*tensors(group), **settings)
        expected = pad([slow.grpo_s(verdicts(group), group.entropy, **settings)])[0]
        torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0, msg=f"group {seed}")


def test_the_shaping_only_redistributes():
    """Proposition 2.2, and Proposition B.5 for one entropy per rollout."""
    alpha1, alpha2 = 0.9, 0.2
    for seed in range(50):
        correct, entropy, mask = tensors(slow.random_group(seed))
        for rows, tokens in ((entropy, mask), (entropy.mean(-1, keepdim=True), mask[..., :1])):
            positive, negative = shaped_rewards(correct, rows, tokens, alpha1, alpha2)
            running = (tokens & correct[..., None]).sum(1), (tokens & ~correct[..., None]).sum(1)
            torch.testing.assert_close(positive.sum(1), (alpha1 + alpha2) * running[0].double())
            torch.testing.assert_close(negative.sum(1), -(alpha1 + alpha2) * running[1].double())


@pytest.mark.parametrize("alpha2", [0.0, 0.1])
def test_without_differences_in_entropy_a_verdict_has_one_advantage(alpha2):
    entropy = example.entropy if alpha2 == 0 else torch.full_like(example.entropy, 0.7)
    shared = {"alpha2": alpha2, "eps": 0}
    advantages = gtpo_advantages(example.correct, entropy, example.mask, **shared)
    for verdict in (True, False):
        of_verdict = advantages[example.mask & (example.correct == verdict)[..., None]]
        torch.testing.assert_close(of_verdict, of_verdict[:1].expand_as(of_verdict))
        assert (of_verdict[0] > 0) == verdict
    rollouts = grpo_s_advantages(example.correct, entropy, example.mask, beta2=alpha2, eps=0)
    torch.testing.assert_close(rollouts, grpo_advantages(example.rewards, eps=0))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_uncertain_successes_earn_more_and_confident_errors_lose_more(normalize):
    compared = 0
    for seed in range(200):
        correct, entropy, mask = tensors(slow.random_group(seed))
        advantages = gtpo_advantages(correct, entropy, mask, normalize=normalize)
        for verdict in (True, False):
            for t in range(mask.shape[-1]):
                chosen = mask[0, :, t] & (correct[0] == verdict)
                order = entropy[0, chosen, t].argsort()
                steps = advantages[0, chosen, t][order].diff()  # by rising entropy
                assert (steps >= -1e-12).all()
                compared += (steps > 1e-3).sum()
    assert compared > 100


def test_with_zeros_reinforces_correct_rollouts_and_own_set_does_not():
    """Why "with-zeros" is the default: own-set advantages do not depend on the verdict."""
    right = example.mask & example.correct[..., None]
    assert (gtpo_advantages(*EXAMPLE)[right] > 0).all()
    own = gtpo_advantages(*EXAMPLE, normalize="own-set", eps=0)
    assert own[right].mean().abs() < 1e-12
    other = gtpo_advantages(*EXAMPLE, normalize="own-set", alpha1=3, alpha2=0.5, eps=0)
    torch.testing.assert_close(own, other)


def test_a_certain_token_takes_the_whole_share():
    rows = [[0.0], [2.0], [0.0], [2.0]]
    positive, negative = shaped_rewards(example.correct, pad(rows), pad_mask(rows), 1, 0.2)
    expected = torch.tensor([[1.0], [1.4], [0.0], [0.0]]).double()
    torch.testing.assert_close(positive[0], expected, atol=1e-6, rtol=0)
    expected = torch.tensor([[0.0], [0.0], [-1.4], [-1.0]]).double()
    torch.testing.assert_close(negative[0], expected, atol=1e-6, rtol=0)


def test_verdicts_may_be_rewards():
    for rewards in (example.rewards, 2 * example.rewards - 1):
        assert torch.equal(
            gtpo_advantages(rewards, example.entropy, example.mask),
            gtpo_advantages(*EXAMPLE),
        )


# GRPO-S: one clipped ratio per rollout

ADVANTAGES = torch.tensor([1.0, 2.0, -1.0, -2.0], dtype=torch.float64)


def losses(
    advantages: Tensor, old_logp: Tensor = example.ref_logp[0], low: float = 0.2, high: float = 0.28
) -> Tensor:
    """The clipped loss of each rollout of the example, [G]: GRPO-S's, as gtpo.py computes it."""
    logp = rollout_logp(example.logp[0], old_logp, example.mask[0])
    loss, _ = clipped_loss(logp, old_logp, advantages[:, None], low, high)
    weight = example.mask[0] / example.mask[0].sum(-1, keepdim=True)
    torch.testing.assert_close(loss, loss[:, :1].expand_as(loss))
    return (loss * weight).sum(-1)


def test_the_ratio_is_the_arithmetic_mean():
    ratio = torch.tensor([1.0384, 1.1107, 0.9429, 0.8187], dtype=torch.float64)
    torch.testing.assert_close(losses(ADVANTAGES), -ratio * ADVANTAGES, atol=1e-4, rtol=0)


def test_the_ratio_is_clipped_once_per_rollout():
    loss = losses(ADVANTAGES, low=0.1, high=0.05)
    expected = torch.tensor([-1.0384, -2.1, 0.9429, 1.8], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=0)
    # The clip does not apply if it would make the loss smaller.
    expected = torch.tensor([1.0384, 2 * 1.1107, -0.9429, -2 * 0.8187], dtype=torch.float64)
    torch.testing.assert_close(losses(-ADVANTAGES, low=0, high=0), expected, atol=1e-4, rtol=0)


def test_a_clipped_rollout_has_no_gradient_and_padding_none():
    mask = example.mask[0]
    logp = example.logp[0].masked_fill(~mask, 7.0).requires_grad_()
    old_logp = example.ref_logp[0].masked_fill(~mask, -7.0)
    loss, clipped = clipped_loss(
        rollout_logp(logp, old_logp, mask), old_logp, ADVANTAGES[:, None], 0.1, 0.1
    )
    loss[mask].sum().backward()
    moves = torch.tensor([True, False, True, False])[:, None]
    assert torch.equal(clipped, ~moves.expand_as(mask))
    assert torch.equal(logp.grad != 0, moves & mask)


def test_on_policy_the_gradient_is_the_plain_policy_gradient():
    mask = example.mask[0]
    logp = example.logp[0].clone().requires_grad_()
    loss, _ = clipped_loss(
        rollout_logp(logp, example.logp[0], mask), example.logp[0], ADVANTAGES[:, None], 0.2, 0.28
    )
    weight = mask / mask.sum(-1, keepdim=True)
    (loss * weight).sum().backward()
    torch.testing.assert_close(logp.grad, -ADVANTAGES[:, None] * weight)


# Appendix D: group-relative overlong punishment


@pytest.mark.parametrize(
    ("correct", "lengths", "expected"),
    [
        # Easy: L = 20 from the correct lengths alone, whose mean and mid-range agree.
        ([1, 1, 1, 0], [10, 20, 30, 90], [0, 0, -10 / 40, 0]),
        # Easy: the mean, 80/3, lies above the mid-range.
        ([1, 1, 1, 0], [10, 30, 40, 1], [0, -1 / 16, -1 / 4, 0]),
        # Easy: the mid-range, 50.5, lies above the mean; the longest comes close to -1/2.
        ([1, 1, 1, 1], [1, 1, 1, 100], [0, 0, 0, -49.5 / 101]),
        # Between, mostly correct: L = 55 from all lengths.
        ([1, 1, 1, 0, 0], [10, 60, 20, 100, 50], [0, -5 / 110, 0, 0, 0]),
        # Between, not mostly correct: L = 57.5 from all, and the wrong ones are punished.
        ([1, 1, 0, 0], [10, 90, 100, 30], [0, 0, -42.5 / 115, 0]),
        # Hard: none.
        ([1, 0, 0, 0], [90, 10, 20, 100], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [90, 10, 20, 100], [0, 0, 0, 0]),
    ],
)
def test_overlong_punishment(correct, lengths, expected):
    punishment = overlong_punishment(
        torch.tensor([correct]).bool(), torch.tensor([lengths]), gamma=0.75
    )
    torch.testing.assert_close(punishment, torch.tensor([expected], dtype=punishment.dtype))


def test_a_verdict_weight_per_rollout_is_a_punishment_added_before_standardising():
    punishment = torch.tensor([[0.0, -0.25, 0.0, -0.125]], dtype=torch.float64)
    alpha1 = torch.tensor([[1.0, 0.75, 1.0, 1.125]], dtype=torch.float64)[..., None]
    shaped = (sum(shaped_rewards(*EXAMPLE, 1, 0.1)) + punishment[..., None]) * example.mask
    torch.testing.assert_close(sum(shaped_rewards(*EXAMPLE, alpha1, 0.1)), shaped)
    expected = slow.token_z_scores(
        [row[keep].tolist() for row, keep in zip(shaped[0], example.mask[0], strict=True)],
        [[True] * len(row) for row in example.ENTROPY],
        eps=1e-6,
    )
    joint = gtpo_advantages(*EXAMPLE, normalize="joint", alpha1=alpha1)
    torch.testing.assert_close(joint, pad(expected))

    plain = gtpo_advantages(*EXAMPLE)
    for advantages, before in (
        (gtpo_advantages(*EXAMPLE, alpha1=alpha1)[..., 0], plain[..., 0]),
        (grpo_s_advantages(*EXAMPLE, beta1=alpha1), grpo_s_advantages(*EXAMPLE)),
    ):
        assert (advantages < before)[0, [1, 3]].all()
        assert (advantages > before)[0, [0, 2]].all()


# Settings


def test_grpo_s_is_averaged_over_rollouts():
    assert Args(level="sequence").loss_average == "sequence"
    assert Args(level="sequence", loss_average="sequence").loss_average == "sequence"


@pytest.mark.parametrize(("majority", "alpha1"), [("correct", 0.75), ("wrong", 1.25)])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_long_rollout_of_the_majority_loses_whatever_its_verdict(level, majority, alpha1):
    """Lengths 3, 1, 1, 1: the limit is (1 + 3) / 2 = 2, the first is punished by (2 - 3) / 4."""
    mask = torch.tensor([[[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]]]).bool()
    entropy = (0.1 + torch.arange(12.0).view(1, 4, 3) / 10) * mask
    correct = torch.tensor([[1.0, 1, 1, 0]] if majority == "correct" else [[0.0, 0, 0, 1]])
    rollouts = SimpleNamespace(correct=correct, entropy=entropy, mask=mask)
    weights = torch.tensor([[alpha1, 1.0, 1.0, 1.0]])[..., None]
    if level == "token":
        expected = gtpo_advantages(correct, entropy, mask, alpha1=weights)
    else:
        expected = grpo_s_advantages(correct, entropy, mask, beta1=weights)[..., None] * mask
    args = Args(level=level, overlong_gamma=1.0)
    torch.testing.assert_close(token_advantages(rollouts, args), expected)
    without = token_advantages(rollouts, Args(level=level))
    assert token_advantages(rollouts, args)[0, 0, 0] < without[0, 0, 0]

    # The punishment of each group, under batch scope: eight rollouts, the second group as the first
    twice = [x.repeat(2, 1, 1) for x in (correct[..., None], entropy, mask)]
    batch = batch_advantages(twice[0][..., 0], *twice[1:], level=level, overlong_gamma=1.0)
    as_one = [x.repeat(1, 2, 1) for x in (correct[..., None], entropy, mask, weights)]
    if level == "token":
        expected = gtpo_advantages(as_one[0][..., 0], *as_one[1:3], alpha1=as_one[3])
    else:
        expected = grpo_s_advantages(as_one[0][..., 0], *as_one[1:3], beta1=as_one[3])
        expected = expected[..., None] * as_one[2]
    torch.testing.assert_close(batch.flatten(0, 1), expected[0])
