"""The policy, its reference and both engines: tokens, log-probabilities, weights."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine
import pytest
import torch
from conftest import ROOT, byte_tokenizer, needs_vllm, read_metrics
from damage import BROKEN
from engine import (
    Engine,
    Reference,
    StopRun,
    autocast,
    base_model,
    eos_ids,
    load_policy,
    load_tokenizer,
    merged_weights,
    save_model,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import common
import grpo
from common import Group, Problem, Rollouts

PROMPTS = [list(b"1+1"), list(b"What is 12 + 34?"), list(b"x"), list(b"so\nthe answer is ")]
NAMES = ["tied", "untied", "tiny"]
VLLM = pytest.param("VLLM", marks=needs_vllm)
both_engines = pytest.mark.parametrize("kind", ["Transformers", VLLM])
all_models = pytest.mark.parametrize("name", NAMES)


def settings(folder: Path, **changes: Any) -> grpo.Args:
    changes = {"device": "cpu", "prompts_per_step": 4, "group_size": 8} | changes
    return grpo.Args(model=str(folder), **changes)


class Setup:
    """A model with its engines, made when first asked for; the weights go back after each test."""

    def __init__(self, folder: Path, precision: str) -> None:
        self.args = settings(folder, precision=precision)
        self.policy, self.tokenizer = load_policy(self.args), load_tokenizer(self.args)
        self.weights = {k: v.clone() for k, v in self.policy.state_dict().items()}
        self.engines: dict[str, engine.Engine] = {}

    def engine(self, kind: str, policy: nn.Module | None = None) -> engine.Engine:
        """That engine, holding the policy's weights."""
        if kind not in self.engines:
            self.engines[kind] = getattr(engine, kind)(self.args, self.policy, self.tokenizer, 200)
        self.engines[kind].sync(policy or self.policy)
        return self.engines[kind]


made: dict[str, Setup] = {}


@pytest.fixture
def setup(name: str, request: pytest.FixtureRequest) -> Iterator[Setup]:
    if name not in made:
        model, _, precision = name.partition("_")
        folder = request.getfixturevalue(f"{model}_model")
        made[name] = Setup(folder, precision or "float32")
    yield made[name]
    made[name].policy.load_state_dict(made[name].weights)


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    yield
    made.clear()


def sample(engine: engine.Engine, prompts: list[list[int]] = PROMPTS, *, seeds: int = 6) -> Any:
    """Some sampled responses to each prompt at a temperature that is not 1."""
    prompts = [prompt for prompt in prompts for _ in range(seeds)]
    return prompts, engine.generate(prompts, list(range(len(prompts))), [20] * len(prompts), 0.8)


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
@needs_vllm
def test_greedy_is_the_same_in_both_engines(setup: Setup):
    ours, theirs = (
        setup.engine(kind).generate(PROMPTS, [0] * 4, [40] * 4, 0.0)
        for kind in ("Transformers", "VLLM")
    )
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]


