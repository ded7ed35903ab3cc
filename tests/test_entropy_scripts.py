"""ep_grpo.py, erpo.py and gtpo.py as whole scripts: what reaches the parameters, what is logged."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import worked_example as example
from conftest import ROOT, read_metrics
from torch import Tensor, nn

import diagnostics
import ep_grpo
import erpo
import grpo
import gtpo

# ------------------------------------------------------------------------------- gradients

TOKENS, VOCABULARY = 6, 11
Shape = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # rewards, entropy, logps, mask


def with_gtpo(rewards: Tensor, entropy: Tensor, logp: Tensor, _: Tensor, mask: Tensor) -> Tensor:
    alpha1 = 1.0 - entropy.mean(-1, keepdim=True) / 10
    return gtpo.gtpo_advantages(rewards, entropy, mask, alpha1=alpha1, alpha2=0.5)


def with_grpo_s(rewards: Tensor, entropy: Tensor, logp: Tensor, _: Tensor, mask: Tensor) -> Tensor:
    return gtpo.grpo_s_advantages(rewards, entropy, mask, beta2=0.5)[..., None] * mask


def with_grpo(rewards: Tensor, entropy: Tensor, logp: Tensor, _: Tensor, mask: Tensor) -> Tensor:
    return grpo.grpo_advantages(rewards)[..., None] * mask


SHAPES: dict[str, Shape] = {
    "ep_grpo": ep_grpo.ep_grpo_advantages,
    "erpo": erpo.erpo_advantages,
    "gtpo": with_gtpo,
    "grpo_s": with_grpo_s,
}


def gradient(shape: Shape, rewards: Tensor, *, detach: bool) -> Tensor:
    """Of one on-policy update of a small policy, as one vector. Without detach, whatever the
    advantages are made of still hangs on the policy's parameters."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)).double()
    previous, chosen = torch.randint(VOCABULARY, (2, *rewards.shape, TOKENS))
    mask = torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (*rewards.shape, 1))
    table = policy(previous).log_softmax(-1)
    entropy = -(table.exp() * table).sum(-1)
    logp = table.gather(-1, chosen[..., None])[..., 0]
    ref_logp = logp.detach() + 0.1 * torch.randn(logp.shape, dtype=logp.dtype)
    inputs = (entropy, logp, ref_logp)
    if detach:
        inputs = tuple(x.detach() for x in inputs)
    advantages = shape(rewards, *inputs, mask)
    loss, _ = grpo.clipped_loss(logp, logp.detach(), advantages, 0.2, 0.2)
    (loss * mask).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in policy.parameters()])


VARIED = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
EQUAL = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_gradient_flows_through_what_shapes_the_advantage(shape: Shape):
    attached, detached = (gradient(shape, VARIED, detach=d) for d in (False, True))
    assert detached.norm() > 0.1
    assert torch.equal(attached, detached)


def test_only_ep_grpo_learns_from_groups_of_equal_rewards():
    assert gradient(ep_grpo.ep_grpo_advantages, EQUAL, detach=True).norm() > 0.1
    for shape in (with_grpo, erpo.erpo_advantages, with_gtpo, with_grpo_s):
        assert not gradient(shape, EQUAL, detach=True).any()


# ------------------------------------------------------------------------------- diagnostics


def test_credit_by_hand():
    """Nine tokens, so that a fifth of them is one: entropies 0.5 and 4, with gates 0.1 and 0.9."""
    gate = torch.where(example.entropy == 0.5, 0.1, torch.where(example.entropy == 4, 0.9, 0.5))
    progress = torch.full_like(example.entropy, -2.0)
    outcome = torch.tensor([[1.0, 3.0, -1.0, 0.0]], dtype=torch.float64)
    advantages = outcome[..., None] + progress  # signs - - - | + + | - - - | not pushed
    bucket = torch.tensor([[[0, 1, 1], [1, 2, 9], [2, 2, 2], [2, 9, 9]]])
    credit = diagnostics.credit(
        *(advantages, progress, gate, bucket, outcome, example.entropy, example.mask), buckets=4
    )
    expected = {
        "gate/low_entropy": 0.1,
        "gate/high_entropy": 0.9,
        "credit/outcome": (3 * 1 + 2 * 3 + 3 * 1 + 0) / 9,
        "credit/progress": 2.0,
        "sign_differs": 3 / 8,
        "bucket/smallest": 0.0,  # the fourth
        "bucket/largest": 5 / 9,
    }
    assert {name: float(value) for name, value in credit.items()} == pytest.approx(expected)


