"""The policy, its reference and both engines: tokens, log-probabilities, weights."""

import dataclasses
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import common
import grpo
import models
from common import Group, Problem
from models import (
    Reference,
    autocast,
    base_model,
    eos_ids,
    load_policy,
    load_tokenizer,
    merged_weights,
)
from runs import StopRun

PROMPTS = [list(b"1+1"), list(b"What is 12 + 34?"), list(b"x"), list(b"so\nthe answer is ")]
NAMES = ["tied", "untied", "tiny"]
VLLM = pytest.param(
    "VLLM",
    marks=pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed"),
)
both_engines = pytest.mark.parametrize("kind", ["Transformers", VLLM])
all_models = pytest.mark.parametrize("name", NAMES)


def settings(folder: Path, **changes: Any) -> grpo.Args:
    changes = {"device": "cpu", "prompts_per_step": 4, "group_size": 8} | changes
    return grpo.Args(model=str(folder), **changes)


class Setup:
    """A model with its engines, made when first asked for; the weights go back after each test."""

    def __init__(self, folder: Path) -> None:
        self.args = settings(folder)
        self.policy, self.tokenizer = load_policy(self.args), load_tokenizer(self.args)
        self.weights = {k: v.clone() for k, v in self.policy.state_dict().items()}
        self.engines: dict[str, models.Engine] = {}

    def engine(self, kind: str, policy: nn.Module | None = None) -> models.Engine:
        """That engine, holding the policy's weights."""
        if kind not in self.engines:
            self.engines[kind] = getattr(models, kind)(self.args, self.policy, self.tokenizer, 200)
        self.engines[kind].sync(policy or self.policy)
        return self.engines[kind]


made: dict[str, Setup] = {}


@pytest.fixture
def setup(name: str, request: pytest.FixtureRequest) -> Iterator[Setup]:
    if name not in made:
        made[name] = Setup(request.getfixturevalue(f"{name}_model"))
    yield made[name]
    made[name].policy.load_state_dict(made[name].weights)


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    yield
    made.clear()


def sample(engine: models.Engine, prompts: list[list[int]] = PROMPTS, *, seeds: int = 6) -> Any:
    """Some sampled responses to each prompt at a temperature that is not 1."""
    prompts = [prompt for prompt in prompts for _ in range(seeds)]
    return prompts, engine.generate(prompts, list(range(len(prompts))), 20, 0.8)


def plain_logp(policy: nn.Module, prompt: list[int], response: list[int], temperature: float):
    """log π of a response's tokens from full logits, one sequence at a time. [T]"""
    with torch.no_grad():
        logits = base_model(policy.eval())(torch.tensor([prompt + response])).logits[0]
    logp = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return logp.gather(-1, torch.tensor(response)[:, None])[:, 0]


def gap(policy: nn.Module, prompts: list[list[int]], responses: Any) -> float:
    """The largest difference between the engine's log-probabilities and the policy's."""
    differences = [
        (torch.tensor(logp) - plain_logp(policy, prompt, tokens, 0.8)).abs().max()
        for prompt, (tokens, logp) in zip(prompts, responses, strict=True)
    ]
    return max(differences).item()


