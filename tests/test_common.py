"""Rollouts as tensors, their scores under a model, micro-batches, and the small statistics."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import StopRun, Transformers, eos_ids, load_policy, load_tokenizer
from run import learning_rate
from torch import Tensor, nn

import common
import grpo
from common import Group, Problem, Rollouts

CPU = torch.device("cpu")
TEXTS = ["1+1", "What is 12 + 34?", "x"]
LENGTHS = [[3, 9, 1], [7, 7, 2], [12, 1, 5]]


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture
def args(make_args: Callable[..., grpo.Args], folder: Path) -> grpo.Args:
    return make_args(model=str(folder), temperature=0.7)


@pytest.fixture
def policy(args: grpo.Args) -> nn.Module:
    return load_policy(args)


def random_groups(lengths: list[list[int]] = LENGTHS) -> list[Group]:
    """Prompts and responses of different lengths, of any tokens: padding and EOS among them."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for text, row in zip(TEXTS, lengths, strict=True):
        tokens = [torch.randint(259, (n,), generator=generator).tolist() for n in row]
        logp = [[-1.0] * n for n in row]
        groups.append(Group(Problem(text, "", list(text.encode())), tokens, logp, [""] * len(row)))
    return groups


def random_rollouts() -> Rollouts:
    return common.stack(random_groups(), [256], CPU)


def plain_scores(policy: nn.Module, rollouts: Rollouts, temperature: float) -> tuple[Tensor, ...]:
    """log-probabilities, entropies and hidden states from full logits, a sequence at a time."""
    logp, entropy = (torch.zeros(rollouts.mask.shape) for _ in "ab")
    hidden = {}
    for p, g in np.ndindex(*rollouts.mask.shape[:2]):
        prompt, response = rollouts.problems[p].prompt, rollouts.tokens[p, g][rollouts.mask[p, g]]
        output = policy.eval()(
            torch.cat([torch.tensor(prompt), response])[None], output_hidden_states=True
        )
        predicting = slice(len(prompt) - 1, -1)
        distribution = (output.logits[0, predicting] / temperature).log_softmax(-1)
        live = torch.arange(len(response))
        logp[p, g, live] = distribution[live, response]
        entropy[p, g, live] = -(distribution.exp() * distribution).sum(-1).detach()
        hidden[p, g] = output.hidden_states[-1][0, predicting]
    return logp, entropy, hidden


# ------------------------------------------------------------------------------- rollouts


class FakeEngine:
    """Answers with what it was asked, so that a response shows which prompt and seed it had."""

    def generate(self, prompts: Any, seeds: Any, lengths: Any, temperature: float) -> Any:
        self.asked = prompts, seeds, lengths, temperature
        return [([*p, s % 100], [-0.5] * (len(p) + 1)) for p, s in zip(prompts, seeds, strict=True)]

    def decode(self, responses: list[list[int]]) -> list[str]:
        return [" ".join(map(str, tokens)) for tokens in responses]


class FakeGrader:
    """Right where the response begins with the gold answer."""

    def grade(self, texts: list[str], golds: list[str]) -> list[bool]:
        return [text.startswith(gold) for text, gold in zip(texts, golds, strict=True)]


def test_responses_and_verdicts_land_on_their_problem(make_args: Callable[..., grpo.Args]):
    args = make_args(group_size=3, max_new_tokens=9)
    problems = [Problem(f"p{i}", f"{i} ", [i] * (i + 1)) for i in range(4)]
    engine = FakeEngine()
    groups = common.roll_out(engine, problems, args, (1, 2))
    _, seeds, lengths, temperature = engine.asked
    assert (lengths, temperature) == ([9] * 12, args.temperature)
    assert len(set(seeds)) == 12
    for i, group in enumerate(groups):
        assert group.problem is problems[i]
        assert group.tokens == [[i] * (i + 1) + [s % 100] for s in seeds[3 * i : 3 * i + 3]]
    common.verify(FakeGrader(), groups)
    assert [group.correct for group in groups] == [[1.0] * 3] * 4

    problems[2].answer = "no"
    groups[1].texts[1] = "wrong"
    common.verify(FakeGrader(), groups)
    assert [group.correct for group in groups] == [[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]]
    rollouts = common.stack(groups, [99], CPU)
    assert rollouts.tokens[1, 2].tolist()[:2] == [1, 1]
    assert rollouts.texts[1][1] == "wrong"


