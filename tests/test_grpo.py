"""GRPO's functions by hand, and the whole of its update against a plain one."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics
from torch import Tensor, nn

import common
import grpo
from engine import load_policy
from grpo import clipped_loss, grpo_advantages, kl_to_reference, overlong_penalty, token_weights
from run import Run

# ------------------------------------------------------------------------------- advantages


def test_worked_example():
    advantages = grpo_advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), eps=0)
    expected = torch.tensor([[0.8660, 0.8660, -0.8660, -0.8660]])
    torch.testing.assert_close(advantages, expected, atol=5e-5, rtol=0)


def test_groups_are_normalised_apart():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [10.0, 0.0, 10.0, 10.0]])
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.5, -1.5, 0.5, 0.5]])
    torch.testing.assert_close(grpo_advantages(rewards, eps=0), expected)


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
def test_equal_rewards_give_exact_zeros(reward: float, size: int, scale: bool, eps: float):
    advantages = grpo_advantages(torch.full((2, size), reward), scale=scale, eps=eps)
    assert torch.equal(advantages, torch.zeros(2, size))


def test_without_scale_only_the_mean_goes():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]])
    assert torch.equal(grpo_advantages(rewards, scale=False), expected)


def test_advantages_leave_their_input_alone():
    rewards = torch.tensor([[1.0, 0.0, 0.5]])
    before = rewards.clone()
    assert not grpo_advantages(rewards).requires_grad
    assert torch.equal(rewards, before)


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
    "on policy": (1.0, 2.0, -2.0, -2.0, False),
}


@pytest.mark.parametrize("case", CLIP.values(), ids=CLIP)
def test_clip_by_hand(case: tuple[float, float, float, float, bool]):
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
    kl = kl_to_reference(logp, ref_logp)
    expected = [0.5 - math.log(0.5) - 1, 0.0, 2 - math.log(2) - 1]  # 0.1931, 0, 0.3069
    torch.testing.assert_close(kl.detach(), torch.tensor(expected, dtype=torch.float64))
    kl.sum().backward()
    slopes = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)  # 1 - π_ref / π
    torch.testing.assert_close(logp.grad, slopes)


def test_kl_estimate_has_the_kl_as_its_mean():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    mean = (policy.exp() * kl_to_reference(policy, reference)).sum()
    torch.testing.assert_close(mean, (policy.exp() * (policy - reference)).sum())


MASK = torch.tensor([[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 0, 0, 0]]]).bool()
WEIGHTS = {  # of a token of each response; 8 tokens in 4 responses, T = 5
    "token": [1 / 8, 1 / 8, 1 / 8, 1 / 8],
    "sequence": [1 / 8, 1 / 16, 1 / 4, 1 / 4],
    "constant": [1 / 20, 1 / 20, 1 / 20, 1 / 20],
}


@pytest.mark.parametrize("average", WEIGHTS)
def test_token_weights_by_hand(average: str):
    expected = torch.tensor(WEIGHTS[average]).view(2, 2, 1) * MASK
    torch.testing.assert_close(token_weights(MASK, average, 5), expected)


@pytest.mark.parametrize("average", WEIGHTS)
def test_token_weights_of_a_share_of_the_problems(average: str):
    """An update counts its own tokens and responses, not those of the whole step."""
    live = MASK.clone()
    live[0] = False
    alone = token_weights(MASK[1:], average, 5)
    torch.testing.assert_close(token_weights(live, average, 5), torch.cat([0 * alone, alone]))


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([[1, 12, 16, 18, 20, 25]])
    expected = torch.tensor([[0.0, 0.0, 0.0, -0.25, -0.5, -0.5]])
    torch.testing.assert_close(overlong_penalty(lengths, max_length=20, buffer=4), expected)
    assert torch.equal(overlong_penalty(lengths, 20, 0), torch.zeros(1, 6))


# ------------------------------------------------------------------------------- the update


def verdicts(_: grpo.Grader, texts: list[str], golds: list[str]) -> list[bool]:
    """A task that a random model is sometimes right about."""
    return [len(text) % 2 == 0 for text in texts]


@pytest.fixture
def gradients(
    make_args: Callable[..., grpo.Args],
    untied_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Callable[..., tuple[list[Tensor], list[dict[str, Any]]]]:
    """Runs one step of grpo.py; returns the gradient of each of its updates, as one vector each,
    and what went into each: the policy's weights, and the problems."""
    monkeypatch.setattr(grpo.Grader, "grade", verdicts)
    runs = []

    def run(stack: Callable = common.stack, **settings: Any) -> tuple[list[Tensor], list[dict]]:
        found, shares, stacked = [], [], []
        weights = []
        load, update, micro_batches = grpo.load_policy, Run.update, common.micro_batches

        def keep_policy(args: grpo.Args) -> Any:
            weights.append(load(args))
            return weights[-1]

        def keep_rollouts(*groups: Any) -> common.Rollouts:
            stacked.append(stack(*groups))
            return stacked[-1]

        def keep_share(rollouts: Any, budget: int, problems: Tensor) -> Any:
            if torch.is_grad_enabled():
                shares.append(problems)
            return micro_batches(rollouts, budget, problems)

        def keep_gradient(self: Run, *rest: Any) -> float:
            policy = weights[0]
            found.append(torch.cat([w.grad.flatten() for w in policy.parameters()]))
            inputs.append({"policy": copy.deepcopy(policy), "share": shares[-1]})
            inputs[-1]["policy"].zero_grad()
            return update(self, *rest)

        inputs: list[dict[str, Any]] = []
        runs.append(settings)
        with monkeypatch.context() as patch:
            patch.setattr(grpo, "load_policy", keep_policy)
            patch.setattr(common, "stack", keep_rollouts)
            patch.setattr(common, "micro_batches", keep_share)
            patch.setattr(Run, "update", keep_gradient)
            folders = {"model": str(untied_model), "run_dir": str(tmp_path / f"run{len(runs)}")}
            args = make_args(max_new_tokens=24, **folders, **settings)
            grpo.main(args)
        for item in inputs:
            item |= {"rollouts": stacked[0], "args": args}
        return found, inputs

    return run


