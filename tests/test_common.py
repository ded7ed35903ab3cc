"""Rollouts as tensors, their scores under a model, micro-batches, loss weights and statistics."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_step import places, plain_distribution, plain_outputs, predicting, response
from torch import Tensor, nn

import common
import grpo
from common import (
    Group,
    HeadLogp,
    Problem,
    Reference,
    Rollouts,
    StopRun,
    load_policy,
)
from infra import forward, lm_head
from infra.hf_engine import HFEngine

CPU = torch.device("cpu")
TEXTS = ["1+1", "What is 12 + 34?", "x"]
LENGTHS = [[3, 9, 1], [7, 7, 2], [12, 1, 5]]
Make = Callable[..., grpo.Args]


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request) -> Path:
    return request.getfixturevalue(f"{request.param}_model")


@pytest.fixture
def args(make_args, folder) -> grpo.Args:
    return make_args(model=str(folder), temperature=0.7)


@pytest.fixture
def policy(args) -> nn.Module:
    return load_policy(args)


def random_rollouts(lengths: list[list[int]] = LENGTHS, texts: list[str] = TEXTS) -> Rollouts:
    """Prompts and responses of different lengths, of any tokens: padding and EOS among them."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for text, row in zip(texts, lengths, strict=True):
        tokens = [torch.randint(259, (n,), generator=generator).tolist() for n in row]
        logp = [[-1.0] * n for n in row]
        groups.append(Group(Problem(text, "", list(text.encode())), tokens, logp, [""] * len(row)))
    return common.stack(groups, [256], CPU)


def all_of(rollouts: Rollouts) -> common.Index:
    p, g = rollouts.mask.shape[:2]
    return torch.arange(p).repeat_interleave(g), torch.arange(g).repeat(p)


def random_like(mask: Tensor) -> Tensor:
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))


def gradients(policy: nn.Module, loss: Tensor) -> list[Tensor]:
    policy.zero_grad()
    loss.backward()
    return [weight.grad for weight in policy.parameters()]


def assert_same_gradients(ours: list[Tensor], expected: list[Tensor]) -> None:
    for gradient, plain in zip(ours, expected, strict=True):
        assert (gradient - plain).norm() <= 1e-5 * plain.norm()


def plain_scores(policy: nn.Module, rollouts: Rollouts, temperature: float) -> tuple[Tensor, ...]:
    """log-probabilities, entropies and hidden states from full logits, a sequence at a time."""
    logp, entropy = (torch.zeros(rollouts.mask.shape) for _ in "ab")
    hidden = {}
    for p, g in places(rollouts):
        tokens, predicts = response(rollouts, p, g), predicting(rollouts, p)
        distribution = plain_distribution(policy, rollouts, p, g, temperature)
        positions = torch.arange(len(tokens))
        logp[p, g, positions] = distribution[positions, tokens]
        entropy[p, g, positions] = -(distribution.exp() * distribution).sum(-1).detach()
        states = plain_outputs(policy, rollouts, p, g).hidden_states[-1]
        hidden[p, g] = states[0, predicts]
    return logp, entropy, hidden


# ------------------------------------------------------------------ rollouts


