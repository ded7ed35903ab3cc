"""The policy, its reference and both engines: tokens, log-probabilities, weights."""

import ctypes
import dataclasses
import functools
import importlib.resources
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, byte_tokenizer, needs_vllm, read_metrics
from damage import BROKEN
from test_common import all_of, assert_same_gradients, gradients, plain_scores, random_rollouts
from torch import Tensor, nn

import common
import grpo
from common import Group, Problem, Reference, autocast, base_model, load_policy, load_tokenizer
from infra import hf_engine, lm_head, models, vllm_engine
from infra.cli import StopRun
from infra.hf_engine import HFEngine
from infra.models import merged_weights, save_model
from infra.vllm_engine import CHECKED_SYNCS, Engine, VLLMEngine, make_engine, why_not_vllm
from tools import check_model
from tools.check_model import WeightCheck

CPU = torch.device("cpu")
PROMPTS = [list(b"1+1"), list(b"What is 12 + 34?"), list(b"x"), list(b"so\nthe answer is ")]
ENGINES = {"transformers": HFEngine, "vllm": VLLMEngine}
both_engines = pytest.mark.parametrize(
    "kind", ["transformers", pytest.param("vllm", marks=needs_vllm)]
)
all_models = pytest.mark.parametrize("name", ["tied", "untied", "tiny"])
tied = pytest.mark.parametrize("name", ["tied"])


def settings(folder: Path, **changes: Any) -> grpo.Args:
    changes = {"device": "cpu", "prompts_per_step": 4, "group_size": 8} | changes
    return grpo.Args(model=str(folder), **changes)


class Setup:
    """A model with its engines, made on first use. Each test leaves the weights as they were."""

    def __init__(self, folder: Path, precision: str) -> None:
        shape = {"max_new_tokens": 20, "temperature": 0.8}
        seed = 20261128203000  # more than 32 bits
        self.args = settings(folder, precision=precision, seed=seed, **shape)
        self.policy, self.tokenizer = load_policy(self.args), load_tokenizer(self.args)
        self.weights = {name: w.clone() for name, w in self.policy.state_dict().items()}
        self.engines: dict[str, Engine] = {}

    def engine(self, kind: str, policy: nn.Module | None = None) -> Engine:
        """That engine, holding the policy's weights, past its checks of them."""
        if kind not in self.engines:
            made = ENGINES[kind](self.args, self.policy, self.tokenizer, 200)
            if kind == "vllm":
                dtype = models.precision(self.args)
                self.check = WeightCheck(made.model, self.policy, dtype)
                made.syncs = CHECKED_SYNCS
            self.engines[kind] = made
        self.engines[kind].sync(policy or self.policy)
        return self.engines[kind]

    def lora(self) -> nn.Module:
        return load_policy(dataclasses.replace(self.args, lora_rank=4))


made: dict[str, Setup] = {}


@pytest.fixture
def setup(name, request) -> Iterator[Setup]:
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


def sample(engine: Engine, prompts: list[list[int]] = PROMPTS, *, seeds: int = 6) -> Any:
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


# ------------------------------------------------------------------ generation


@all_models
@both_engines
def test_tokens_and_logps_are_the_policys(setup, kind):
    """Greedy tokens are the most likely ones, so they are the same in both engines."""
    engine = setup.engine(kind)
    responses = engine.generate(PROMPTS, [0] * 4, [40] * 4, 0.0)
    for prompt, (tokens, _) in zip(PROMPTS, responses, strict=True):
        with torch.no_grad():
            logits = setup.policy.eval()(torch.tensor([prompt + tokens])).logits[0]
        assert tokens == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert len(tokens) == 40 or tokens[-1] in engine.stop_tokens
    assert gap(setup.policy, *sample(engine)) < 1e-4


