"""HölderPO, ARCA and REFT as runs: the update that they share with GRPO, and what they add."""

import gc
import shutil
from typing import Any

import pytest
import torch
from conftest import needs_vllm
from one_step import (
    Place,
    assert_same_gradient,
    gradient_of,
    places,
    plain_advantages,
    plain_distribution,
    plain_logp,
    plain_outputs,
    predicting,
    response,
)
from test_common import random_rollouts
from torch import Tensor, nn
from transformers import AutoTokenizer

import arca
import common
import grpo
import holderpo
import reft
from infra.hf_engine import HFEngine
from infra.models import Reference, base_model, load_policy, load_tokenizer


def mean(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).mean()


# ------------------------------------------------------------------------------- HölderPO


def test_holder_on_policy_is_grpo_averaged_per_sequence(record):
    plain = record(grpo, loss_average="sequence")
    for p in (0.0, 2.0, -2.0):
        for clip_level in ("sequence", "token"):
            settings = {"p_start": p, "clip_level": clip_level, "updates_per_rollout": 1}
            holder = record(holderpo, schedule="constant", **settings)
            assert len(plain.updates) == len(holder.updates) == 1
            assert_same_gradient(holder.updates[0].gradient, plain.updates[0].gradient, 1e-6)
            assert holder.metrics[1]["rho/max"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("p", "clip_level"), [(2.0, "sequence"), (-1.0, "token")])
def test_holder_update_off_policy_is_the_plain_one(p, clip_level, record):
    """The second update of a step, from the definition: power means of each response's ratios."""
    settings = {"p_start": p, "schedule": "constant", "clip_level": clip_level, "lr": 0.003}
    recording = record(holderpo, updates_per_rollout=2, token_budget=100, **settings)
    rollouts, advantages = recording.rollouts[0], plain_advantages(recording)
    first, second = recording.updates
    losses = []
    for i in second.problems:
        for g in range(4):
            old = plain_logp(first.policy, rollouts, i, g).detach()
            ratio = (plain_logp(second.policy, rollouts, i, g) - old).exp()
            advantage = advantages[i, g]
            if clip_level == "token":
                bounded = ratio.clamp(0.8, 1.2)
                smaller = torch.min if advantage > 0 else torch.max
                ratio = smaller(ratio, bounded)
            rho = (ratio**p).mean() ** (1 / p)
            bounded = rho.clamp(0.8, 1.2) if clip_level == "sequence" else rho
            losses.append(-torch.min(rho * advantage, bounded * advantage))
    plain = gradient_of(mean(losses), second.policy)
    assert_same_gradient(second.gradient, plain, 1e-4)
    assert recording.metrics[1]["rho/std"] > 1e-3


def test_holder_anneals_p_and_logs_its_ratios(record):
    recording = record(holderpo, steps=4, lr=0.01, max_grad_norm=1.0, seed=3)
    rows = recording.metrics[1:]
    assert [row["p"] for row in rows] == [1, 0, -1, -2]
    assert len(recording.updates) == 16  # four updates per step
    for row in rows:
        assert row["rho/min"] < 1 < row["rho/max"]
        assert row["rho/std"] > 0
        assert 0 < row["weight_entropy"] <= torch.tensor(row["length"]).log() + 1e-6
    assert max(row["clip_fraction"] for row in rows) > 0


def test_holder_importance_weighs_responses(record):
    """For the engine, every other token is half as likely: its responses count more."""

    def other_engine(rollouts: common.Rollouts) -> None:
        rollouts.engine_logp[..., ::2] -= torch.tensor(2.0).log()

    settings = {"importance_cap": 10.0, "max_logp_gap": 1.0, "updates_per_rollout": 1}
    recording = record(holderpo, edit_rollouts=other_engine, **settings)
    rollouts, advantages = recording.rollouts[0], plain_advantages(recording)
    update, losses = recording.updates[0], []
    for place in places(rollouts):
        logp = plain_logp(update.policy, rollouts, *place)
        weight = torch.tensor([2.0, 1.0]).repeat(6)[: len(logp)].mean()
        losses.append(-advantages[place] * weight * logp.mean())
    assert_same_gradient(update.gradient, gradient_of(mean(losses), update.policy), 1e-4)


# ------------------------------------------------------------------------------- ARCA