class FakeEngine:
    """Responds with the prompt and the seed, so that a response shows which ones it had."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def generate(self, prompts: Any, seeds: Any, lengths: Any, temperature: float) -> Any:
        self.calls.append((prompts, seeds, lengths, temperature))
        return [([*p, s % 100], [-0.5] * (len(p) + 1)) for p, s in zip(prompts, seeds, strict=True)]

    def decode(self, responses: list[list[int]]) -> list[str]:
        return [" ".join(map(str, tokens)) for tokens in responses]


class FakeGrader:
    """Correct if the response begins with the reference answer."""

    def grade(self, responses: list[str], references: list[str]) -> list[bool]:
        return [text.startswith(r) for text, r in zip(responses, references, strict=True)]


def test_responses_and_verdicts_belong_to_their_problem(make_args):
    args = make_args(group_size=3, max_new_tokens=9)
    problems = [Problem(f"p{i}", f"{i} ", [i] * (i + 1)) for i in range(4)]
    engine = FakeEngine()
    groups = common.roll_out(engine, problems, args, (1, 2))
    _, seeds, lengths, temperature = engine.calls[0]
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
    verdicts = [[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]]
    assert [group.correct for group in groups] == verdicts
    problems[2].alternatives = ("never", "2 2")  # one is enough
    common.verify(FakeGrader(), groups)
    verdicts[2] = [1, 1, 1]
    assert [group.correct for group in groups] == verdicts
    rollouts = common.stack(groups, [99], CPU)
    assert rollouts.correct.tolist() == verdicts and rollouts.problems == problems
    assert rollouts.tokens[1, 2].tolist()[:2] == [1, 1]
    assert rollouts.texts[1][1] == "wrong"


def test_seeds_depend_on_run_step_problem_and_rollout(make_args):
    args, engine = make_args(), FakeEngine()
    for seed in [(1, 1, 0), (1, 2, 0), (2, 1, 0), (1, 1, 1), (1, "evaluation"), (1, 1, 0)]:
        common.roll_out(engine, [Problem("", "", [1])] * 2, args, seed)
    seeds = [call[1] for call in engine.calls]
    assert len({seed for row in seeds[:5] for seed in row}) == 5 * 2 * args.group_size
    assert seeds[5] == seeds[0]


def test_first_tokens_begin_the_responses(make_args):
    args, engine = make_args(group_size=2, max_new_tokens=9), FakeEngine()
    problems = [Problem("", "", [1, 2]), Problem("", "", [3])]
    first_tokens = torch.tensor([[7, 8], [9, 10]])
    groups = common.roll_out(engine, problems, args, (1,), first_tokens=first_tokens)
    prompts, _, lengths, _ = engine.calls[0]
    assert prompts == [[1, 2, 7], [1, 2, 8], [3, 9], [3, 10]]
    assert lengths == [8] * 4  # the first token counts
    assert [rows[0] for group in groups for rows in group.tokens] == [7, 8, 9, 10]
    rollouts = common.stack(groups, [], CPU)
    assert rollouts.engine_logp[..., 0].isnan().all()
    assert not rollouts.engine_logp[..., 1:].isnan().any()


class InOrder(common.Problems):
    def take(self, count: int, seed: int) -> list[Problem]:
        self.position += count
        return self[self.position - count : self.position]


CORRECT = {"c": [True, True], "n": [False, False], "m": [True, False]}


class Verdicts:
    """For each problem in turn: all correct (c), none (n), or mixed (m), in groups of two."""

    def __init__(self, kinds: str) -> None:
        self.kinds = list(kinds)

    def grade(self, responses: list[str], references: list[str]) -> list[bool]:
        kinds = [self.kinds.pop(0) for _ in responses[::2]]
        return [verdict for kind in kinds for verdict in CORRECT[kind]]


@pytest.mark.parametrize(
    ("kinds", "rounds", "kept", "asked"),
    [
        ("mmmm", 10, [0, 1, 2, 3], [4]),
        ("mcmnncmm", 10, [0, 2, 6, 7], [4, 2, 2]),
        ("mcmnnm", 2, [0, 2, 5, 4], [4, 2]),  # filled from the last round
        ("cncncncn", 2, [4, 5, 6, 7], [4, 4]),
        ("mcmn", None, [0, 1, 2, 3], [4]),
    ],
)
def test_collect_by_hand(kinds, rounds, kept, asked, make_args):
    """rounds: most of them under --dynamic-sampling, or None without it."""
    dynamic = {"dynamic_sampling": True, "generation_rounds": rounds} if rounds else {}
    args = make_args(group_size=2, prompts_per_step=4, **dynamic)
    problems = InOrder(Problem("", "", [i]) for i in range(9))
    run = SimpleNamespace(time=lambda part: contextlib.nullcontext())
    engine, taken = FakeEngine(), []

    def roll_out(*call: Any) -> list[Group]:
        taken.append((len(call[1]), call[3]))
        return common.roll_out(*call)

    groups = common.collect(args, 7, problems, engine, Verdicts(kinds), run, roll_out)
    assert [group.problem.prompt for group in groups] == [[i] for i in kept]
    assert taken == [(count, (args.seed, 7, i)) for i, count in enumerate(asked)]
    assert [group.correct for group in groups] == [CORRECT[kinds[i]] for i in kept]


def test_stack_takes_the_mask_from_lengths():
    """Pad and EOS tokens within a response are response tokens like any other."""
    tokens = [[[0, 0, 7], [5]], [[7], [0, 0, 0, 0]]]
    groups = [
        Group(Problem("", "", [1]), rows, [[-1.0] * len(row) for row in rows], ["", ""])
        for rows in tokens
    ]
    rollouts = common.stack(groups, [0, 7], CPU)
    assert rollouts.mask.int().tolist() == [
        [[1, 1, 1, 0], [1, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 1, 1, 1]],
    ]
    assert rollouts.tokens.tolist() == [[[0, 0, 7, 0], [5, 0, 0, 0]], [[7, 0, 0, 0], [0, 0, 0, 0]]]
    assert torch.equal(rollouts.engine_logp, -rollouts.mask.float())
    assert rollouts.truncated.tolist() == [[False, True], [False, False]]


def test_overlong_penalty_by_hand():
    """On rewards of 0 and 1 the longest correct response loses half, so it beats a wrong one.

    DAPO's penalty of -1 belongs to rewards of 1 and -1.
    """
    lengths = torch.tensor([[1, 16, 17, 18, 19, 20, 25]])
    expected = torch.tensor([[0, 0, -0.125, -0.25, -0.375, -0.5, -0.5]])
    assert torch.equal(common.overlong_penalty(lengths, 20, 4), expected)
    assert torch.equal(common.overlong_penalty(lengths, 20, 0), torch.zeros(1, 7))
    lengths = torch.tensor([[3, 20, 5, 7]])
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0]]) + common.overlong_penalty(lengths, 20, 4)
    assert rewards.tolist() == [[1.0, 0.5, 0.0, 0.0]]
    # mean 3/8, standard deviation √(0.6875 / 3) = 0.4787
    expected = torch.tensor([[1.3056, 0.2611, -0.7833, -0.7833]])
    torch.testing.assert_close(grpo.grpo_advantages(rewards), expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------ scoring


@pytest.mark.parametrize("token_budget", [1, 40, 10**6])
def test_scores_equal_those_of_full_logits(args, policy, token_budget, monkeypatch):
    monkeypatch.setattr(lm_head, "TILE_SIZE", 259 * 4)
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


@pytest.mark.parametrize("tile_size", [1, 20, 24, 40, 10**6])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (1.7, 0.0), (1.0, 2.0), (0.6, 1.5)])
def test_head_logp_equals_the_plain_version(scale, cap, tile_size, monkeypatch):
    """Tiles of 1, 5, 6 and 10 columns, or all; targets in the first and last of them."""
    monkeypatch.setattr(lm_head, "TILE_SIZE", tile_size)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=generator).requires_grad_()
    weight = torch.randn(21, 8, generator=generator).requires_grad_()
    targets = torch.tensor([0, 20, 4, 11])
    logits = scale * lm_head.head_logits(hidden, weight, cap)
    plain = logits.log_softmax(-1)
    target_logp, entropy = plain.gather(-1, targets[:, None])[:, 0], -(plain.exp() * plain).sum(-1)

    logp, tiled_entropy = HeadLogp.apply(hidden, weight, targets, scale, cap)
    torch.testing.assert_close(logp, target_logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiled_entropy, entropy, atol=1e-5, rtol=1e-5)
    assert not tiled_entropy.requires_grad
    factors = torch.tensor([1.0, -2.0, 0.5, 3.0])
    of_plain = torch.autograd.grad((factors * target_logp).sum(), (hidden, weight))
    of_tiled = torch.autograd.grad((factors * logp).sum(), (hidden, weight))
    torch.testing.assert_close(of_tiled, of_plain, atol=1e-5, rtol=1e-5)
    frozen, _ = HeadLogp.apply(hidden, weight.detach(), targets, scale, cap)  # as under LoRA
    (of_frozen,) = torch.autograd.grad((factors * frozen).sum(), hidden)
    torch.testing.assert_close(of_frozen, of_plain[0], atol=1e-5, rtol=1e-5)


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of `hidden_states` has gradients."""
    passes, hidden_states = [], common.hidden_states

    def counted(*call: Any) -> Tensor:
        passes.append(torch.is_grad_enabled())
        return hidden_states(*call)

    monkeypatch.setattr(common, "hidden_states", counted)
    return passes


