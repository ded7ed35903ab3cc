"""TRL's defaults that would change a method, and what the trainer does instead. docs/scale.md."""

import dataclasses
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("trl") is None:
    pytest.skip("TRL is not installed: make scale-test", allow_module_level=True)

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trl_trainer

TINY = Path(__file__).resolve().parents[2] / "tiny"
REWARDS = [1.0, 0.999, 1.0, 0.999]  # a group whose standard deviation is 0.00058
KL = 0.5
SERVER = "http://127.0.0.1:8000"


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> None:
    PartialState(cpu=True)


@pytest.fixture
def config() -> GRPOConfig:
    """The settings of TRL that the trainer makes for a run with a vLLM server."""
    command = ["--model", str(TINY), "--device", "cpu", "--vllm-server", SERVER, "--kl", str(KL)]
    return trl_trainer.trl_config(trl_trainer.parse(command), held_out=8)


DEFAULTS = {  # setting: TRL's default, ours
    "vllm_importance_sampling_correction": (True, False),
    "use_bias_correction_kl": (True, False),
    "vllm_mode": ("colocate", "server"),
    "vllm_server_base_url": (None, SERVER),
    "use_vllm": (False, True),
}


@pytest.mark.parametrize("setting", DEFAULTS)
def test_the_trainer_sets_each_default_that_changes_a_method(
    setting: str, config: GRPOConfig
) -> None:
    default, ours = DEFAULTS[setting]
    fields = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    assert fields[setting] == default
    assert getattr(config, setting) == ours


def test_trl_would_mask_sequences(config: GRPOConfig) -> None:
    """The mode and bound of the correction that the trainer turns off."""
    assert config.vllm_importance_sampling_mode == "sequence_mask"
    assert config.vllm_importance_sampling_clip_max == 3


def test_rollouts_are_samples_of_the_policy(config: GRPOConfig) -> None:
    """None of TRL's settings changes the distribution of the tokens."""
    sampling = {"temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1}
    assert {name: getattr(config, name) for name in sampling} == sampling
    assert not config.min_p
    assert not config.generation_kwargs


@pytest.fixture(scope="module")
def trl_step(tmp_path_factory: pytest.TempPathFactory) -> tuple[GRPOTrainer, dict]:
    """A trainer of TRL with its defaults and a KL term, and its scored rollouts of one group."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = [{"prompt": "1 + 1 = "}] * len(REWARDS)
    trainer = GRPOTrainer(
        str(TINY),
        lambda completions, **_: REWARDS,
        GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            report_to="none",
            beta=KL,
            per_device_train_batch_size=len(REWARDS),
            num_generations=len(REWARDS),
            max_completion_length=8,
        ),
        Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer, trainer._generate_and_score_completions(rows)


def test_trl_adds_another_epsilon_to_the_standard_deviation(trl_step: tuple) -> None:
    """(r - mean) / (std + 1e-4) in TRL; 1e-6 in the scripts and the trainer."""
    rewards = torch.tensor([REWARDS])
    deviations = rewards - rewards.mean()
    theirs = trl_step[1]["advantages"]
    torch.testing.assert_close(theirs, (deviations / (rewards.std() + 1e-4)).flatten())

    args = trl_trainer.parse(["--model", str(TINY), "--device", "cpu"])
    one_token = torch.ones(1, len(REWARDS), 1)
    step = SimpleNamespace(rewards=rewards, mask=one_token.bool())
    step.entropy = step.old_logp = step.ref_logp = one_token
    ours = trl_trainer.methods.method_advantages(args, step)[..., 0]
    torch.testing.assert_close(ours, deviations / (rewards.std() + 1e-6))
    assert (ours / theirs).min() > 1.1


def test_trl_multiplies_the_kl_term_by_the_ratio(trl_step: tuple) -> None:
    """A policy that has moved by 0.3 nats per token from the one that sampled, no advantage."""
    trainer, inputs = trl_step
    mask = inputs["completion_mask"].bool()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    model, length = trainer.model, mask.shape[1]
    scored = trainer._get_per_token_logps_and_entropies(model, ids, attended, length)
    logp = scored[0].detach()
    ref_logp = logp + 0.2 * torch.arange(logp.numel()).view(logp.shape).sin()
    moved = {"old_per_token_logps": logp - 0.3, "ref_per_token_logps": ref_logp}
    moved["advantages"] = torch.zeros(len(REWARDS))
    theirs = trainer._compute_loss(model, inputs | moved).item()

    args = trl_trainer.parse(["--model", str(TINY), "--device", "cpu", "--kl", str(KL)])
    step = SimpleNamespace(mask=mask, old_logp=logp - 0.3, ref_logp=ref_logp)
    step.advantages = torch.zeros(logp.shape)
    ours = trl_trainer.methods.method_loss(args, step, logp, slice(None))[mask].mean().item()
    assert ours > 1e-4
    assert theirs / ours == pytest.approx(math.exp(0.3), rel=1e-4)


@pytest.mark.parametrize(("micro_batch", "passes"), [(4, 32), (6, 32), (128, 1)])
def test_a_micro_batch_is_the_largest_that_divides(tmp_path: Path, micro_batch, passes) -> None:
    """Of 128 rollouts in an update. 6 does not divide them, 4 does."""
    command = ["--model", str(TINY), "--device", "cpu", "--run-dir", str(tmp_path)]
    args = trl_trainer.parse([*command, "--micro-batch", str(micro_batch)])
    config = trl_trainer.trl_config(args, held_out=8)
    assert config.per_device_train_batch_size * passes == 128
    assert config.gradient_accumulation_steps == passes
    assert config.save_total_limit == args.keep_checkpoints == 2


def test_the_models_own_dropout_is_off(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((TINY / "config.json").read_text()) | {"attention_dropout": 0.1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    args = trl_trainer.parse(["--model", str(tmp_path / "model"), "--device", "cpu"])
    expected = {"dtype": torch.float32, "attention_dropout": 0.0}
    assert trl_trainer.methods.model_options(args) == expected


def test_stop_tokens_end_a_response(tmp_path: Path) -> None:
    """Those of the chat template and of --stop-tokens, in generation and in TRL's masks."""
    command = ["--model", str(TINY), "--device", "cpu", "--stop-tokens", "4"]
    command += ["--dataset", f"{TINY}/train.jsonl", "--eval-dataset", f"{TINY}/test.jsonl"]
    trainer = trl_trainer.make_trainer(trl_trainer.parse([*command, "--run-dir", str(tmp_path)]))
    tokenizer = trainer.processing_class
    expected = sorted(tokenizer.convert_tokens_to_ids(["4", "<|im_end|>"]))
    assert trainer.eos_token_ids == trainer.generation_config.eos_token_id == expected
