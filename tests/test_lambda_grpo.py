"""λ-GRPO: docs/lambda_grpo.md, by hand, token by token, by prefix, and as a run."""

import random
from collections.abc import Callable

import pytest
import torch
import worked_example as example
from one_step import (
    Recording,
    Update,
    assert_same_gradient,
    gradient_of,
    places,
    plain_advantages,
    plain_losses,
    response,
)
from torch import Tensor
from worked_example import pad, pad_mask

import common
import grpo
import lambda_grpo
from lambda_grpo import clipped_loss, grpo_advantages, kl_estimate, lambda_weights

Rollouts = list[list[int]]  # the tokens of each rollout of a group

# ------------------------------------------------------------------------------- by hand

TOKENS = [[5, 6, 2], [5, 2], [5, 6, 7], [9]]
WEIGHTS = [[1 / 3, 1 / 2, 1], [1 / 3, 1], [1 / 3, 1 / 2, 1], [1]]


def weights_of(rows: Rollouts, padding: int = 0) -> Tensor:
    """lambda_weights of one group, [G, T]."""
    return lambda_weights(pad(rows, fill=padding).long(), pad_mask(rows))[0]


def on_policy_loss(advantages: Tensor) -> float:
    loss, _ = clipped_loss(example.logp, example.logp, advantages, 0.2, 0.2)
    return loss[example.mask].mean().item()


def test_worked_example():
    weights = lambda_weights(pad(TOKENS).long(), example.mask).double()
    torch.testing.assert_close(weights, pad(WEIGHTS), atol=1e-7, rtol=0)
    advantages = grpo_advantages(example.rewards, eps=0)[..., None] * example.mask
    expected = [[0.2887, 0.4330, 0.8660], [0.2887, 0.8660], [-0.2887, -0.4330, -0.8660], [-0.8660]]
    torch.testing.assert_close(weights * advantages, pad(expected), atol=5e-5, rtol=0)
    assert on_policy_loss(weights * advantages) == pytest.approx(-0.0321, abs=5e-5)
    assert on_policy_loss(advantages) == pytest.approx(-0.0962, abs=5e-5)


def by_prefix(weights: Tensor) -> dict[tuple[int, ...], float]:
    """The sum of weight x advantage over the rollouts through each prefix of the example."""
    total: dict[tuple[int, ...], float] = {}
    for row, weight, advantage in zip(TOKENS, weights, [1, 1, -1, -1], strict=True):
        for t in range(len(row)):
            prefix = tuple(row[: t + 1])
            total[prefix] = total.get(prefix, 0.0) + weight[t].item() * advantage * 0.75**0.5
    return total


def test_worked_example_by_prefix():
    ours, theirs = by_prefix(weights_of(TOKENS)), by_prefix(torch.ones(4, 3))
    both = {(5, 6): 0, (5, 6, 2): 0.8660, (5, 2): 0.8660, (5, 6, 7): -0.8660, (9,): -0.8660}
    assert ours == pytest.approx(both | {(5,): 0.2887}, abs=5e-5)
    assert theirs == pytest.approx(both | {(5,): 0.8660}, abs=5e-5)


# ------------------------------------------------------------------------------- a slow loop


def random_rows(seed: int) -> Rollouts:
    """Rollouts of few token ids, so that they share prefixes; some are equal or begin others."""
    rng = random.Random(seed)
    ids = range(rng.choice([1, 2, 2, 3]))
    size = rng.randint(1, 8)
    return [[rng.choice(ids) for _ in range(rng.randint(1, 7))] for _ in range(size)]


def slow_weights(rows: Rollouts) -> list[list[float]]:
    weights = []
    for row in rows:
        counts = []
        for t in range(1, len(row) + 1):
            counts.append(sum(len(other) >= t and other[:t] == row[:t] for other in rows))
        weights.append([1 / count for count in counts])
    return weights