@pytest.mark.parametrize("token_budget", [10**6, 70])
def test_whole_groups_are_scored_by_the_updates_forward_pass(
    args, policy, token_budget, monkeypatch
):
    """The reference has a pass of its own. Everything equals a separate scoring pass."""
    args.token_budget = token_budget
    reference = Reference(policy, args)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.1)
    rollouts, separate = random_rollouts(), random_rollouts()
    common.score_rollouts(policy, reference, separate, args)
    assert not common.needs_scoring_pass(policy, rollouts, args)
    passes = count_passes(monkeypatch)
    problems = torch.arange(3)
    seen = []
    for batch in common.scored_micro_batches(policy, reference, rollouts, problems, args):
        p = batch.problems
        seen += p.tolist()
        assert batch.logp.requires_grad and not batch.old_logp.requires_grad
        assert torch.equal(batch.logp, batch.old_logp)  # the ratio is exactly 1
        assert torch.equal(batch.mask, rollouts.mask[p])
        assert torch.equal(batch.trained, batch.mask)
        for name in ("old_logp", "entropy", "ref_logp"):
            expected = getattr(separate, name)[p]
            torch.testing.assert_close(getattr(batch, name), expected, atol=1e-5, rtol=1e-5)
    assert sorted(seen) == [0, 1, 2]
    batches = 1 if token_budget == 10**6 else 3
    assert passes == [False, True] * batches  # the reference, then the policy