def test_arca_begins_with_uniform_credit(record):
    arca_run = record(arca, credit="arca", lora_rank=4, log_rollouts=4)
    uniform = record(arca, credit="uniform", lora_rank=4)
    plain = record(grpo, loss_average="sequence", lora_rank=4)
    for line in arca_run.lines:
        assert set(line["credit"]) == {(1 / torch.tensor([len(line["tokens"])]).float()).item()}
    assert arca_run.metrics[1]["gini"] == pytest.approx(0, abs=1e-6)
    assert arca_run.metrics[1]["effective_fraction"] == pytest.approx(1)
    ours = arca_run.updates[0].gradient
    assert torch.equal(ours, uniform.updates[0].gradient)
    assert_same_gradient(ours, plain.updates[0].gradient, 1e-6)


@torch.no_grad()
def plain_score(
    credit: str, policy: nn.Module, base: nn.Module, rollouts: common.Rollouts, place: Place
) -> Tensor:
    """The signal of each token of a response, [T], from whole sequences."""
    if credit == "surprisal":
        return -plain_logp(policy, rollouts, *place)
    if credit == "divergence":
        return (plain_logp(policy, rollouts, *place) - plain_logp(base, rollouts, *place)).abs()
    if credit == "entropy":
        logp = plain_distribution(policy, rollouts, *place)
        entropy = -(logp.exp() * logp).sum(-1)
        return torch.cat([(entropy[:-1] - entropy[1:]).clamp(min=0), torch.zeros(1)])
    if credit == "arca":
        predicts = predicting(rollouts, place[0])
        adapted, bare = (plain_outputs(model, rollouts, *place) for model in (policy, base))
        return (adapted.hidden_states[-1] - bare.hidden_states[-1])[0, predicts].norm(dim=-1)
    return torch.zeros(len(response(rollouts, *place)))


@pytest.mark.parametrize("credit", ["uniform", "surprisal", "entropy", "divergence", "arca"])
def test_arca_gradient_is_the_plain_one(credit, record, short_args):
    """In the second step, from the definition; the base model is loaded without an adapter."""
    settings = {"steps": 2, "lr": 0.02, "lora_rank": 4, "token_budget": 100}
    recording = record(arca, credit=credit, **settings)
    metrics, rollouts, update = (
        recording.metrics[2],
        recording.rollouts[1],
        recording.updates[1],
    )
    assert {"gini", "effective_fraction"} <= metrics.keys()
    assert (metrics["gini"] > 0.01) is (credit != "uniform")

    base, advantages, losses = load_policy(short_args(grpo)), plain_advantages(recording, 2), []
    for place in places(rollouts):
        logp = plain_logp(update.policy, rollouts, *place)
        score = plain_score(credit, update.policy, base, rollouts, place).double()
        power = (score + 1e-8) ** 2
        weights = power / power.sum() if power.sum() > 1e-8 else 1 / len(logp)
        losses.append(-advantages[place] * (weights * logp).sum())
    assert_same_gradient(update.gradient, gradient_of(mean(losses), update.policy), 1e-3)


def moved_policy(args: Any) -> nn.Module:
    """A policy whose adapter is no longer zero."""
    policy = load_policy(args)
    torch.manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return policy


def test_arca_base_states_are_the_models_own(short_args):
    rollouts = random_rollouts()
    args = short_args(arca, lora_rank=4, lora_dropout=0.5)
    policy = moved_policy(args)
    bare = load_policy(short_args(grpo))  # never had an adapter
    reference = Reference(policy, args)
    everything = torch.arange(3)
    for index in common.micro_batches(rollouts, 40, everything):
        with torch.no_grad():
            adapted = common.hidden_states(policy, rollouts, index, args)
            with reference() as frozen:
                base = common.hidden_states(frozen, rollouts, index, args)
            assert torch.equal(base, common.hidden_states(bare, rollouts, index, args))
            assert (adapted - base).norm(dim=-1).min() > 1e-3
            # The adapter is on again, and dropout is off: the states repeat.
            assert torch.equal(adapted, common.hidden_states(policy, rollouts, index, args))
        moved = arca.residuals(policy, reference, rollouts, index, args)
        torch.testing.assert_close(moved, (adapted - base).norm(dim=-1))
        assert torch.equal(moved, arca.residuals(policy, reference, rollouts, index, args, adapted))


