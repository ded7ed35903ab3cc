"""HölderPO, ARCA and REFT as runs: what they share with GRPO's update, and what they add."""

import copy
import dataclasses
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, needs_vllm, read_metrics
from torch import Tensor, nn

import arca
import common
import grpo
import holderpo
import reft
import vineppo
from engine import (
    Engine,
    Reference,
    Transformers,
    base_model,
    load_policy,
    load_tokenizer,
    seed_for,
)
from grading import Grader
from run import Run, RunArgs, parse_args

SCRIPTS = [holderpo, arca, reft, vineppo]


def verdicts(_: Grader, texts: list[str], golds: list[str]) -> list[bool]:
    """A task that a random model is sometimes right about."""
    return [len(text) % 2 == 0 for text in texts]


@pytest.fixture
def make(make_args: Callable[..., grpo.Args], tmp_path: Path) -> Callable[..., Any]:
    """Settings of a short run of a script, in a folder of its own."""
    made = []

    def make(script: ModuleType, **settings: Any) -> Any:
        made.append(script)
        short = vars(make_args(run_dir=str(tmp_path / f"run{len(made)}")))
        shared = [field.name for field in dataclasses.fields(RunArgs)]
        return script.Args(**{name: short[name] for name in [*shared, "lr"]} | settings)

    return make


@pytest.fixture
def run(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a script. Returns its settings, metrics, log of rollouts, the groups of each step, and
    for each update the policy that it found with its gradient."""
    monkeypatch.setattr(Grader, "grade", verdicts)

    def run(script: ModuleType, args: Any = None, **settings: Any) -> SimpleNamespace:
        args = args or make(script, **settings)
        seen = SimpleNamespace(args=args, policies=[], groups=[], rollouts=[], engine=None)
        loaded, update, stack = [], Run.update, common.stack
        load, make_engine = script.load_policy, script.make_engine

        def keep_policy(args: Any) -> Any:
            loaded.append(load(args))
            return loaded[0]

        def keep_engine(*call: Any) -> Engine:
            seen.engine = make_engine(*call)
            return seen.engine

        def keep_groups(groups: list[common.Group], *call: Any) -> common.Rollouts:
            seen.groups.append(groups)
            seen.rollouts.append(stack(groups, *call))
            return seen.rollouts[-1]

        def keep_gradient(self: Run, *call: Any) -> float:
            policy = loaded[0]
            seen.policies.append(copy.deepcopy(policy))
            for ours, kept in zip(policy.parameters(), seen.policies[-1].parameters(), strict=True):
                kept.grad = None if ours.grad is None else ours.grad.clone()
            return update(self, *call)

        with monkeypatch.context() as patch:
            patch.setattr(script, "load_policy", keep_policy)
            patch.setattr(script, "make_engine", keep_engine)
            patch.setattr(common, "stack", keep_groups)
            patch.setattr(Run, "update", keep_gradient)
            script.main(args)
        seen.metrics = read_metrics(Path(args.run_dir))
        lines = (Path(args.run_dir) / "rollouts.jsonl").read_text().splitlines()
        seen.log = [json.loads(line) for line in lines]
        return seen

    return run


def gradient(policy: nn.Module) -> Tensor:
    return torch.cat([w.grad.flatten() for w in policy.parameters() if w.grad is not None])


def plain_logp(policy: nn.Module, rollouts: common.Rollouts, p: int, g: int) -> Tensor:
    """Log-probabilities of a response's tokens: full logits, no batch."""
    prompt, response = rollouts.problems[p].prompt, rollouts.tokens[p, g][rollouts.mask[p, g]]
    sequence = torch.cat([torch.tensor(prompt), response])[None]
    logits = policy.eval()(input_ids=sequence).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), response]