def test_seeds_depend_on_run_step_problem_and_rollout(make_args: Callable[..., grpo.Args]):
    args, engine, seeds = make_args(), FakeEngine(), []
    for seed in [(1, 1, 0), (1, 2, 0), (2, 1, 0), (1, 1, 1), (1, "evaluation")]:
        common.roll_out(engine, [Problem("", "", [1])] * 2, args, seed)
        seeds += engine.asked[1]
    assert len(set(seeds)) == 5 * 2 * args.group_size
    common.roll_out(engine, [Problem("", "", [1])] * 2, args, (1, 1, 0))
    assert engine.asked[1] == seeds[: 2 * args.group_size]


def test_openers_begin_the_responses(make_args: Callable[..., grpo.Args]):
    args, engine = make_args(group_size=2, max_new_tokens=9), FakeEngine()
    problems = [Problem("", "", [1, 2]), Problem("", "", [3])]
    openers = torch.tensor([[7, 8], [9, 10]])
    groups = common.roll_out(engine, problems, args, (1,), openers=openers)
    assert engine.asked[0] == [[1, 2, 7], [1, 2, 8], [3, 9], [3, 10]]
    assert engine.asked[2] == [8] * 4  # the opener counts
    assert [rows[0] for group in groups for rows in group.tokens] == [7, 8, 9, 10]
    rollouts = common.stack(groups, [], CPU)
    assert rollouts.engine_logp[..., 0].isnan().all()
    assert not rollouts.engine_logp[..., 1:].isnan().any()


def test_mask_comes_from_lengths():
    """Pad and EOS tokens within a response are response tokens like any other."""
    ends = [0, 7]
    tokens = [[[0, 0, 7], [5]], [[7], [0, 0, 0, 0]]]
    groups = [
        Group(Problem("", "", [1]), rows, [[-1.0] * len(row) for row in rows], ["", ""])
        for rows in tokens
    ]
    rollouts = common.stack(groups, ends, CPU)
    assert rollouts.mask.int().tolist() == [
        [[1, 1, 1, 0], [1, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 1, 1, 1]],
    ]
    assert rollouts.tokens.shape == rollouts.engine_logp.shape == (2, 2, 4)
    assert rollouts.truncated.tolist() == [[False, True], [False, False]]


def test_eos_is_trained_where_pad_is_eos(tied_model: Path, make_args: Callable[..., grpo.Args]):
    args = make_args(group_size=64, max_new_tokens=24)
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    engine = Transformers(args, policy, tokenizer, 200)
    groups = common.roll_out(engine, [Problem("", "", list(b"1+1"))], args, (1,))
    rollouts = common.stack(groups, eos_ids(policy, tokenizer), CPU)
    is_eos = rollouts.tokens == tokenizer.eos_token_id
    assert 0 < (~rollouts.truncated).sum() < 64
    assert ((is_eos & rollouts.mask).sum(-1) == ~rollouts.truncated).all()  # one, the last
    assert rollouts.mask.sum(-1)[rollouts.truncated].eq(24).all()
    logp, _ = common.score(policy, rollouts, args)
    assert (logp[is_eos & rollouts.mask] < 0).all()


# ------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("token_budget", [1, 40, 10**6])
def test_scores_equal_those_of_full_logits(
    args: grpo.Args, policy: nn.Module, token_budget: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 259 * 4)
    rollouts = random_rollouts()
    args = dataclasses.replace(args, token_budget=token_budget)
    logp, entropy = common.score(policy, rollouts, args)
    with torch.no_grad():
        expected_logp, expected_entropy, _ = plain_scores(policy, rollouts, args.temperature)
    torch.testing.assert_close(logp, expected_logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)
    assert not logp[~rollouts.mask].any() and not entropy[~rollouts.mask].any()
    assert logp.dtype == entropy.dtype == torch.float32
    assert not logp.requires_grad


def all_of(rollouts: Rollouts) -> common.Index:
    p, g = rollouts.mask.shape[:2]
    return torch.arange(p).repeat_interleave(g), torch.arange(g).repeat(p)


@pytest.mark.parametrize("chunk", [1, 7, 10**4])
def test_gradient_through_the_chunked_head_is_the_plain_one(
    args: grpo.Args, policy: nn.Module, chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 259 * chunk)
    rollouts = random_rollouts()
    weights = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(1))
    index = all_of(rollouts)
    logp, entropy = common.token_logp(policy, rollouts, index, args)
    assert not entropy.requires_grad
    (logp * weights[index]).sum().backward()
    ours = [weight.grad for weight in policy.parameters()]
    policy.zero_grad()
    expected, _, _ = plain_scores(policy, rollouts, args.temperature)
    (expected * weights).sum().backward()
    for gradient, weight in zip(ours, policy.parameters(), strict=True):
        assert (gradient - weight.grad).norm() <= 1e-5 * weight.grad.norm()