@pytest.mark.parametrize(
    "settings", [{"token_budget": 35}, {"updates_per_rollout": 2}, {"lora_dropout": 0.1}], ids=str
)
def test_what_needs_a_scoring_pass(args, policy, settings):
    """A group takes 33 tokens or 36."""
    rollouts = random_rollouts()
    assert not common.needs_scoring_pass(policy, rollouts, args)
    for name, value in settings.items():
        setattr(args, name, value)
    assert common.needs_scoring_pass(policy, rollouts, args)


@pytest.mark.parametrize("token_budget", [1, 35, 70, 10**6])
def test_gradients_of_scored_micro_batches(args, policy, token_budget):
    """Parts of a group, one group, or several in a micro-batch: the gradient is the same."""
    args.token_budget = token_budget
    rollouts = random_rollouts()
    if common.needs_scoring_pass(policy, rollouts, args):
        common.score_rollouts(policy, None, rollouts, args)
    weights = random_like(rollouts.mask)
    policy.zero_grad()
    parts = 0
    trained = torch.zeros_like(rollouts.mask, dtype=torch.long)
    for batch in common.scored_micro_batches(policy, None, rollouts, torch.arange(3), args):
        p = batch.problems
        # Untrained rollouts of a split group have values, for statistics, but no gradient.
        assert (batch.logp[batch.mask] < 0).all()
        tokens = rollouts.mask[batch.index].sum()
        assert batch.hidden.shape == (tokens, 64) and batch.trained.sum() == tokens
        (batch.logp * weights[p]).sum().backward()
        trained[p] += batch.trained
        parts += 1
    assert torch.equal(trained, rollouts.mask.long())
    assert parts == {1: 9, 35: 5, 70: 3, 10**6: 1}[token_budget]
    ours = [weight.grad for weight in policy.parameters()]
    expected, _, _ = plain_scores(policy, rollouts, args.temperature)
    assert_same_gradients(ours, gradients(policy, (expected * weights).sum()))