def test_reward_spread_by_hand():
    rewards = sum(gtpo.shaped_rewards(example.correct, example.entropy, example.mask, 1, 0.1))
    spread = diagnostics.reward_spread(rewards, example.correct, example.mask)
    assert float(spread["spread/correct"]) == pytest.approx(0.05)  # of 1.15 1.05 1.1 1.05 1.15
    assert float(spread["spread/wrong"]) == pytest.approx(
        0.0635, abs=1e-4
    )  # of 1.1778 1.1 1.1 1.0222
    nobody = torch.zeros_like(example.correct)
    assert diagnostics.reward_spread(rewards, nobody, example.mask)["spread/correct"] == 0


# ------------------------------------------------------------------------------- whole runs


def parity(_: Any, texts: list[str], golds: list[str]) -> list[bool]:
    """A task that a random model is sometimes right about."""
    return [len(text) % 2 == 0 for text in texts]


@pytest.fixture
def run(
    make_args: Callable[..., grpo.Args],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    signals: None,
) -> Callable[..., tuple[list[dict[str, float]], Path]]:
    """Runs a script for a few steps; returns its metrics by step, and its folder."""
    monkeypatch.setattr(grpo.Grader, "grade", parity)

    def run(script: ModuleType, name: str = "run", **settings: Any) -> tuple[list[dict], Path]:
        shared = vars(make_args(steps=3, run_dir=str(tmp_path / name)))
        known = {field.name for field in fields(script.Args)}
        defaults = {key: value for key, value in shared.items() if key in known}
        script.main(script.Args(**defaults | {"lr": 1e-2} | settings))
        return read_metrics(tmp_path / name), tmp_path / name

    return run


@pytest.mark.parametrize(
    ("lora_rank", "precision"), [(0, "float32"), (0, "bfloat16"), (4, "float32"), (4, "bfloat16")]
)
@pytest.mark.parametrize("script", [ep_grpo, erpo], ids=lambda script: script.__name__)
def test_progress_is_exactly_zero_until_the_policy_has_moved(
    run: Callable, script: ModuleType, lora_rank: int, precision: str
):
    """In bfloat16 too, where a reference of other rounding would make noise of the first step."""
    settings = {"lora_rank": lora_rank, "precision": precision, "max_logp_gap": 1.0}
    metrics, _ = run(script, token_budget=100, **settings)
    assert metrics[1]["kl_to_reference"] == 0
    assert metrics[1]["credit/progress"] == 0
    assert metrics[1]["credit/outcome"] > 0.1
    assert metrics[3]["credit/progress"] > 0.1