def plain_gradients(updates: list[dict[str, Any]]) -> list[Tensor]:
    """The same gradients from the definition: full logits, one sequence at a time, no masks."""
    args, rollouts = updates[0]["args"], updates[0]["rollouts"]
    old, reference = updates[0]["policy"], load_policy(args)
    old = copy.deepcopy(old)

    def logp(policy: nn.Module, p: int, g: int) -> Tensor:
        prompt, response = rollouts.problems[p].prompt, rollouts.tokens[p, g][rollouts.mask[p, g]]
        sequence = torch.cat([torch.tensor(prompt), response])[None]
        logits = policy.eval()(sequence).logits[0, len(prompt) - 1 : -1] / args.temperature
        return logits.log_softmax(-1)[torch.arange(len(response)), response]

    found = []
    for update in updates:
        policy, losses = update["policy"], []
        for p in update["share"].tolist():
            rewards = [float(len(text) % 2 == 0) for text in rollouts.texts[p]]
            mean = sum(rewards) / len(rewards)
            std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
            for g, reward in enumerate(rewards):
                advantage = (reward - mean) / (std + 1e-6)
                now = logp(policy, p, g)
                with torch.no_grad():
                    before, first = logp(old, p, g), logp(reference, p, g)
                ratio = (now - before).exp()
                clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
                gain = torch.minimum(ratio * advantage, clipped * advantage)
                kl = (first - now).exp() - (first - now) - 1
                losses.append(args.kl * kl - gain)
        tokens = sum(len(loss) for loss in losses)
        loss = {
            "token": sum(loss.sum() for loss in losses) / tokens,
            "sequence": sum(loss.mean() for loss in losses) / len(losses),
            "constant": sum(loss.sum() for loss in losses) / len(losses) / args.max_new_tokens,
        }[args.loss_average]
        loss.backward()
        found.append(torch.cat([weight.grad.flatten() for weight in policy.parameters()]))
    return found


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert b.norm() > 1e-3, "a gradient of nothing would agree with anything"
        assert (a - b).norm() <= tolerance * b.norm()


AVERAGES = pytest.mark.parametrize("loss_average", ["token", "sequence", "constant"])


@AVERAGES
@pytest.mark.parametrize(
    "settings",
    [{}, {"updates_per_rollout": 2, "lr": 0.01, "kl": 0.3, "temperature": 0.8}],
    ids=["one update", "two updates with KL"],
)
def test_gradient_is_the_plain_one(gradients: Callable, loss_average: str, settings: dict):
    ours, updates = gradients(loss_average=loss_average, **settings)
    assert len(ours) == settings.get("updates_per_rollout", 1)
    assert len(updates[0]["rollouts"].mask.sum(-1).unique()) > 3  # lengths
    assert_same(ours, plain_gradients(updates))


@AVERAGES
def test_gradient_does_not_depend_on_micro_batches(gradients: Callable, loss_average: str):
    budgets = [1, 60, 150, 10**6]  # one rollout at a time .. all at once
    first, *others = [gradients(loss_average=loss_average, token_budget=n)[0] for n in budgets]
    for other in others:
        assert_same(other, first)