def test_a_single_micro_batch_goes_forward_once(
    args: grpo.Args, policy: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    passes, hidden_states = [], common.hidden_states

    def counted(*call: Any) -> Tensor:
        passes.append(torch.is_grad_enabled())
        return hidden_states(*call)

    monkeypatch.setattr(common, "hidden_states", counted)
    rollouts = random_rollouts()
    weights = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(1))
    index = all_of(rollouts)
    old_logp, _ = common.score(policy, rollouts, args, reuse=True)
    common.score(policy, rollouts, args)  # as of a reference, in between
    assert passes == [True, False] and not old_logp.requires_grad
    gradients = []
    for _ in "ab":  # from the kept graph, then from a pass of its own
        logp, _ = common.token_logp(policy, rollouts, index, args)
        torch.testing.assert_close(logp.detach(), old_logp[index])
        (logp * weights[index]).sum().backward()
        gradients.append([weight.grad for weight in policy.parameters()])
        policy.zero_grad()
    assert passes == [True, False, True]
    for kept, fresh in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, fresh)


@pytest.mark.parametrize(
    "settings", [{"token_budget": 40}, {"updates_per_rollout": 2}, {"lora_dropout": 0.1}], ids=str
)
def test_no_graph_is_kept_that_the_update_could_not_use(
    args: grpo.Args, policy: nn.Module, settings: dict[str, Any]
):
    rollouts = random_rollouts()
    args = dataclasses.replace(args, **settings)
    common.score(policy, rollouts, args, reuse=True)
    assert rollouts.graph is None


def test_hidden_states_come_in_the_order_of_the_mask(args: grpo.Args, policy: nn.Module):
    rollouts = random_rollouts()
    index = (torch.tensor([2, 0, 1, 0]), torch.tensor([0, 1, 2, 2]))
    with torch.no_grad():
        hidden = common.hidden_states(policy, rollouts, index, args)
        _, _, plain = plain_scores(policy, rollouts, 1.0)
    expected = torch.cat([plain[p, g] for p, g in [(2, 0), (0, 1), (1, 2), (0, 2)]])
    assert hidden.shape[0] == rollouts.mask[index].sum()
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["shared", "checkpointing", "recurrent"])
def test_a_prompt_is_computed_once_for_its_rollouts(
    args: grpo.Args, policy: nn.Module, case: str, monkeypatch: pytest.MonkeyPatch
):
    """The same log-probs and gradients as a sequence at a time, even where it cannot be shared."""
    rollouts = common.stack(random_groups([row * 2 for row in LENGTHS]), [256], CPU)
    args = dataclasses.replace(args, gradient_checkpointing=case == "checkpointing")
    monkeypatch.setattr(type(policy), "_is_stateful", case == "recurrent")
    body, computed = policy.base_model, []
    body.register_forward_pre_hook(
        lambda _, __, inputs: computed.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    index = all_of(rollouts)
    weights = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(1))
    logp, _ = common.token_logp(policy, rollouts, index, args)
    longest = len(TEXTS[1]) - 1
    assert computed == ([(3, longest), (18, 12)] if case == "shared" else [(18, longest + 7)])
    (logp * weights[index]).sum().backward()
    ours = [weight.grad for weight in policy.parameters()]
    policy.zero_grad()
    expected, _, _ = plain_scores(policy, rollouts, args.temperature)
    torch.testing.assert_close(logp, expected[index], atol=1e-5, rtol=1e-5)
    (expected * weights).sum().backward()
    for gradient, weight in zip(ours, policy.parameters(), strict=True):
        assert (gradient - weight.grad).norm() <= 1e-5 * weight.grad.norm()


