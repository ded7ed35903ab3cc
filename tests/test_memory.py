"""docs/memory.md is what docs/memory.py computes, and that is what models and runs really hold."""

import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

import memory
from memory import GPUS, KINDS, MODELS, Model, Settings

from infra.models import Reference

SHAPES = {model.name: model for model in MODELS}


def on_cpu(model: Model, lora: bool) -> torch.nn.Module:
    """The model with memory for its weights, whatever is in it."""
    policy = model.build(lora).to_empty(device="cpu")
    policy.tie_weights()
    return policy


def test_the_page_shows_what_the_script_computes():
    assert memory.PAGE.read_text(encoding="utf-8") == memory.filled_page(), (
        "docs/memory.md is stale: python docs/memory.py --write"
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [("0.5B", 494032768), ("1.5B", 1543714304), ("3B", 3085938688), ("7B", 7615616512)],
)
def test_parameters_are_those_of_the_published_models(name: str, count: int):
    assert SHAPES[name].parameters == count


@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_is_as_large_as_a_real_one(tied: bool):
    model = Model("small", 64, 2, 4, 2, 128, 500, tied)
    args = SimpleNamespace(precision="bfloat16", device="cpu")
    weights = Reference(on_cpu(model, lora=False), args).copy.parameters()
    assert model.reference == sum(weight.nbytes for weight in weights)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_takes_the_room_that_is_said(kind: str, tmp_path: Path):
    settings = Settings(Model("small", 256, 2, 4, 2, 512, 2000, True), kind)
    policy = on_cpu(settings.model, lora=kind == "lora")
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(weights)
    optimizer.step()
    policy.save_pretrained(tmp_path / "checkpoint")
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint" / "trainer.pt")
    base = policy.merge_and_unload() if kind == "lora" else policy
    base.save_pretrained(tmp_path / "model")
    for folder, size in zip(("checkpoint", "model"), settings.saved, strict=True):
        on_disk = sum(file.stat().st_size for file in (tmp_path / folder).iterdir())
        assert size <= on_disk < size + 100_000, folder  # names, shapes, configurations


def test_full_fine_tuning_keeps_16_bytes_a_parameter():
    settings = Settings(SHAPES["1.5B"])
    fixed = settings.update - 16 * settings.model.parameters
    layers = memory.activations(settings.model, lora=False)[0] * 28 * 8192
    assert 0 < fixed - layers < 10e9  # bf16 copies of the weights, a tile of logits, CUDA


def test_each_setting_that_costs_saves():
    plain = {"model": SHAPES["7B"], "kind": "reference"}
    for change in (
        {"checkpointing": True},
        {"token_budget": 4096},
        {"kind": "full"},
        {"kind": "lora"},
    ):
        assert Settings(**plain | change).update < Settings(**plain).update, change


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_to_fit_fits(kind: str):
    for model, gpu in itertools.product(MODELS, GPUS):
        chosen = memory.gentlest(model, kind, gpu)
        if chosen is None:
            continue
        assert chosen.update <= gpu * 1e9
        flag = re.search("--gpu-memory ([0-9.]+)", chosen.flags(gpu))
        share = float(flag[1]) if flag else memory.GPU_MEMORY
        assert model.engine <= share * gpu * 1e9 <= gpu * 1e9 - chosen.resident - memory.RESERVED
        # Scoring: one layer at a time, of four times as many tokens.
        of_token, of_weights = memory.activations(model, kind == "lora")
        layer = 4 * chosen.token_budget * of_token + of_weights * model.num_hidden_layers
        score = chosen.resident + layer + memory.LOGITS + memory.RESERVED
        assert score <= max(chosen.update, chosen.rollout)


def test_the_main_case_fits_with_room():
    settings = Settings(SHAPES["1.5B"], "reference")
    assert settings.flags(80) == "as it is"
    assert settings.update < 66e9


def test_what_a_gpu_has_measured_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "MEASURED", tmp_path / "gpu.json")
    assert "measured" not in memory.tables()
    sizes = {"memory": {"reference": {"1.5B": [32.0, 11.5, 60.2]}}}
    memory.MEASURED.write_text(json.dumps(sizes))
    lines = [line for line in memory.tables().splitlines() if line.endswith("| 34, 12, 65 |")]
    assert [line[:9] for line in lines] == ["| 1.5B | "]
