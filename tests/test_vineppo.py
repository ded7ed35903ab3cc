"""VinePPO's values and advantages: docs/vineppo.md, by hand, step by step, and as a run."""

import copy
import math
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_step import assert_same_gradient, gradient_of, move, moved_reference, plain_logp
from torch import Tensor
from worked_example import mask, pad, rewards

import common
import vineppo
from common import Group, Problem
from infra.hf_engine import HFEngine
from infra.models import load_policy, load_tokenizer
from vineppo import (
    Args,
    estimate_values,
    kl_penalty,
    step_ends,
    token_texts,
    vineppo_advantages,
)

STEP_END = Args.step_end

# Rollouts of 3, 2, 3 and 1 tokens, whose steps are as long as the rows say. Of nine continuations
# of the prompt four were right; of the first rollout's first step eight, and so on.
STEPS = pad([[0, 1, 1], [0, 0], [0, 1, 2], [0]]).long()
VALUES = pad([[4, 8], [4], [4, 6, 1], [4]]) / 9
ADVANTAGES = pad([[4, 1, 1], [5, 5], [2, -5, -1], [-4]]) / 9


def test_worked_example():
    advantages = vineppo_advantages(VALUES, STEPS, rewards, mask, whiten=False)
    torch.testing.assert_close(advantages, ADVANTAGES)


def test_worked_example_whitened():
    # In ninths: mean 8/9, sum of squares 114; the variance (114 - 64/9) / 8 is 3.6553 squared.
    expected = [[0.8511, 0.0304, 0.0304], [1.1247, 1.1247], [0.3040, -1.6111, -0.5168], [-1.3375]]
    advantages = vineppo_advantages(VALUES, STEPS, rewards, mask)
    torch.testing.assert_close(advantages, pad(expected), atol=5e-5, rtol=0)


def random_steps(seed: int) -> tuple[list[list[list[float]]], list[list[list[int]]], Tensor]:
    """Values before each step, the lengths of the steps and rewards of 3 groups of 4 rollouts."""
    rng = random.Random(seed)
    counts = [[rng.randint(1, 5) for _ in range(4)] for _ in range(3)]
    lengths = [[[rng.randint(1, 3) for _ in range(n)] for n in row] for row in counts]
    values = [[[rng.randint(0, 9) / 9 for _ in range(n)] for n in row] for row in counts]
    return values, lengths, torch.tensor([[rng.random() for _ in row] for row in counts])


def tensors(values: list, lengths: list) -> tuple[Tensor, Tensor, Tensor]:
    """values [P, G, S]; steps and mask [P, G, T]. What pads is not zero."""
    most = max(len(row) for group in values for row in group)
    longest = max(sum(row) for group in lengths for row in group)
    steps = [
        [[s for s, n in enumerate(row) for _ in range(n)] for row in group] for group in lengths
    ]
    inside = [[[t < len(row) for t in range(longest)] for row in group] for group in steps]
    filled = [[row + [7.0] * (most - len(row)) for row in group] for group in values]
    steps = [[row + [0] * (longest - len(row)) for row in group] for group in steps]
    return torch.tensor(filled), torch.tensor(steps), torch.tensor(inside)


@pytest.mark.parametrize("seed", range(20))
def test_advantages_equal_a_slow_loop(seed):
    values, lengths, outcome = random_steps(seed)
    padded, steps, inside = tensors(values, lengths)
    steps = torch.where(inside, steps, 99)  # what lies outside the mask is ignored
    advantages = vineppo_advantages(padded, steps, outcome, inside, whiten=False)
    for p, group in enumerate(values):
        for g, row in enumerate(group):
            expected = []
            for s, length in enumerate(lengths[p][g]):
                after = row[s + 1] if s + 1 < len(row) else outcome[p, g].item()
                expected += [after - row[s]] * length
            assert advantages[p, g][inside[p, g]].tolist() == pytest.approx(expected, abs=1e-6)
            assert not advantages[p, g][~inside[p, g]].any()


def test_nothing_learnt_where_nothing_changes():
    values = torch.full((2, 3, 4), 0.5)
    steps = torch.arange(4).expand(2, 3, 4)
    inside = torch.ones(2, 3, 4, dtype=torch.bool)
    for whiten in (True, False):
        none = vineppo_advantages(values, steps, torch.full((2, 3), 0.5), inside, whiten=whiten)
        assert torch.equal(none, torch.zeros(2, 3, 4))


