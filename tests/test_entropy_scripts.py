"""EP-GRPO, ERPO and GTPO as runs: the gradient of an update and the metrics of the method."""

from typing import Any

import pytest
import slow
import torch
import worked_example as example
from one_step import (
    Recording,
    all_wrong,
    gradient_of,
    moved_reference,
    places,
    plain_losses,
    trainable,
)
from torch import Tensor

import common
import ep_grpo
import erpo
import grpo
import gtpo
from tools.metrics import pass_at_k

WITH_PROGRESS = pytest.mark.parametrize("script", [ep_grpo, erpo], ids=lambda s: s.__name__)

# ------------------------------------------------------------------------------- progress in a run


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
@WITH_PROGRESS
def test_progress_is_exactly_zero_until_the_policy_has_moved(record, script, lora_rank, precision):
    """Also in bfloat16: a reference that rounds differently would add noise to the first step."""
    settings = {"lora_rank": lora_rank, "precision": precision, "max_logp_gap": 1.0}
    settings |= {"lr": 1e-2, "max_grad_norm": 1.0, "token_budget": 100}
    metrics = record(script, steps=3, **settings).metrics
    assert metrics[1]["kl_to_reference"] == 0
    assert metrics[1]["credit/progress"] == 0
    assert metrics[1]["credit/outcome"] > 0.1
    assert metrics[2]["credit/progress"] > 0.1
    assert metrics[3]["credit/progress"] > 0.01


@pytest.fixture
def with_moved_reference(monkeypatch) -> None:
    monkeypatch.setattr(common, "Reference", moved_reference)


def test_only_ep_grpo_learns_from_groups_of_equal_rewards(record, with_moved_reference):
    settings = {"grade": all_wrong, "kl": 0.0}
    metrics = record(ep_grpo, **settings).metrics[1]
    assert metrics["zero_variance"] == 1
    assert metrics["credit/outcome"] == 0 < metrics["credit/progress"]
    assert metrics["grad_norm"] > 0.01
    metrics = record(erpo, **settings).metrics[1]
    assert metrics["kl_to_reference"] > 0
    assert metrics["grad_norm"] == 0


# ------------------------------------------------------------------------------- the update


def plain_loss(recording: Recording) -> Tensor:
    """The mean of the losses of all tokens, with the advantages that rollouts.jsonl has."""
    update, rollouts = recording.updates[0], recording.rollouts[0]
    rows = zip(places(rollouts), recording.lines, strict=True)
    advantages = {place: torch.tensor(line["advantage"]) for place, line in rows}
    with moved_reference(update.policy, recording.args)() as reference:
        losses = plain_losses(recording, update, advantages, reference)
    return torch.cat([*losses.values()]).mean()