def perturb(policy: nn.Module, amount: float = 0.05) -> None:
    """Move every weight that is trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += amount * torch.randn(weight.shape, generator=generator)


# ------------------------------------------------------------------------------- engines


@all_models
def test_greedy_is_the_same_in_both_engines(setup: Setup):
    pytest.importorskip("vllm")
    ours, theirs = (
        setup.engine(kind).generate(PROMPTS, [0] * len(PROMPTS), 40, 0.0)
        for kind in ("Transformers", "VLLM")
    )
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]


@all_models
@both_engines
def test_greedy_takes_the_likeliest_token(setup: Setup, kind: str):
    for prompt, (tokens, _) in zip(
        PROMPTS, setup.engine(kind).generate(PROMPTS, [0] * 4, 20, 0.0), strict=True
    ):
        with torch.no_grad():
            logits = setup.policy.eval()(torch.tensor([prompt + tokens])).logits[0]
        assert tokens == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@all_models
@both_engines
def test_sampled_logp_is_the_policys(setup: Setup, kind: str):
    prompts, responses = sample(setup.engine(kind))
    assert gap(setup.policy, prompts, responses) < 1e-4


@all_models
@both_engines
def test_a_response_depends_on_its_own_seed_alone(setup: Setup, kind: str):
    engine = setup.engine(kind)
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    seeds = list(range(100, 112))
    together = [tokens for tokens, _ in engine.generate(prompts, seeds, 20, 1.0)]
    again = [tokens for tokens, _ in engine.generate(prompts, seeds, 20, 1.0)]
    apart = [engine.generate([p], [s], 20, 1.0)[0][0] for p, s in zip(prompts, seeds, strict=True)]
    backwards = [t for t, _ in engine.generate(prompts[::-1], seeds[::-1], 20, 1.0)][::-1]
    assert together == again == apart == backwards
    assert len({tuple(tokens) for tokens in together}) > 8


@all_models
def test_transformers_computes_each_prompt_once(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    """Where layers are recurrent, once for each response; what is said is the same."""
    engine, computed = setup.engine("Transformers"), []
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    hook = base_model(setup.policy).base_model.register_forward_pre_hook(
        lambda _, __, inputs: computed.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    said = {}
    for recurrent in (False, True):
        monkeypatch.setattr(type(setup.policy), "_is_stateful", recurrent)
        said[recurrent] = engine.generate(prompts, list(range(12)), 8, 1.0)
        longest = max(map(len, PROMPTS))
        first = (12, longest) if recurrent else (len({tuple(p[:-1]) for p in PROMPTS}), longest - 1)
        assert computed[0] == first
        computed.clear()
    hook.remove()
    for shared, own in zip(said[False], said[True], strict=True):
        assert shared[0] == own[0] and shared[1] == pytest.approx(own[1], abs=1e-4)


@both_engines
@pytest.mark.parametrize("name", ["tied"])
def test_samples_follow_the_distribution(setup: Setup, kind: str):
    """Chi-square of 4000 responses of one token, each with its own seed.

    The temperature is low: where no token stands out, other noise than Gumbel's looks right too.
    """
    prompt, count, temperature = PROMPTS[0], 4000, 0.3
    engine = setup.engine(kind)
    draws = Counter(
        r[0][0] for r in engine.generate([prompt] * count, range(count), 1, temperature)
    )
    with torch.no_grad():
        logits = setup.policy.eval()(torch.tensor([prompt])).logits[0, -1]
    expected = count * (logits / temperature).softmax(-1)
    observed = torch.tensor([draws[i] for i in range(len(expected))])
    common_ones = expected >= 5
    cells = [torch.cat([x[common_ones], x[~common_ones].sum()[None]]) for x in (observed, expected)]
    statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum().item()
    degrees = len(cells[0]) - 1
    assert degrees > 15 and expected.max() > count / 2
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


@both_engines
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_responses_end_at_each_eos_and_are_then_not_truncated(setup: Setup, kind: str):
    ends = eos_ids(setup.policy, setup.tokenizer)
    assert len(ends) == {"tied": 1, "untied": 2}[setup.args.model.rpartition("/")[2]]
    prompts, responses = sample(setup.engine(kind), seeds=16)
    seen = Counter()
    for tokens, logp in responses:
        assert len(tokens) == len(logp)
        assert not set(tokens[:-1]) & set(ends)
        assert len(tokens) == 20 or tokens[-1] in ends
        seen[tokens[-1] if tokens[-1] in ends else "cut off"] += 1
    assert set(seen) == {*ends, "cut off"}, "every way to end must occur for this test to mean much"

    groups = [
        Group(Problem("", "", prompt), [tokens], [logp], [""])
        for prompt, (tokens, logp) in zip(prompts, responses, strict=True)
    ]
    rollouts = common.stack(groups, ends, torch.device("cpu"))
    assert rollouts.truncated.sum() == seen["cut off"]
    for p, (tokens, _) in enumerate(responses):
        assert rollouts.tokens[p, 0][rollouts.mask[p, 0]].tolist() == tokens  # EOS included


# ------------------------------------------------------------------------------- weights


@all_models
@both_engines
def test_sync_is_exact(setup: Setup, kind: str):
    prompts = [*PROMPTS, list(b"1 + 2 = 3, " * 15)]  # the last fills a block of the prefix cache
    engine = setup.engine(kind)
    perturb(setup.policy)
    if kind == "VLLM":
        unseen = gap(setup.policy, *sample(engine, prompts))
        assert unseen > 0.01, "the engine must not see it before sync"
    assert gap(setup.policy, *sample(setup.engine(kind), prompts)) < 1e-4


@all_models
@both_engines
def test_sync_merges_lora(setup: Setup, kind: str):
    policy = load_policy(dataclasses.replace(setup.args, lora_rank=4))
    perturb(policy)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    responses = sample(setup.engine(kind, policy))
    assert gap(policy, *responses) < 1e-4
    assert gap(setup.policy, *responses) > 0.01
    after = policy.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(module.merged for module in policy.modules() if hasattr(module, "merged"))


@all_models
def test_merged_weights_have_the_models_own_names(setup: Setup):
    policy = load_policy(dataclasses.replace(setup.args, lora_rank=4))
    merged = dict(merged_weights(policy))
    assert merged.keys() == setup.policy.state_dict().keys()
    assert all(torch.equal(weight, setup.weights[name]) for name, weight in merged.items())
    assert not any(weight.requires_grad for weight in merged.values())


@all_models
def test_merging_adds_lora_and_leaves_the_policy_alone(setup: Setup):
    policy = load_policy(dataclasses.replace(setup.args, lora_rank=4))
    perturb(policy)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    adapted = plain_logp(policy, PROMPTS[1], PROMPTS[3], 1.0)
    setup.policy.load_state_dict(dict(merged_weights(policy)))
    torch.testing.assert_close(
        plain_logp(setup.policy, PROMPTS[1], PROMPTS[3], 1.0), adapted, atol=1e-4, rtol=0
    )
    assert all(torch.equal(before[name], weight) for name, weight in policy.state_dict().items())


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_reference_stays_what_the_policy_was(tied_model: Path, lora_rank: int):
    args = settings(tied_model, lora_rank=lora_rank)
    policy = load_policy(args)
    perturb(policy, 0.0 if lora_rank else 0.05)
    prompt, response = PROMPTS[1], PROMPTS[3]
    before = plain_logp(policy, prompt, response, 1.0)
    reference = Reference(policy, args)
    perturb(policy)
    with reference as frozen:
        torch.testing.assert_close(plain_logp(frozen, prompt, response, 1.0), before)
    assert (plain_logp(policy, prompt, response, 1.0) - before).abs().max() > 0.01
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained) == bool(lora_rank)


@pytest.mark.parametrize("model", ["tied_model", "untied_model"])
def test_under_bfloat16_the_reference_takes_half_the_memory_and_changes_no_value(
    model: str, request: pytest.FixtureRequest
):
    args = settings(request.getfixturevalue(model), precision="bfloat16")
    policy = load_policy(args)
    ids = torch.arange(20)[None]
    with torch.no_grad(), autocast(args), Reference(policy, args) as frozen:
        assert torch.equal(frozen(ids).logits, policy(ids).logits)
    half = {name for name, weight in frozen.named_parameters() if weight.dtype == torch.bfloat16}
    assert {name for name in half if "proj" in name} and not any(map(is_norm_or_embedding, half))
    assert ("lm_head.weight" in half) == (model == "untied_model")


def is_norm_or_embedding(name: str) -> bool:
    return "norm" in name or "embed" in name


def test_master_weights_are_float32(tied_model: Path):
    policy = load_policy(settings(tied_model, precision="bfloat16"))
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    adapted = load_policy(settings(tied_model, precision="bfloat16", lora_rank=4))
    trained = {weight.dtype for weight in adapted.parameters() if weight.requires_grad}
    assert trained == {torch.float32}


# ------------------------------------------------------------------------------- the guard


@pytest.fixture
def guarded_run(
    make_args: Callable[..., grpo.Args],
    problem_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals: None,
) -> Callable[[Setup], None]:
    """Three steps of grpo.py on a model's vLLM engine, with every other response right."""
    pytest.importorskip("vllm")

    def run(setup: Setup) -> None:
        args = make_args(model=setup.args.model, steps=3, engine="vllm", eval_every=0)
        monkeypatch.setattr(grpo, "make_engine", lambda *_: setup.engine("VLLM"))
        monkeypatch.setattr(
            grpo.Grader, "grade", lambda _, texts, __: [i % 2 for i in range(len(texts))]
        )
        grpo.main(args)

    return run


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_guard_lets_a_sound_run_pass(setup: Setup, guarded_run: Callable[[Setup], None]):
    guarded_run(setup)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_guard_stops_a_run_that_skips_one_sync(
    setup: Setup, guarded_run: Callable[[Setup], None], monkeypatch: pytest.MonkeyPatch
):
    sync, calls = models.VLLM.sync, []

    def skip_the_second_step(engine: models.VLLM, policy: nn.Module) -> None:
        calls.append(policy)
        if len(calls) != 4:  # made, step 0, step 1, step 2
            sync(engine, policy)

    monkeypatch.setattr(models.VLLM, "sync", skip_the_second_step)
    with pytest.raises(StopRun, match="the engine does not hold the policy's weights"):
        guarded_run(setup)
    assert len(calls) == 4


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("stale", ["lm_head", "layers.1.mlp", "norm"])
def test_guard_stops_a_run_with_stale_weights(
    setup: Setup,
    stale: str,
    guarded_run: Callable[[Setup], None],
    monkeypatch: pytest.MonkeyPatch,
):
    merged = models.merged_weights

    def without_some(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight) for name, weight in merged(policy) if stale not in name)

    monkeypatch.setattr(models, "merged_weights", without_some)
    with pytest.raises(StopRun, match="the engine does not hold the policy's weights"):
        guarded_run(setup)