# ------------------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Well, 5*3=15; |17+15=32; |\\boxed{32}", "by byte"),
        ("Pi is |3.14| here.| So| it is.", ["Pi is 3.14 here. So", " it is."]),
        ("One.\n|\n|Two.\n|", ["One.\n", "\n", "Two.\n"]),
        ("One.|\n\n|Two", ["One.\n\n", "Two"]),
        ("One|.\n\n|Two", ["One.\n\n", "Two"]),
        ("a =| 1\n|b =| 2", ["a = 1\n", "b = 2"]),
        ("no| end", ["no end"]),
        ("Done.| |", ["Done. "]),
        ("The answer| is 4|.\n\n", ["The answer is 4.\n\n"]),
        ("a|\n\n|b|\n\n", ["a\n\n", "b\n\n"]),
        ("|", [""]),
    ],
)
def test_where_steps_end(text, steps):
    if steps == "by byte":
        steps, pieces = text.split("|"), [*text.replace("|", "")]
    else:
        pieces = text.split("|")
    ends = step_ends([*pieces, ""], STEP_END)  # an end-of-sequence token has no text
    starts = [0, *ends]
    assert ["".join(pieces[a:b]) for a, b in zip(starts, ends, strict=False)] == steps
    assert ends[-1] == len(pieces) + 1  # and is in the last step


@pytest.mark.parametrize(("step_end", "gradient"), [(STEP_END, 0.0), (r"[.](?=\s)", -0.075)])
def test_a_step_that_the_next_token_ends_biases_the_gradient(step_end, gradient):
    """The first token is "." (probability 1/2), after which the answer is right with probability
    0.6, or another one, after which it never is. The second token, " So" or "5" with probability
    1/2 each, does not matter, so its true gradient is 0. Under the lookahead " So" ends the first
    step and "5" does not; the default decides a step's end by the tokens up to it.
    """
    value_of_prompt, value_after = 0.5 * 0.6, 0.6
    expected = 0.0  # of d log p(token) / d logit(" So") x advantage, after "."
    for token, slope in ((" So", 0.5), ("5", -0.5)):
        ends = step_ends([".", token, " x", ""], step_end)
        values = [value_of_prompt] + [value_after] * (len(ends) - 1)
        step_of_token = sum(end <= 1 for end in ends)
        for reward, probability in ((1.0, 0.6), (0.0, 0.4)):
            gains = [after - before for before, after in pairwise([*values, reward])]
            expected += 0.5 * slope * probability * gains[step_of_token]
    assert expected == pytest.approx(gradient, abs=1e-9)


def test_another_step_end():
    assert step_ends(["a", "b", "a", "b"], "a") == [1, 3, 4]
    assert step_ends(["a", "b"], "x") == [2]
    assert step_ends(["a", "b"], "|b") == [1, 2]  # matches nothing, too, at the start
    assert step_ends(["", ""], "|x") == [2]


def test_a_token_reads_as_it_does_within_a_text():
    """Decoded alone, tokens of SentencePiece lose the space they begin with."""
    words = {0: "1", 5: "▁so", 6: ".", 7: "▁"}
    engine = SimpleNamespace(
        tokenizer=SimpleNamespace(encode=lambda *_, **__: [0]),
        decode=lambda rows: ["".join(words[t] for t in r).replace("▁", " ").lstrip() for r in rows],
    )
    assert engine.decode([[5]]) == ["so"]
    assert token_texts(engine, {5, 6, 7}) == {5: " so", 6: ".", 7: " "}


# ------------------------------------------------------------------------------- values

TEXTS = {1: "a; ", 2: "b; ", 3: "c ", 4: "", 8: "right", 9: "wrong"}
END = 4


class FakeEngine:
    """Goes on from a prefix with `right` or `wrong`, by the request's seed."""

    tokenizer = SimpleNamespace(encode=lambda *_, **__: [3])

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], int, int]] = []

    def generate(self, prompts: Any, seeds: Any, lengths: Any, temperature: float) -> Any:
        assert temperature == 0.7
        self.asked += zip(prompts, seeds, lengths, strict=True)
        return [([8 if seed % 3 else 9, END], [0.0, 0.0]) for seed in seeds]

    def decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(TEXTS[token] for token in row) for row in rows]