@all_models
@both_engines
def test_greedy_takes_the_likeliest_token(setup: Setup, kind: str):
    for prompt, (tokens, _) in zip(
        PROMPTS, setup.engine(kind).generate(PROMPTS, [0] * 4, [20] * 4, 0.0), strict=True
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
    seeds, lengths = list(range(100, 112)), [20] * 12
    together = [tokens for tokens, _ in engine.generate(prompts, seeds, lengths, 1.0)]
    again = [tokens for tokens, _ in engine.generate(prompts, seeds, lengths, 1.0)]
    apart = [
        engine.generate([p], [s], [20], 1.0)[0][0] for p, s in zip(prompts, seeds, strict=True)
    ]
    backwards = [t for t, _ in engine.generate(prompts[::-1], seeds[::-1], lengths, 1.0)][::-1]
    assert together == again == apart == backwards
    assert len({tuple(tokens) for tokens in together}) > 8


@both_engines
@pytest.mark.parametrize("name", ["tied"])
def test_samples_follow_the_distribution(setup: Setup, kind: str):
    """Chi-square of 4000 responses of one token, each with its own seed.

    The temperature is low: where no token stands out, other noise than Gumbel's looks right too.
    """
    prompt, count, temperature = PROMPTS[0], 4000, 0.3
    engine = setup.engine(kind)
    draws = Counter(
        r[0][0] for r in engine.generate([prompt] * count, range(count), [1] * count, temperature)
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
    with reference() as frozen:
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
    with torch.no_grad(), autocast(args), Reference(policy, args)() as frozen:
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


def lora(setup: Setup) -> nn.Module:
    return load_policy(dataclasses.replace(setup.args, lora_rank=4))


@needs_vllm
@pytest.mark.parametrize("name", ["tied", "untied", "tied_bfloat16", "untied_bfloat16"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_weights_that_did_not_arrive_are_called_stale(
    setup: Setup, adapted: bool, monkeypatch: pytest.MonkeyPatch
):
    policy = lora(setup) if adapted else setup.policy
    vllm = setup.engine("VLLM", policy)
    perturb(policy)
    with monkeypatch.context() as patch:
        patch.setattr(vllm.llm, "collective_rpc", lambda *_, **__: None)
        with pytest.raises(StopRun, match="stale"):
            vllm.sync(policy)
    vllm.sync(policy)


@pytest.mark.parametrize("name", ["tied"])
@both_engines
def test_each_response_keeps_to_its_own_length(setup: Setup, kind: str):
    """And is the beginning of what it would be with more room."""
    engine, lengths = setup.engine(kind), [1, 20, 7, 3]
    short, long = (engine.generate(PROMPTS, [5, 6, 7, 8], n, 1.0) for n in (lengths, [20] * 4))
    for (tokens, logp), (whole, _), length in zip(short, long, lengths, strict=True):
        assert tokens == whole[:length] and len(logp) == len(tokens)


@pytest.mark.parametrize("name", ["tied"])
def test_transformers_draws_as_many_at_once_as_a_step_has_rollouts(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
):
    engine, sizes = setup.engine("Transformers"), []
    whole, batch = sample(engine)[1], engine.generate_batch
    assert engine.at_once == setup.args.prompts_per_step * setup.args.group_size

    def counted(prompts: list, *rest: object) -> list:
        sizes.append(len(prompts))
        return batch(prompts, *rest)

    monkeypatch.setattr(engine, "generate_batch", counted)
    monkeypatch.setattr(engine, "at_once", 10)
    parts = sample(engine)[1]
    assert sizes == [10, 10, 4] and [t for t, _ in parts] == [t for t, _ in whole]


@pytest.mark.parametrize("name", ["tied"])
@pytest.mark.parametrize("prompts", [PROMPTS, [[0, 120], [120]], [[120], [121]]])
def test_transformers_computes_a_prompt_once_for_all_its_responses(
    setup: Setup, prompts: list[list[int]]
):
    """All of it but the last token, from which each response starts. A prompt of one token more,
    the token that pads the other, is another prompt."""
    engine, computed = setup.engine("Transformers"), []
    embedding = setup.policy.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, given: computed.append(given[0].shape))
    given, responses = sample(engine, prompts)
    hook.remove()
    assert gap(setup.policy, given, responses) < 1e-4
    before = max(1, *(len(prompt) - 1 for prompt in prompts))  # or one token of padding
    assert computed[:3] == [(len(prompts), before), (len(given), 1), (len(given), 1)]


@needs_vllm
@pytest.mark.parametrize("name", ["tied"])
def test_adapters_are_merged_once_a_sync(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    policy, calls = lora(setup), []
    vllm = setup.engine("VLLM", policy)

    def counted(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
        calls.append(policy)
        return merged_weights(policy)

    monkeypatch.setattr(engine, "merged_weights", counted)
    vllm.sync(policy)
    assert calls == [policy]


@needs_vllm
@pytest.mark.parametrize("name", ["untied", "untied_bfloat16"])
@pytest.mark.parametrize("part", ["lm_head", "layers.1.self_attn.v_proj", "up_proj", "embed"])
def test_one_weight_that_did_not_arrive_is_called_stale(
    setup: Setup, part: str, monkeypatch: pytest.MonkeyPatch
):
    vllm = setup.engine("VLLM")
    load = vllm.llm.collective_rpc
    old = {name: weight.clone() for name, weight in setup.policy.state_dict().items()}

    def without_part(method: str, kwargs: dict[str, Any]) -> None:
        weights = ((n, old[n] if part in n else w) for n, w in kwargs["weights_iterator"])
        load(method, kwargs={"weights_iterator": weights})

    perturb(setup.policy)
    monkeypatch.setattr(vllm.llm, "collective_rpc", without_part)
    with pytest.raises(StopRun, match="stale"):
        vllm.sync(setup.policy)


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="only the CPU build computes with a copy")
@pytest.mark.parametrize("name", ["tied", "tied_bfloat16"])
def test_a_tied_head_that_was_left_out_is_called_stale(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
):
    vllm = setup.engine("VLLM")
    perturb(setup.policy)
    monkeypatch.setattr(vllm, "unknown", {"lm_head.weight"})
    with pytest.raises(StopRun, match="lm_head"):
        vllm.sync(setup.policy)


def one_rollout(engine_logp: list[float], device: str = "cpu") -> Rollouts:
    group = Group(Problem("", "", [1]), [[2, 3]], [engine_logp], [""])
    return common.stack([group], [256], torch.device(device))


@pytest.mark.parametrize(
    ("precision", "gap", "end"),
    [
        ("float32", 0.5e-4, ""),
        ("float32", 2e-4, "stops"),
        ("bfloat16", 0.04, ""),  # what rounding alone gives a 135M model
        ("bfloat16", 0.06, "warns"),
        ("bfloat16", 0.3, "stops"),
    ],
)
def test_the_gap_is_bounded(
    tied_model: Path, capsys: pytest.CaptureFixture, precision: str, gap: float, end: str
):
    args, logp = settings(tied_model, precision=precision), torch.tensor([[[-1.0, -2.0]]])
    rollouts = one_rollout([-1.0 - gap, -2.0 + gap])
    if end == "stops":
        with pytest.raises(StopRun, match="--max-logp-gap"):
            common.check_engine(rollouts, logp, args)
    else:
        seen = common.check_engine(rollouts, logp, args)
        assert seen == pytest.approx({"logp_gap/mean": gap, "logp_gap/max": gap}, rel=1e-2)
    assert ("warning" in capsys.readouterr().err) == (end == "warns")


def test_a_policy_that_is_not_finite_stops_the_run(tied_model: Path):
    with pytest.raises(StopRun, match="not finite"):
        common.check_engine(
            one_rollout([-1.0, -2.0]), torch.tensor([[[-1.0, torch.nan]]]), settings(tied_model)
        )


# ------------------------------------------------------------------------------- families

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 256}
GROUPED = SIZES | {"num_key_value_heads": 1}
EXPERTS = GROUPED | {"num_experts_per_tok": 2}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
GEMMA = {"head_dim": 32, "final_logit_softcapping": 3.0, "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256} | NO_DROPOUT),
    "gpt_neox": ("GPTNeoX", SIZES),  # vLLM runs transformers' own class, as for the next two
    "olmo2": ("Olmo2", GROUPED),
    "smollm3": ("SmolLM3", GROUPED),
    "gemma2": ("Gemma2", GROUPED | GEMMA),
    "granite": ("Granite", GROUPED | {"logits_scaling": 8.0}),
    "cohere": ("Cohere", GROUPED | {"logit_scale": 0.25}),
    "lfm2": ("Lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": ("FalconH1", GROUPED | MAMBA | {"head_dim": 32, "lm_head_multiplier": 0.3}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"moe_intermediate_size": 32, "num_experts": 4}),
    "mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
}
REFUSED = {
    "phi": ("Phi", SIZES),  # a bias in its LM head
    "hyperclovax": ("HyperCLOVAX", GROUPED | {"logits_scaling": 0.3}),  # multiplies by it
    "recurrent_gemma": ("RecurrentGemma", GROUPED | {"lru_width": 64, "logits_soft_cap": 3.0}),
}


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    import transformers

    def build(family: str) -> Path:
        folder = tmp_path_factory.mktemp("families") / family
        name, sizes = (FAMILIES | REFUSED)[family]
        tokenizer = byte_tokenizer("<|endoftext|>")
        ends = {"eos_token_id": 256, "pad_token_id": 257, "bos_token_id": None}
        config = getattr(transformers, f"{name}Config")
        config = config(vocab_size=len(tokenizer), initializer_range=0.15, **ends, **sizes)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.mark.parametrize(
    ("family", "lora_rank"),
    [(f, rank) for f in FAMILIES for rank in (0, 4) if (f, rank) != ("falcon_h1", 4)],
)
@both_engines
def test_a_family_is_rolled_out_synced_and_saved(
    family: str, lora_rank: int, kind: str, family_folder: Callable, tmp_path: Path
):
    args = settings(family_folder(family), lora_rank=lora_rank, max_new_tokens=20)
    args.engine = kind.lower()
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    assert engine.is_recurrent(policy) == (family in ("lfm2", "falcon_h1"))
    without = {"qwen3_moe": "experts", "mixtral": "experts"}
    without |= {"lfm2": "a state, not keys", "falcon_h1": "a state, not keys"}
    if kind == "VLLM" and family in without:
        assert without[family] in engine.why_not_vllm(args, policy)
        args.engine = "auto"
    made = engine.make_engine(args, policy, tokenizer, [Problem("", "", list(range(80)))])
    perturb(policy)
    made.sync(policy)
    assert gap(policy, *sample(made, seeds=2)) < 1e-4
    save_model(policy, tokenizer, tmp_path)
    again = load_policy(dataclasses.replace(args, model=str(tmp_path), lora_rank=0))
    theirs = plain_logp(again, PROMPTS[1], PROMPTS[3], 1.0)
    torch.testing.assert_close(
        theirs, plain_logp(policy, PROMPTS[1], PROMPTS[3], 1.0), atol=1e-4, rtol=0
    )
    policy.save_pretrained(tmp_path / "checkpoint")
    fresh = load_policy(args)
    engine.load_weights(fresh, tmp_path / "checkpoint")
    mine = policy.state_dict()
    assert all(torch.equal(weight, mine[name]) for name, weight in fresh.state_dict().items())


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "falcon_h1", "gpt2"])
def test_the_tiled_head_is_the_models_own(
    family: str, family_folder: Callable, monkeypatch: pytest.MonkeyPatch
):
    """Log-probabilities, entropy and gradient, against the model's own logits."""
    args = settings(family_folder(family), temperature=0.7)
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", 64 * 12)  # several tiles
    policy = load_policy(args)
    prompts, tokens = [p[:6] for p in PROMPTS[1:3]], [[5, 6, 7, 256], [70, 80]]
    groups = [
        Group(Problem("", "", prompt), [row], [[0.0] * len(row)], [""])
        for prompt, row in zip(prompts, tokens, strict=True)
    ]
    rollouts = common.stack(groups, [256], torch.device("cpu"))
    index = torch.tensor([0, 1]), torch.tensor([0, 0])
    logp, entropy = common.token_logp(policy, rollouts, index, args)
    logp.square().sum().backward()
    tiled = {name: weight.grad.clone() for name, weight in policy.named_parameters()}
    policy.zero_grad()

    total = torch.zeros(())
    for i, (prompt, row) in enumerate(zip(prompts, tokens, strict=True)):
        logits = policy(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1]
        whole = (logits / args.temperature).log_softmax(-1)
        picked = whole.gather(-1, torch.tensor(row)[:, None])[:, 0]
        torch.testing.assert_close(logp[i, : len(row)], picked, atol=1e-5, rtol=1e-5)
        own_entropy = -(whole.exp() * whole).sum(-1)
        torch.testing.assert_close(entropy[i, : len(row)], own_entropy, atol=1e-5, rtol=1e-5)
        total = total + picked.square().sum()
    total.backward()
    for name, weight in policy.named_parameters():
        torch.testing.assert_close(tiled[name], weight.grad, atol=1e-4, rtol=1e-4)


def test_a_model_that_would_not_load_back_is_not_kept(
    tied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    args = settings(tied_model)
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    merged = engine.merged_weights

    def misnamed(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((name.replace("mlp", "base_layer.mlp"), weight) for name, weight in merged(policy))

    monkeypatch.setattr(engine, "merged_weights", misnamed)
    with pytest.raises(StopRun, match="would not load back"):
        save_model(policy, tokenizer, tmp_path)
    with pytest.raises(SystemExit):
        load_policy(dataclasses.replace(args, lora_rank=4))


def test_a_lora_checkpoint_names_its_base_from_anywhere(
    tied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tied_model.parent)
    policy = load_policy(settings(Path(tied_model.name), lora_rank=4))
    policy.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert AutoPeftModelForCausalLM.from_pretrained(".") is not None


# ------------------------------------------------------------------------------- what is refused


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantised(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "awq", "bits": 4})


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (quantised, "is quantised (awq)"),
        *BROKEN,
        (not_finite, "holds weights that are not finite"),
        (adapter, "is a LoRA adapter"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    damage: Callable[[Path], None],
    why: str,
    tied_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    folder = tmp_path / "model"
    shutil.copytree(tied_model, folder)
    damage(folder)
    with pytest.raises(SystemExit) as stopped:
        load_tokenizer(settings(folder))
        load_policy(settings(folder))
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and said.startswith(f"error: --model {folder}: ") and why in said


@pytest.mark.parametrize(
    ("family", "changes", "flag"),
    [
        *[(family, {}, "--model") for family in REFUSED],
        ("mixtral", {"lora_rank": 4, "lora_dropout": 0.1}, "--lora-rank 4"),
        ("falcon_h1", {"lora_rank": 4}, "--lora-rank 4"),
    ],
)
def test_a_family_that_cannot_be_trained_is_refused(
    family: str,
    changes: dict[str, Any],
    flag: str,
    family_folder: Callable[[str], Path],
    capsys: pytest.CaptureFixture,
):
    with pytest.raises(SystemExit) as stopped:
        load_policy(settings(family_folder(family), **changes))
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and said.startswith(f"error: {flag}")


@needs_vllm
def test_an_engine_that_cannot_run_here_is_refused(
    tied_model: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    args = settings(tied_model, engine="vllm", device="cuda", max_new_tokens=9)
    if torch.cuda.is_available():
        args.device = "cpu"
    policy, tokenizer = load_policy(settings(tied_model)), load_tokenizer(args)
    assert "runs on" in engine.why_not_vllm(args, policy)
    with pytest.raises(SystemExit):
        engine.make_engine(args, policy, tokenizer, [Problem("", "", [1])])
    assert "--engine vllm" in capsys.readouterr().err
    args.engine = "auto"
    made = engine.make_engine(args, policy, tokenizer, [Problem("", "", [1])])
    assert isinstance(made, engine.Transformers)


# ------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
def test_a_run_on_cuda_is_killed_and_goes_on(tiny_model: Path, tmp_path: Path):
    run, script = tmp_path / "run", [sys.executable, "grpo.py"]
    flags = f"--steps 4 --save-every 1 --max-new-tokens 32 --eval-problems 8 --run-dir {run}"
    first = subprocess.Popen([*script, *flags.split(), "--engine", "vllm"], cwd=ROOT)
    while not (run / "checkpoints" / "step-000002").exists():
        assert first.poll() is None
        time.sleep(0.1)
    first.kill()
    first.wait()
    assert subprocess.run([*script, "--resume", str(run)], cwd=ROOT).returncode == 0
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert max(row["logp_gap/mean"] for row in rows[1:]) < 5e-3


ASLEEP = """
import torch, common, engine, grpo
args = grpo.Args(engine="vllm", max_new_tokens=32)
policy, tokenizer = engine.load_policy(args), engine.load_tokenizer(args)
used = lambda: (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 1e9
problems = [common.Problem("", "", data.prompt_tokens(tokenizer, "What is 1+2?"))]
made, asleep = engine.make_engine(args, policy, tokenizer, problems), []
for _ in range(3):
    made.sync(policy)
    awake = used()
    common.roll_out(made, problems, args, (1,))
    made.sleep()
    asleep.append(used())
assert max(asleep) - min(asleep) < 0.1 and awake - asleep[-1] > 10, (awake, asleep)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is there")
def test_an_engine_that_sleeps_gives_its_memory_back(tiny_model: Path):
    """In a process of its own, as every engine on CUDA; needs a card of 40 GB."""
    subprocess.run([sys.executable, "-c", ASLEEP], cwd=ROOT, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep nothing, or do not say")
def test_freed_memory_goes_back_before_the_update():
    """Pieces too small for a mapping of their own, freed with the last one still in use."""
    pages = Path("/proc/self/statm")
    pieces = [torch.ones(2**14) for _ in range(2**12)]  # 64 KiB each, 268 MB
    last = pieces[-1]
    del pieces
    before = int(pages.read_text().split()[1])
    Engine.sleep(None)
    assert (before - int(pages.read_text().split()[1])) * os.sysconf("SC_PAGE_SIZE") > 2e8
    assert last.sum() == 2**14
