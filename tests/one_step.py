"""Training steps of a script, recorded, and the plain computation to compare them with.

Every test of the methods that replaces a function of the shared modules does so through this file.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import worked_example as example
from conftest import read_lines, read_metrics
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import grpo

# ------------------------------------------------------------------------------- recording


@dataclass
class Update:
    """One optimiser update."""

    policy: nn.Module  # a copy of the policy before the update
    gradient: Tensor  # of all trainable weights, as one vector
    problems: list[int]  # the update's share of the problems


@dataclass
class Recording:
    """A finished run."""

    args: Any
    engine: Any = None
    groups: list[list[common.Group]] = field(default_factory=list)  # of each step
    rollouts: list[common.Rollouts] = field(default_factory=list)  # of each step
    updates: list[Update] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)  # of each step, from 0
    lines: list[dict[str, Any]] = field(default_factory=list)  # of rollouts.jsonl


def unchanged(_: Any) -> None:
    pass


def parity(_: Any, texts: list[str], references: list[str]) -> list[bool]:
    """Grade responses so that a random model is sometimes right."""
    return [len(text) % 2 == 0 for text in texts]


def all_wrong(_: Any, texts: list[str], references: list[str]) -> list[bool]:
    return [False] * len(texts)


def record_run(
    script: ModuleType,
    args: Any,
    grade: Callable = parity,
    edit_groups: Callable = unchanged,
    edit_rollouts: Callable = unchanged,
) -> Recording:
    """Run a script. The edits change a step's groups and its padded rollouts in place."""
    recording = Recording(args)
    policies: list[nn.Module] = []
    shares: list[list[int]] = []
    load_policy, make_engine = common.load_policy, common.make_engine
    stack, micro_batches = common.stack, common.scored_micro_batches

    def keep_policy(*call: Any) -> nn.Module:
        policies.append(load_policy(*call))
        return policies[-1]

    def keep_engine(*call: Any) -> Any:
        recording.engine = make_engine(*call)
        return recording.engine

    def keep_rollouts(groups: list[common.Group], *call: Any) -> common.Rollouts:
        edit_groups(groups)
        rollouts = stack(groups, *call)
        edit_rollouts(rollouts)
        recording.groups.append(groups)
        recording.rollouts.append(rollouts)
        return rollouts

    def keep_share(*call: Any) -> Iterator[common.MicroBatch]:
        problems = call[3]
        shares.append(problems.tolist())
        return micro_batches(*call)

    def keep_update(*_: Any) -> None:
        policy = policies[0]
        gradient = flat(policy, [weight.grad for weight in trainable(policy)])
        recording.updates.append(Update(copy.deepcopy(policy), gradient, shares[-1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Grader, "grade", grade)
        patch.setattr(common, "load_policy", keep_policy)
        patch.setattr(common, "make_engine", keep_engine)
        patch.setattr(common, "stack", keep_rollouts)
        patch.setattr(common, "scored_micro_batches", keep_share)
        hook = register_optimizer_step_pre_hook(keep_update)
        try:
            script.main(args)
        finally:
            hook.remove()
    folder = Path(args.run_dir)
    recording.metrics = read_metrics(folder)
    recording.lines = read_lines(folder / "rollouts.jsonl")
    return recording


# ------------------------------------------------------------------------------- plain computation


def trainable(policy: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in policy.parameters() if weight.requires_grad]


def flat(policy: nn.Module, gradients: list[Tensor | None]) -> Tensor:
    """The gradients of the trainable weights as one vector; None counts as zeros."""
    pairs = zip(trainable(policy), gradients, strict=True)
    return torch.cat([(0 * w if g is None else g).detach().flatten() for w, g in pairs])


def gradient_of(loss: Tensor, policy: nn.Module) -> Tensor:
    return flat(policy, torch.autograd.grad(loss, trainable(policy), allow_unused=True))


def assert_same_gradient(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert theirs.norm() > 1e-3, "any gradient is close to a gradient of zeros"
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def places(rollouts: common.Rollouts) -> list[tuple[int, int]]:
    """(problem, rollout) of every response."""
    return [(p, g) for p, texts in enumerate(rollouts.texts) for g in range(len(texts))]


def response(rollouts: common.Rollouts, p: int, g: int) -> Tensor:
    return rollouts.tokens[p, g][rollouts.mask[p, g]]


def plain_outputs(policy: nn.Module, rollouts: common.Rollouts, p: int, g: int) -> Any:
    """The model's outputs on one whole sequence, without padding or a shared prompt."""
    prompt = torch.tensor(rollouts.problems[p].prompt)
    sequence = torch.cat([prompt, response(rollouts, p, g)])[None]
    return policy.eval()(input_ids=sequence, output_hidden_states=True)


def predicting(rollouts: common.Rollouts, p: int) -> slice:
    """The positions that predict the response tokens of a problem's rollouts."""
    return slice(len(rollouts.problems[p].prompt) - 1, -1)


def plain_distribution(
    policy: nn.Module, rollouts: common.Rollouts, p: int, g: int, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of all tokens at each token of a response, from full logits. [T, V]"""
    logits = plain_outputs(policy, rollouts, p, g).logits[0, predicting(rollouts, p)]
    return (logits / temperature).log_softmax(-1)


def plain_logp(
    policy: nn.Module, rollouts: common.Rollouts, p: int, g: int, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of a response's tokens. [T]"""
    tokens = response(rollouts, p, g)
    distribution = plain_distribution(policy, rollouts, p, g, temperature)
    return distribution[torch.arange(len(tokens)), tokens]


def plain_advantages(recording: Recording, step: int = 1) -> Tensor:
    """GRPO's advantages of a step, [P, G], as `test_grpo.py` has them by hand."""
    correct = [group.correct for group in recording.groups[step - 1]]
    return grpo.grpo_advantages(torch.tensor(correct))


Place = tuple[int, int]


def plain_losses(
    recording: Recording,
    update: Update,
    advantages: Tensor | dict[Place, Tensor],
    reference: nn.Module | None = None,
) -> dict[Place, Tensor]:
    """Each token's clipped loss and KL penalty in an update of the first step, from full logits.

    advantages: of each response, [P, G], or of each of its tokens, [T] by (problem, rollout).
    reference: by default the policy before the first update.
    """
    args, rollouts = recording.args, recording.rollouts[0]
    first = recording.updates[0].policy
    losses = {}
    for place in places(rollouts):
        if place[0] not in update.problems:
            continue
        at = (rollouts, *place, args.temperature)
        new = plain_logp(update.policy, *at)
        old = plain_logp(first, *at).detach()
        ref = plain_logp(reference or first, *at).detach()
        advantage = advantages[place]

        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        kl = (ref - new).exp() - (ref - new) - 1
        losses[place] = args.kl * kl - surrogate
    return losses


# ------------------------------------------------------------------------------- other references


def moved_reference(policy: nn.Module, _: Any) -> Callable:
    """Takes the place of Reference: from the first step on it differs from the policy."""
    other = copy.deepcopy(policy)
    move(other)

    @contextlib.contextmanager
    def reference() -> Iterator[nn.Module]:
        yield other

    return reference


def move(model: nn.Module) -> None:
    model.requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(1.1)


# ------------------------------------------------------------------------------- given rollouts


def record_example(script: ModuleType, args: Any) -> Recording:
    """Run one step on the worked example of docs/: its entropies, log-probabilities and rewards
    take the place of the model's and the grader's."""
    logp, ref_logp = example.logp.float(), example.ref_logp.float()
    size = len(example.ENTROPY)

    def stack(groups: list[common.Group], *_: Any) -> common.Rollouts:
        return common.Rollouts(
            problems=[group.problem for group in groups],
            tokens=torch.full(example.mask.shape, 65),
            mask=example.mask,
            engine_logp=logp,
            correct=torch.tensor([groups[0].correct]),
            truncated=torch.zeros(1, size, dtype=torch.bool),
            texts=[[""] * size],
        )

    def score(_: Any, __: Any, rollouts: common.Rollouts, ___: Any) -> None:
        rollouts.old_logp, rollouts.ref_logp = logp, ref_logp
        rollouts.entropy = example.entropy.float()

    def verify(_: Any, groups: list[common.Group]) -> None:
        for group in groups:
            group.correct = example.rewards[0, : len(group.texts)].tolist()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "stack", stack)
        patch.setattr(common, "needs_scoring_pass", lambda *_: True)
        patch.setattr(common, "score_rollouts", score)
        patch.setattr(common, "verify", verify)
        return record_run(script, args)
