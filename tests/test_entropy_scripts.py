"""ep_grpo.py, erpo.py and gtpo.py as whole scripts: what reaches the parameters, what is logged."""

import copy
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
import slow
import torch
import worked_example as example
from conftest import ROOT, read_metrics
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import common
import ep_grpo
import erpo
import grpo
import gtpo
from engine import Reference
from run import Run, RunArgs
from tools.metrics import pass_at_k

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
        short = vars(make_args(steps=3, run_dir=str(tmp_path / name)))
        defaults = {field.name: short[field.name] for field in fields(RunArgs)}
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


def all_wrong(_: Any, texts: list[str], golds: list[str]) -> list[bool]:
    return [False] * len(texts)


@pytest.fixture
def moved_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is another model than the policy from the first step on."""

    def moved(policy: nn.Module, args: Any) -> Reference:
        made = Reference(policy, args)
        for weight in made.copy.parameters():
            weight.mul_(1.1)
        return made

    for script in (ep_grpo, erpo):
        monkeypatch.setattr(script, "Reference", moved)


def test_in_a_run_too_only_ep_grpo_learns_from_groups_of_equal_rewards(
    run: Callable, moved_reference: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grpo.Grader, "grade", all_wrong)
    metrics, _ = run(ep_grpo, "ep_grpo", kl=0.0)
    assert metrics[1]["zero_variance"] == 1
    assert metrics[1]["credit/outcome"] == 0 < metrics[1]["credit/progress"]
    assert metrics[1]["grad_norm"] > 0.01
    metrics, _ = run(erpo, "erpo", kl=0.0)
    assert metrics[3]["kl_to_reference"] > 0
    assert metrics[3]["grad_norm"] == 0


@pytest.fixture
def first_update(
    run: Callable, tied_model: Path, moved_reference: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[dict[str, float], float]]:
    """Runs one step of a script and holds its gradient to the plain one, of the mean over all
    tokens of -A log π + β k3, from full logits; A: as logged. Returns the metrics and that mean."""
    seen, stack, update = [], common.stack, Run.update

    def keep_rollouts(*call: Any) -> common.Rollouts:
        seen.append(stack(*call))
        return seen[0]

    def keep_gradient(self: Run, optimizer: torch.optim.Optimizer, *call: Any) -> float:
        seen.extend(weight.grad.clone() for weight in optimizer.param_groups[0]["params"])
        return update(self, optimizer, *call)

    monkeypatch.setattr(common, "stack", keep_rollouts)
    monkeypatch.setattr(Run, "update", keep_gradient)

    def first_update(script: ModuleType, kl: float, **settings: Any) -> tuple[dict, float]:
        metrics, folder = run(script, steps=1, log_rollouts=99, **settings)
        rollouts, *gradients = seen
        lines = (folder / "rollouts.jsonl").read_text().splitlines()
        advantages = iter([json.loads(line)["advantage"] for line in lines])
        policy = AutoModelForCausalLM.from_pretrained(tied_model)
        reference = copy.deepcopy(policy).requires_grad_(False)
        for weight in reference.parameters():
            weight.mul_(1.1)
        terms = []
        for p, problem in enumerate(rollouts.problems):
            for tokens, live in zip(rollouts.tokens[p], rollouts.mask[p], strict=True):
                whole = torch.tensor([problem.prompt + tokens[live].tolist()])
                places = torch.arange(len(problem.prompt), whole.shape[1])
                logps = [model(whole).logits[0].log_softmax(-1) for model in (policy, reference)]
                new, old = (logp[places - 1, whole[0, places]] for logp in logps)
                k3 = (old - new).exp() - (old - new) - 1
                terms.append(kl * k3 - torch.tensor(next(advantages)) * new)
        loss = torch.cat(terms).mean()
        loss.backward()
        for ours, weight in zip(gradients, policy.parameters(), strict=True):
            assert weight.grad.norm() > 0
            assert (ours - weight.grad).norm() <= 1e-3 * weight.grad.norm()
        return metrics[1], loss.item()

    return first_update


@pytest.mark.parametrize("script", [ep_grpo, erpo], ids=lambda script: script.__name__)
def test_the_loss_has_a_kl_term_of_weight_0_001(
    run: Callable, first_update: Callable, script: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """With advantages of zero it is the whole loss."""
    monkeypatch.setattr(grpo.Grader, "grade", all_wrong)
    metrics, loss = first_update(script, kl=0.001, eta=0.0)
    assert loss > 1e-5
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    metrics, _ = run(script, "without", steps=1, eta=0.0, kl=0.0)
    assert metrics[1]["loss"] == metrics[1]["grad_norm"] == 0


@pytest.mark.parametrize(
    ("script", "kl"),
    [(ep_grpo, 0.001), (erpo, 0.001), (gtpo, 0.0)],
    ids=["ep_grpo", "erpo", "gtpo"],
)
def test_the_gradient_is_the_plain_one(first_update: Callable, script: ModuleType, kl: float):
    """Of advantages that differ from token to token, and the KL term of the defaults."""
    metrics, _ = first_update(script, kl)
    assert metrics["grad_norm"] > 0.01


# ------------------------------------------------------------------------------- metrics by hand


@pytest.fixture
def on_example(run: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Metrics of one step of a script, and lines of its rollouts.jsonl, on the worked example of
    the pages: its verdicts, log-probabilities and entropies in the place of the model's."""
    scores = {True: example.logp.float(), False: example.ref_logp.float()}
    widths = [len(row) for row in example.ENTROPY]

    def stack(groups: list[common.Group], *_: Any) -> common.Rollouts:
        tokens = torch.full_like(example.entropy, 65).long()
        none = torch.zeros_like(example.rewards).bool()
        problems = [group.problem for group in groups]
        logp = example.logp.float()
        texts = [[""] * len(widths)]
        return common.Rollouts(problems, tokens, example.mask, logp, none, texts)

    def score(*_: Any, reuse: bool = False) -> tuple[Tensor, Tensor]:
        return scores[reuse], example.entropy.float()

    def on_example(
        script: ModuleType, correct: tuple[int, ...] = (1, 1, 0, 0), **settings: Any
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        def verify(_: Any, groups: list[common.Group]) -> None:
            for group in groups:
                group.correct = [float(verdict) for verdict in correct][: len(group.texts)]

        for name, function in (("stack", stack), ("score", score), ("verify", verify)):
            monkeypatch.setattr(common, name, function)
        metrics, folder = run(script, steps=1, prompts_per_step=1, group_size=4, **settings)
        lines = (folder / "rollouts.jsonl").read_text().splitlines()
        return metrics[1], [json.loads(line) for line in lines]

    return on_example


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


@pytest.mark.parametrize("script", [ep_grpo, erpo], ids=lambda script: script.__name__)
def test_credit_by_hand(on_example: Callable, script: ModuleType):
    metrics, lines = on_example(script, buckets=2)
    found = {name: value for name, value in metrics.items() if name.startswith("credit/")}
    assert found == pytest.approx(CREDIT[script.__name__], abs=1e-4)
    for line in lines:  # the two terms add up
        total = torch.tensor(line["outcome"]) + torch.tensor(line["progress"])
        torch.testing.assert_close(total, torch.tensor(line["advantage"]))


@pytest.mark.parametrize("script", [ep_grpo, erpo], ids=lambda script: script.__name__)
def test_credit_where_progress_is_the_larger_part(on_example: Callable, script: ModuleType):
    settings = {"buckets": 2, "eta": 3.0}
    metrics, _ = on_example(script, **settings)
    method = getattr(slow, script.__name__)
    entropy, logp = example.ENTROPY, example.LOGP
    whole = method(slow.Group([1.0, 1.0, 0.0, 0.0], entropy, logp, example.REF_LOGP), **settings)
    outcome = method(slow.Group([1.0, 1.0, 0.0, 0.0], entropy, logp, logp), **settings)
    pairs = [pair for rows in zip(whole, outcome, strict=True) for pair in zip(*rows, strict=True)]
    against = sum(a * b < 0 for a, b in pairs) / 9
    assert 0 < against < 1
    assert metrics["credit/sign_differs"] == pytest.approx(against)
    progress = sum(abs(a - b) for a, b in pairs) / 9
    assert metrics["credit/progress"] == pytest.approx(progress, abs=1e-4)


def test_reward_spread_by_hand(on_example: Callable):
    metrics, _ = on_example(gtpo)
    assert metrics["spread/correct"] == pytest.approx(0.05)  # of 1.15 1.05 1.1 1.05 1.15
    wrong = metrics["spread/wrong"]
    assert wrong == pytest.approx(0.0635, abs=1e-4)  # of -1.1778 -1.1 -1.1 -1.0222


@pytest.mark.parametrize(("correct", "none"), [((0, 0, 0, 0), "correct"), ((1, 1, 1, 1), "wrong")])
def test_no_rewards_have_no_spread(on_example: Callable, correct: tuple[int, ...], none: str):
    metrics, _ = on_example(gtpo, correct)
    assert metrics[f"spread/{none}"] == 0
    assert metrics["spread/correct"] + metrics["spread/wrong"] > 0.01


# ------------------------------------------------------------------------------- GTPO


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


# ------------------------------------------------------------------------------- their results


@pytest.mark.parametrize(("right", "percent"), [(3, 9.69), (14, 38.20), (25, 58.10), (45, 79.84)])
def test_pass_at_16_of_one_pool(right: int, percent: float):
    """EP-GRPO's pass@16 on AIME25, in per cent: of 30 problems with 16 samples each, as one."""
    assert round(100 * pass_at_k(30 * 16, right, 16), 2) == percent


# ------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("script", "symbols"),
    [
        ("ep_grpo", ["γ", "η", "K: ", "θ", "(paper: 0.001)"]),
        ("erpo", ["γ", "η", "K: ", "(paper: 0.001)"]),
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
@pytest.mark.parametrize("settings", [{"buckets": 0}, {"gamma": -1.0}, {"eta": -0.1}], ids=str)
def test_numbers_too_small(script: ModuleType, settings: dict, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        script.main(script.Args(**settings))
    name, value = next(iter(settings.items()))
    assert f"error: --{name} {value}: must be " in capsys.readouterr().err
