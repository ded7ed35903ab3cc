"""What benchmark/speed.py measures that is not wall time, and that it measures real steps."""

from pathlib import Path
from typing import Any

import our_side
import pieces
import pytest
import speed
import torch
from transformers import AutoModelForCausalLM

import common
import grpo


def test_two_steps_do_the_work_that_is_compared(tiny_model: Path, tmp_path: Path):
    shape = our_side.Shape("tiny", prompts=2, group=2, new_tokens=5, steps=1)
    measured = our_side.ours(shape, "transformers", tmp_path, "cpu")
    assert measured["tokens_a_step"]["generated"] == 2 * 2 * 5
    assert measured["tokens_a_step"]["trained"] == 2 * 2 * 5
    assert len(measured["seconds"]) == 1
    assert 0 < measured["parts"]["update"] < measured["parts"]["step"]
    assert measured["peak_bytes"] > 1e8


def test_bare_log_probs_are_those_of_the_step(tiny_model: Path):
    """The bare forward pass sees the same tokens as `common.score`, at the same positions."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    lengths = torch.tensor([[3, 9, 4], [1, 30, 8]])
    rollouts = pieces.made_up_rollouts(lengths, prompt_tokens=4, vocabulary=250)
    args = grpo.Args(device="cpu")
    logp, _ = common.score(policy, rollouts, args)
    batches = our_side.sorted_batches(rollouts)
    with torch.no_grad():
        means = [our_side.bare_nll(policy, *batch, args) for batch in batches]
    counts = [int(predicts.sum()) for _, predicts in batches]
    total = sum(mean * count for mean, count in zip(means, counts, strict=True))
    assert sum(counts) == int(lengths.sum())
    torch.testing.assert_close(-total, logp.sum(), rtol=1e-5, atol=0)


def test_log_probs_in_chunks_need_an_eighth_of_the_memory_and_give_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
):
    """A quarter of the benchmark's tokens, in chunks of a quarter, with narrow hidden states."""
    monkeypatch.setattr(common, "LOGITS_AT_ONCE", common.LOGITS_AT_ONCE // 4)
    measured = pieces.chunked(width=64, tokens=256)
    assert measured["chunked"]["extra_bytes"] <= measured["plain"]["extra_bytes"] / 8
    assert measured["gradient_difference"] <= 1e-5


def test_peak_counts_what_is_alive_at_once():
    def work() -> None:
        for _ in range(3):
            torch.zeros(2**20).sum()  # 4 MiB, freed before the next
        both = torch.zeros(2**20), torch.zeros(2**20)
        del both

    assert 2**23 <= pieces.peak_bytes(work) < 2**23 + 2**16


def test_nine_tenths_of_computed_tokens_are_real():
    assert pieces.packing()["efficiency"] >= 0.9


def test_the_update_needs_no_more_memory_for_more_rollouts():
    few, many = pieces.update_bytes(64), pieces.update_bytes(512)
    assert many <= 1.01 * few


def test_lengths_are_long_tailed_and_reach_the_longest():
    lengths = sorted(our_side.long_tailed(512, 1024))
    assert lengths[0] >= 1 and lengths[-1] == 1024
    assert sum(lengths) / 512 > lengths[256]  # the mean above the median


def test_the_page_shows_the_results_file():
    results = speed.files.read_json(speed.RESULTS)
    assert speed.PAGE.read_text(encoding="utf-8") == speed.filled_page(results), (
        "docs/speed.md is stale: python benchmark/speed.py --write"
    )


def test_a_section_that_is_missing_or_unequal_is_said(monkeypatch: pytest.MonkeyPatch):
    def side(seconds: float, trained: int) -> dict[str, Any]:
        return {"seconds": [seconds] * 3, "tokens_a_step": {"trained": trained}, "peak_bytes": 1e9}

    sections = {"ours: tiny: transformers": side(0.5, 10), "trl: tiny: transformers": side(1.0, 10)}
    row = "transformers on both sides: TRL's step / ours"
    table = speed.tables({"cpu": {"sections": sections}})
    line = next(line for line in table.splitlines() if row in line)
    assert "1 / 0.5 s = 2.00" in line and line.count("not measured") == 2 and "(!)" not in line
    sections["trl: tiny: transformers"] = side(1.0, 11)
    assert "2.00 (!)" in speed.tables({"cpu": {"sections": sections}})


@pytest.mark.parametrize("name", ["nothing", "parts: tiny"])
def test_an_unknown_section_is_refused(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        speed.main(speed.Args(only=name))
    assert stop.value.code == 2 and f"--only {name}" in capsys.readouterr().err
