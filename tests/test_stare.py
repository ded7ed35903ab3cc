"""STARE's weights: docs/stare.md, by hand, token by token, and as updates of a run."""

import pytest
import slow
import torch
import worked_example as example
from one_step import (
    assert_same_gradient,
    gradient_of,
    moved_reference,
    places,
    plain_advantages,
    plain_logp,
    plain_losses,
)
from torch import Tensor
from worked_example import pad, tensors

import common
import grpo
import stare
from stare import grpo_advantages, stare_weights


def on_example(rewards: Tensor = example.rewards, **settings: float) -> Tensor:
    advantages = grpo_advantages(rewards)[..., None] * example.mask
    return stare_weights(example.logp, advantages, example.mask, **settings)


def random_step(seed: int, problems: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """logp without ties, advantages and mask, [P, 4, 8]."""
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(problems, 4, 8, generator=generator, dtype=torch.float64)
    mask = torch.arange(8) < torch.randint(1, 9, (problems, 4, 1), generator=generator)
    rewards = torch.randint(2, (problems, 4), generator=generator).double()
    return logp, grpo_advantages(rewards)[..., None] * mask, mask


# ------------------------------------------------------------------------------- by hand


EXAMPLE = [
    ({}, [[1, 1.1, 1], [1, 1], [1, 1, 1], [1]]),
    ({"top": 0.4, "attenuate": 0.9}, [[1, 1.1, 1], [1.1, 1], [1, 0.9, 1], [0.9]]),
    ({"top": 0.7}, [[1.1, 1.1, 1.1], [1.1, 1.1], [1, 1, 1], [1]]),
]


@pytest.mark.parametrize(("settings", "expected"), EXAMPLE, ids=str)
def test_worked_example(settings, expected):
    torch.testing.assert_close(on_example(**settings), pad(expected))


@pytest.mark.parametrize(
    "settings",
    [{}, {"top": 0.5, "attenuate": 0.9}, {"top": 1.0, "amplify": 3.0, "attenuate": 0.1}],
    ids=str,
)
def test_agrees_with_a_loop_over_tokens(settings):
    for seed in range(200):
        group = slow.random_group(seed)
        rewards, _, logp, _, mask = tensors(group)
        logp = (4 * logp).round() / 4 if seed % 2 else logp  # many ties
        advantages = grpo_advantages(rewards)
        weights = stare_weights(logp, advantages[..., None] * mask, mask, **settings)
        rows = [row[kept].tolist() for row, kept in zip(logp[0], mask[0], strict=True)]
        expected = pad(slow.stare(rows, advantages[0].tolist(), **settings))
        torch.testing.assert_close(weights, expected, msg=f"group {seed}")


# ------------------------------------------------------------------------------- what must hold


def test_a_product_that_rounds_above_a_whole_number():
    """0.07 x 100 is 7.000000000000001, and k is 7."""
    logp = -torch.arange(1.0, 101.0).view(1, 1, 100)
    mask = torch.ones(1, 1, 100, dtype=torch.bool)
    assert (stare_weights(logp, mask.float(), mask, top=0.07) > 1).sum() == 7


def test_weights_of_1_and_no_contrast():
    assert torch.equal(on_example(amplify=1.0), example.mask.double())
    for reward in (0.0, 1.0):
        equal = on_example(torch.full_like(example.rewards, reward), attenuate=0.5, amplify=2.0)
        assert torch.equal(equal, example.mask.double())
    nothing = torch.zeros_like(example.mask)
    assert not stare_weights(example.logp, example.logp, nothing).any()


def test_one_token_of_a_sign_is_surprising():
    logp, advantages = torch.tensor([[[-0.1], [-0.2]]]), torch.tensor([[[1.0], [-1.0]]])
    weights = stare_weights(logp, advantages, advantages != 0, attenuate=0.9)
    torch.testing.assert_close(weights, torch.tensor([[[1.1], [0.9]]]))


def test_the_entropy_moves_as_theorem_3_1_says():
    """dH/dη = -A Φ(p) for a small step along the gradient of A log p with respect to the logits: a
    surprising token raises the entropy, an expected one lowers it."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)

    def entropy(logits: Tensor) -> Tensor:
        return torch.special.entr(logits.softmax(-1)).sum()

    probabilities, before = logits.softmax(-1), entropy(logits)
    surplus = probabilities.log() + before
    for token, advantage in ((0, 1.0), (3, 1.0), (3, -0.5)):
        p = probabilities[token]
        phi = p * surplus[token] - (probabilities.square() * surplus).sum()
        one_hot = torch.eye(4, dtype=torch.float64)[token]
        moved = logits + 1e-6 * advantage * (one_hot - probabilities)
        slope = (entropy(moved) - before) / 1e-6
        assert slope.item() == pytest.approx(-advantage * phi.item(), rel=1e-4)
        assert (slope > 0).item() is ((token == 3) == (advantage > 0))


def test_problems_share_one_population():
    """One problem can have all surprising tokens of the step. The order does not matter."""
    logp, advantages, mask = random_step(2, problems=4)
    logp[0] -= 10
    weights = stare_weights(logp, advantages, mask, top=0.01)
    assert (weights[0] > 1).any() and not (weights[1:] > 1).any()
    assert (stare_weights(logp[1:], advantages[1:], mask[1:], top=0.01) > 1).any()
    order = torch.tensor([2, 0, 3, 1])
    permuted = stare_weights(logp[order], advantages[order], mask[order], top=0.01)
    assert torch.equal(permuted, weights[order])


# ------------------------------------------------------------------------------- a run


def test_the_gate_and_the_metrics_by_hand(record_on_example):
    """The mean entropy is 17.5 / 9."""
    mean = example.entropy.float()[example.mask].mean().item()
    for target, on in ((0.3, False), (mean, False), (2.0, True)):
        recording = record_on_example(stare, top=0.4, attenuate=0.9, target_entropy=target)
        metrics = recording.metrics[1]
        weights = pad(EXAMPLE[1][1]) if on else example.mask.double()
        logged = pad([line["weight"] for line in recording.lines])
        torch.testing.assert_close(logged, weights, atol=1e-6, rtol=0)
        assert metrics["gate"] == on
        assert metrics["weight"] == pytest.approx(weights[example.mask].mean().item())
        assert metrics["raised/share"] == pytest.approx(0.4 * on)
        assert metrics["raised/surprisal"] == pytest.approx(0.4 * on)  # of .5 and .3
        assert metrics["lowered/share"] == pytest.approx(0.5 * on)
        assert metrics["lowered/surprisal"] == pytest.approx(1.05 * on)  # of .9 and 1.2
    advantages = grpo_advantages(example.rewards)[..., None] * weights
    logged = pad([line["advantage"] for line in recording.lines])
    torch.testing.assert_close(logged, advantages, atol=1e-5, rtol=0)


def test_with_the_gate_off_it_is_grpo(record):
    ours = record(stare, target_entropy=0.0)
    theirs = record(grpo, clip_high=0.28)
    assert_same_gradient(ours.updates[0].gradient, theirs.updates[0].gradient, 1e-6)


@pytest.mark.parametrize("token_budget", [100, 16384])
def test_the_update_is_the_plain_one(record, monkeypatch, token_budget):
    """Ranks are those of the whole step whatever a micro-batch holds, the weights are not in the
    denominator, and the KL term is not weighted."""
    monkeypatch.setattr(common, "Reference", moved_reference)
    weighting = {"top": 0.05, "amplify": 100.0, "attenuate": 0.5}
    settings = {"target_entropy": 99.0, "kl": 0.5, "token_budget": token_budget}
    recording = record(stare, **weighting, **settings)
    rollouts, update = recording.rollouts[0], recording.updates[0]
    advantages, everywhere = plain_advantages(recording), places(rollouts)
    logps = [plain_logp(update.policy, rollouts, *place).tolist() for place in everywhere]
    weights = slow.stare(logps, advantages.flatten().tolist(), **weighting)
    assert sum(row.count(100.0) for row in weights) > 1

    weighted = {}
    for place, row in zip(everywhere, weights, strict=True):
        weighted[place] = advantages[place] * torch.tensor(row)
    with moved_reference(update.policy, recording.args)() as reference:
        losses = [*plain_losses(recording, update, weighted, reference).values()]
    plain = gradient_of(torch.cat(losses).mean(), update.policy)
    assert_same_gradient(update.gradient, plain, 1e-4)