def test_no_wrong_policy_is_updated(make_args, monkeypatch):
    """The engine has stale weights: the run stops after all micro-batches, before the update."""
    args = make_args(token_budget=60, steps=1)
    updates, backward = [], Tensor.backward
    monkeypatch.setattr(HFEngine, "sync", lambda *_: None)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: updates.append(1))
    monkeypatch.setattr(HFEngine, "generate", stale(HFEngine.generate))
    calls = []
    monkeypatch.setattr(Tensor, "backward", lambda *a, **k: (calls.append(1), backward(*a, **k)))
    with pytest.raises(StopRun, match="engine and trainer differ by"):
        grpo.main(args)
    assert len(calls) > 1 and not updates


def stale(generate: Callable) -> Callable:
    """Log-probabilities as of a policy that differs by 0.1 nats."""

    def generate_stale(*call: Any) -> list[Any]:
        return [(tokens, [x - 0.1 for x in logp]) for tokens, logp in generate(*call)]

    return generate_stale


def test_rows_of_similar_length_share_a_pass(monkeypatch):
    """Prompts of 20 and 30 tokens. Worked by hand: 9 of 10 computed tokens are not padding."""
    monkeypatch.setattr(forward, "MIN_TOKENS", 1)
    plan = forward.forward_passes([0, 0, 1, 1], [20, 30], [10, 12, 70, 5], True)
    # totals 30, 32, 100, 35: 30 + 32 + 35 = 97 of 3 x 35 is above 0.9; with 100 it would be 197/400
    # shared: 19 + 29 are padded to 2 x 29, and 3 x 12 = 94 tokens; one row each: 3 x 34 = 102
    assert plan == [forward.ForwardPass([0, 1, 3], False, 102), forward.ForwardPass([2], False, 99)]
    plan = forward.forward_passes([0, 0, 0, 0], [20], [10, 12, 11, 12], True)
    assert plan == [forward.ForwardPass([0, 1, 2, 3], True, 19 + 4 * 12)]
    plan = forward.forward_passes([0, 0, 0, 0], [20], [10, 12, 11, 12], False)
    assert plan == [forward.ForwardPass([0, 1, 2, 3], False, 4 * 31)]
    monkeypatch.setattr(forward, "MIN_TOKENS", 400)
    assert len(forward.forward_passes([0, 0, 1, 1], [20, 30], [10, 12, 70, 5], True)) == 1


def several_passes(*call: Any) -> Tensor:
    return forward.response_states(*call, can_share=True)