def plain_advantages(seen: SimpleNamespace) -> Tensor:
    correct = torch.tensor([group.correct for group in seen.groups[0]])
    return grpo.grpo_advantages(correct)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert theirs.norm() > 1e-3, "a gradient of nothing would agree with anything"
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help(script: ModuleType, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        parse_args(script.Args, ["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(script.Args):
        assert "--" + field.name.replace("_", "-") in printed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_resumed_lora_run_repeats_the_whole_one(script: ModuleType, run: Callable):
    settings = {"lora_rank": 4, "lr": 1e-2, "steps": 4, "save_every": 2, "lora_dropout": 0.1}
    whole = run(script, **settings)
    folder = Path(whole.args.run_dir)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    resumed = run(script, dataclasses.replace(whole.args, resume=str(folder)))
    assert len(resumed.groups) == 2

    def untimed(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
        timed = ("seconds/", "tokens_per_second")
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in metrics]

    assert untimed(resumed.metrics) == untimed(whole.metrics)
    assert (resumed.metrics[4]["logp_gap/mean"]) < 1e-5


# ------------------------------------------------------------------------------- HölderPO


@pytest.mark.parametrize("p", [0.0, 2.0, -2.0])
@pytest.mark.parametrize("clip_level", ["sequence", "token"])
def test_holder_on_policy_is_grpo_averaged_per_sequence(p: float, clip_level: str, run: Callable):
    plain = run(grpo, loss_average="sequence")
    once = {"schedule": "constant", "updates_per_rollout": 1}
    holder = run(holderpo, p_start=p, clip_level=clip_level, **once)
    assert len(plain.policies) == len(holder.policies) == 1
    assert_same(gradient(holder.policies[0]), gradient(plain.policies[0]), 1e-6)
    assert holder.metrics[1]["rho/max"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("p", "clip_level"), [(2.0, "sequence"), (-1.0, "token")])
def test_holder_update_off_policy_is_the_plain_one(p: float, clip_level: str, run: Callable):
    """The second update of a step, from the definition: power means of each response's ratios."""
    settings = {"p_start": p, "schedule": "constant", "clip_level": clip_level, "lr": 0.003}
    seen = run(holderpo, updates_per_rollout=2, token_budget=100, **settings)
    rollouts, advantages = seen.rollouts[0], plain_advantages(seen)
    old, new = seen.policies[0], seen.policies[1]
    theirs = gradient(new)
    share = [p for p in range(4) if p not in first_share(seen)]
    new.zero_grad()
    losses = []
    for i in share:
        for g in range(4):
            with torch.no_grad():
                before = plain_logp(old, rollouts, i, g)
            ratio, a = (plain_logp(new, rollouts, i, g) - before).exp(), advantages[i, g]
            if clip_level == "token":
                bounded = ratio.clamp(0.8, 1.2)
                ratio = torch.min(ratio, bounded) if a > 0 else torch.max(ratio, bounded)
            rho = (ratio**p).mean() ** (1 / p)
            bounded = rho.clamp(0.8, 1.2) if clip_level == "sequence" else rho
            losses.append(-torch.min(rho * a, bounded * a))
    (sum(losses) / len(losses)).backward()
    assert_same(theirs, gradient(new), 1e-4)
    assert seen.metrics[1]["rho/std"] > 1e-3


def first_share(seen: SimpleNamespace) -> list[int]:
    """The problems of a step's first update."""
    shuffle = torch.Generator().manual_seed(seed_for(seen.args.seed, 1, "updates"))
    return torch.randperm(4, generator=shuffle).chunk(2)[0].tolist()


def test_holder_anneals_p_and_logs_its_ratios(run: Callable):
    seen = run(holderpo, steps=4, lr=0.01, seed=3)
    assert [row["p"] for row in seen.metrics[1:]] == [1, 0, -1, -2]
    assert len(seen.policies) == 16  # four updates a step
    for row in seen.metrics[1:]:
        assert row["rho/min"] < 1 < row["rho/max"] and row["rho/std"] > 0
        assert 0 < row["weight_entropy"] <= torch.tensor(row["length"]).log() + 1e-6
    assert max(row["clip_fraction"] for row in seen.metrics[1:]) > 0


def test_holder_steps_may_not_change_where_p_depends_on_them(
    run: Callable, capsys: pytest.CaptureFixture
):
    for schedule in ("linear", "constant"):
        seen = run(holderpo, schedule=schedule)
        longer = ["--resume", seen.args.run_dir, "--steps", "2"]
        if schedule == "constant":
            assert len(run(holderpo, parse_args(holderpo.Args, longer)).groups) == 1
            continue
        with pytest.raises(SystemExit) as stop:
            parse_args(holderpo.Args, longer)
        assert stop.value.code == 2
        assert "--steps 2: this run began with 1" in capsys.readouterr().err


def test_holder_importance_weighs_responses(run: Callable, monkeypatch: pytest.MonkeyPatch):
    """Half of each response's tokens (or so) are half as likely for the engine: it counts more."""

    def other_engine(*call: Any) -> common.Rollouts:
        rollouts = stack(*call)
        rollouts.engine_logp[..., ::2] -= torch.tensor(2.0).log()
        return rollouts

    stack = common.stack
    monkeypatch.setattr(common, "stack", other_engine)
    settings = {"updates_per_rollout": 1, "max_logp_gap": 1.0}
    seen = run(holderpo, importance_cap=10.0, **settings)
    rollouts, advantages = seen.rollouts[0], plain_advantages(seen)
    policy = seen.policies[0]
    theirs = gradient(policy)
    policy.zero_grad()
    loss = 0.0
    for p in range(4):
        for g in range(4):
            logp = plain_logp(policy, rollouts, p, g)
            weight = torch.tensor([2.0, 1.0]).repeat(6)[: len(logp)].mean()
            loss = loss - advantages[p, g] * weight * logp.mean() / 16
    loss.backward()
    assert_same(theirs, gradient(policy), 1e-4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"clip": 0.0}, "--clip 0.0"),
        ({"clip": 1.0}, "--clip 1.0"),
        ({"p_start": float("nan")}, "--p-start nan"),
        ({"p_end": float("inf")}, "--p-end inf"),
        ({"schedule": "constant", "p_end": 1.0}, "--p-end 1.0"),
    ],
)
def test_holder_refuses(settings: dict, named: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        holderpo.Args(**settings)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


# ------------------------------------------------------------------------------- ARCA

CREDITS = ["uniform", "surprisal", "entropy", "divergence", "arca"]


def test_arca_begins_with_uniform_credit(run: Callable):
    seen, uniform, plain = (
        run(arca, credit="arca", lora_rank=4, log_rollouts=4),
        run(arca, credit="uniform", lora_rank=4),
        run(grpo, loss_average="sequence", lora_rank=4),
    )
    for line in seen.log:
        assert set(line["credit"]) == {(1 / torch.tensor([len(line["tokens"])]).float()).item()}
    assert seen.metrics[1]["gini"] == pytest.approx(0, abs=1e-6)
    assert seen.metrics[1]["effective_fraction"] == pytest.approx(1)
    ours = gradient(seen.policies[0])
    assert torch.equal(ours, gradient(uniform.policies[0]))
    assert_same(ours, gradient(plain.policies[0]), 1e-6)


@pytest.mark.parametrize("credit", CREDITS)
def test_arca_gradient_is_the_plain_one(credit: str, run: Callable):
    """The second step's, from the definition, the base model loaded afresh and without LoRA."""
    settings = {"steps": 2, "lr": 0.02, "lora_rank": 4, "token_budget": 100}
    seen = run(arca, credit=credit, **settings)
    assert {"gini", "effective_fraction"} <= seen.metrics[2].keys()
    assert (seen.metrics[2]["gini"] > 0.01) is (credit != "uniform")

    policy, rollouts = seen.policies[1], seen.rollouts[1]
    base = arca.load_policy(dataclasses.replace(grpo.Args(**run_settings(seen.args))))
    theirs = gradient(policy)
    policy.zero_grad()
    seen.groups = seen.groups[1:]
    advantages, losses = plain_advantages(seen), []
    for i in range(4):
        for g in range(4):
            logp = plain_logp(policy, rollouts, i, g)
            score = plain_score(credit, policy, base, rollouts, i, g).double()
            power = (score + 1e-8) ** 2
            weights = power / power.sum() if power.sum() > 1e-8 else 1 / len(logp)
            losses.append(-advantages[i, g] * (weights * logp).sum())
    (sum(losses) / len(losses)).backward()
    assert_same(theirs, gradient(policy), 1e-3)


def run_settings(args: Any) -> dict[str, Any]:
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(RunArgs)}