def test_agrees_with_a_loop_over_tokens():
    for seed in range(300):
        rows = random_rows(seed)
        expected = pad(slow_weights(rows))[0]
        torch.testing.assert_close(weights_of(rows).double(), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[4, 4, 4]], [[1, 1, 1]]),  # a group of one
        ([[4, 5], [4, 5]], [[1 / 2, 1 / 2]] * 2),  # equal to the end
        ([[1], [2], [1], [1]], [[1 / 3], [1], [1 / 3], [1 / 3]]),
        ([[1, 9], [2, 9]], [[1, 1]] * 2),  # equal tokens after other beginnings
        ([[1, 2], [1]], [[1 / 2, 1], [1 / 2]]),  # one begins the other
        ([[3, 1], [3, 2], [4, 1], [4, 2]], [[1 / 2, 1]] * 4),  # REFT: K/G on the first token
    ],
)
def test_groups_by_hand(rows, expected):
    torch.testing.assert_close(weights_of(rows).double(), pad(expected)[0])


def test_padding_is_not_shared():
    """Both responses end after one token, and id 3 fills the rest."""
    tokens = torch.tensor([[[1, 3, 3], [1, 3, 3], [1, 3, 3]]])
    mask = torch.tensor([[[1, 0, 0], [1, 0, 0], [1, 1, 1]]]).bool()
    third = 1 / 3
    expected = torch.tensor([[[third, 0, 0], [third, 0, 0], [third, 1, 1]]])
    torch.testing.assert_close(lambda_weights(tokens, mask), expected)
    mask[0, 1] = False  # a masked response counts for no other
    expected = torch.tensor([[[0.5, 0, 0], [0, 0, 0], [0.5, 1, 1]]])
    torch.testing.assert_close(lambda_weights(tokens, mask), expected)


# ------------------------------------------------------------------------------- a policy by prefix


def tree(rows: Rollouts) -> tuple[Tensor, dict[tuple[int, ...], int]]:
    """Logits after each prefix, [prefixes, 3], and the row of each prefix."""
    prefixes = {tuple(row[:t]) for row in rows for t in range(len(row))}
    torch.manual_seed(0)
    logits = torch.randn(len(prefixes), 3, dtype=torch.float64)
    return logits.requires_grad_(), {prefix: i for i, prefix in enumerate(sorted(prefixes))}


def tree_gradient(rows: Rollouts, rewards: Tensor, weigh: bool, kl: float = 0.0) -> Tensor:
    """The gradient of the loss in the script: token average, on policy, [prefixes, 3]."""
    logits, number = tree(rows)
    logp = logits.log_softmax(-1)
    moves = [(number[tuple(row[:t])], row[t]) for row in rows for t in range(len(row))]
    before, token = zip(*moves, strict=True)
    mask = pad_mask(rows)[0]
    padded = torch.zeros(mask.shape, dtype=torch.float64)
    padded = padded.masked_scatter(mask, logp[list(before), list(token)])
    advantages = grpo_advantages(rewards[None], eps=0)[0, :, None] * mask
    loss, _ = clipped_loss(padded, padded.detach(), advantages, 0.2, 0.2)
    loss = loss + kl * kl_estimate(padded, torch.full_like(padded, -1.0))
    weights = weights_of(rows).double() if weigh else mask.double()
    [gradient] = torch.autograd.grad((loss * weights)[mask].mean(), logits)
    return gradient


def random_rewards(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_each_distinct_prefix_gets_its_mean_advantage_once(kl):
    """The KL term, too, is entered once: k times 1/k."""
    for seed in range(30):
        rows = random_rows(seed)
        rewards = random_rewards(seed, len(rows))
        advantages = grpo_advantages(rewards[None], eps=0)[0]
        logits, number = tree(rows)
        total = 0.0
        for prefix in {tuple(row[:t]) for row in rows for t in range(1, len(row) + 1)}:
            through = [i for i, row in enumerate(rows) if tuple(row[: len(prefix)]) == prefix]
            logp = logits.log_softmax(-1)[number[prefix[:-1]], prefix[-1]]
            log_ratio = -1.0 - logp
            total = total - advantages[through].mean() * logp
            total = total + kl * (log_ratio.exp() - log_ratio - 1)
        [expected] = torch.autograd.grad(total / sum(map(len, rows)), logits)
        found = tree_gradient(rows, rewards, weigh=True, kl=kl)
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)