def test_hidden_states_come_in_the_order_of_the_mask(args, policy, monkeypatch):
    """With a shared prompt or a padded one: values and gradients, rows in any order."""
    rollouts = random_rollouts()
    pairs = [(2, 0), (0, 1), (1, 2), (0, 2), (2, 1), (1, 0)]
    index = tuple(torch.tensor(pairs).T)
    tokens, mask = rollouts.tokens[index], rollouts.mask[index]
    prompts = [problem.prompt for problem in rollouts.problems]
    _, _, plain = plain_scores(policy, rollouts, 1.0)
    plain = torch.cat([plain[pair] for pair in pairs])
    assert plain.shape == (12 + 9 + 2 + 1 + 1 + 7, 64)
    weights = random_like(plain)
    of_plain = gradients(policy.base_model, (plain * weights).sum())
    monkeypatch.setattr(forward, "MIN_TOKENS", 1)  # several passes
    for function in (forward.shared_states, forward.padded_states, several_passes):
        states = function(policy, prompts, index[0], tokens, mask)
        torch.testing.assert_close(states, plain, atol=1e-5, rtol=1e-5)
        assert_same_gradients(gradients(policy.base_model, (states * weights).sum()), of_plain)
    states = common.hidden_states(policy, rollouts, index, args)
    torch.testing.assert_close(states, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("case", "tile_size"), [("shared", 259), ("checkpointing", 2000), ("recurrent", 10**6)]
)
def test_a_prompt_is_computed_once_for_its_rollouts(args, policy, case, tile_size, monkeypatch):
    """Log-probabilities and gradients are those of a sequence at a time, shared or not."""
    monkeypatch.setattr(lm_head, "TILE_SIZE", tile_size)
    rollouts = random_rollouts([row * 2 for row in LENGTHS])
    args = dataclasses.replace(args, gradient_checkpointing=case == "checkpointing")
    monkeypatch.setattr(type(policy), "_is_stateful", case == "recurrent")
    computed = []
    policy.base_model.register_forward_pre_hook(
        lambda _, __, inputs: computed.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    weights, index = random_like(rollouts.mask), all_of(rollouts)
    logp, entropy = common.token_logp(policy, rollouts, index, args)
    assert not entropy.requires_grad
    longest = len(TEXTS[1]) - 1
    assert computed == ([(3, longest), (18, 12)] if case == "shared" else [(18, longest + 7)])
    ours = gradients(policy, (logp * weights[index]).sum())
    expected, _, _ = plain_scores(policy, rollouts, args.temperature)
    torch.testing.assert_close(logp, expected[index], atol=1e-5, rtol=1e-5)
    assert_same_gradients(ours, gradients(policy, (expected * weights).sum()))


def test_gradients_are_bit_identical_each_time(tiny_model, make_args):
    """With as many rollouts as a step has, threads could sum gradients in any order."""
    args = make_args(model=str(tiny_model))
    policy, generator = load_policy(args), torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 32, (16, 8), generator=generator).tolist()
    rollouts = random_rollouts(lengths, ["What is 12345 + 678?"] * 16)
    (index,) = common.micro_batches(rollouts, 10**6, torch.arange(16))
    of_each, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    for _ in range(6):
        logp, _ = common.token_logp(policy, rollouts, index, args)
        loss = (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum()
        of_each.append(gradients(policy, loss))
    torch.set_num_threads(threads)
    for again in of_each[1:]:
        assert all(a.equal(b) for a, b in zip(of_each[0], again, strict=True))


@pytest.mark.parametrize("token_budget", [1, 20, 25, 64, 10**6])
def test_micro_batches_hold_whole_groups_within_the_budget(token_budget):
    rollouts = random_rollouts()
    prompt_lengths = [len(problem.prompt) for problem in rollouts.problems]
    seen = []
    for p, g in common.micro_batches(rollouts, token_budget, torch.tensor([2, 0])):
        pairs = list(zip(p.tolist(), g.tolist(), strict=True))
        assert pairs == sorted(pairs)
        lengths = [LENGTHS[i][j] for i, j in pairs]
        passes = forward.forward_passes(p.tolist(), prompt_lengths, lengths, True)
        assert len(pairs) == 1 or sum(part.tokens for part in passes) <= token_budget
        seen.append(pairs)
    assert sorted(itertools.chain(*seen)) == [(i, j) for i in (0, 2) for j in range(3)]
    sizes = [len(pairs) for pairs in seen]
    two_parts = [2, 1, 2, 1]
    assert sizes == {1: [1] * 6, 20: two_parts, 25: two_parts, 64: [3, 3], 10**6: [6]}[token_budget]


# ------------------------------------------------------------------ statistics and loss weights


def test_standardize_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 99.0]], [[5.0, 5.0], [99.0, 5.0]]])
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [0, 1]]]).bool()
    expected = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(common.standardize(x, mask, 0.0), expected)
    one = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 0]]]).bool()
    assert not common.standardize(x, one, 0.0).any()
    assert not common.standardize(torch.full((1, 7, 3), 0.1), torch.ones(1, 7, 3).bool(), 0.0).any()


def test_token_values_come_from_trained_tokens_alone():
    """A step of two groups of two rollouts; the second group is trained in two parts."""
    mask = torch.tensor([[[1, 1], [1, 0]], [[1, 0], [1, 1]]]).bool()
    values = common.TokenValues(mask)
    first = SimpleNamespace(problems=torch.tensor([0]), trained=mask[:1])
    values.add(first, x=torch.tensor([[[1.0, 2.0], [3.0, 99.0]]]))
    for row, x in ((0, [[[4.0, 99.0], [99.0, 99.0]]]), (1, [[[99.0, 99.0], [5.0, 9.0]]])):
        trained = torch.zeros_like(mask[1:])
        trained[0, row] = mask[1, row]
        part = SimpleNamespace(problems=torch.tensor([1]), trained=trained)
        values.add(part, x=torch.tensor(x), y=torch.ones(1, 2, 1, dtype=torch.bool))
    assert values["x"].tolist() == [[[1, 2], [3, 0]], [[4, 0], [5, 9]]]
    assert values.means("x", "y") == {"x": 24 / 6, "y": 3 / 6}