def test_the_probe_measures_and_changes_nothing(run: Callable):
    settings = {"lora_rank": 4, "lora_dropout": 0.5}
    plain, plain_folder = run(ep_grpo, "plain", probe_every=0, **settings)
    probed, probed_folder = run(ep_grpo, "probed", probe_every=1, **settings)
    for folder in (plain_folder, probed_folder):
        (folder / "metrics.jsonl").unlink()  # holds times
    weights = [folder / "model" / "model.safetensors" for folder in (plain_folder, probed_folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for before, after in zip(plain[1:], probed[1:], strict=True):
        assert "zero_variance_grad_norm" not in before
        assert after["grad_norm"] == before["grad_norm"]
    # At first there is no progress, and groups of equal rewards have nothing else.
    assert probed[1]["zero_variance_grad_norm"] == 0 < probed[1]["grad_norm"]


def test_the_probe_finds_the_gradient_of_groups_of_equal_rewards(
    run: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grpo.Grader, "grade", lambda _, texts, golds: [False] * len(texts))
    monkeypatch.setattr(ep_grpo, "Reference", moved_reference(ep_grpo.Reference))
    metrics, _ = run(ep_grpo, "ep_grpo", probe_every=1)
    assert metrics[1]["zero_variance"] == 1
    assert metrics[1]["grad_norm"] > 0.01
    # All groups are such, so theirs is the whole gradient.
    for row in metrics[1:]:
        assert row["zero_variance_grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)

    monkeypatch.setattr(erpo, "Reference", moved_reference(erpo.Reference))
    metrics, _ = run(erpo, "erpo", probe_every=1)
    assert metrics[3]["kl_to_reference"] > 0
    assert metrics[3]["zero_variance_grad_norm"] == metrics[3]["grad_norm"] == 0


def moved_reference(reference: type) -> Callable[..., Any]:
    """A reference that is not the policy from the first step on."""

    def moved(*arguments: Any) -> Any:
        made = reference(*arguments)
        for weight in made.copy.parameters():
            weight.mul_(1.1)
        return made

    return moved


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"level": "sequence", "kl": 0.1},
        {"normalize": "joint", "entropy_clamp": (0.5, 4.9), "overlong_gamma": 0.75},
    ],
    ids=["token", "sequence", "flags"],
)
def test_gtpo_runs(run: Callable, settings: dict[str, Any]):
    metrics, folder = run(gtpo, **settings)
    assert metrics[1]["spread/correct"] > 0
    assert metrics[1]["spread/wrong"] > 0
    assert metrics[1]["grad_norm"] > 0.01
    rollout = json.loads((folder / "rollouts.jsonl").read_text().splitlines()[0])
    sign = 1 if rollout["reward"] else -1
    assert len(rollout["shaped_reward"]) == len(rollout["tokens"])
    assert all(sign * reward > 0.4 for reward in rollout["shaped_reward"])


def test_grpo_s_without_entropy_is_grpo_averaged_over_responses(run: Callable):
    ours, _ = run(gtpo, "grpo_s", level="sequence", alpha2=0.0, clip_high=0.2)
    theirs, _ = run(grpo, "grpo", loss_average="sequence")
    token, _ = run(grpo, "token", loss_average="token")
    assert token[1]["grad_norm"] != pytest.approx(theirs[1]["grad_norm"], rel=1e-3)
    assert ours[1]["grad_norm"] == pytest.approx(theirs[1]["grad_norm"], rel=1e-4)
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], abs=1e-5)


def test_grpo_s_clips_whole_rollouts(run: Callable):
    """From the second update of a step on, ratios differ, and a clip is off or on for a rollout."""
    settings = {"clip_low": 0.001, "clip_high": 0.001, "updates_per_rollout": 2, "seed": 2}
    sequence, _ = run(gtpo, "grpo_s", level="sequence", alpha2=0.0, **settings)
    token, _ = run(grpo, "token", loss_average="sequence", **settings)
    assert sequence[1]["clip_fraction"] > 0
    assert sequence[1]["grad_norm"] != pytest.approx(token[1]["grad_norm"], rel=1e-2)


# ------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("script", "symbols"),
    [
        ("ep_grpo", ["γ", "K: ", "[open]", "--gate-progress", "--probe-every"]),
        ("erpo", ["RECONSTRUCTION", "γ", "K: ", "[open]"]),
        ("gtpo", ["α₂", "γ₁", "ε_high", "{token,sequence}", "with-zeros", "LOW HIGH"]),
    ],
)
def test_help(script: str, symbols: list[str]):
    command = [sys.executable, f"{script}.py", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    for symbol in symbols:
        assert symbol in done.stdout
    assert f"docs/{script}.md" in done.stdout
    assert not re.search(r"Traceback|Warning", done.stderr)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_clamp": (0.3, 0.2)}, "--entropy-clamp"),
        ({"entropy_clamp": (-1.0, 0.2)}, "--entropy-clamp"),
        ({"overlong_gamma": 0.5}, "--overlong-gamma 0.5"),
        ({"overlong_gamma": 1.5}, "--overlong-gamma 1.5"),
    ],
)
def test_refusals(settings: dict, message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        gtpo.Args(**settings)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", [ep_grpo, erpo], ids=lambda script: script.__name__)
@pytest.mark.parametrize("settings", [{"buckets": 0}, {"probe_every": -1}], ids=str)
def test_counts_too_small(script: ModuleType, settings: dict, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        script.main(script.Args(**settings))
    name, value = next(iter(settings.items()))
    assert f"--{name.replace('_', '-')} {value}: must be at least" in capsys.readouterr().err