@all_models
@both_engines
def test_a_response_depends_on_its_own_seed_alone(setup, kind):
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
@tied
def test_samples_follow_the_distribution(setup, kind):
    """Chi-square of 4000 responses of one token, each with its own seed.

    The temperature is low: if no token stands out, noise other than Gumbel's looks right too.
    """
    prompt, count, temperature = PROMPTS[0], 4000, 0.3
    responses = setup.engine(kind).generate(
        [prompt] * count, list(range(count)), [1] * count, temperature
    )
    draws = Counter(tokens[0] for tokens, _ in responses)
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
@pytest.mark.parametrize("name", ["tied", "untied", "base"])
def test_responses_end_at_each_stop_token_and_are_then_not_truncated(setup, kind):
    engine, model = setup.engine(kind), Path(setup.args.model).name
    named = {"tied": [256], "untied": [256, 257], "base": [257]}  # <|im_end|>, <|endoftext|>
    assert models.eos_ids(setup.policy, setup.tokenizer) == named[model]
    ends = engine.stop_tokens
    assert ends == {"base": [256, 257]}.get(model, named[model])
    prompts, responses = sample(engine, seeds=16)
    seen = Counter()
    for tokens, logp in responses:
        assert len(tokens) == len(logp)
        assert not set(tokens[:-1]) & set(ends)
        assert len(tokens) == 20 or tokens[-1] in ends
        seen[tokens[-1] if tokens[-1] in ends else "truncated"] += 1
    assert set(seen) == {*ends, "truncated"}, "each way to end must occur"

    groups = [
        Group(Problem("", "", prompt), [tokens], [logp], [""])
        for prompt, (tokens, logp) in zip(prompts, responses, strict=True)
    ]
    rollouts = common.stack(groups, ends, CPU)
    assert rollouts.truncated.sum() == seen["truncated"]
    for p, (tokens, _) in enumerate(responses):
        assert rollouts.tokens[p, 0][rollouts.mask[p, 0]].tolist() == tokens  # EOS included


@both_engines
@tied
def test_further_stop_tokens(setup, kind, capsys):
    """They end a response, which is otherwise the same, and are printed with the model's own."""
    engine = setup.engine(kind)
    _, before = sample(engine, seeds=16)
    often = Counter(token for tokens, _ in before for token in tokens if token < 94)  # ASCII
    [(further, _)] = often.most_common(1)
    name = setup.tokenizer.convert_ids_to_tokens(further)
    text = setup.tokenizer.decode([further])
    capsys.readouterr()
    args = dataclasses.replace(setup.args, stop_tokens=(text,))
    engine.set_tokenizer(args, setup.policy, setup.tokenizer)
    try:
        assert (
            capsys.readouterr().err == f"{args.model}: a response stops at {name} or <|im_end|>\n"
        )
        after = sample(engine, seeds=16)[1]
    finally:
        engine.set_tokenizer(setup.args, setup.policy, setup.tokenizer)
    assert engine.stop_tokens == [256]
    for (tokens, _), (complete, _) in zip(after, before, strict=True):
        end = complete.index(further) + 1 if further in complete else len(complete)
        assert tokens == complete[:end]


def test_a_model_without_a_stop_token(tied_model, capsys):
    args = settings(tied_model, max_new_tokens=9)
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    policy.generation_config.eos_token_id = tokenizer.eos_token = tokenizer.chat_template = None
    assert HFEngine(args, policy, tokenizer, 200).stop_tokens == []
    line = f"{tied_model}: a response stops at --max-new-tokens 9 alone"
    assert line in capsys.readouterr().err.splitlines()
    # An id that the tokenizer lacks, as a generation config of another tokenizer has it.
    policy.generation_config.eos_token_id = 9999
    assert HFEngine(args, policy, tokenizer, 200).stop_tokens == [9999]
    assert line in capsys.readouterr().err.splitlines()