@torch.no_grad()
def plain_score(credit: str, policy: Any, base: Any, rollouts: Any, p: int, g: int) -> Tensor:
    prompt, response = rollouts.problems[p].prompt, rollouts.tokens[p, g][rollouts.mask[p, g]]
    sequence = torch.cat([torch.tensor(prompt), response])[None]
    predicts = slice(len(prompt) - 1, -1)
    outputs = [
        model.eval()(input_ids=sequence, output_hidden_states=True) for model in (policy, base)
    ]
    distribution, base_distribution = (x.logits[0, predicts].log_softmax(-1) for x in outputs)
    hidden, base_hidden = (x.hidden_states[-1][0, predicts] for x in outputs)
    places = torch.arange(len(response)), response
    if credit == "surprisal":
        return -distribution[places]
    if credit == "divergence":
        return (distribution[places] - base_distribution[places]).abs()
    if credit == "entropy":
        entropy = -(distribution.exp() * distribution).sum(-1)
        return torch.cat([(entropy[:-1] - entropy[1:]).clamp(min=0), torch.zeros(1)])
    if credit == "arca":
        return (hidden - base_hidden).norm(dim=-1)
    return torch.zeros(len(response))


def moved_policy(args: Any) -> nn.Module:
    """A policy whose adapter is no longer zero."""
    policy = load_policy(args)
    torch.manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return policy