class FakeGrader:
    def grade(self, texts: list[str], references: list[str]) -> list[bool]:
        assert set(references) <= {"reference 0", "reference 1", "no"}
        pairs = zip(texts, references, strict=True)
        return [text.endswith("right") and reference != "no" for text, reference in pairs]


Estimates = tuple[Tensor, Tensor, int]


def estimated(**settings: Any) -> tuple[Estimates, FakeEngine]:
    """Two groups: of the first, two rollouts begin alike; no text is shared by both groups."""
    args = Args(continuations=5, max_new_tokens=6, temperature=0.7, **settings)
    rows = [[[1, 2, 8, END], [1, 2, 3, 9, END], [2, 9, END]], [[1, 8, END], [1, 8, END], [9, END]]]
    first = Problem("", "reference 0", [70])
    second = Problem("", "no", [71], ("no", "reference 1"))  # any of three reference answers
    groups = [Group(first, rows[0], [], []), Group(second, rows[1], [], [])]
    engine = FakeEngine()
    return estimate_values(engine, FakeGrader(), groups, args, (1, 2, 0)), engine


def test_a_prefix_is_continued_once_for_all_rollouts_that_begin_with_it():
    (steps, _, sampled), engine = estimated()
    prefixes = [tuple(prompt) for prompt, _, _ in engine.asked]
    expected = [(70,), (70, 1), (70, 1, 2), (70, 2), (71,), (71, 1)]
    assert prefixes == [prefix for prefix in expected for _ in range(5)]
    assert len({seed for _, seed, _ in engine.asked}) == len(engine.asked)
    assert all(length == 6 - (len(prompt) - 1) for prompt, _, length in engine.asked)
    first = pad([[0, 1, 2, 2], [0, 1, 2, 2, 2], [0, 1, 1]])
    second = pad([[0, 1, 1, 0, 0], [0, 1, 1], [0, 0]])
    assert torch.equal(steps, torch.cat([first, second]).long())
    assert sampled == 2 * len(engine.asked)


def test_a_value_is_the_mean_reward_of_its_continuations():
    (_, values, _), engine = estimated()
    wins: dict[tuple[int, ...], list[bool]] = {}
    for prompt, seed, _ in engine.asked:
        wins.setdefault(tuple(prompt), []).append(seed % 3 != 0)
    share = {prefix: sum(won) / 5 for prefix, won in wins.items()}
    assert len(set(share.values())) > 2
    expected = [
        [[(70,), (70, 1), (70, 1, 2)], [(70,), (70, 1), (70, 1, 2)], [(70,), (70, 2)]],
        [[(71,), (71, 1)], [(71,), (71, 1)], [(71,)]],
    ]
    for p, of_group in enumerate(expected):
        for g, prefixes in enumerate(of_group):
            found = values[p, g, : len(prefixes)].tolist()
            assert found == pytest.approx([share[prefix] for prefix in prefixes])


def test_values_hold_the_overlong_penalty():
    """Rollouts of 2 to 4 tokens; from 2 on the reward falls, by 1/8 a token."""
    (_, plain, _), _ = estimated()
    (_, penalised, _), _ = estimated(overlong_buffer=4)
    # The prefix before step n has n tokens, and each continuation two.
    expected = plain[0, :2, :3] - torch.arange(3) / 8
    torch.testing.assert_close(penalised[0, :2, :3], expected)


# ------------------------------------------------------------------------------- a run


def test_a_run_takes_the_policy_gradient_of_its_advantages(record, monkeypatch):
    estimates = []

    def keep(*call: Any) -> Estimates:
        estimates.append(estimate_values(*call))
        return estimates[-1]

    monkeypatch.setattr(vineppo, "estimate_values", keep)
    settings = {"continuations": 2, "step_end": "[a-z]", "kl": 0.0, "log_rollouts": 4}
    recording = record(vineppo, **settings)
    rollouts, update = recording.rollouts[0], recording.updates[0]
    [(steps, values, sampled)] = estimates
    counts = (steps.amax(-1) + 1).flatten().tolist()  # of steps
    assert len(set(counts)) > 1

    advantages, befores = [], []
    for p, group in enumerate(recording.groups[0]):
        for g, reward in enumerate(group.correct):
            of_tokens = steps[p, g, : len(group.tokens[g])].tolist()
            before = values[p, g, : of_tokens[-1] + 1].tolist()
            gains = [after - value for value, after in pairwise([*before, reward])]
            advantages.append(torch.tensor([gains[step] for step in of_tokens]))
            befores.append([before[step] for step in of_tokens])
    flat = torch.cat(advantages)
    loss = 0.0
    for number, row in enumerate(advantages):
        z_scores = (row - flat.mean()) / flat.std()
        logged = recording.lines[number]["advantage"]
        assert logged == pytest.approx(z_scores.tolist(), abs=1e-4)
        assert recording.lines[number]["value"] == pytest.approx(befores[number])
        logp = plain_logp(update.policy, rollouts, *divmod(number, 4))
        loss = loss - (z_scores * logp).sum() / len(flat)
    assert_same_gradient(update.gradient, gradient_of(loss, update.policy), 1e-3)
    metrics = recording.metrics[1]
    assert metrics["value/tokens"] == sampled
    assert metrics["value/prompt"] == pytest.approx(values[..., 0].mean().item())
    assert metrics["value/steps"] == pytest.approx(sum(counts) / 16)