def test_with_two_rollouts_the_gradient_is_grpos():
    """What both share has advantages that sum to 0."""
    differed = 0
    for seed in range(100):
        rows = random_rows(seed)[:2]
        rewards = random_rewards(seed, len(rows))
        ours, theirs = (tree_gradient(rows, rewards, weigh=weigh) for weigh in (True, False))
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)
        differed += int((weights_of(rows)[pad_mask(rows)[0]] < 1).any())
    assert differed > 20
    rows, rewards = TOKENS, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    rows = [[token % 3 for token in row] for row in rows]
    ours, theirs = (tree_gradient(rows, rewards, weigh=weigh) for weigh in (True, False))
    assert (ours - theirs).abs().max() > 0.01


# ------------------------------------------------------------------------------- the update


def begin_with(*first: int) -> Callable:
    """Sets the first tokens of each group's rollouts, and for token 65 the second ones alike."""

    def edit(rollouts: common.Rollouts) -> None:
        rollouts.tokens[..., 0] = torch.tensor(first)
        rollouts.tokens[..., 1] = torch.where(rollouts.tokens[..., 0] == 65, 66, 67)

    return edit


SHARED, APART = begin_with(65, 65, 70, 65), begin_with(65, 70, 71, 72)
ANY_GAP = {"max_logp_gap": 100.0}  # the engine sampled other tokens


def plain_gradient(recording: Recording, update: Update) -> Tensor:
    """From the definition, on full logits."""
    rollouts, losses = recording.rollouts[0], []
    for (p, g), loss in plain_losses(recording, update, plain_advantages(recording)).items():
        rows = [response(rollouts, p, i).tolist() for i in range(recording.args.group_size)]
        losses.append(torch.tensor(slow_weights(rows)[g]) * loss)
    return gradient_of(torch.cat(losses).mean(), update.policy)


@pytest.mark.parametrize(
    "settings",
    [{}, {"updates_per_rollout": 2, "lr": 0.01, "kl": 0.3, "token_budget": 60}],
    ids=["one update", "two updates with KL"],
)
def test_gradient_is_the_plain_one(record, settings):
    recording = record(lambda_grpo, edit_rollouts=SHARED, **settings, **ANY_GAP)
    assert recording.metrics[1]["process/shared"] > 0.1
    for update in recording.updates:
        assert_same_gradient(update.gradient, plain_gradient(recording, update), 1e-4)


def test_without_shared_tokens_the_run_is_grpos(record):
    settings = {"edit_rollouts": APART, "kl": 0.1, "steps": 2} | ANY_GAP
    ours, theirs = (record(script, **settings) for script in (lambda_grpo, grpo))
    for one, other in zip(ours.updates, theirs.updates, strict=True):
        assert torch.equal(one.gradient, other.gradient)
    assert ours.metrics[2]["process/shared"] == 0
    assert ours.metrics[2]["process/weight"] == 1
    other = record(lambda_grpo, **settings | {"edit_rollouts": SHARED}).updates[0].gradient
    assert (other - theirs.updates[0].gradient).norm() > 0.01 * other.norm()


def test_metrics_and_rollouts_file(record):
    recording = record(lambda_grpo, edit_rollouts=SHARED, log_rollouts=99, **ANY_GAP)
    metrics = recording.metrics[1]
    weights = []
    for p, g in places(recording.rollouts[0]):
        rows = [response(recording.rollouts[0], p, i).tolist() for i in range(4)]
        line = recording.lines[4 * p + g]
        assert line["process_weight"] == pytest.approx(slow_weights(rows)[g])
        weights += line["process_weight"]
    assert metrics["process/weight"] == pytest.approx(sum(weights) / len(weights))
    shared = sum(weight < 1 for weight in weights)
    assert metrics["process/shared"] == pytest.approx(shared / len(weights))