@pytest.fixture
def rollouts() -> common.Rollouts:
    """Two problems with three responses of different lengths."""
    problems = [common.Problem("", "", list(range(20, 30))), common.Problem("", "", [7, 8, 9])]
    lengths = [[5, 3, 8], [1, 9, 2]]
    groups = []
    for problem, of_group in zip(problems, lengths, strict=True):
        tokens = [list(range(40, 40 + length)) for length in of_group]
        groups.append(common.Group(problem, tokens, [[0.0] * n for n in of_group], [""] * 3))
    return common.stack(groups, [0], torch.device("cpu"))


def test_arca_base_states_are_the_models_own(make: Callable, rollouts: common.Rollouts):
    args = make(arca, lora_rank=4, lora_dropout=0.5)
    policy = moved_policy(args)
    bare = load_policy(make(grpo))  # never had an adapter
    reference = Reference(policy, args)
    everything = torch.arange(2)
    for index in common.micro_batches(rollouts, 40, everything):
        with torch.no_grad():
            adapted = common.hidden_states(policy, rollouts, index, args)
            with reference() as frozen:
                base = common.hidden_states(frozen, rollouts, index, args)
            assert torch.equal(base, common.hidden_states(bare, rollouts, index, args))
            assert (adapted - base).norm(dim=-1).min() > 1e-3
            # The adapter is back on, and dropout is off: the same states once more.
            assert torch.equal(adapted, common.hidden_states(policy, rollouts, index, args))
    alpha = arca.residuals(policy, reference, rollouts, args)
    assert (alpha[rollouts.mask] > 1e-3).all() and (alpha[~rollouts.mask] == 0).all()
    args.token_budget = 1
    one_by_one = arca.residuals(policy, reference, rollouts, args)
    torch.testing.assert_close(alpha, one_by_one, rtol=1e-4, atol=1e-5)


def tensor_bytes() -> int:
    """Memory of all tensors alive, each storage once."""
    gc.collect()
    alive = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
    return sum(storages.values())


