"""docs/memory.md is what docs/memory.py computes, and the shapes are those of Qwen2.5."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "docs" / "memory.py"
spec = importlib.util.spec_from_file_location("memory", PATH)
memory = sys.modules["memory"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)


def model(name: str) -> "memory.Model":
    return next(m for m in memory.MODELS if m.name == name)


def test_the_page_shows_what_the_script_computes():
    assert memory.PAGE.read_text(encoding="utf-8") == memory.filled_page(), (
        "docs/memory.md is stale: python docs/memory.py --write"
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [("0.5B", 494032768), ("1.5B", 1543714304), ("3B", 3085938688), ("7B", 7615616512)],
)
def test_parameters_are_those_of_the_published_models(name: str, count: int):
    assert model(name).parameters == count


def test_full_fine_tuning_keeps_16_bytes_a_parameter():
    shape = model("1.5B")
    settings = memory.Settings(lora=False)
    fixed = memory.update_bytes(shape, settings) - 16 * shape.parameters
    layers = memory.activations(shape, lora=False)[0] * 28 * 16384
    assert 0 < fixed - layers < 10e9  # bf16 copies of the weights, a chunk of logits, CUDA


def test_each_setting_that_costs_saves():
    shape = model("7B")
    plain = memory.Settings(lora=False, reference=True)
    for change in (
        {"checkpointing": True},
        {"eight_bit": True},
        {"token_budget": 8192},
        {"reference": False},
        {"lora": True},
    ):
        less = memory.Settings(**vars(plain) | change)
        assert memory.update_bytes(shape, less) < memory.update_bytes(shape, plain), change


def test_what_is_said_to_fit_fits():
    for lora in (False, True):
        for gpu in memory.GPUS:
            chosen = memory.gentlest(model("3B"), gpu, lora, reference=False)
            assert chosen is None or memory.peak(model("3B"), chosen) <= gpu * 1e9