def test_importance_weights_by_hand():
    engine_logp = torch.tensor([[-1.0, -1.0, math.nan, 0.0]])  # NaN: the engine did not sample it
    old_logp = torch.tensor([[-1.0 + math.log(1.5), -1.0 + math.log(5.0), -1.0, 0.0]])
    weights = common.importance_weights(old_logp, engine_logp, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.5, 2.0, 1.0, 1.0]]))
    assert torch.equal(common.importance_weights(old_logp, engine_logp, 0.0), torch.ones(1, 4))


@pytest.mark.parametrize(
    ("average", "of_share", "of_all"),
    [
        ("token", [1 / 8] * 4, [1 / 12] * 6),
        (
            "sequence",
            [1 / 4, 1 / 12, 1 / 12, 1 / 4],
            [1 / 6, 1 / 18, 1 / 12, 1 / 12, 1 / 18, 1 / 6],
        ),
        ("constant", [1 / 20] * 4, [1 / 30] * 6),
    ],
)
def test_token_weights_by_hand(average, of_share, of_all):
    """of_share, of_all: the weight of a token of each response of two problems, or of all three."""
    lengths = torch.tensor([[1, 3], [2, 2], [3, 1]])
    mask = torch.arange(3) < lengths[..., None]
    for share, weights in [([2, 0], of_share), ([1, 2, 0], of_all)]:
        expected = torch.zeros(3, 2)
        expected[sorted(share)] = torch.tensor(weights).view(-1, 2)
        result = common.token_weights(mask, torch.tensor(share), average, max_new_tokens=5)
        torch.testing.assert_close(result, expected[..., None] * mask)
        assert result.sum().item() == pytest.approx(
            {"token": 1, "sequence": 1, "constant": 2 / 5}[average]
        )


def test_shuffled_shares_split_all_numbers():
    shares = common.shuffled_shares(12, 3, seed=5)
    assert [len(share) for share in shares] == [4, 4, 4]
    order = torch.cat(shares).tolist()
    assert sorted(order) == list(range(12)) != order
    assert torch.cat(common.shuffled_shares(12, 1, seed=5)).tolist() == order
    assert torch.cat(common.shuffled_shares(12, 3, seed=6)).tolist() != order


def scored(gap: list[list[float]]) -> Rollouts:
    """Rollouts of one problem, with scores that differ from the engine's by that much."""
    engine_logp = [[-1.0] * len(row) for row in gap]
    tokens = [[5] * len(row) for row in gap]
    group = Group(Problem("", "", [1]), tokens, engine_logp, [r"\boxed{1}", "1"], [1.0, 0.0])
    rollouts = common.stack([group], [5], CPU)
    rollouts.old_logp = rollouts.engine_logp + torch.tensor([gap])
    return rollouts


def test_the_gap_between_engine_and_trainer_by_hand(make_args):
    rollouts = scored([[0.0, 3e-5], [-9e-5, 0.0]])
    rollouts.engine_logp[0, 0, 0] = math.nan  # the engine did not sample it
    gap = common.check_engine(rollouts, make_args())
    assert gap == pytest.approx({"logp_gap/mean": 4e-5, "logp_gap/max": 9e-5}, rel=2e-2)

    rollouts.old_logp[0, 1, 1] = math.nan
    with pytest.raises(StopRun, match="policy's log-probabilities are not finite"):
        common.check_engine(rollouts, make_args(max_logp_gap=9.0))
    rollouts.engine_logp[:] = math.nan
    rollouts.old_logp[:] = 0.0
    with pytest.raises(StopRun, match="differ by nan nats per token"):
        common.check_engine(rollouts, make_args(max_logp_gap=9.0))