@AVERAGES
def test_gradient_does_not_depend_on_padding_or_order(gradients: Callable, loss_average: str):
    def wider(*call: Any) -> common.Rollouts:
        rollouts = common_stack(*call)
        for name in ("tokens", "mask", "engine_logp"):
            value = getattr(rollouts, name)
            setattr(rollouts, name, nn.functional.pad(value, (0, 5), value=0))
        rollouts.tokens[~rollouts.mask] = 99  # what is written there must not matter
        rollouts.engine_logp[~rollouts.mask] = 7.0
        return rollouts

    def shuffled(groups: list[common.Group], *rest: Any) -> common.Rollouts:
        for group in groups:
            order = [2, 0, 3, 1]
            for name in ("tokens", "engine_logp", "texts", "correct"):
                setattr(group, name, [getattr(group, name)[i] for i in order])
        groups.reverse()
        return common_stack(groups, *rest)

    common_stack = common.stack
    plain, padded, reordered = (
        gradients(stack, loss_average=loss_average)[0] for stack in (common.stack, wider, shuffled)
    )
    assert_same(padded, plain)
    assert_same(reordered, plain)


def test_importance_cap_reaches_the_gradient(gradients: Callable):
    def other_engine(*call: Any) -> common.Rollouts:
        rollouts = stack(*call)
        rollouts.engine_logp[rollouts.mask] -= math.log(1.5)
        return rollouts

    stack = common.stack
    plain = gradients()[0]
    weighed = gradients(other_engine, importance_cap=2.0, max_logp_gap=1.0)[0]
    assert_same(weighed, [1.5 * gradient for gradient in plain])
    capped = gradients(other_engine, importance_cap=1.2, max_logp_gap=1.0)[0]
    assert_same(capped, [1.2 * gradient for gradient in plain])


def test_overlong_penalty_reaches_the_gradient(gradients: Callable):
    plain, punished = gradients()[0], gradients(overlong_buffer=8)[0]
    assert (punished[0] - plain[0]).norm() > 0.1 * plain[0].norm()


# ------------------------------------------------------------------------------- whole runs

KEYS = {
    *("reward", "accuracy", "zero_variance", "length", "truncated", "entropy", "clip_fraction"),
    *("kl_to_old", "loss", "grad_norm", "lr", "logp_gap/mean", "logp_gap/max"),
    *("seconds/sync", "seconds/rollout", "seconds/verify", "seconds/score", "seconds/update"),
    *("seconds/other", "seconds/step", "tokens_per_second", "step"),
}
EVALUATION = {"eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/greedy"}
EVALUATION |= {"eval/length"}


@pytest.fixture
def run(
    make_args: Callable[..., grpo.Args], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, float]]]:
    """Runs grpo.py and returns its metrics."""
    monkeypatch.setattr(grpo.Grader, "grade", verdicts)

    def run(**settings: Any) -> list[dict[str, float]]:
        args = make_args(**settings)
        grpo.main(args)
        return read_metrics(Path(args.run_dir))

    return run


def test_three_steps_log_everything(run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture):
    metrics = run(steps=3, eval_every=2, kl=0.05)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    for row in metrics[1:]:
        assert row.keys() >= KEYS | {"kl_to_reference"}
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
    for word in ("before", "after", "95% interval", "wall time", str(tmp_path / "run" / "model")):
        assert word in printed


def test_model_folder_holds_the_trained_policy(run: Callable, tmp_path: Path, tied_model: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(steps=2)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tied_model).state_dict()
    assert trained.keys() == start.keys()
    assert all((trained[name] != start[name]).any() for name in start)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template


def untimed(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds/", "tokens_per_second"))}
        for row in metrics
    ]


def test_same_command_same_metrics(run: Callable, tmp_path: Path):
    first, second, other = (
        untimed(run(steps=2, seed=seed, run_dir=str(tmp_path / name)))
        for seed, name in [(1, "a"), (1, "b"), (2, "c")]
    )
    assert first == second
    assert first[1] != other[1]


@pytest.mark.parametrize("untied", [False, True])
def test_lora_run(run: Callable, tmp_path: Path, untied_model: Path, untied: bool):
    from transformers import AutoModelForCausalLM

    model = {"model": str(untied_model)} if untied else {}
    metrics = run(steps=3, lora_rank=4, lora_dropout=0.1, lr=1e-2, kl=0.1, **model)
    assert metrics[1]["kl_to_reference"] == pytest.approx(0, abs=1e-9)
    assert metrics[3]["kl_to_reference"] > 1e-6
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert not any("lora" in name for name in trained.state_dict())
    assert metrics[3]["logp_gap/mean"] < 1e-5


def test_updates_per_rollout(run: Callable):
    metrics = run(steps=2, updates_per_rollout=4, lr=0.02)
    assert metrics[1]["kl_to_old"] > 1e-4  # the later updates are off policy
    assert 0 < metrics[1]["clip_fraction"] < 1