def test_gradients_repeat_themselves_bit_for_bit(
    tiny_model: Path, make_args: Callable[..., grpo.Args]
):
    """With as many rollouts as a step has, threads could add up what prompts get in any order."""
    args = make_args(model=str(tiny_model))
    policy, draw = load_policy(args), torch.Generator().manual_seed(0)
    groups = []
    for row in torch.randint(8, 32, (16, 8), generator=draw).tolist():
        problem = Problem("", "", torch.randint(256, (20,), generator=draw).tolist())
        tokens = [torch.randint(256, (n,), generator=draw).tolist() for n in row]
        groups.append(Group(problem, tokens, [[-1.0] * n for n in row], [""] * 8))
    rollouts = common.stack(groups, [256], CPU)
    (index,) = common.micro_batches(rollouts, 10**6, torch.arange(16))
    gradients, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    for _ in range(6):
        logp, _ = common.token_logp(policy, rollouts, index, args)
        (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
        gradients.append([weight.grad for weight in policy.parameters()])
        policy.zero_grad()
    torch.set_num_threads(threads)
    for again in gradients[1:]:
        assert all(a.equal(b) for a, b in zip(gradients[0], again, strict=True))


@pytest.mark.parametrize("token_budget", [1, 20, 25, 64, 10**6])
def test_micro_batches_take_every_rollout_once_within_the_budget(token_budget: int):
    rollouts = random_rollouts()
    seen = []
    for p, g in common.micro_batches(rollouts, token_budget, torch.tensor([2, 0])):
        lengths = [
            len(rollouts.problems[i].prompt) + LENGTHS[i][j]
            for i, j in zip(p.tolist(), g.tolist(), strict=True)
        ]
        assert len(lengths) == 1 or max(lengths) * len(lengths) <= token_budget
        seen += zip(p.tolist(), g.tolist(), strict=True)
    assert sorted(seen) == [(i, j) for i in (0, 2) for j in range(3)]


# ------------------------------------------------------------------------------- statistics


def test_standardize_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 99.0]], [[5.0, 5.0], [99.0, 5.0]]])
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [0, 1]]]).bool()
    expected = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(common.standardize(x, mask, 0.0), expected)
    one = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 0]]]).bool()
    assert not common.standardize(x, one, 0.0).any()
    assert not common.standardize(torch.full((1, 7, 3), 0.1), torch.ones(1, 7, 3).bool(), 0.0).any()


def test_means_weigh_tokens_not_batches():
    means = common.Means()
    means.add(torch.tensor([[True, True, True]]), x=torch.tensor([[1.0, 2.0, 3.0]]))
    means.add(torch.tensor([[True, False]]), x=torch.tensor([[10.0, 99.0]]))
    assert means.result() == {"x": 4.0}


def test_importance_weights_by_hand():
    rollouts = random_rollouts()
    old_logp = torch.where(rollouts.mask, -1.0 + math.log(1.5), 0.0)
    old_logp[0, 0, 0] = -1.0 + math.log(5.0)
    rollouts.engine_logp[0, 1, 0] = math.nan  # the engine did not sample it
    weights = common.importance_weights(rollouts, old_logp, cap=2.0)
    expected = torch.where(rollouts.mask, 1.5, 1.0)
    expected[0, 0, 0], expected[0, 1, 0] = 2.0, 1.0
    torch.testing.assert_close(weights, expected)
    assert torch.equal(common.importance_weights(rollouts, old_logp, 0.0), torch.ones(3, 3, 12))


def scored(gap: list[list[float]]) -> tuple[Rollouts, Tensor]:
    """Rollouts of one problem, and scores that differ from the engine's by so much."""
    engine_logp = [[-1.0] * len(row) for row in gap]
    tokens = [[5] * len(row) for row in gap]
    group = Group(Problem("", "", [1]), tokens, engine_logp, [r"\boxed{1}", "1"])
    rollouts = common.stack([group], [5], CPU)
    return rollouts, torch.tensor([[[-1.0 + x for x in row] for row in gap]])


def test_the_gap_between_engine_and_trainer_by_hand(
    make_args: Callable[..., grpo.Args], capsys: pytest.CaptureFixture
):
    rollouts, logp = scored([[0.0, 3e-5], [-9e-5, 0.0]])
    rollouts.engine_logp[0, 0, 0] = math.nan  # the engine did not sample it
    gap = common.check_engine(rollouts, logp, make_args())
    assert gap == pytest.approx({"logp_gap/mean": 4e-5, "logp_gap/max": 9e-5}, rel=2e-2)

    rollouts, logp = scored([[0.06, 0.06], [0.06, 0.06]])
    with pytest.raises(StopRun, match=r"0\.06 nats a token.*more than --max-logp-gap 0.0001"):
        common.check_engine(rollouts, logp, make_args())
    assert not capsys.readouterr().err
    common.check_engine(rollouts, logp, make_args(precision="bfloat16"))  # 0.2 then
    common.check_engine(rollouts, logp, make_args(max_logp_gap=0.1))
    assert capsys.readouterr().err.count("warning: engine and trainer differ by 0.06") == 2
    with pytest.raises(StopRun, match="not finite"):
        common.check_engine(rollouts, logp * math.nan, make_args(max_logp_gap=9.0))