@needs_vllm
def test_temperatures_that_vllm_takes():
    """infra.cli rejects all others before anything is loaded."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    for temperature in (0.01, 1.0, 2.0):
        assert SamplingParams(temperature=temperature).temperature == temperature
    assert SamplingParams(temperature=0.0099).temperature == 0.01
    with pytest.raises(VLLMValidationError):
        SamplingParams(temperature=2.01)


@both_engines
@tied
def test_each_response_has_its_own_length_limit(setup, kind):
    """And is the beginning of what it would be under a higher limit."""
    engine, lengths = setup.engine(kind), [1, 20, 7, 3]
    short, long = (engine.generate(PROMPTS, [5, 6, 7, 8], n, 1.0) for n in (lengths, [20] * 4))
    for (tokens, logp), (complete, _), length in zip(short, long, lengths, strict=True):
        assert tokens == complete[:length] and len(logp) == len(tokens)


def test_sample_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.0, 0.2]).log().expand(7, 4)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.99, 1.0])
    token, logp = hf_engine.sample(logits, 1.0, uniform)
    assert token.tolist() == [0, 0, 1, 1, 3, 3, 3]  # never one of probability 0
    expected = torch.tensor([0.5, 0.5, 0.3, 0.3, 0.2, 0.2, 0.2]).log()
    torch.testing.assert_close(logp, expected)
    token, logp = hf_engine.sample(logits, 0.5, uniform)  # squared: 25, 9 and 4 of 38
    assert token.tolist() == [0, 0, 0, 1, 1, 3, 3]
    assert logp[3].item() == pytest.approx(math.log(9 / 38))
    token, logp = hf_engine.sample(logits, 0.0, uniform)
    assert token.tolist() == [0] * 7 and logp[0].item() == pytest.approx(math.log(0.5))


@tied
def test_transformers_samples_in_batches_of_a_steps_rollouts(setup, monkeypatch):
    engine = setup.engine("transformers")
    assert engine.batch_size == setup.args.prompts_per_step * setup.args.group_size
    complete, generate_batch = sample(engine)[1], Mock(wraps=engine.generate_batch)
    monkeypatch.setattr(engine, "generate_batch", generate_batch)
    monkeypatch.setattr(engine, "batch_size", 10)
    parts = sample(engine)[1]
    assert [len(call.args[0]) for call in generate_batch.mock_calls] == [10, 10, 4]
    assert [tokens for tokens, _ in parts] == [tokens for tokens, _ in complete]


@tied
@pytest.mark.parametrize("prompts", [PROMPTS, [[0, 120], [120]], [[120], [121]]])
def test_transformers_computes_a_prompt_once_for_all_its_responses(setup, prompts):
    """Except its last token, from which each response starts. A prompt that has one token more,
    the token that pads the other, is another prompt."""
    engine, computed = setup.engine("transformers"), []
    embedding = setup.policy.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, given: computed.append(given[0].shape))
    given, responses = sample(engine, prompts)
    hook.remove()
    assert gap(setup.policy, given, responses) < 1e-4
    before = max(1, *(len(prompt) - 1 for prompt in prompts))  # or one token of padding
    assert computed[:3] == [(len(prompts), before), (len(given), 1), (len(given), 1)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@both_engines
@tied
def test_a_progress_bar_is_drawn_only_on_a_terminal(setup, kind, monkeypatch):
    engine, module = setup.engine(kind), {"transformers": hf_engine, "vllm": vllm_engine}[kind]
    at_once = functools.partial(module.progress_bar, delay=0)
    monkeypatch.setattr(module, "progress_bar", at_once)
    drawn, responses = {}, {}
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        responses[type(stream)] = sample(engine)
        drawn[type(stream)] = stream.getvalue()
    assert not drawn[io.StringIO] and drawn[Terminal]
    assert responses[io.StringIO] == responses[Terminal]


# ------------------------------------------------------------------ weights


@all_models
@both_engines
def test_sync_is_exact(setup, kind):
    prompts = [*PROMPTS, list(b"1 + 2 = 3, " * 15)]  # the last fills a block of the prefix cache
    engine = setup.engine(kind)
    perturb(setup.policy)
    if kind == "vllm":
        before = gap(setup.policy, *sample(engine, prompts))
        assert before > 0.01, "the engine must not have the new weights before sync"
    assert gap(setup.policy, *sample(setup.engine(kind), prompts)) < 1e-4


@all_models
@both_engines
def test_sync_merges_lora(setup, kind):
    policy = setup.lora()
    perturb(policy)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    responses = sample(setup.engine(kind, policy))
    assert gap(policy, *responses) < 1e-4
    assert gap(setup.policy, *responses) > 0.01
    after = policy.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(module.merged for module in policy.modules() if hasattr(module, "merged"))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_reference_stays_what_the_policy_was(tied_model, lora_rank):
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
def test_in_bfloat16_the_reference_takes_half_the_memory_and_changes_no_value(model, request):
    args = settings(request.getfixturevalue(model), precision="bfloat16")
    policy = load_policy(args)
    ids = torch.arange(20)[None]
    with torch.no_grad(), autocast(args), Reference(policy, args)() as frozen:
        assert torch.equal(frozen(ids).logits, policy(ids).logits)
    half = {name for name, weight in frozen.named_parameters() if weight.dtype == torch.bfloat16}
    assert any("proj" in name for name in half)
    assert not any("norm" in name or "embed" in name for name in half)
    assert ("lm_head.weight" in half) == (model == "untied_model")
    assert not any(weight.requires_grad for weight in frozen.parameters())


def test_master_weights_are_float32(tied_model):
    policy = load_policy(settings(tied_model, precision="bfloat16"))
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    adapted = load_policy(settings(tied_model, precision="bfloat16", lora_rank=4))
    trained = {weight.dtype for weight in adapted.parameters() if weight.requires_grad}
    assert trained == {torch.float32}


# ------------------------------------------------------------------ stale weights


def withhold(patch: pytest.MonkeyPatch, engine: VLLMEngine, old: dict[str, Tensor], part: str):
    """From now on a sync delivers the old values of the weights whose name contains `part`."""
    weights = engine.weights

    def without_part(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((name, old[name] if part in name else w) for name, w in weights(policy))

    patch.setattr(engine, "weights", without_part)


@needs_vllm
@pytest.mark.parametrize("name", ["tied", "untied", "tied_bfloat16", "untied_bfloat16"])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_weights_that_did_not_arrive_stop_the_run(setup, adapted, monkeypatch):
    """By the log-probabilities of the step's rollouts, whichever sync it was."""
    policy = setup.lora() if adapted else setup.policy
    vllm = setup.engine("vllm", policy)
    perturb(policy)

    def step() -> dict[str, float]:
        vllm.sync(policy)
        problems = [Problem("", "", prompt) for prompt in PROMPTS]
        groups = common.roll_out(vllm, problems, setup.args, (1,))
        rollouts = common.stack(groups, vllm.stop_tokens, CPU)
        common.score_rollouts(policy, None, rollouts, setup.args)
        return common.check_engine(rollouts, setup.args)

    with monkeypatch.context() as patch:
        patch.setattr(vllm.llm, "collective_rpc", lambda *_, **__: None)
        with pytest.raises(StopRun, match="--max-logp-gap"):
            step()
    assert step()["logp_gap/max"] < (1e-4 if setup.args.precision == "float32" else 0.2)


