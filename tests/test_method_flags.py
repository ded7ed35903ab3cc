"""The command lines of the methods: their help, and the settings that they reject."""

import dataclasses
import importlib
import math
from pathlib import Path
from typing import Any

import pytest

import common
from infra.cli import parse_args

SYMBOLS = {
    "ep_grpo": ["γ", "η", "K: ", "θ", "(paper: 0.001)"],
    "erpo": ["γ", "η", "K: ", "(paper: 0.001)"],
    "gtpo": ["α₂", "γ₁", "ε_high", "{token,sequence}", "with-zeros", "LOW HIGH"],
    "holderpo": ["ε"],
    "arca": [],
    "reft": [],
    "vineppo": [],
}


@pytest.mark.parametrize(("script", "symbols"), SYMBOLS.items())
def test_help(
    script: str,
    symbols: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setenv("COLUMNS", "200")
    args = importlib.import_module(script).Args
    with pytest.raises(SystemExit) as stop:
        parse_args(args, ["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr()
    for word in [*symbols, f"docs/{script}.md"]:
        assert word in printed.out
    for field in dataclasses.fields(args):
        prefix = "--no-" if field.default is True else "--"
        assert prefix + field.name.replace("_", "-") in printed.out
    assert "Traceback" not in printed.err and "Warning" not in printed.err


REJECTED = [  # script, settings, how the message begins
    ("ep_grpo", {"buckets": 0}, "--buckets 0: must be "),
    ("ep_grpo", {"gamma": -1.0}, "--gamma -1.0: must be "),
    ("ep_grpo", {"eta": -0.1}, "--eta -0.1: must be "),
    ("erpo", {"buckets": 0}, "--buckets 0: must be "),
    ("erpo", {"gamma": -1.0}, "--gamma -1.0: must be "),
    ("erpo", {"eta": -0.1}, "--eta -0.1: must be "),
    ("gtpo", {"alpha2": -0.1}, "--alpha2 -0.1: "),
    ("gtpo", {"alpha2": math.nan}, "--alpha2 nan: "),
    ("gtpo", {"entropy_clamp": (0.3, 0.2)}, "--entropy-clamp (0.3, 0.2): "),
    ("gtpo", {"entropy_clamp": (-1.0, 0.2)}, "--entropy-clamp (-1.0, 0.2): "),
    ("gtpo", {"overlong_gamma": 0.5}, "--overlong-gamma 0.5: "),
    ("gtpo", {"overlong_gamma": 1.5}, "--overlong-gamma 1.5: "),
    ("holderpo", {"clip": 0.0}, "--clip 0.0: "),
    ("holderpo", {"clip": 1.0}, "--clip 1.0: "),
    ("holderpo", {"p_start": math.nan}, "--p-start nan: "),
    ("holderpo", {"p_end": math.inf}, "--p-end inf: "),
    ("arca", {"lora_rank": 0}, "--lora-rank 0: "),
    ("arca", {"sharpening": -1.0}, "--sharpening -1.0: "),
    ("reft", {"max_new_tokens": 1}, "--max-new-tokens 1: "),
    ("reft", {"openers": 0}, "--openers 0: must be from 1 to --candidates 20"),
    ("reft", {"openers": 21}, "--openers 21: must be from 1 to --candidates 20"),
    ("reft", {"openers": 3}, "--group-size 8: must be a multiple of --openers 3"),
    ("vineppo", {"continuations": 0}, "--continuations 0: "),
    ("vineppo", {"step_end": "("}, "--step-end (: "),
]
WITHOUT_EFFECT = [
    ("gtpo", {"overlong_buffer": 8}, "--overlong-buffer 8: "),
    ("gtpo", {"alpha2": 0.0, "entropy_clamp": (0.2, 0.28)}, "--entropy-clamp (0.2, 0.28): "),
    ("gtpo", {"level": "sequence", "normalize": "own-set"}, "--normalize own-set: "),
    ("gtpo", {"level": "sequence", "normalize": "joint"}, "--normalize joint: "),
    ("gtpo", {"level": "sequence", "loss_average": "constant"}, "--loss-average constant: "),
    ("holderpo", {"schedule": "constant", "p_end": 1.0}, "--p-end 1.0: "),
    ("arca", {"credit": "uniform", "sharpening": 3.0}, "--sharpening 3.0: "),
]


@pytest.mark.parametrize(("script", "settings", "message"), REJECTED + WITHOUT_EFFECT, ids=str)
def test_rejected_before_anything_is_loaded(
    script: str,
    settings: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
):
    module = importlib.import_module(script)
    monkeypatch.chdir(tmp_path)
    for name in ("Grader", "load_tokenizer", "load_policy"):
        monkeypatch.setattr(common, name, lambda *_: pytest.fail("something is loaded"))
    with pytest.raises(SystemExit) as stop:
        module.main(module.Args(**settings))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