def test_arca_holds_one_copy_of_the_weights(make: Callable, rollouts: common.Rollouts):
    args = make(arca, lora_rank=2)
    policy = moved_policy(args)
    weights = sum(w.nbytes for w in base_model(policy).state_dict().values())
    before = tensor_bytes()
    assert before > weights / 2  # what is counted includes them
    reference = Reference(policy, args)
    with reference() as frozen:
        assert frozen is policy
        during = tensor_bytes()
    alpha = arca.residuals(policy, reference, rollouts, args)
    assert during - before < weights / 50
    assert tensor_bytes() - before - alpha.nbytes < weights / 50


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_rank": 0}, "--lora-rank 0"),
        ({"sharpening": -1.0}, "--sharpening -1.0"),
        ({"credit": "uniform", "sharpening": 3.0}, "--sharpening 3.0"),
    ],
)
def test_arca_refuses(settings: dict, named: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        arca.Args(**settings)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


# ------------------------------------------------------------------------------- REFT


def test_reft_opener_is_the_first_token_scored_stored_and_verified(
    run: Callable, monkeypatch: pytest.MonkeyPatch
):
    graded, verified = [], common.verify

    def keep_texts(grader: Grader, groups: list[common.Group]) -> None:
        verified(grader, groups)
        graded.append((groups, [group.texts for group in groups]))

    monkeypatch.setattr(common, "verify", keep_texts)
    seen = run(reft, candidates=6, openers=2, log_rollouts=4)
    groups, rollouts = seen.groups[0], seen.rollouts[0]
    texts = next(texts for of_call, texts in graded if of_call[0] is groups[0])
    policy = load_policy(seen.args)  # the first step's policy
    tokenizer = load_tokenizer(seen.args)
    special = set(tokenizer.all_special_ids)
    for p, group in enumerate(groups):
        first = [tokens[0] for tokens in group.tokens]
        assert first[0] == first[1] != first[2] == first[3]
        prompt = torch.tensor([group.problem.prompt])
        with torch.no_grad():
            logp = policy(prompt).logits[0, -1].log_softmax(-1)
        allowed = [i for i in logp.argsort(descending=True).tolist() if i not in special]
        for g, token in enumerate(first):
            assert allowed.index(token) + 1 == group.notes[g] <= 6
            # Stored: padded tokens, mask, text. Not sampled by the engine.
            assert rollouts.tokens[p, g, 0] == token and rollouts.mask[p, g, 0]
            assert rollouts.engine_logp[p, g, 0].isnan()
            assert rollouts.engine_logp[p, g][rollouts.mask[p, g]][1:].isfinite().all()
            assert group.texts[g] == tokenizer.decode(group.tokens[g], skip_special_tokens=True)
            # Verified: the text with the opener.
            assert texts[p][g] == group.texts[g]
            # Scored: with the policy's own probability.
            line = seen.log[4 * p + g]
            assert line["tokens"] == group.tokens[g]
            assert line["logp"][0] == pytest.approx(logp[token].item(), abs=1e-5)
            torch.testing.assert_close(
                torch.tensor(line["logp"]),
                plain_logp(policy, rollouts, p, g).detach(),
                atol=1e-5,
                rtol=0,
            )
        assert max(map(len, group.tokens)) <= seen.args.max_new_tokens


def test_reft_with_one_candidate_takes_the_likeliest(run: Callable):
    for seed in (1, 2):
        seen = run(reft, candidates=1, openers=1, seed=seed)
        policy, tokenizer = load_policy(seen.args), load_tokenizer(seen.args)
        for group in seen.groups[0]:
            with torch.no_grad():
                logits = policy(torch.tensor([group.problem.prompt])).logits[0, -1]
            logits[tokenizer.all_special_ids] = -torch.inf
            assert {tokens[0] for tokens in group.tokens} == {logits.argmax().item()}
            assert group.notes == [1] * 4


def test_reft_draws_anew_each_step(run: Callable):
    seen = run(reft, steps=3, lr=1e-9, prompts_per_step=12, group_size=4)  # each problem each step
    drawn = [
        {group.problem.text: tuple(row[0] for row in group.tokens) for group in groups}
        for groups in seen.groups
    ]
    assert drawn[0].keys() == drawn[1].keys()
    assert drawn[0] != drawn[1] != drawn[2]


def test_reft_evaluates_without_openers(run: Callable, monkeypatch: pytest.MonkeyPatch):
    calls, roll_out = {}, common.roll_out

    def spy(engine: Any, problems: Any, args: Any, seed: tuple, **more: Any) -> Any:
        calls[seed[1]] = more.get("openers")
        return roll_out(engine, problems, args, seed, **more)

    monkeypatch.setattr(common, "roll_out", spy)
    run(reft)
    assert calls[1] is not None
    assert calls["evaluation"] is calls["greedy"] is None


@pytest.mark.parametrize("loss_average", ["token", "sequence"])
def test_reft_mask_opener_takes_it_out_of_the_loss(loss_average: str, run: Callable):
    settings = {"candidates": 6, "openers": 2, "loss_average": loss_average}
    plain, masked = (run(reft, mask_opener=mask, **settings) for mask in (False, True))
    rollouts, advantages = plain.rollouts[0], plain_advantages(plain)
    assert torch.equal(rollouts.tokens, masked.rollouts[0].tokens)
    policy = plain.policies[0]
    difference = gradient(policy) - gradient(masked.policies[0])
    policy.zero_grad()
    loss = 0.0
    for p in range(4):
        for g in range(4):
            length = rollouts.mask[p, g].sum()
            weight = rollouts.mask.sum() if loss_average == "token" else 16 * length
            loss = loss - advantages[p, g] * plain_logp(policy, rollouts, p, g)[0] / weight
    loss.backward()
    assert_same(difference, gradient(policy), 1e-4)


def test_reft_on_dapo(run: Callable, capsys: pytest.CaptureFixture):
    seen = run(reft, base="dapo", generation_rounds=3)
    assert seen.args.dynamic_sampling and seen.args.clip_high == 0.28
    assert seen.args.loss_average == "token" and seen.args.clip_low == 0.2
    assert "eval/greedy" in seen.metrics[0]
    again = dataclasses.replace(seen.args, steps=2)
    assert again.clip_high == 0.28
    assert not reft.Args().dynamic_sampling and reft.Args(clip_high=0.3).clip_high == 0.3
    for contradiction in ({"clip_high": 0.3}, {"loss_average": "sequence"}):
        with pytest.raises(SystemExit) as stop:
            reft.Args(base="dapo", **contradiction)
        assert stop.value.code == 2
        assert "--base dapo" in capsys.readouterr().err


def test_reft_openers_follow_a_reasoning_marker(
    run: Callable, tied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where the chat template opens one, it is the end of the prompt."""
    folder = shutil.copytree(tied_model, tmp_path / "reasoner")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        template.replace("assistant\n", "assistant\n<think>\n")
    )
    prompts, generate = [], Transformers.generate

    def keep_prompts(self: Transformers, batch: list[list[int]], *call: Any) -> Any:
        prompts.append(batch)
        return generate(self, batch, *call)

    monkeypatch.setattr(Transformers, "generate", keep_prompts)
    seen = run(reft, model=str(folder))
    decode = seen.engine.tokenizer.decode
    openers = [tokens[0] for group in seen.groups[0] for tokens in group.tokens]
    step = next(batch for batch in prompts if len(batch) == 16)
    for prompt, opener in zip(step, openers, strict=True):
        assert decode(prompt[:-1]).endswith("<think>\n")
        assert prompt[-1] == opener


def test_reft_refuses_before_it_loads_anything():
    command = [sys.executable, "reft.py", "--group-size", "8", "--openers", "3", "--model", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --candidates 20 --openers 3 --group-size 8: "
        "--group-size must be a multiple of --openers\n"
    )


def test_reft_refuses_more_candidates_than_tokens(
    make: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    import transformers

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(SystemExit) as stop:
        load_tokenizer(make(reft, candidates=260))
    assert stop.value.code == 2
    assert "--candidates 260: the model knows 259 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reft.Args(max_new_tokens=1)
    assert "--max-new-tokens 1" in capsys.readouterr().err


def test_top_tokens_are_the_policys(make: Callable):
    args = make(reft, temperature=0.7)
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    engine = Transformers(args, policy, tokenizer, 64)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    tokens, logp = engine.top_tokens(prompts, 30, 0.7)
    for row, values, prompt in zip(tokens, logp, prompts, strict=True):
        with torch.no_grad():
            expected = (policy(torch.tensor([prompt])).logits[0, -1] / 0.7).log_softmax(-1).topk(30)
        assert torch.equal(row, expected.indices)
        torch.testing.assert_close(values, expected.values, atol=1e-5, rtol=0)
    assert engine.top_tokens(prompts, 1000, 1.0)[0].shape == (3, 259)


@needs_vllm
def test_reft_on_vllm(run: Callable):
    """Openers do not depend on the engine, and the run's guard finds the engines in agreement."""
    settings = {"candidates": 6, "openers": 2, "steps": 2, "eval_every": 0}
    ours, theirs = (run(reft, engine=name, **settings) for name in ("transformers", "vllm"))
    for a, b in zip(ours.groups[0], theirs.groups[0], strict=True):
        assert [row[0] for row in a.tokens] == [row[0] for row in b.tokens]
        assert a.notes == b.notes
    prompts = [group.problem.prompt for group in ours.groups[0]]
    theirs.engine.sync(load_policy(theirs.args))
    ours.engine.sync(load_policy(ours.args))
    mine, others = (engine.top_tokens(prompts, 300, 1.0) for engine in (ours.engine, theirs.engine))
    assert mine[0].shape == others[0].shape == (4, 259)
    torch.testing.assert_close(mine[1], others[1], atol=1e-4, rtol=0)
    assert (mine[0] == others[0]).float().mean() > 0.95  # all but ties