def assert_same_for_each_weight(recording: Recording, loss: Tensor) -> None:
    update = recording.updates[0]
    sizes = [weight.numel() for weight in trainable(update.policy)]
    plain = gradient_of(loss, update.policy)
    for ours, theirs in zip(update.gradient.split(sizes), plain.split(sizes), strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@WITH_PROGRESS
def test_the_loss_has_a_kl_term_of_weight_0_001(record, with_moved_reference, script):
    """With advantages of zero, it is the whole loss."""
    settings = {"grade": all_wrong, "eta": 0.0}
    recording = record(script, log_rollouts=99, **settings)
    loss = plain_loss(recording)
    assert recording.args.kl == 0.001
    assert loss > 1e-5
    assert recording.metrics[1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same_for_each_weight(recording, loss)
    metrics = record(script, kl=0.0, **settings).metrics[1]
    assert metrics["loss"] == metrics["grad_norm"] == 0


@pytest.mark.parametrize(
    ("script", "kl"),
    [(ep_grpo, 0.001), (erpo, 0.001), (gtpo, 0.0)],
    ids=["ep_grpo", "erpo", "gtpo"],
)
def test_the_gradient_is_the_plain_one(record, with_moved_reference, script, kl):
    """With advantages that differ between tokens, and the KL term of the defaults."""
    recording = record(script, log_rollouts=99)
    assert recording.args.kl == kl
    assert_same_for_each_weight(recording, plain_loss(recording))
    assert recording.metrics[1]["grad_norm"] > 0.01


# ------------------------------------------------------------------------------- metrics by hand


CREDIT = {  # of nine tokens; advantages and outcomes as docs/ep_grpo.md and docs/erpo.md have them
    "ep_grpo": {
        "credit/outcome": (2 * (0.8584 + 0.0124 + 0.4866) + 0.0013 + 0.0124 + 0.8659) / 9,
        "credit/progress": (2 * (0.0230 + 0.2982 + 0.2000) + 3 * 0.1836) / 9,
        "credit/log_ratio": (5 * 0.1 + 3 * 0.2) / 9,
        "credit/sign_differs": 4 / 9,  # tokens 2 and 4, 6 and 8
    },
    "erpo": {
        "credit/outcome": (5 * 0.8944 + 4 * 1.1180) / 9,
        "credit/progress": 0.1783,
        "credit/log_ratio": (5 * 0.1 + 3 * 0.2) / 9,
        "credit/sign_differs": 0,
    },
}


@WITH_PROGRESS
def test_credit_by_hand(record_on_example, script):
    recording = record_on_example(script, buckets=2)
    metrics = recording.metrics[1]
    found = {name: value for name, value in metrics.items() if name.startswith("credit/")}
    assert found == pytest.approx(CREDIT[script.__name__], abs=1e-4)
    for line in recording.lines:  # the two terms add up
        total = torch.tensor(line["outcome"]) + torch.tensor(line["progress"])
        torch.testing.assert_close(total, torch.tensor(line["advantage"]))


@WITH_PROGRESS
def test_credit_where_progress_is_the_larger_part(record_on_example, script):
    settings = {"buckets": 2, "eta": 3.0}
    metrics = record_on_example(script, **settings).metrics[1]
    method, rewards = getattr(slow, script.__name__), [1.0, 1.0, 0.0, 0.0]
    example_group = slow.Group(rewards, example.ENTROPY, example.LOGP, example.REF_LOGP)
    without_progress = slow.Group(rewards, example.ENTROPY, example.LOGP, example.LOGP)
    total = example.pad(method(example_group, **settings))[example.mask]
    outcome = example.pad(method(without_progress, **settings))[example.mask]
    against = (total * outcome < 0).double().mean().item()
    assert 0 < against < 1
    assert metrics["credit/sign_differs"] == pytest.approx(against)
    progress = (total - outcome).abs().mean().item()
    assert metrics["credit/progress"] == pytest.approx(progress, abs=1e-4)


# ------------------------------------------------------------------------------- GTPO


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"level": "sequence", "kl": 0.1},
        {"normalize": "joint", "overlong_gamma": 0.75},
        {"scope": "batch"},
    ],
    ids=["token", "sequence", "flags", "batch"],
)
def test_gtpo_runs(record, settings):
    recording = record(gtpo, steps=3, lr=1e-2, **settings)
    metrics, rollout = recording.metrics[1], recording.lines[0]
    assert metrics["grad_norm"] > 0.01
    sign = 1 if rollout["reward"] else -1
    assert len(rollout["advantage"]) == len(rollout["tokens"])
    assert all(sign * advantage > 0.1 for advantage in rollout["advantage"])


def first_group_is_right(_: Any, texts: list[str], references: list[str]) -> list[bool]:
    return [i < 4 or i % 2 == 0 for i in range(len(texts))]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_batch_scope_compares_all_rollouts_of_a_step(record, level):
    """Also in several micro-batches. The first group has equal verdicts."""
    settings = {"token_budget": 200, "log_rollouts": 4, "level": level}
    recording = record(gtpo, scope="batch", grade=first_group_is_right, **settings)
    entropy = [line["entropy"] for line in recording.lines]
    correct = [verdict > 0 for verdict in recording.rollouts[0].correct.flatten().tolist()]
    expected = slow.gtpo(correct, entropy)
    if level == "sequence":
        rollouts = slow.grpo_s(correct, entropy)
        expected = [[a] * len(row) for a, row in zip(rollouts, entropy, strict=True)]
    for line, advantages in zip(recording.lines, expected, strict=True):
        assert line["advantage"] == pytest.approx(advantages, abs=2e-4)
        assert any(line["advantage"])
    other = record(gtpo, grade=first_group_is_right, **settings)
    assert not any(any(line["advantage"]) for line in other.lines[:4])


def test_grpo_s_without_entropy_is_grpo_averaged_over_responses(record):
    ours = record(gtpo, level="sequence", alpha2=0.0, clip_high=0.2).metrics[1]
    theirs = record(grpo, loss_average="sequence").metrics[1]
    token = record(grpo, loss_average="token").metrics[1]
    assert token["grad_norm"] != pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_grpo_s_clips_whole_rollouts(record):
    """From the second update of a step on, ratios differ, and each rollout is clipped or not."""
    settings = {"clip_low": 0.001, "clip_high": 0.001, "updates_per_rollout": 2, "seed": 2}
    settings |= {"steps": 1, "lr": 1e-2}
    sequence = record(gtpo, level="sequence", alpha2=0.0, **settings).metrics[1]
    token = record(grpo, loss_average="sequence", **settings).metrics[1]
    assert sequence["clip_fraction"] > 0
    assert sequence["grad_norm"] != pytest.approx(token["grad_norm"], rel=1e-2)


# ------------------------------------------------------------------------------- their results


@pytest.mark.parametrize(("right", "percent"), [(3, 9.69), (14, 38.20), (25, 58.10), (45, 79.84)])
def test_pass_at_16_of_one_pool(right, percent):
    """EP-GRPO's pass@16 on AIME25, in per cent: 30 problems with 16 samples each, pooled."""
    assert round(100 * pass_at_k(30 * 16, right, 16), 2) == percent