def test_rollouts_file_is_what_the_metrics_say(run: Callable, tmp_path: Path):
    metrics = run(steps=2, log_rollouts=99)
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    for step in (1, 2):
        rows = [row for row in map(json.loads, lines) if row["step"] == step]
        assert len(rows) == 16
        assert sum(row["reward"] for row in rows) / 16 == pytest.approx(metrics[step]["reward"])
        tokens = [len(row["tokens"]) for row in rows]
        assert sum(tokens) / 16 == pytest.approx(metrics[step]["length"])
        total = sum(sum(row["entropy"]) for row in rows) / sum(tokens)
        assert total == pytest.approx(metrics[step]["entropy"], rel=1e-5)
        for row in rows:
            lengths = {len(row[name]) for name in ("tokens", "logp", "entropy", "advantage")}
            assert len(lengths) == 1
            assert row["problem"] and row["answer"]
            assert row["reward"] == (len(row["text"]) % 2 == 0)


# ------------------------------------------------------------------------------- collecting


class Verdicts:
    """Fills in verdicts from a script: rounds of counts of right rollouts, one a group."""

    def __init__(self, rounds: list[list[int]]) -> None:
        self.rounds = iter(rounds)

    def __call__(self, grader: Any, groups: list[common.Group]) -> None:
        for group, right in zip(groups, next(self.rounds), strict=True):
            group.correct = [1.0] * right + [0.0] * (4 - right)


def collect(
    args: grpo.Args, rounds: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[common.Group], common.Problems, list[Any]]:
    seeds = []

    def roll_out(_: Any, batch: list[common.Problem], __: Any, seed: Any) -> list[common.Group]:
        seeds.append(seed)
        return [common.Group(problem, [], [], []) for problem in batch]

    monkeypatch.setattr(common, "roll_out", roll_out)
    monkeypatch.setattr(common, "verify", Verdicts(rounds))
    problems = common.Problems(common.Problem(str(i), "", []) for i in range(20))
    timer = type("Timer", (), {"time": Run.time, "seconds": {}})()
    return grpo.collect(args, 5, problems, None, None, timer), problems, seeds


def counts(groups: list[common.Group]) -> list[int]:
    return [int(sum(group.correct)) for group in groups]


def test_dynamic_sampling_replaces_groups_without_variance(
    make_args: Callable[..., grpo.Args], monkeypatch: pytest.MonkeyPatch
):
    args = make_args(dynamic_sampling=True)
    groups, problems, seeds = collect(args, [[0, 2, 4, 3], [4, 1], [2]], monkeypatch)
    assert counts(groups) == [2, 3, 1, 2]
    assert problems.position == 7
    assert len(set(seeds)) == 3
    assert len({group.problem.text for group in groups}) == 4


def test_dynamic_sampling_fills_up_after_the_last_round(
    make_args: Callable[..., grpo.Args], monkeypatch: pytest.MonkeyPatch
):
    args = make_args(dynamic_sampling=True, generation_rounds=2)
    groups, problems, _ = collect(args, [[0, 2, 4, 0], [4, 1, 0]], monkeypatch)
    assert counts(groups) == [2, 1, 4, 0]
    assert problems.position == 7


def test_without_dynamic_sampling_every_group_stays(
    make_args: Callable[..., grpo.Args], monkeypatch: pytest.MonkeyPatch
):
    groups, problems, _ = collect(make_args(), [[0, 2, 4, 0]], monkeypatch)
    assert counts(groups) == [0, 2, 4, 0]
    assert problems.position == 4


def test_dynamic_sampling_run_keeps_all_groups(run: Callable, tmp_path: Path):
    metrics = run(steps=2, dynamic_sampling=True, group_size=2, log_rollouts=99)
    lines = (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] == 1]
    assert len(rows) == 8
    assert metrics[1]["zero_variance"] == 0


# ------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "settings", [{"kl": 0.1}, {"lora_rank": 4, "kl": 0.1}], ids=["all", "LoRA"]
)
def test_bfloat16_run(run: Callable, settings: dict):
    """The forward passes are bfloat16, the weights that learn are not: a small lr still moves."""
    metrics = run(steps=2, precision="bfloat16", lr=1e-4, max_logp_gap=0.1, **settings)
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert 1e-5 < metrics[1]["logp_gap/mean"] < 0.1
    assert metrics[1]["kl_to_reference"] < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_run_on_cuda(run: Callable, precision: str, lora_rank: int):
    settings = {"updates_per_rollout": 2, "gradient_checkpointing": True, "max_logp_gap": 0.1}
    metrics = run(steps=2, device="cuda", precision=precision, lora_rank=lora_rank, **settings)
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert metrics[2]["logp_gap/mean"] < (1e-4 if precision == "float32" else 0.1)