def test_the_share_of_boxed_answers():
    assert common.boxed(scored([[0.0], [0.0]])[0]) == 0.5


# ------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, [1, 1, 1, 1]),
        ({"lr_schedule": "linear"}, [3 / 4, 1 / 2, 1 / 4, 0]),
        ({"lr_schedule": "cosine"}, [(2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4, 0]),
        ({"warmup_steps": 2}, [1 / 2, 1, 1, 1]),
        ({"warmup_steps": 2, "lr_schedule": "linear"}, [1 / 2, 1, 1 / 2, 0]),
        ({"warmup_steps": 2, "lr_schedule": "cosine"}, [1 / 2, 1, 1 / 2, 0]),
        ({"warmup_ratio": 0.75}, [1 / 3, 2 / 3, 1, 1]),
        ({"warmup_ratio": 0.3}, [1 / 2, 1, 1, 1]),  # of four steps 1.2: two
        ({"warmup_steps": 4, "lr_schedule": "linear"}, [1 / 4, 1 / 2, 3 / 4, 1]),
    ],
    ids=str,
)
def test_learning_rate_by_hand(settings: dict[str, Any], factors: list[float]):
    args = grpo.Args(steps=4, lr=2e-3, **settings)
    rates = [learning_rate(step, args) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([2e-3 * factor for factor in factors], abs=1e-15)


def test_overlong_penalty_on_rewards_of_0_and_1():
    """Right, right at the longest length, and two wrong: that length costs, but less than an error.

    DAPO's penalty of -1 belongs to rewards of 1 and -1. Unhalved, the second would be as wrong as
    the last two.
    """
    lengths = torch.tensor([[3, 20, 5, 7]])
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0]]) + grpo.overlong_penalty(lengths, 20, 4)
    assert rewards.tolist() == [[1.0, 0.5, 0.0, 0.0]]
    # mean 3/8, deviation √(0.6875 / 3) = 0.4787
    expected = torch.tensor([[1.3056, 0.2611, -0.7833, -0.7833]])
    torch.testing.assert_close(grpo.grpo_advantages(rewards), expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------- evaluation


class HalfRight:
    """Two right answers in four samples for the first problem, all for the second; greedy: one."""

    def grade(self, texts: list[str], golds: list[str]) -> list[bool]:
        return [True, True, False, False, True, True, True, True, False, True]


def test_evaluate_by_hand(make_args: Callable[..., grpo.Args]):
    args = make_args(eval_problems=2, eval_samples=4)
    problems = common.Problems(Problem("", "", [i] * i) for i in (1, 3, 9))
    result = common.evaluate(FakeEngine(), HalfRight(), problems, args)
    assert result["eval/accuracy"] == 0.75
    assert result["eval/greedy"] == 0.5
    assert result["eval/length"] == 3  # (2 + 4) / 2
    assert (result["eval/accuracy_low"], result["eval/accuracy_high"]) == (0.5, 1.0)
    assert (args.group_size, args.temperature) == (4, 1.0)


def test_evaluation_is_greedy_and_sampled_alike_each_time(make_args: Callable[..., grpo.Args]):
    asked = []

    class Engine(FakeEngine):
        def generate(self, *call: Any) -> Any:
            asked.append(call)
            return super().generate(*call)

    for step in range(2):
        args = make_args(eval_problems=2, eval_samples=4, temperature=0.9)
        problems = common.Problems(Problem("", "", [step + 1]) for _ in range(2))
        common.evaluate(Engine(), HalfRight(), problems, args)
    assert [(len(call[0]), call[3]) for call in asked] == [(8, 0.9), (2, 0.0)] * 2
    assert [call[1] for call in asked[:2]] == [call[1] for call in asked[2:]]


def test_bootstrap_interval_covers_the_mean():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        values = generator.binomial(4, 0.4, size=100) / 4
        low, high = common.bootstrap_interval(values, resamples=500)
        assert low <= values.mean() <= high
        covered += low <= 0.4 <= high
    assert 0.90 < covered / 300 < 0.99
    assert common.bootstrap_interval(np.ones(5)) == (1.0, 1.0)
