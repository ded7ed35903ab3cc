"""Forking tokens: docs/forking.md, by hand, token by token, at the edges, and as a run."""

import math

import pytest
import slow
import torch
import worked_example as example
from one_step import (
    Recording,
    Update,
    assert_same_gradient,
    gradient_of,
    plain_advantages,
    plain_distribution,
    plain_losses,
)
from torch import Tensor
from worked_example import pad, pad_mask

import common
import forking
import grpo
from forking import clipped_loss, forking_mask, grpo_advantages

# ------------------------------------------------------------------------------- by hand

KEPT = {  # of the entropies 3 1 2 | 1 3 | 0.5 2 1 | 4
    0.1: [[0, 0, 0], [0, 0], [0, 0, 0], [1]],
    0.2: [[1, 0, 0], [0, 1], [0, 0, 0], [1]],  # k = 2, but the second and the third are both 3
    0.3: [[1, 0, 0], [0, 1], [0, 0, 0], [1]],
    0.5: [[1, 0, 1], [0, 1], [0, 1, 0], [1]],
    1.0: [[1, 1, 1], [1, 1], [1, 1, 1], [1]],
}


@pytest.mark.parametrize("top", KEPT)
def test_worked_example(top):
    kept = forking_mask(example.entropy, example.mask, top=top)
    assert torch.equal(kept, pad(KEPT[top]).bool())


def loss_on_example(logp: Tensor, top: float) -> Tensor:
    kept = forking_mask(example.entropy, example.mask, top=top)
    advantages = grpo_advantages(example.rewards, eps=0)[..., None] * example.mask
    loss, _ = clipped_loss(logp[0], example.ref_logp[0], advantages[0], 0.2, 0.28)
    weights = common.token_weights(kept, torch.arange(1), "token", 3)
    return (loss * weights[0]).sum()


@pytest.mark.parametrize(("top", "expected"), [(0.2, -0.4353), (0.5, -0.2612), (1.0, -0.1625)])
def test_loss_of_the_worked_example(top, expected):
    assert loss_on_example(example.logp, top).item() == pytest.approx(expected, abs=5e-5)


