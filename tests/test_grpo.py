"""GRPO: its functions by hand, its gradient against a plain computation, and short runs."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import untimed
from one_step import (
    Recording,
    Update,
    assert_same_gradient,
    gradient_of,
    plain_advantages,
    plain_losses,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import grpo
from grpo import clipped_loss, grpo_advantages, kl_estimate

# ------------------------------------------------------------------------------- advantages


def test_worked_example():
    advantages = grpo_advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), eps=0)
    expected = torch.tensor([[0.8660, 0.8660, -0.8660, -0.8660]])
    torch.testing.assert_close(advantages, expected, atol=5e-5, rtol=0)


def test_affine_invariance():
    rewards = torch.rand(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = grpo_advantages(rewards, eps=0)
    torch.testing.assert_close(grpo_advantages(3 * rewards - 7, eps=0), plain)
    torch.testing.assert_close(grpo_advantages(-rewards, eps=0), -plain)
    verdicts = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]])
    torch.testing.assert_close(
        grpo_advantages(2 * verdicts - 1, eps=0), grpo_advantages(verdicts, eps=0)
    )


@pytest.mark.parametrize("reward", [0.0, 1.0, -1.0, 0.1, 0.7, 1e-3])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_rewards_give_exact_zeros(reward, size, scale, eps):
    advantages = grpo_advantages(torch.full((2, size), reward), scale=scale, eps=eps)
    assert torch.equal(advantages, torch.zeros(2, size))


def test_without_scale_only_the_mean_goes():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]])
    assert torch.equal(grpo_advantages(rewards, scale=False), expected)


# ------------------------------------------------------------------------------- the loss

# ε_low = 0.2, ε_high = 0.3. Of each: ratio, advantage, loss, d loss / d logp, clipped.
CLIP = {
    "good, more likely, beyond the clip": (1.5, 2.0, -2.6, 0.0, True),
    "good, more likely, within": (1.25, 2.0, -2.5, -2.5, False),
    "good, less likely, within": (0.9, 2.0, -1.8, -1.8, False),
    "good, less likely, beyond": (0.5, 2.0, -1.0, -1.0, False),
    "bad, more likely, beyond the clip": (1.5, -2.0, 3.0, 3.0, False),
    "bad, more likely, within": (1.25, -2.0, 2.5, 2.5, False),
    "bad, less likely, within": (0.9, -2.0, 1.8, 1.8, False),
    "bad, less likely, beyond": (0.5, -2.0, 1.6, 0.0, True),
    "no advantage": (1.5, 0.0, 0.0, 0.0, False),
    "good, on policy": (1.0, 2.0, -2.0, -2.0, False),
    "bad, on policy": (1.0, -2.0, 2.0, 2.0, False),
}


@pytest.mark.parametrize("case", CLIP.values(), ids=CLIP)
def test_clip_by_hand(case):
    ratio, advantage, expected, slope, is_clipped = case
    old_logp = torch.tensor([[-1.7]], dtype=torch.float64, requires_grad=True)
    logp = (old_logp.detach() + math.log(ratio)).requires_grad_()
    loss, clipped = clipped_loss(
        logp, old_logp.detach(), torch.tensor([[advantage]], dtype=torch.float64), 0.2, 0.3
    )
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected)
    assert logp.grad.item() == pytest.approx(slope)
    assert clipped.item() is is_clipped


def test_on_policy_gradient_is_the_policy_gradient():
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    advantages = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    logp.requires_grad_()
    loss, clipped = clipped_loss(logp, logp.detach(), advantages, 0.2, 0.28)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, -advantages)  # of -A log π
    torch.testing.assert_close(loss.detach(), -advantages)
    assert not clipped.any()


def test_kl_by_hand():
    logp = torch.log(torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)).requires_grad_()
    ref_logp = torch.log(torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64))
    kl = kl_estimate(logp, ref_logp)
    expected = [0.5 - math.log(0.5) - 1, 0.0, 2 - math.log(2) - 1]  # 0.1931, 0, 0.3069
    torch.testing.assert_close(kl.detach(), torch.tensor(expected, dtype=torch.float64))
    kl.sum().backward()
    slopes = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)  # 1 - π_ref / π
    torch.testing.assert_close(logp.grad, slopes)


def test_kl_estimate_has_the_kl_as_its_mean():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    mean = (policy.exp() * kl_estimate(policy, reference)).sum()
    torch.testing.assert_close(mean, (policy.exp() * (policy - reference)).sum())


# ------------------------------------------------------------------------------- the update


def plain_gradient(recording: Recording, update: Update) -> Tensor:
    """From the definition: full logits, one sequence at a time."""
    losses = plain_losses(recording, update, plain_advantages(recording)).values()
    total = sum(loss.sum() for loss in losses)
    loss = {
        "token": total / sum(len(loss) for loss in losses),
        "sequence": sum(loss.mean() for loss in losses) / len(losses),
        "constant": total / len(losses) / recording.args.max_new_tokens,
    }[recording.args.loss_average]
    return gradient_of(loss, update.policy)


@pytest.fixture
def updates(record, untied_model) -> Callable[..., Recording]:
    """Records one step of grpo.py on responses of many lengths."""
    return functools.partial(record, grpo, model=str(untied_model), max_new_tokens=24)


AVERAGES = pytest.mark.parametrize("loss_average", ["token", "sequence", "constant"])


@AVERAGES
@pytest.mark.parametrize(
    "settings",
    [{}, {"updates_per_rollout": 2, "lr": 0.01, "kl": 0.3, "temperature": 0.8}],
    ids=["one update", "two updates with KL"],
)
def test_gradient_is_the_plain_one(updates, loss_average, settings):
    recording = updates(loss_average=loss_average, **settings)
    assert len(recording.updates) == settings.get("updates_per_rollout", 1)
    assert len(recording.rollouts[0].mask.sum(-1).unique()) > 3  # lengths
    for update in recording.updates:
        assert_same_gradient(update.gradient, plain_gradient(recording, update), 1e-5)


def widen(rollouts: common.Rollouts) -> None:
    """Add five columns of padding, and write values into it that must not matter."""
    for name in ("tokens", "mask", "engine_logp"):
        setattr(rollouts, name, nn.functional.pad(getattr(rollouts, name), (0, 5), value=0))
    rollouts.tokens[~rollouts.mask] = 99
    rollouts.engine_logp[~rollouts.mask] = 7.0


def shuffle(groups: list[common.Group]) -> None:
    for group in groups:
        for name in ("tokens", "engine_logp", "texts", "correct"):
            setattr(group, name, [getattr(group, name)[i] for i in (2, 0, 3, 1)])
    groups.reverse()


OTHER_WAYS = [  # to compute the same gradient
    *[{"token_budget": budget} for budget in (1, 60, 150)],  # from one rollout at a time
    {"edit_rollouts": widen},
    {"edit_groups": shuffle},
]


@AVERAGES
def test_gradient_does_not_depend_on_micro_batches_padding_or_order(updates, loss_average):
    plain = updates(loss_average=loss_average, token_budget=10**6).updates[0]
    for change in OTHER_WAYS:
        other = updates(loss_average=loss_average, **change).updates[0]
        assert_same_gradient(other.gradient, plain.gradient, 1e-5)


def test_importance_cap_reaches_the_gradient(updates):
    def other_engine(rollouts: common.Rollouts) -> None:
        rollouts.engine_logp[rollouts.mask] -= math.log(1.5)

    plain = updates().updates[0].gradient
    for cap, factor in ((2.0, 1.5), (1.2, 1.2)):
        settings = {"importance_cap": cap, "max_logp_gap": 1.0}
        weighted = updates(edit_rollouts=other_engine, **settings).updates[0].gradient
        assert_same_gradient(weighted, factor * plain, 1e-5)


def test_overlong_penalty_reaches_the_gradient(updates):
    plain, penalised = (updates(overlong_buffer=n).updates[0].gradient for n in (0, 8))
    assert (penalised - plain).norm() > 0.1 * plain.norm()


# ------------------------------------------------------------------------------- whole runs

SHARED_METRICS = {
    *("reward", "accuracy", "zero_variance", "length", "truncated", "entropy", "clip_fraction"),
    *("kl_to_old", "loss", "grad_norm", "lr", "logp_gap/mean", "logp_gap/max"),
    *("seconds/sync", "seconds/rollout", "seconds/verify", "seconds/score", "seconds/update"),
    *("seconds/other", "seconds/step", "tokens_per_second", "step"),
}
EVALUATION = {
    *("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high"),
    *("eval/greedy", "eval/length"),
}


def test_three_steps_log_everything(record, capsys):
    recording = record(grpo, steps=3, eval_every=2, kl=0.05)
    metrics = recording.metrics
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    for row in metrics[1:]:
        assert row.keys() >= SHARED_METRICS | {"kl_to_reference"}
        assert all(math.isfinite(value) for value in row.values())
        parts = [v for k, v in row.items() if k.startswith("seconds/") and k != "seconds/step"]
        assert sum(parts) == pytest.approx(row["seconds/step"])
        assert row["logp_gap/mean"] < 1e-5
        assert row["kl_to_old"] == pytest.approx(0, abs=1e-9)  # one update: on policy
        assert row["clip_fraction"] == 0
    assert metrics[1]["kl_to_reference"] == pytest.approx(0, abs=1e-9)
    assert metrics[3]["kl_to_reference"] > 1e-6
    assert [row.keys() >= EVALUATION for row in metrics] == [True, False, True, True]
    printed = capsys.readouterr().out
    model = str(Path(recording.args.run_dir) / "model")
    for word in ("before", "after", "95% interval", "wall time", model):
        assert word in printed


def test_model_folder_holds_the_trained_policy(record, tied_model):
    folder = Path(record(grpo, steps=2).args.run_dir) / "model"
    trained = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    start = AutoModelForCausalLM.from_pretrained(tied_model).state_dict()
    assert trained.keys() == start.keys()
    assert all((trained[name] != start[name]).any() for name in start)
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_same_command_same_metrics(record):
    first, second, other = (untimed(record(grpo, steps=2, seed=seed).metrics) for seed in (1, 1, 2))
    assert first == second
    assert first[1] != other[1]


@pytest.mark.parametrize("untied", [False, True])
def test_lora_run(record, untied_model, untied):
    settings = {"model": str(untied_model)} if untied else {}
    settings |= {"lora_rank": 4, "lora_dropout": 0.1, "lr": 1e-2, "kl": 0.1}
    recording = record(grpo, steps=3, **settings)
    metrics = recording.metrics
    assert metrics[1]["kl_to_reference"] == pytest.approx(0, abs=1e-9)
    assert metrics[3]["kl_to_reference"] > 1e-6
    assert metrics[3]["logp_gap/mean"] < 1e-5
    folder = Path(recording.args.run_dir) / "model"
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert not any("lora" in name for name in trained.state_dict())


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
def test_the_update_has_no_dropout_but_loras(record, tied_model, tmp_path, lora_dropout):
    """Not the model's own: the first update's ratio is 1, and the engine computes the same."""
    model = shutil.copytree(tied_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.1}
    (model / "config.json").write_text(json.dumps(config))
    lora = {"lora_rank": 4, "lora_dropout": lora_dropout, "lr": 1e-2}
    metrics = record(grpo, model=str(model), steps=2, **lora).metrics
    assert metrics[1]["kl_to_old"] == 0  # an adapter that is 0 at the start
    assert (metrics[2]["kl_to_old"] > 1e-6) == bool(lora_dropout)
    assert (metrics[2]["kl_to_old"] == 0) == (not lora_dropout)
    assert metrics[2]["logp_gap/max"] < 1e-5


def test_updates_per_rollout(record):
    metrics = record(grpo, steps=2, updates_per_rollout=4, lr=0.02).metrics
    assert metrics[1]["kl_to_old"] > 1e-4  # the later updates are off policy
    assert 0 < metrics[1]["clip_fraction"] < 1


def test_rollouts_file_is_what_the_metrics_say(record):
    recording = record(grpo, steps=2, log_rollouts=99)
    for step in (1, 2):
        metrics = recording.metrics[step]
        rows = [row for row in recording.lines if row["step"] == step]
        assert len(rows) == 16
        assert sum(row["reward"] for row in rows) / 16 == pytest.approx(metrics["reward"])
        tokens = sum(len(row["tokens"]) for row in rows)
        assert tokens / 16 == pytest.approx(metrics["length"])
        total = sum(sum(row["entropy"]) for row in rows) / tokens
        assert total == pytest.approx(metrics["entropy"], rel=1e-5)
        for row in rows:
            lengths = {len(row[name]) for name in ("tokens", "logp", "entropy", "advantage")}
            assert len(lengths) == 1
            assert row["problem"] and row["answer"]
            assert row["reward"] == (len(row["text"]) % 2 == 0)


def test_dynamic_sampling_run_keeps_all_groups(record):
    recording = record(grpo, steps=2, dynamic_sampling=True, group_size=2, log_rollouts=99)
    assert len([row for row in recording.lines if row["step"] == 1]) == 8
    assert recording.metrics[1]["zero_variance"] == 0


# ------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "settings", [{"kl": 0.1}, {"lora_rank": 4, "kl": 0.1}], ids=["all", "LoRA"]
)
def test_bfloat16_run(record, settings):
    """Only the forward pass is in bfloat16: float32 weights still move at a small lr."""
    settings |= {"precision": "bfloat16", "lr": 1e-4, "max_logp_gap": 0.1}
    metrics = record(grpo, steps=2, **settings).metrics
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert 1e-5 < metrics[1]["logp_gap/mean"] < 0.1
    assert metrics[1]["kl_to_reference"] < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_run_on_cuda(record, precision, lora_rank):
    settings = {"updates_per_rollout": 2, "gradient_checkpointing": True, "max_logp_gap": 0.1}
    settings |= {"precision": precision, "lora_rank": lora_rank}
    metrics = record(grpo, steps=2, device="cuda", **settings).metrics
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert metrics[2]["logp_gap/mean"] < (1e-4 if precision == "float32" else 0.1)