@needs_vllm
@pytest.mark.parametrize("name", ["tied", "untied_bfloat16"])
def test_norm_weights_that_did_not_arrive_stop_the_first_five_syncs(setup, monkeypatch):
    vllm = setup.engine("vllm")
    perturb(setup.policy)
    monkeypatch.setattr(vllm, "syncs", 0)
    with monkeypatch.context() as patch:
        withhold(patch, vllm, setup.weights, "layers.1.post_attention_layernorm")
        stale = "stale weights: model.layers.1.post_attention_layernorm.weight differs"
        for _ in range(CHECKED_SYNCS):
            with pytest.raises(StopRun, match=stale):
                vllm.sync(setup.policy)
        vllm.sync(setup.policy)  # no longer checked
    monkeypatch.setattr(vllm, "syncs", 0)
    vllm.sync(setup.policy)
    monkeypatch.setattr(vllm.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(StopRun, match="did not reset its prefix cache"):
        vllm.sync(setup.policy)


@needs_vllm
@pytest.mark.parametrize("name", ["untied", "untied_bfloat16"])
@pytest.mark.parametrize(
    ("part", "stale"),
    [
        ("lm_head", ["lm_head.weight"]),
        ("layers.1.self_attn.v_proj", ["model.layers.1.self_attn.qkv_proj.weight"]),
        ("up_proj", [f"model.layers.{i}.mlp.gate_up_proj.weight" for i in (0, 1)]),
        ("embed", ["model.embed_tokens.weight"]),
    ],
)
def test_one_weight_that_did_not_arrive_is_called_stale(setup, part, stale, monkeypatch):
    vllm = setup.engine("vllm")
    perturb(setup.policy)
    withhold(monkeypatch, vllm, setup.weights, part)
    vllm.sync(setup.policy)
    assert setup.check.stale(setup.policy) == stale


@needs_vllm
@pytest.mark.parametrize("name", ["tiny", "tied", "tied_bfloat16"])
def test_a_tied_head_is_part_of_each_sync(setup, monkeypatch):
    """`named_parameters` leaves it out. The CPU build multiplies by a copy of its own in float32;
    in bfloat16 that depends on the processor."""
    vllm = setup.engine("vllm")
    assert "lm_head.weight" not in dict(setup.policy.named_parameters())
    for _ in range(2):
        perturb(setup.policy)
        handed = dict(vllm.weights(setup.policy))
        assert handed["lm_head.weight"].equal(setup.policy.get_input_embeddings().weight)
        vllm.sync(setup.policy)
        assert not setup.check.stale(setup.policy)
    if not torch.cuda.is_available() and setup.args.precision == "float32":
        perturb(setup.policy)
        monkeypatch.setattr(vllm, "not_in_vllm", {"lm_head.weight"})
        vllm.sync(setup.policy)
        assert setup.check.stale(setup.policy) == ["lm_head.weight"]


@needs_vllm
@tied
def test_adapters_are_merged_once_per_sync(setup, monkeypatch):
    policy = setup.lora()
    vllm, counted = setup.engine("vllm", policy), Mock(wraps=merged_weights)
    monkeypatch.setattr(vllm_engine, "merged_weights", counted)
    vllm.sync(policy)
    counted.assert_called_once_with(policy)


@needs_vllm
@pytest.mark.parametrize(
    ("part", "held", "stale"),
    [
        ("nothing", 10, "none"),
        ("down_proj", 8, ", ".join(f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1))),
        ("", 0, "lm_head.weight, model.embed_tokens.weight, model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_check_model_names_stale_weights(part, held, stale, tied_model, capsys, monkeypatch):
    """part: of the names of the weights that do not arrive; empty: none of them does."""
    saved, make = dict(load_policy(settings(tied_model)).state_dict()), common.make_engine

    def broken(*args: Any) -> Engine:
        engine = make(*args)
        withhold(monkeypatch, engine, saved, part)
        return engine

    monkeypatch.setattr(common, "make_engine", broken)
    code = check_model.main(check_model.Args(model=str(tied_model), device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    gaps = [line.split() for line in lines if line.startswith("logp_gap/")]
    assert f"vLLM holds the policy's values for {held} of 10 weights" in lines
    assert f"\nstale: {stale}" in "\n".join(lines)
    assert code == (0 if held == 10 else 1)
    assert [float(gap) < 1e-4 for _, gap in gaps] == ([True] * 2 if held == 10 else [])
    assert lines[0].startswith("vLLM holds stale weights: ") == (held == 0)


def test_check_model_reports_errors_as_one_line(tmp_path):
    command = [sys.executable, "tools/check_model.py", "--device", "cpu", "--model", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: --model {tmp_path}: cannot be loaded")


# ------------------------------------------------------------------ families

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 256}
GROUPED = SIZES | {"num_key_value_heads": 1}
EXPERTS = GROUPED | {"num_experts_per_tok": 2}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
GEMMA = {"head_dim": 32, "final_logit_softcapping": 3.0, "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED),
    "phi3": ("Phi3", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "gemma3": ("Gemma3Text", GROUPED | {"head_dim": 32, "sliding_window": 8}),
    "opt": ("OPT", SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "gpt_neox": ("GPTNeoX", SIZES),  # vLLM runs transformers' own class, as for the next two
    "olmo2": ("Olmo2", GROUPED),
    "smollm3": ("SmolLM3", GROUPED),
    "gemma2": ("Gemma2", GROUPED | GEMMA),
    "granite": ("Granite", GROUPED | {"logits_scaling": 8.0}),
    "cohere": ("Cohere", GROUPED | {"logit_scale": 0.25}),
    "lfm2": ("Lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "falcon_h1": ("FalconH1", GROUPED | MAMBA | {"head_dim": 32, "lm_head_multiplier": 0.3}),
    "mamba": ("Mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"moe_intermediate_size": 32, "num_experts": 4}),
    "mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 4, "sliding_window": None}),
}
ROUTER = re.compile(r"\.(gate|router)\.weight")
MULTIMODAL = {
    "gemma3": {"mm_tokens_per_image": 4, "image_token_index": 258},
    "qwen3_5": {"image_token_id": 258, "video_token_id": 258},
}
REJECTED = {
    "phi": ("Phi", SIZES),  # a bias in its LM head
    "hyperclovax": ("HyperCLOVAX", GROUPED | {"logits_scaling": 0.3}),  # multiplies by it
    "recurrent_gemma": ("RecurrentGemma", GROUPED | {"lru_width": 64, "logits_soft_cap": 3.0}),
}
OTHERS = {"phimoe": ("Phimoe", EXPERTS | {"num_local_experts": 4})}
RECURRENT = ("lfm2", "falcon_h1", "mamba")
NO_LORA = {("falcon_h1", 4), ("mamba", 4)}
WITHOUT_VLLM = {
    **dict.fromkeys(("qwen3_moe", "mixtral"), "experts"),
    **dict.fromkeys(RECURRENT, "recurrent state"),
}


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory) -> Callable[[str], Path]:
    import transformers

    @functools.cache
    def build(family: str) -> Path:
        folder = tmp_path_factory.mktemp("families") / family
        name, sizes = (FAMILIES | REJECTED | OTHERS)[family]
        tokenizer = byte_tokenizer("<|endoftext|>")
        ends = {"eos_token_id": 256, "pad_token_id": 257, "bos_token_id": None}
        config = getattr(transformers, f"{name}Config")
        config = config(vocab_size=len(tokenizer), initializer_range=0.15, **ends, **sizes)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return build


def multimodal_folder(family: str, parent: Path) -> Path:
    """A random model with a text and a vision part."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vocabulary = {"vocab_size": 259, "eos_token_id": 256, "pad_token_id": 257}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text = GROUPED | {"head_dim": 32, "num_hidden_layers": 4} | linear | vocabulary
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_heads": 2}
    vision |= {"num_hidden_layers": 1, "depth": 1, "image_size": 28, "patch_size": 14}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 16}
    parts = {"text_config": text, "vision_config": vision}
    config = AutoConfig.for_model(family, **parts, **MULTIMODAL[family])
    AutoModelForImageTextToText.from_config(config).save_pretrained(parent / family)
    byte_tokenizer("<|endoftext|>").save_pretrained(parent / family)
    return parent / family


@pytest.mark.parametrize(
    ("family", "lora_rank"),
    [(f, rank) for f in FAMILIES for rank in (0, 4) if (f, rank) not in NO_LORA],
)
@both_engines
def test_a_family_is_rolled_out_synced_and_saved(family, lora_rank, kind, family_folder, tmp_path):
    args = settings(family_folder(family), lora_rank=lora_rank, max_new_tokens=20, engine=kind)
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    assert models.is_recurrent(policy) == (family in RECURRENT)
    if kind == "vllm" and family in WITHOUT_VLLM:
        assert WITHOUT_VLLM[family] in why_not_vllm(args, policy)
        args.engine = "auto"
    engine = make_engine(args, policy, tokenizer, [Problem("", "", list(range(80)))])
    in_vllm = kind == "vllm" and family not in WITHOUT_VLLM
    assert isinstance(engine, ENGINES["vllm" if in_vllm else "transformers"])
    if kind == "vllm" and not in_vllm:
        return  # the rest is the case of the other engine
    if in_vllm:
        check = WeightCheck(engine.model, policy, torch.float32)
        embedding = any(name.endswith("embed_tokens.weight") for name in check.compared)
        assert embedding or family.startswith("gpt")
    engine.sync(policy)
    perturb(policy)
    if in_vllm:  # on a GPU, sleep discards all its weights
        for weight in engine.model.parameters():
            weight.data.fill_(math.nan)
    engine.sync(policy)
    assert gap(policy, *sample(engine, seeds=2)) < 1e-4
    assert not in_vllm or (check.compared and not check.stale(policy))

    save_model(policy, tokenizer, tmp_path)
    again = load_policy(dataclasses.replace(args, model=str(tmp_path), lora_rank=0))
    theirs = plain_logp(again, PROMPTS[1], PROMPTS[3], 1.0)
    torch.testing.assert_close(
        theirs, plain_logp(policy, PROMPTS[1], PROMPTS[3], 1.0), atol=1e-4, rtol=0
    )
    policy.save_pretrained(tmp_path / "checkpoint")
    fresh = load_policy(args)
    models.load_weights(fresh, tmp_path / "checkpoint")
    saved = policy.state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in fresh.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "phimoe"])
def test_lora_leaves_routers_alone(family, family_folder):
    """It adapts attention and experts that peft knows. Phi's router is a plain linear layer."""
    policy = load_policy(settings(family_folder(family), lora_rank=4))
    with models.Reference(policy, settings(family_folder(family)))():
        pass  # peft unfreezes all adapters after it
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert any("q_proj" in name for name in trained)
    assert not any({"gate", "router"} & set(name.split(".")) for name in trained)
    assert any(".experts." in name for name in trained) == (family != "phimoe")
    perturb(policy)
    without_adapters = load_policy(settings(family_folder(family)))
    models.freeze_routers(without_adapters)
    assert all(weight.requires_grad for weight in without_adapters.parameters())
    before = without_adapters.state_dict()
    routers = {name: weight for name, weight in merged_weights(policy) if ROUTER.search(name)}
    assert len(routers) == 2
    assert all(weight.equal(before[name]) for name, weight in routers.items())


@pytest.mark.parametrize(
    ("family", "saved", "printed"),
    [
        (
            "gemma3",
            "Gemma3ForConditionalGeneration",
            "its text part is trained, and the whole model is saved",
        ),
        ("qwen3_5", "Qwen3_5ForCausalLM", "only its text part is loaded, trained and saved"),
    ],
)
def test_a_multimodal_folder(family, saved, printed, tmp_path, capsys):
    """The part that is printed is saved."""
    folder = multimodal_folder(family, tmp_path)
    args = settings(folder, max_new_tokens=8)
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    assert f"--model {folder} is multimodal: {printed}" in capsys.readouterr().err.splitlines()
    assert models.context_limit(args) == policy.config.get_text_config().max_position_embeddings
    save_model(policy, tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == [saved]


def test_tekken_json_does_not_replace_the_chat_template(family_folder, tmp_path):
    """Mistral's folders have it, and vLLM installs mistral-common."""
    pytest.importorskip("mistral_common")
    folder = shutil.copytree(family_folder("mistral"), tmp_path / "mistral")
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    tekken = importlib.resources.files("mistral_common") / "data" / "tekken_240911.json"
    (folder / "tekken.json").write_bytes(tekken.read_bytes())
    assert load_tokenizer(settings(folder)).chat_template


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_that_ends_a_response_is_not_in_its_text(special, tied_model, tmp_path):
    folder = shutil.copytree(tied_model, tmp_path / "answers")
    args = settings(folder, stop_tokens=("</answer>", "}"))
    tokenizer = load_tokenizer(settings(folder))
    tokenizer.add_tokens(["</answer>"], special_tokens=special)
    end = tokenizer.convert_tokens_to_ids("</answer>")
    engine = Engine(args, load_policy(args), tokenizer)
    text, brace = tokenizer.encode("x=7"), tokenizer.encode("}")
    shown = "" if special else "</answer>"
    responses = [[*text, end], [*text, *brace], [*text, end, *brace], [end]]
    assert engine.decode(responses) == ["x=7", "x=7}", f"x=7{shown}}}", ""]


@needs_vllm
@pytest.mark.skipif(importlib.util.find_spec("torchvision"), reason="torchvision is installed")
@pytest.mark.parametrize(
    ("family", "why"), [("gemma3", "for which vLLM needs torchvision"), ("qwen3_5", "recurrent")]
)
def test_auto_prints_why_it_does_not_use_vllm(family, why, tmp_path, capsys, rejection):
    args = settings(multimodal_folder(family, tmp_path), max_new_tokens=8)
    policy, tokenizer = load_policy(args), load_tokenizer(args)
    problems = [Problem("", "", [1])]
    capsys.readouterr()
    assert isinstance(make_engine(args, policy, tokenizer, problems), HFEngine)
    printed, stops = capsys.readouterr().err.splitlines()
    assert printed.startswith("--engine auto: transformers is used, because ") and why in printed
    assert "a response stops at" in stops and args.engine == "transformers"
    args.engine = "vllm"
    line = rejection(make_engine, args, policy, tokenizer, problems)
    assert line.startswith("--engine vllm: ") and why in line


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "falcon_h1", "gpt2"])
def test_the_tiled_head_is_the_models_own(family, family_folder, monkeypatch):
    """Log-probabilities, entropy and gradient, against the model's own logits."""
    args = settings(family_folder(family), temperature=0.7)
    monkeypatch.setattr(lm_head, "TILE_SIZE", 64 * 12)  # several tiles
    policy, rollouts = load_policy(args), random_rollouts()
    index = all_of(rollouts)
    logp, entropy = common.token_logp(policy, rollouts, index, args)
    ours = gradients(policy, logp.square().sum())
    expected, expected_entropy, _ = plain_scores(policy, rollouts, args.temperature)
    torch.testing.assert_close(logp, expected[index], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy[index], atol=1e-5, rtol=1e-5)
    assert_same_gradients(ours, gradients(policy, expected.square().sum()))


def test_a_model_that_would_not_load_is_not_kept(tied_model, tmp_path, monkeypatch):
    args = settings(tied_model)
    policy, tokenizer = load_policy(args), load_tokenizer(args)

    def misnamed(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, weight in merged_weights(policy):
            yield name.replace("mlp", "base_layer.mlp"), weight

    monkeypatch.setattr(models, "merged_weights", misnamed)
    with pytest.raises(StopRun, match="would not load"):
        save_model(policy, tokenizer, tmp_path)
    with pytest.raises(SystemExit):
        load_policy(dataclasses.replace(args, lora_rank=4))


def test_a_lora_checkpoint_loads_from_any_directory(tied_model, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tied_model.parent)
    policy = load_policy(settings(Path(tied_model.name), lora_rank=4))
    policy.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert AutoPeftModelForCausalLM.from_pretrained(".") is not None


# ------------------------------------------------------------------ rejections


def quantised(folder: Path) -> None:
    path = folder / "config.json"
    quantization = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantization))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (quantised, "is quantised (awq)"),
        *BROKEN,
        (adapter, "is a LoRA adapter"),
    ],
)
def test_a_model_that_cannot_be_trained_is_rejected(damage, why, tied_model, tmp_path, rejection):
    folder = tmp_path / "model"
    shutil.copytree(tied_model, folder)
    damage(folder)
    args = settings(folder)
    line = rejection(lambda: (load_tokenizer(args), load_policy(args)))
    assert line.startswith(f"--model {folder}: ") and why in line


@pytest.mark.parametrize(
    ("family", "changes", "flag"),
    [
        *[(family, {}, "--model") for family in REJECTED],
        ("mixtral", {"lora_rank": 4, "lora_dropout": 0.1}, "--lora-rank 4"),
        ("falcon_h1", {"lora_rank": 4}, "--lora-rank 4"),
        ("mamba", {"lora_rank": 4}, "--lora-rank 4"),
    ],
)
def test_a_family_that_cannot_be_trained_is_rejected(
    family, changes, flag, family_folder, rejection
):
    args = settings(family_folder(family), **changes)
    assert rejection(load_policy, args).startswith(flag)


@needs_vllm
def test_an_engine_that_cannot_run_here_is_rejected(tied_model, rejection):
    args = settings(tied_model, engine="vllm", max_new_tokens=9)
    args.device = "cpu" if torch.cuda.is_available() else "cuda"
    policy, tokenizer = load_policy(settings(tied_model)), load_tokenizer(args)
    problems = [Problem("", "", [1])]
    assert "runs on" in why_not_vllm(args, policy)
    line = rejection(make_engine, args, policy, tokenizer, problems)
    assert line.startswith("--engine vllm: the installed vLLM runs on")
    args.engine = "auto"
    assert isinstance(make_engine(args, policy, tokenizer, problems), HFEngine)


# ------------------------------------------------------------------ memory and CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_killed_run_on_cuda_is_resumed(tiny_model, tmp_path):
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
import torch, common, grpo
args = grpo.Args(engine="vllm", max_new_tokens=32)
policy, tokenizer = common.load_policy(args), common.load_tokenizer(args)
used = lambda: (torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 1e9
problems = [common.Problem("", "", tokenizer.encode("What is 1+2?"))]
engine, asleep = common.make_engine(args, policy, tokenizer, problems), []
for _ in range(3):
    engine.sync(policy)
    awake = used()
    common.roll_out(engine, problems, args, (1,))
    engine.sleep()
    asleep.append(used())
share = args.gpu_memory * torch.cuda.mem_get_info()[1] / 1e9
assert max(asleep) - min(asleep) < 0.1 and awake - asleep[-1] > share / 2, (awake, asleep)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
def test_a_sleeping_engine_frees_its_memory(tiny_model):
    """In a process of its own, as every engine on CUDA."""
    subprocess.run([sys.executable, "-c", ASLEEP], cwd=ROOT, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_returned_before_the_update():
    """Pieces too small for a mapping of their own, freed with the last one still in use."""
    pages = Path("/proc/self/statm")
    pieces = [torch.ones(2**14) for _ in range(2**12)]  # 64 KiB each, 268 MB
    last = pieces[-1]
    del pieces
    before = int(pages.read_text().split()[1])
    Engine.sleep(SimpleNamespace(is_large=True))
    assert (before - int(pages.read_text().split()[1])) * os.sysconf("SC_PAGE_SIZE") > 2e8
    assert last.sum() == 2**14


@pytest.mark.parametrize(("outputs", "asked"), [(10**4, 0), (10**4 + 1, 1)])
def test_only_a_large_model_returns_memory(outputs, asked, monkeypatch):
    """Large: above 10^8 parameters."""
    libc = Mock()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(Engine, "set_tokenizer", lambda *_: None)
    policy = torch.nn.Linear(10**4, outputs, bias=False, device="meta")
    Engine(None, policy, None).sleep()
    assert libc.malloc_trim.call_count == asked