def test_dropped_tokens_change_neither_loss_nor_gradient():
    """Three of nine tokens are kept. Their mean is over three."""
    kept = forking_mask(example.entropy, example.mask)
    found = []
    for shift in (0.0, 0.05):
        logp = (example.logp + shift * ~kept).requires_grad_()
        loss = loss_on_example(logp, 0.2)
        loss.backward()
        found.append((loss.detach(), logp.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    gradient = found[0][1]
    assert not gradient[~kept].any()
    # Of the last token: A = -0.866, ratio exp(-0.2), within the clip.
    assert gradient[0, 3, 0].item() == pytest.approx(math.sqrt(0.75) * math.exp(-0.2) / 3)


# ------------------------------------------------------------------------------- a slow loop

TOPS = [0.01, 0.1, 0.2, 0.25, 0.5, 0.99, 1.0]


def slow_mask(groups: list[slow.Rows], top: float) -> list[list[list[bool]]]:
    """A token is kept if fewer than k tokens of all groups have a higher entropy."""
    everything = [value for rows in groups for row in rows for value in row]
    count = 1
    while count < top * len(everything) - 1e-6:
        count += 1
    kept = []
    for rows in groups:
        kept.append([[sum(x > h for x in everything) < count for h in row] for row in rows])
    return kept


def batch_of(groups: list[slow.Rows]) -> tuple[Tensor, Tensor]:
    """Entropy and mask, [P, G, T], of groups of any sizes."""
    size, width = max(map(len, groups)), max(len(row) for rows in groups for row in rows)
    entropy = torch.zeros(len(groups), size, width, dtype=torch.float64)
    mask = torch.zeros_like(entropy, dtype=torch.bool)
    for p, rows in enumerate(groups):
        for g, row in enumerate(rows):
            entropy[p, g, : len(row)] = torch.tensor(row, dtype=torch.float64)
            mask[p, g, : len(row)] = True
    return entropy, mask


def random_batches() -> list[list[slow.Rows]]:
    """Batches of one to three groups, some with many equal entropies."""
    return [
        [slow.random_group(3 * seed + p).entropy for p in range(1 + seed % 3)]
        for seed in range(100)
    ]


@pytest.mark.parametrize("top", TOPS)
def test_agrees_with_a_loop_over_tokens(top):
    for groups in random_batches():
        entropy, mask = batch_of(groups)
        expected, _ = batch_of(slow_mask(groups, top))
        assert torch.equal(forking_mask(entropy, mask, top=top), expected.bool())


# ------------------------------------------------------------------------------- what must hold


def distinct_entropies(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(math.prod(shape), generator=generator).view(shape).double() / 7


@pytest.mark.parametrize(("count", "top"), [(15, 0.2), (7, 0.2), (9, 1.0), (100, 0.07)])
def test_without_ties_the_number_of_tokens_is_rounded_up(count, top):
    """In floating point 0.07 x 100 is above 7."""
    entropy = distinct_entropies((1, 1, count))
    kept = forking_mask(entropy, torch.ones(1, 1, count, dtype=torch.bool), top=top)
    assert kept.sum() == math.ceil(round(top * count, 6))


def test_the_threshold_is_not_per_response():
    entropy = distinct_entropies((2, 4, 5))
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    assert (forking_mask(entropy, mask).sum((0, 2)) < 5).all()
    entropy[1, 2] = 100 * (1 + entropy[1, 2])
    kept = forking_mask(entropy, mask)
    assert kept[1, 2].all()
    assert kept.sum() == 8


def test_edges():
    entropy, none = torch.tensor([[[2.0, 1.0], [0.0, 3.0]]]), torch.zeros(1, 2, 2).bool()
    assert torch.equal(forking_mask(entropy, none), none)
    one = none.clone()
    one[0, 1, 0] = True
    assert torch.equal(forking_mask(entropy, one, top=0.001), one)
    assert torch.equal(forking_mask(0 * entropy, ~none), ~none)  # all equal: all kept
    mask = pad_mask(example.ENTROPY)
    assert torch.equal(forking_mask(example.entropy, mask, top=1.0), mask)


# ------------------------------------------------------------------------------- the update


def test_top_of_1_is_grpo_bit_for_bit(record):
    settings = {"updates_per_rollout": 2, "lr": 0.01, "kl": 0.1, "steps": 2}
    ours = record(forking, top=1.0, **settings)
    theirs = record(grpo, clip_high=0.28, **settings)
    for one, other in zip(ours.updates, theirs.updates, strict=True):
        assert torch.equal(one.gradient, other.gradient)
    assert ours.metrics[2]["loss"] == theirs.metrics[2]["loss"]
    assert ours.metrics[2]["kept/share"] == 1


def plain_gradient(recording: Recording, update: Update) -> Tensor:
    """From the definition, on full logits."""
    args, rollouts = recording.args, recording.rollouts[0]
    first = recording.updates[0].policy
    losses = plain_losses(recording, update, plain_advantages(recording))
    entropy = {}
    for place in losses:
        logp = plain_distribution(first, rollouts, *place, args.temperature).detach()
        entropy[place] = -(logp.exp() * logp).sum(-1)
    ordered = torch.cat(list(entropy.values())).sort(descending=True).values
    threshold = ordered[math.ceil(args.top * len(ordered)) - 1] - 1e-5  # of another rounding

    kept = [loss[entropy[place] >= threshold] for place, loss in losses.items()]
    kept = [loss for loss in kept if len(loss)]  # a response without kept tokens is not counted
    if args.loss_average == "token":
        return gradient_of(torch.cat(kept).mean(), update.policy)
    return gradient_of(torch.stack([loss.mean() for loss in kept]).mean(), update.policy)


@pytest.mark.parametrize("loss_average", ["token", "sequence"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"top": 0.1, "updates_per_rollout": 2, "lr": 0.01, "kl": 0.3, "temperature": 0.8}],
    ids=["one update", "two updates with KL"],
)
def test_gradient_is_the_plain_one(record, loss_average, settings):
    """Each update has a threshold of its own, whatever its micro-batches."""
    for token_budget in (60, 10**6):
        recording = record(
            forking, loss_average=loss_average, token_budget=token_budget, **settings
        )
        for update in recording.updates:
            assert_same_gradient(update.gradient, plain_gradient(recording, update), 1e-4)


def test_metrics_and_rollouts_file(record):
    recording = record(forking, log_rollouts=99)
    metrics, kept, dropped = recording.metrics[1], [], []
    for line in recording.lines:
        for is_kept, entropy in zip(line["kept"], line["entropy"], strict=True):
            (kept if is_kept else dropped).append(entropy)
    count = len(kept) + len(dropped)
    assert len(kept) == math.ceil(0.2 * count)
    assert metrics["kept/share"] == pytest.approx(len(kept) / count)
    assert metrics["kept/entropy"] == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert metrics["kept/threshold"] == pytest.approx(min(kept), rel=1e-5)
    assert max(dropped) < min(kept)