def tensor_bytes() -> int:
    """Memory of all tensors in use, each storage once."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
    return sum(storages.values())


def test_arca_holds_one_copy_of_the_weights(short_args):
    rollouts = random_rollouts()
    args = short_args(arca, lora_rank=2)
    policy = moved_policy(args)
    weights = sum(w.nbytes for w in base_model(policy).state_dict().values())
    before = tensor_bytes()
    assert before > weights / 2  # the count includes them
    reference = Reference(policy, args)
    with reference() as frozen:
        assert frozen is policy
        during = tensor_bytes()
    (index,) = common.micro_batches(rollouts, 10**6, torch.arange(3))
    alpha = arca.residuals(policy, reference, rollouts, index, args)
    assert during - before < weights / 50
    assert tensor_bytes() - before - alpha.nbytes < weights / 50


# ------------------------------------------------------------------------------- REFT


def first_tokens(group: common.Group) -> list[int]:
    return [tokens[0] for tokens in group.tokens]


def first_logp(policy: nn.Module, prompt: list[int]) -> Tensor:
    """Log-probabilities of the first token after a prompt. [V]"""
    with torch.no_grad():
        logits = policy(torch.tensor([prompt])).logits[0, -1]
    return logits.log_softmax(-1)


def test_reft_opener_is_the_first_token_scored_stored_and_verified(record, monkeypatch):
    graded, verify = [], common.verify

    def keep_texts(grader: Any, groups: list[common.Group]) -> None:
        verify(grader, groups)
        graded.append((groups, [group.texts for group in groups]))

    monkeypatch.setattr(common, "verify", keep_texts)
    recording = record(reft, candidates=6, openers=2, log_rollouts=4)
    groups, rollouts = recording.groups[0], recording.rollouts[0]
    texts = next(texts for of_call, texts in graded if of_call[0] is groups[0])
    policy, tokenizer = load_policy(recording.args), load_tokenizer(recording.args)
    special = set(tokenizer.all_special_ids)
    for p, group in enumerate(groups):
        first = first_tokens(group)
        assert first[0] == first[1] != first[2] == first[3]
        logp = first_logp(policy, group.problem.prompt)
        allowed = [i for i in logp.argsort(descending=True).tolist() if i not in special]
        for g, token in enumerate(first):
            assert allowed.index(token) + 1 == group.notes[g] <= 6
            # Stored: padded tokens, mask, text. The engine did not sample it.
            assert rollouts.tokens[p, g, 0] == token and rollouts.mask[p, g, 0]
            assert rollouts.engine_logp[p, g, 0].isnan()
            assert rollouts.engine_logp[p, g][rollouts.mask[p, g]][1:].isfinite().all()
            assert group.texts[g] == tokenizer.decode(group.tokens[g], skip_special_tokens=True)
            # Verified: the text with the opener.
            assert texts[p][g] == group.texts[g]
            # Scored: with the policy's own probability.
            line = recording.lines[4 * p + g]
            assert line["tokens"] == group.tokens[g]
            assert line["logp"][0] == pytest.approx(logp[token].item(), abs=1e-5)
            plain = plain_logp(policy, rollouts, p, g).detach()
            torch.testing.assert_close(torch.tensor(line["logp"]), plain, atol=1e-5, rtol=0)
        assert max(map(len, group.tokens)) <= recording.args.max_new_tokens


def test_reft_draws_anew_each_step(record):
    recording = record(reft, steps=3, lr=1e-9, prompts_per_step=12)  # every problem in each step
    drawn = [
        {group.problem.text: tuple(first_tokens(group)) for group in groups}
        for groups in recording.groups
    ]
    assert drawn[0].keys() == drawn[1].keys()
    assert drawn[0] != drawn[1] != drawn[2]


def test_reft_evaluates_without_openers(record, monkeypatch):
    calls, roll_out = {}, common.roll_out

    def spy(engine: Any, problems: Any, args: Any, seed: tuple, **more: Any) -> Any:
        calls[seed[1]] = more.get("first_tokens")
        return roll_out(engine, problems, args, seed, **more)

    monkeypatch.setattr(common, "roll_out", spy)
    record(reft)
    assert calls[1] is not None
    assert calls["evaluation"] is calls["greedy"] is None


@pytest.mark.parametrize("loss_average", ["token", "sequence"])
def test_reft_mask_opener_takes_it_out_of_the_loss(loss_average, record):
    settings = {"candidates": 6, "openers": 2, "loss_average": loss_average}
    plain, masked = (record(reft, mask_opener=mask, **settings) for mask in (False, True))
    rollouts, advantages = plain.rollouts[0], plain_advantages(plain)
    assert torch.equal(rollouts.tokens, masked.rollouts[0].tokens)
    policy, loss = plain.updates[0].policy, 0.0
    for place in places(rollouts):
        length = rollouts.mask[place].sum()
        weight = rollouts.mask.sum() if loss_average == "token" else 16 * length
        loss = loss - advantages[place] * plain_logp(policy, rollouts, *place)[0] / weight
    difference = plain.updates[0].gradient - masked.updates[0].gradient
    assert_same_gradient(difference, gradient_of(loss, policy), 1e-4)


def test_reft_on_dapo(record):
    recording = record(reft, dynamic_sampling=True, clip_high=0.28, generation_rounds=3)
    assert "eval/greedy" in recording.metrics[0]
    for group in recording.rollouts[0].tokens[..., 0]:
        assert len(group.unique()) == recording.args.openers


def test_reft_openers_follow_a_reasoning_marker(record, tied_model, tmp_path, monkeypatch):
    """If the chat template opens a reasoning section, the marker is the end of the prompt."""
    folder = shutil.copytree(tied_model, tmp_path / "reasoner")
    template = (folder / "chat_template.jinja").read_text()
    reasoning = template.replace("assistant\n", "assistant\n<think>\n")
    (folder / "chat_template.jinja").write_text(reasoning)
    prompts, generate = [], HFEngine.generate

    def keep_prompts(self: HFEngine, batch: list[list[int]], *call: Any) -> Any:
        prompts.append(batch)
        return generate(self, batch, *call)

    monkeypatch.setattr(HFEngine, "generate", keep_prompts)
    recording = record(reft, model=str(folder))
    decode = recording.engine.tokenizer.decode
    openers = [token for group in recording.groups[0] for token in first_tokens(group)]
    step = next(batch for batch in prompts if len(batch) == 16)
    for prompt, opener in zip(step, openers, strict=True):
        assert decode(prompt[:-1]).endswith("<think>\n")
        assert prompt[-1] == opener


def test_reft_rejects_more_candidates_than_allowed_tokens(record, rejection):
    """Of the 259 tokens of tiny/ three are special."""
    line = rejection(record, reft, candidates=257, lines=2)
    assert line.startswith("--candidates 257: only 256 tokens can begin a response")


def test_reft_counts_tokens_of_the_model(record, rejection, tied_model, tmp_path):
    """Some tokenizers have tokens that their model lacks."""
    folder = shutil.copytree(tied_model, tmp_path / "more-tokens")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<unused0>", "<unused1>"])
    tokenizer.save_pretrained(folder)
    line = rejection(record, reft, model=str(folder), candidates=257, lines=2)
    assert line.startswith("--candidates 257: only 256 tokens can begin a response")


def test_first_token_logits_are_the_policys(short_args, monkeypatch):
    """Of prompts of different lengths."""
    picked_from, pick = [], reft.pick_first_tokens

    def keep_logits(logits: Tensor, **numbers: Any) -> Tensor:
        picked_from.append(logits)
        return pick(logits, **numbers)

    monkeypatch.setattr(reft, "pick_first_tokens", keep_logits)
    args = short_args(reft)
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    engine = HFEngine(args, policy, tokenizer, 64)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    reft.choose_openers(policy, engine, prompts, args, torch.Generator())
    [logits] = picked_from
    allowed = reft.allowed_openers(engine, 259)
    assert logits.shape == (3, 256)
    for row, prompt in zip(logits, prompts, strict=True):
        expected = first_logp(policy, prompt)[allowed].log_softmax(-1)
        found = row.log_softmax(-1)
        assert torch.equal(found.topk(30).indices, expected.topk(30).indices)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@needs_vllm
def test_reft_on_vllm(record):
    """Openers do not depend on the engine. The run compares the engine's log-probabilities."""
    settings = {"candidates": 6, "openers": 2, "steps": 2, "eval_every": 0}
    ours, theirs = (record(reft, engine=name, **settings) for name in ("transformers", "vllm"))
    for a, b in zip(ours.groups[0], theirs.groups[0], strict=True):
        assert first_tokens(a) == first_tokens(b)
        assert a.notes == b.notes
