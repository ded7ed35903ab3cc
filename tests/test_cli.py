"""The command line of every script: its help, the settings that it rejects, and --resume."""

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from conftest import ROOT, SCRIPTS, write_jsonl
from pytest import MonkeyPatch

import common
import grpo
from infra.cli import MAY_CHANGE, flag_of, launch, parse_args
from infra.run import Run


@pytest.fixture
def rejected(rejection) -> Callable[..., str]:
    """The line with which a script rejects a command line."""

    def rejected(script: str, *command: str) -> str:
        module = importlib.import_module(script)
        with MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *command])
            return rejection(launch, module.main, module.Args)

    return rejected


# ------------------------------------------------------------------ help


def texts(path: Path, name: str) -> dict[str, str]:
    """What is said of each field: a comment next to it or above it, or a docstring."""
    source = path.read_text()
    lines = source.splitlines()
    (node,) = (n for n in ast.parse(source).body if getattr(n, "name", "") == name)
    found = {}
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
            comment = lines[field.end_lineno - 1].partition("  # ")[2]
            if not comment and isinstance(after, ast.Expr):
                comment = after.value.value
            above = lines[field.lineno - 2].strip()
            found[field.target.id] = comment or (above[2:] if above.startswith("# ") else "")
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_setting_with_its_text(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    args = importlib.import_module(script).Args
    with pytest.raises(SystemExit) as stop:
        parse_args(args, ["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr()
    assert not printed.err
    assert len(printed.out.splitlines()) <= 112
    shown = re.sub(r"[\s│]", "", printed.out)
    assert args.__module__ == script and f"{script}.py" in shown
    described = texts(ROOT / "common.py", "RunArgs") | texts(ROOT / f"{script}.py", "Args")
    for field in dataclasses.fields(args):
        prefix = "--no-" if field.default is True else "--"
        assert prefix + field.name.replace("_", "-") in shown
        text = re.sub(r"\s", "", described[field.name])
        assert text and text in shown, field.name


def test_a_seed_may_be_any_number():
    assert parse_args(grpo.Args, ["--seed", "9" * 400]).seed == int("9" * 400)


# ------------------------------------------------------------------ impossible settings

REJECTED = {  # by the message after the last flag of each command line
    "must be at least 2": ["grpo --group-size 1"],
    "must be above 0": [
        *("grpo --prompts-per-step 0", "grpo --max-new-tokens 0", "grpo --max-prompt-tokens 0"),
        *("grpo --steps 0", "grpo --token-budget 0", "grpo --temperature 0.0", "grpo --lr 0.0"),
        *("grpo --max-grad-norm 0.0", "ep_grpo --buckets 0", "erpo --buckets 0"),
        "vineppo --continuations 0",
        *("erpo --sigma-target 0.0", "fipo --half-life 0.0", "fipo --safety 0.0"),
    ],
    "must be finite": [
        *("grpo --lr nan", "ep_grpo --gamma inf", "gtpo --alpha2 nan"),
        *("holderpo --p-start nan", "holderpo --p-end inf"),
    ],
    "must be at least 0": [
        *("grpo --eval-every -1", "grpo --lora-rank -1", "grpo --kl -1.0"),
        *("grpo --overlong-buffer -4", "grpo --weight-decay -0.1", "grpo --clip-low -0.1"),
        *("grpo --clip-high -0.1", "grpo --max-logp-gap -1.0", "ep_grpo --gamma -1.0"),
        *("ep_grpo --eta -0.1", "erpo --gamma -1.0", "erpo --eta -0.1", "gtpo --alpha2 -0.1"),
        *("arca --sharpening -1.0", "fipo --influence-low -0.1", "fipo --influence-high -0.1"),
    ],
    "must be below 1": [
        *("grpo --gpu-memory 1.0", "grpo --lora-rank 2 --lora-dropout 1.0"),
        "fipo --influence-low 1.0",
        "grpo --lr-schedule linear --warmup-ratio 1.0",
    ],
    "must be at most --max-new-tokens 1024": ["grpo --overlong-buffer 1025"],
    "must divide --prompts-per-step 16": ["grpo --updates-per-rollout 3"],
    "has no effect without --lora-rank": ["grpo --lora-dropout 0.1", "grpo --lora-alpha 4"],
    "has no effect without --dynamic-sampling": ["grpo --generation-rounds 3"],
    "has no effect with --lr-schedule constant: use constant_with_warmup": [
        "grpo --warmup-ratio 0.1",
    ],
    "must lie in (0.5, 1], or be 0: off": [
        *("gtpo --overlong-gamma 0.5", "gtpo --overlong-gamma 1.5"),
    ],
    "changes rewards, but GTPO uses verdicts; use --overlong-gamma": [
        "gtpo --overlong-buffer 8",
    ],
    "has no effect with --level sequence": [
        "gtpo --level sequence --normalize own-set",
        "gtpo --level sequence --normalize joint",
        "gtpo --level sequence --loss-average constant",
    ],
    "must lie in (0, 1]": ["forking --top 0.0", "forking --top 1.5"],
    "must be above 0 and below 1": ["holderpo --clip 0.0", "holderpo --clip 1.0"],
    "has no effect with --schedule constant": ["holderpo --schedule constant --p-end 1.0"],
    "ARCA compares the model with and without LoRA": ["arca --lora-rank 0"],
    "has no effect with --credit uniform": ["arca --credit uniform --sharpening 3.0"],
    "must leave room after the first token": ["reft --max-new-tokens 1"],
    "must be from 1 to --candidates 20": ["reft --openers 0", "reft --openers 21"],
    "must be a multiple of --openers 3": ["reft --openers 3"],
    "must be at least 1": ["stare --amplify 0.9"],
    "is DAPO: all weights are 1": ["fipo --updates-per-rollout 1"],
    "must exceed 1 + --clip-high 0.28": ["fipo --ratio-cap 1.28"],
    "must be above 0 and at most 1": [
        *("stare --top 0.0", "stare --top 1.1", "stare --attenuate 0.0", "stare --attenuate 1.1"),
    ],
    "is not a regular expression: missing ), unterminated subpattern at position 0": [
        "vineppo --step-end (",
    ],
    "is not a regular expression: the repetition number is too large": [
        "vineppo --step-end a{99999999999}"
    ],
}


@pytest.mark.parametrize(("command", "why"), [(c, why) for why in REJECTED for c in REJECTED[why]])
def test_rejected_before_anything_is_loaded(rejected, command, why, monkeypatch):
    for name in ("Run", "Grader", "load_tokenizer", "load_policy"):
        monkeypatch.setattr(common, name, lambda *_: pytest.fail("something is loaded"))
    line = rejected(*command.split())
    flag, *values = command[command.rindex("--") :].split()
    value = values[0] if len(values) == 1 else f"({', '.join(values)})"
    if why.endswith("multiple of --openers 3"):
        flag, value = "--group-size", "8"
    assert line == f"{flag} {value}: {why}"


def test_rejected_in_a_real_process():
    command = [sys.executable, "grpo.py", "--group-size", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --group-size 1: must be at least 2\n"


@pytest.mark.parametrize("temperature", [0.001, 0.0099, 2.01, 100.0])
def test_temperatures_that_vllm_would_change(rejected, temperature, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # vLLM is installed
    flags = ["--temperature", str(temperature)]
    for engine in ("auto", "vllm"):
        line = rejected("grpo", *flags, "--engine", engine)
        why = "vLLM takes 0.01 to 2; --engine transformers takes any"
        assert line == f"--temperature {temperature}: {why}"
    assert parse_args(grpo.Args, [*flags, "--engine", "transformers"]).temperature == temperature
    for edge in ("0.01", "2.0"):
        parse_args(grpo.Args, ["--temperature", edge])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    parse_args(grpo.Args, flags)


def test_values_at_the_edge_are_accepted():
    flags = "--kl 0 --clip-low 0 --eval-every 0 --overlong-buffer 1024 --generation-rounds 3"
    flags += " --dynamic-sampling --lora-rank 2 --lora-dropout 0.5 --seed 0"
    flags += " --lr-schedule cosine --warmup-ratio 0.99"
    parse_args(grpo.Args, flags.split())
    holderpo = importlib.import_module("holderpo").Args
    assert parse_args(holderpo, ["--p-start", "-3", "--p-end", "0"]).p_start == -3


# ------------------------------------------------------------------ models and problems


@pytest.mark.parametrize("name", ["model", "dataset", "eval_dataset"])
def test_missing_model_or_problems(name, rejected, short_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "load_policy", lambda _: pytest.fail("the weights were loaded"))
    missing = str(tmp_path / "no" / "data.jsonl")
    why = {"model": "cannot be loaded: "}.get(name, "no such file or folder")
    line = rejected("grpo", *short_flags(**{name: missing}))
    assert line.startswith(f"{flag_of(name)} {missing}: {why}")


@pytest.mark.parametrize(("text", "count"), [("</answer>", 9), ("", 0)])
def test_a_stop_token_that_is_not_one_token(text, count, rejected, short_flags, tied_model):
    line = rejected("grpo", *short_flags(), "--stop-tokens", "a", text)
    assert line == f"--stop-tokens {text}: must be one token of {tied_model}, and is {count}"


def test_prompts_longer_than_the_context(rejected, short_flags, tmp_path, monkeypatch, capsys):
    """The model has 256 positions and the template takes 19. The advice in the message works."""
    rows = [{"problem": "1" * n, "answer": "1"} for n in (10, 100, 197, 198, 230)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    settings = {"dataset": str(path), "max_new_tokens": 40}
    load_policy = common.load_policy
    monkeypatch.setattr(common, "load_policy", lambda _: pytest.fail("the weights were loaded"))
    line = rejected("grpo", *short_flags(**settings))
    assert line == (
        "--max-new-tokens 40: 2 of 5 prompts of --dataset leave less than that in the model's "
        "context of 256 tokens; --max-prompt-tokens 216 discards them"
    )
    line = rejected("grpo", *short_flags(dataset=str(path), max_new_tokens=256))
    assert line == "--max-new-tokens 256: leaves no room in the model's context of 256 tokens"

    monkeypatch.setattr(common, "load_policy", load_policy)
    monkeypatch.setattr(sys, "argv", ["grpo.py", *short_flags(**settings, max_prompt_tokens=216)])
    launch(grpo.main, grpo.Args)
    discarded = "discarded 2 of 5: prompts exceed --max-prompt-tokens 216"
    assert discarded in capsys.readouterr().err


# ------------------------------------------------------------------ --resume


@pytest.fixture
def begin(tmp_path, monkeypatch) -> Callable[..., str]:
    """The folder of a run of a script that was killed before its first step."""
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", MagicMock())

    def begin(script: str = "grpo", **settings: Any) -> str:
        folder = str(tmp_path / f"{script}'s folder")
        args = importlib.import_module(script).Args
        Run(args(**{"model": "none", "dataset": "none", "run_dir": folder} | settings)).open_logs()
        return folder

    return begin


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_are_read_back(script, begin):
    """The saved ones count, even if the defaults have changed since."""
    settings = {"lr": 1e-7, "dynamic_sampling": True, "stop_tokens": ("<|im_end|>", "a")}
    settings |= {"device": "cpu", "precision": "bfloat16"}
    folder = begin(script, **settings)
    args = importlib.import_module(script).Args
    again = parse_args(args, ["--resume", folder, "--dynamic-sampling"])  # given again
    assert again == args(model="none", dataset="none", run_dir=folder, resume=folder, **settings)


def test_auto_again_is_what_it_was(begin):
    """Otherwise the command that started the run could not resume it."""
    saved = {"engine": "transformers", "device": "cpu", "precision": "bfloat16"}
    folder = begin(**saved)
    for flags in ([], ["--engine", "auto", "--device", "auto", "--precision", "auto"]):
        args = parse_args(grpo.Args, ["--resume", folder, *flags])
        assert vars(args).items() >= saved.items()


@pytest.mark.parametrize(
    ("has_cuda", "chosen"), [(False, ("cpu", "float32")), (True, ("cuda", "bfloat16"))]
)
def test_what_auto_chose_is_recorded(has_cuda, chosen, begin, monkeypatch):
    """A run resumed on a machine with another device would train in another precision."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_cuda)
    settings = json.loads((Path(begin()) / "args.json").read_text())
    assert (settings["device"], settings["precision"]) == chosen


@pytest.mark.parametrize(
    ("flags", "started"),
    [
        ("--group-size 4", 8),
        ("--seed 2", 1),
        ("--lr 1.0", 1e-6),
        ("--temperature 0.5", 1.0),
        ("--max-new-tokens 9", 1024),
        ("--lr-schedule cosine", "constant"),
        ("--engine transformers", "auto"),
        ("--kl 0.5", 0.0),
        ("--model other", "none"),
        ("--dataset other", "none"),
        ("--run-dir other", "FOLDER"),
        ("--precision bfloat16", "float32"),
        ("--no-scale-rewards", True),
    ],
)
def test_training_settings_may_not_change(flags, started, begin, rejected):
    """One line names the flag and both values."""
    folder = begin(precision="float32")
    files = {path: path.read_bytes() for path in Path(folder).iterdir()}
    shown = flags.replace("--no-scale-rewards", "--scale-rewards False")
    started = folder if started == "FOLDER" else started
    line = rejected("grpo", "--resume", folder, *flags.split())
    assert line == f"{shown}: the run started with {started}; start a new run"
    assert files == {path: path.read_bytes() for path in Path(folder).iterdir()}


def test_other_settings_may_change(begin, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", MagicMock(__spec__=MagicMock()))
    changes = {
        "steps": 200,
        "eval_every": 3,
        "save_every": 7,
        "keep_checkpoints": 8,
        "log_rollouts": 9,
        "wandb_project": "other",
        "token_budget": 10,
        "gradient_checkpointing": True,
        "gpu_memory": 0.5,
        "max_logp_gap": 1.0,
    }
    assert changes.keys() | {"resume"} == MAY_CHANGE
    folder = begin(lr=0.5)
    words = ["--gradient-checkpointing"]
    for name, value in changes.items():
        words += [flag_of(name), str(value)] if value is not True else []
    args = parse_args(grpo.Args, ["--resume", folder, *words])
    assert vars(args).items() >= (changes | {"lr": 0.5, "run_dir": folder}).items()


@pytest.mark.parametrize(
    ("script", "settings", "may_change"),
    [
        ("grpo", {}, True),
        ("grpo", {"lr_schedule": "cosine"}, False),
        ("grpo", {"lr_schedule": "constant_with_warmup", "warmup_ratio": 0.1}, False),
        ("holderpo", {}, False),
        ("holderpo", {"schedule": "constant"}, True),
        ("holderpo", {"schedule": "constant", "lr_schedule": "linear"}, False),
    ],
)
def test_steps_may_not_change_if_a_schedule_depends_on_them(
    script, settings, may_change, begin, rejected
):
    words = ["--resume", begin(script, steps=4, **settings), "--steps", "8"]
    if may_change:
        assert parse_args(importlib.import_module(script).Args, words).steps == 8
    else:
        assert rejected(script, *words) == "--steps 8: the run started with 4; start a new run"


@pytest.mark.parametrize("text", [None, "", "{", "[]", "7", "{}", '{"script": "grpo", "no": 1}'])
def test_folder_of_no_run(text, tmp_path, rejected):
    if text is not None:
        (tmp_path / "args.json").write_text(text)
    line = rejected("grpo", "--resume", str(tmp_path))
    assert line.startswith(f"--resume {tmp_path}: is not the folder of a run: ")


def test_an_empty_folder_name_starts_no_new_run(rejected):
    assert rejected("grpo", "--resume", "") == "--resume '': must name a folder"


def test_run_of_another_script(begin, rejected):
    folder = begin()
    assert rejected("erpo", "--resume", folder) == f"--resume {folder}: is a run of grpo.py"