def test_kl_penalty_by_hand():
    """k3 at twice the probability is 2 - log 2 - 1 = 0.3069, and at e^3 times it 16.09, above 10.

    Over the worked lengths 3, 2, 3 and 1 the mean response has 9 / 4 = 2.25 times a token's.
    """
    penalty = kl_penalty(torch.zeros(mask.shape), mask * math.log(2), mask)
    torch.testing.assert_close(penalty, torch.tensor([[3, 2, 3, 1]]) * 0.3069, atol=2e-4, rtol=0)
    assert penalty.mean().item() == pytest.approx(2.25 * (1 - math.log(2)))
    assert kl_penalty(torch.zeros(1, 2), torch.tensor([[3.0, 3.0]]), torch.ones(1, 2)) == 20
    half = kl_penalty(torch.zeros(mask.shape), mask * math.log(2), 0.5 * mask)  # importance
    torch.testing.assert_close(half, penalty / 2)


def test_a_run_adds_the_kl_penalty(record, monkeypatch):
    monkeypatch.setattr(common, "Reference", moved_reference)
    settings = {"continuations": 2, "step_end": "[a-z]", "log_rollouts": 4}
    recording = record(vineppo, kl=0.3, **settings)
    rollouts, update = recording.rollouts[0], recording.updates[0]
    other = copy.deepcopy(update.policy)
    move(other)
    loss, number = 0.0, len(recording.lines)
    advantages = [torch.tensor(line["advantage"]) for line in recording.lines]
    tokens = sum(map(len, advantages))
    for i, row in enumerate(advantages):
        logp = plain_logp(update.policy, rollouts, *divmod(i, 4))
        log_ratio = plain_logp(other, rollouts, *divmod(i, 4)).detach() - logp
        penalty = log_ratio.exp() - log_ratio - 1
        loss = loss - (row * logp).sum() / tokens
        loss = loss + 0.3 * penalty.clamp(max=10).sum() / number
    assert_same_gradient(update.gradient, gradient_of(loss, update.policy), 1e-3)
    of_surrogate = record(vineppo, kl=0.0, **settings).updates[0].gradient
    assert (update.gradient - of_surrogate).norm() > 0.1 * of_surrogate.norm()


def test_values_do_not_depend_on_the_batch(short_args):
    """A continuation depends only on the weights, the step, the problem and its prefix."""
    args = short_args(vineppo, continuations=3, step_end="[a-z]")
    policy, tokenizer, grader = load_policy(args), load_tokenizer(args), common.Grader()
    engine = HFEngine(args, policy, tokenizer, 64)
    problems = common.load_problems(args, "--dataset", tokenizer, grader)[:2]
    both, one = (common.roll_out(engine, problems[:n], args, (1, 1, 0)) for n in (2, 1))
    drawn, generate = [], engine.generate
    engine.generate = lambda *call: drawn.append(generate(*call)) or drawn[-1]
    steps_of_both, *_ = estimate_values(engine, grader, both, args, (1, 1, 0))
    steps_of_one, *_ = estimate_values(engine, grader, one, args, (1, 1, 0))
    grader.close()
    of_both, of_one = ([tokens for tokens, _ in responses] for responses in drawn)
    assert of_one == of_both[: len(of_one)]
    longest = steps_of_one.shape[-1]
    assert torch.equal(steps_of_both[:1, :, :longest], steps_of_one)
