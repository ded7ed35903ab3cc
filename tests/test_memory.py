"""docs/memory.md and the table of docs/scale.md are what docs/memory.py computes, and the bytes are
what models and runs really hold."""

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
from memory import CASES, GPUS, KINDS, LARGE, MODELS, Cluster, Model, Settings

from infra.models import Reference

SHAPES = {model.name: model for model in (*MODELS, *LARGE)}


def on_cpu(model: Model, lora: bool) -> torch.nn.Module:
    """The model with memory for its weights, whatever is in it."""
    policy = model.build(lora).to_empty(device="cpu")
    policy.tie_weights()
    return policy


@pytest.mark.parametrize("page", [memory.PAGE, memory.SCALE_PAGE], ids=lambda page: page.name)
def test_the_page_shows_what_the_script_computes(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- results:memory -->") == 1
    assert text == memory.filled_page(page), "stale: python docs/memory.py --write"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("0.5B", 494032768),
        ("1.5B", 1543714304),
        ("3B", 3085938688),
        ("7B", 7615616512),
        ("32B", 32763876352),
        ("72B", 72706203648),
    ],
)
def test_parameters_are_those_of_the_published_models(name, count):
    assert SHAPES[name].parameters == count


@pytest.mark.parametrize("tied", [True, False])
def test_the_reference_is_as_large_as_a_real_one(tied):
    model = Model("small", 64, 2, 4, 2, 128, 500, tied)
    args = SimpleNamespace(precision="bfloat16", device="cpu")
    weights = Reference(on_cpu(model, lora=False), args).copy.parameters()
    assert model.reference == sum(weight.nbytes for weight in weights)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_takes_the_room_that_is_said(kind, tmp_path):
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
def test_what_is_said_to_fit_fits(kind):
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


def test_a_step_of_72b_on_64_gpus():
    """Worked by hand: 168 x 8 rollouts of 512 + 2,048 tokens, 56 GPUs train, 8 serve."""
    weights, tokens = 72706203648, 3440640
    step = Cluster(SHAPES["72B"], 8, 2048, train=56, serve=8, tensor_parallel=8)
    assert (step.rollouts, step.tokens) == (1344, tokens)
    assert step.token_cache == 327680  # 80 layers, 8 heads of 128, keys and values in bfloat16
    # 576 GB of cache and weights, of which 145.4 are weights and 32 are workspace.
    assert step.at_once == (576e9 - 2 * weights - 32e9) // (327680 * 2560) == 475
    # 2,048 decoding steps per batch of 475, each reads the weights and 1,536 tokens per sequence.
    read = 2 * weights + 475 * 327680 * 1536
    rollout = 1344 / 475 * 2048 * read / (0.4 * 8 * 3.35e12)
    assert step.rollout == pytest.approx(rollout) == pytest.approx(208, abs=1)
    assert step.micro_batch == 4
    # Six passes of four rollouts gather the weights twice and reduce the gradients.
    communicated = 6 * 3 * 2 * weights / (0.4 * 50e9)
    computed = 8 * weights * tokens / (56 * 0.4 * 989e12)
    assert computed < communicated
    assert step.update == pytest.approx(communicated) == pytest.approx(131, abs=1)
    assert step.transfer == pytest.approx(8 * weights / (0.4 * 50e9))
    assert step.step == step.rollout + step.score + step.update + step.transfer


def test_a_training_gpu_holds_its_share_and_what_is_gathered():
    """20 bytes per parameter are sharded; a pass adds the same on every number of GPUs."""
    half, whole = (Cluster(SHAPES["7B"], 8, 2048, n, 1, 1).memory(1) for n in (8, 4))
    assert whole - half == pytest.approx(20 * 7615616512 * (1 / 4 - 1 / 8))
    one, two = (Cluster(SHAPES["7B"], 8, 2048, 4, 1, 1).memory(n) for n in (1, 2))
    per_token = (two - one) / 2560
    assert per_token > 4 * 3584 * 28  # every layer's input, and a layer that is recomputed
    embedding = 152064 * 3584
    layer = (7615616512 - 2 * embedding) / 28
    gathered = 8 * embedding + 6 * layer
    rest = one - 20 * 7615616512 / 4 - 2560 * per_token - memory.LOGITS - memory.RESERVED
    assert rest == pytest.approx(gathered)


@pytest.mark.parametrize(("model", "case"), [*itertools.product(LARGE, CASES)])
def test_what_is_said_to_fit_on_a_cluster_fits(model, case):
    smaller = 0
    for gpus in memory.TOTALS:
        cluster = memory.fastest(model, case, gpus, servers=memory.NODE)
        if cluster is None:
            assert not smaller  # what fits on fewer GPUs fits on more
            continue
        assert cluster.train + cluster.serve <= gpus
        assert cluster.memory(cluster.micro_batch) <= memory.GPU_BYTES
        assert cluster.rollouts % (cluster.train * cluster.micro_batch) == 0
        assert 2 * model.parameters < 0.9 * memory.GPU_BYTES * cluster.tensor_parallel
        assert model.num_attention_heads % cluster.tensor_parallel == 0
        assert not smaller or cluster.step <= smaller
        smaller = cluster.step
    assert smaller  # 64 are enough for each


def test_what_a_gpu_has_measured_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEASURED", tmp_path / "gpu.json")
    assert "measured" not in memory.tables()
    sizes = {"memory": {"reference": {"1.5B": [32.0, 11.5, 60.2]}}}
    memory.MEASURED.write_text(json.dumps(sizes))
    lines = [line for line in memory.tables().splitlines() if line.endswith("| 34, 12, 65 |")]
    assert [line[:9] for line in lines] == ["| 1.5B | "]