@pytest.mark.parametrize(
    ("settings", "gap", "allowed"),
    [
        ({}, 0.5e-4, ""),
        ({}, 2e-4, "0.0001"),
        ({"precision": "bfloat16"}, 0.04, ""),  # what rounding alone gives a 135M model
        ({"precision": "bfloat16"}, 0.06, ""),
        ({"precision": "bfloat16"}, 0.3, "0.2"),
        ({"max_logp_gap": 0.1}, 0.06, ""),
        ({"max_logp_gap": 0.1, "precision": "bfloat16"}, 0.11, "0.1"),
    ],
)
def test_the_gap_is_bounded(settings, gap, allowed, make_args):
    rollouts = scored([[gap, -gap], [gap, gap]])
    if allowed:
        why = f"differ by {gap:.2g} nats per token .* {gap:.2g} at most, more than --max-logp-gap"
        with pytest.raises(StopRun, match=rf"{why} {allowed}$"):
            common.check_engine(rollouts, make_args(**settings))
    else:
        seen = common.check_engine(rollouts, make_args(**settings))
        assert seen == pytest.approx({"logp_gap/mean": gap, "logp_gap/max": gap}, rel=1e-2)


def test_rollout_metrics_by_hand():
    rollouts = scored([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    rollouts.mask[0, 0, 1:] = False
    rollouts.truncated[0, 1] = True
    rollouts.entropy = torch.tensor([[[1.0, 99.0, 99.0], [2.0, 4.0, 5.0]]])
    metrics = common.rollout_metrics(rollouts, torch.tensor([[1.0, 0.5]]))
    expected = {"reward": 0.75, "accuracy": 0.5, "zero_variance": 0.0, "length": 2.0}
    expected |= {"truncated": 0.5, "boxed": 0.5, "entropy": 3.0}
    assert {name: float(value) for name, value in metrics.items()} == expected
    equal = common.rollout_metrics(rollouts, torch.tensor([[0.5, 0.5]]))
    assert equal["zero_variance"] == 1.0


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, [1, 1, 1, 1]),
        ({"lr_schedule": "linear"}, [1, 3 / 4, 1 / 2, 1 / 4]),
        ({"lr_schedule": "cosine"}, [1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4]),
        ({"lr_schedule": "constant_with_warmup", "warmup_ratio": 0.75}, [0, 1 / 3, 2 / 3, 1]),
        ({"lr_schedule": "linear", "warmup_ratio": 0.3}, [0, 1 / 2, 1, 1 / 2]),  # of 1.2 updates: 2
    ],
    ids=str,
)
def test_learning_rate_by_hand(settings, factors):
    """Of each of four updates, in two steps."""
    args = grpo.Args(steps=2, updates_per_rollout=2, lr=2e-3, **settings)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    schedule = args.lr_schedule, optimizer, args.warmup_updates, args.updates
    scheduler, rates = common.get_scheduler(*schedule), []
    for _ in range(4):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2e-3 * factor for factor in factors], abs=1e-15)


# ------------------------------------------------------------------ evaluation


class HalfCorrect:
    """Two of four samples for the first problem, all for the second; greedy: the second."""

    def grade(self, responses: list[str], references: list[str]) -> list[bool]:
        return [True, True, False, False, True, True, True, True, False, True]


def test_evaluate_by_hand(make_args):
    args = make_args(eval_problems=2, eval_samples=4)
    problems = common.Problems(Problem("", "", [i] * i) for i in (1, 3, 9))
    result = common.evaluate(FakeEngine(), HalfCorrect(), problems, args)
    assert result["eval/accuracy"] == 0.75
    assert result["eval/greedy"] == 0.5
    assert result["eval/length"] == 3  # (2 + 4) / 2
    assert (result["eval/accuracy_low"], result["eval/accuracy_high"]) == (0.5, 1.0)
    assert (args.group_size, args.temperature) == (4, 1.0)


def test_evaluation_is_greedy_and_sampled_with_the_same_seeds_each_time(make_args):
    engine = FakeEngine()
    for step in range(2):
        args = make_args(eval_problems=2, eval_samples=4, temperature=0.9)
        problems = common.Problems(Problem("", "", [step + 1]) for _ in range(2))
        common.evaluate(engine, HalfCorrect(), problems, args)
    calls = engine.calls
    assert [(len(call[0]), call[3]) for call in calls] == [(8, 0.9), (2, 0.0)] * 2
    assert [call[1] for call in calls[:2]] == [call[1] for call in calls[2:]]
