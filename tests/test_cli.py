"""The command line: what it refuses, how a run is interrupted, and how it goes on."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, read_metrics, save_model
from run import check, launch, parse_args

import grpo
import holderpo

Command = Callable[..., list[str]]


@pytest.fixture
def command(tied_model: Path, problem_file: Path, tmp_path: Path) -> Command:
    """The flags of a short run, and more of them."""

    def command(*more: str) -> list[str]:
        flags = {
            "--model": tied_model,
            "--dataset": problem_file,
            "--eval-dataset": problem_file,
            "--engine": "transformers",
            "--device": "cpu",
            "--steps": 2,
            "--prompts-per-step": 2,
            "--group-size": 2,
            "--max-new-tokens": 8,
            "--lr": 1e-3,
            "--eval-problems": 2,
            "--eval-samples": 2,
            "--run-dir": tmp_path / "run",
        }
        flags |= dict(zip(more[::2], more[1::2], strict=True))
        return [str(word) for flag in flags.items() for word in flag]

    return command


def start(arguments: list[str], **options: object) -> subprocess.Popen:
    script = [sys.executable, "-W", "ignore", str(ROOT / "grpo.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(script + arguments, cwd=ROOT, **pipes, **options)


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[[list[str]], str]:
    """Runs grpo.py in this process; returns the one line with which it refuses its arguments."""

    def refusal(arguments: list[str], script: str = "grpo") -> str:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        module = importlib.import_module(script)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            launch(module.main, module.Args)
        assert stop.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        return line

    return refusal


# ------------------------------------------------------------------------------- numbers


LEAST, ABOVE, BELOW = "must be at least 0 and finite", "must be above 0", "must be below 1"
NO_ADAPTERS = "changes nothing without --lora-rank"
IMPOSSIBLE = [
    ("grpo", "--group-size 1", "must be at least 2"),
    ("grpo", "--prompts-per-step 0", ABOVE),
    ("grpo", "--max-new-tokens 0", ABOVE),
    ("grpo", "--max-prompt-tokens 0", ABOVE),
    ("grpo", "--steps 0", ABOVE),
    ("grpo", "--token-budget 0", ABOVE),
    ("grpo", "--eval-every -1", LEAST),
    ("grpo", "--lora-rank -1", LEAST),
    ("grpo", "--kl -1.0", LEAST),
    ("grpo", "--overlong-buffer -4", LEAST),
    ("grpo", "--overlong-buffer 9", "must be at most --max-new-tokens 8"),
    ("grpo", "--updates-per-rollout 3", "must divide --prompts-per-step 2"),
    ("grpo", "--temperature 0.0", ABOVE),
    ("grpo", "--lr nan", LEAST),
    ("grpo", "--lr 0.0", ABOVE),
    ("grpo", "--max-grad-norm 0.0", ABOVE),
    ("grpo", "--weight-decay -0.1", LEAST),
    ("grpo", "--clip-low 1.0", BELOW),
    ("grpo", "--clip-low -0.1", LEAST),
    ("grpo", "--clip-high -0.1", LEAST),
    ("grpo", "--gpu-memory 1.0", BELOW),
    ("grpo", "--max-logp-gap -1.0", LEAST),
    ("grpo", "--lora-rank 2 --lora-dropout 1.0", BELOW),
    ("grpo", "--lora-dropout 0.1", NO_ADAPTERS),
    ("grpo", "--lora-alpha 4", NO_ADAPTERS),
    ("grpo", "--generation-rounds 3", "changes nothing without --dynamic-sampling"),
    (
        "grpo",
        "--warmup-steps 2 --warmup-ratio 0.1",
        "cannot be given together with --warmup-steps 2",
    ),
    ("grpo", "--warmup-ratio 1.0", BELOW),
    ("ep_grpo", "--eta -1.0", LEAST),
    ("ep_grpo", "--gamma inf", LEAST),
    ("ep_grpo", "--buckets 0", ABOVE),
    ("erpo", "--sigma-target 0.0", ABOVE),
    ("holderpo", "--p-end inf", "must be finite"),
    ("arca", "--lora-rank 0", "ARCA compares the model with and without LoRA"),
]


@pytest.mark.parametrize(("script", "flags", "why"), IMPOSSIBLE, ids=lambda text: text)
def test_impossible_number(refusal: Callable, command: Command, script: str, flags: str, why: str):
    last = " ".join(flags.split()[-2:])
    assert refusal(command(*flags.split()), script) == f"error: {last}: {why}"


def test_numbers_that_are_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """At the edge of what is refused."""
    flags = "--kl 0 --clip-low 0 --warmup-ratio 0.99 --eval-every 0 --overlong-buffer 1024"
    flags += " --generation-rounds 3 --dynamic-sampling --lora-rank 2 --lora-dropout 0.5 --seed 0"
    check(parse_args(grpo.Args, flags.split()))
    check(parse_args(holderpo.Args, ["--p-start", "-3", "--p-end", "0"]))


def test_refused_before_anything_is_loaded(command: Command):
    """In a real process: exit code 2, one line, and no time to import a model."""
    run = start(command("--group-size", "1"))
    out, err = run.communicate(timeout=300)
    assert (run.returncode, out) == (2, "")
    assert err == "error: --group-size 1: must be at least 2\n"


# ------------------------------------------------------------------------------- model and data


def test_missing_model(refusal: Callable, command: Command, tmp_path: Path):
    missing = tmp_path / "no" / "model"
    assert refusal(command("--model", str(missing))).startswith(f"error: --model {missing}: ")


@pytest.mark.parametrize("absent", ["model.safetensors", "config.json", "tokenizer.json"])
def test_incomplete_model(refusal: Callable, command: Command, tmp_path: Path, absent: str):
    folder = save_model(tmp_path / "model", tied=True, pad="<|im_end|>", eos=("<|im_end|>",))
    (folder / absent).unlink()
    assert refusal(command("--model", str(folder))).startswith(f"error: --model {folder}: ")


@pytest.mark.parametrize("flag", ["--dataset", "--eval-dataset"])
def test_missing_dataset(
    refusal: Callable,
    command: Command,
    tmp_path: Path,
    flag: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(grpo, "load_policy", lambda _: pytest.fail("the weights were loaded first"))
    missing = tmp_path / "nothing.jsonl"
    assert (
        refusal(command(flag, str(missing))) == f"error: {flag} {missing}: no such file or folder"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no problems"]),
        ('{"frage": 1}\n', ["found: ['frage']", "problem", "question", "--question-column"]),
        ('{"problem": "1", "answer": "1"}\n{"problem":\n', ["JSONDecodeError", "line 3"]),
    ],
    ids=["empty", "columns", "broken line"],
)
def test_unusable_dataset(
    refusal: Callable, command: Command, tmp_path: Path, content: str, words: list[str]
):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    line = refusal(command("--dataset", str(path)))
    assert line.startswith(f"error: --dataset {path}: ")
    assert all(word in line for word in words)


def test_prompts_longer_than_the_context(refusal: Callable, command: Command, tmp_path: Path):
    """The model has 256 positions; the template takes 19."""
    path = tmp_path / "data.jsonl"
    rows = [{"problem": "1" * n, "answer": "1"} for n in (10, 100, 197, 198, 230)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refusal(command("--dataset", str(path), "--max-new-tokens", "40"))
    expected = (
        "error: --max-new-tokens 40: 2 of 17 prompts leave less than that in the model's context "
        "of 256 tokens; --max-prompt-tokens 216 drops them"
    )
    assert line == expected


def test_dropping_long_prompts_as_told(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    path = tmp_path / "data.jsonl"
    rows = [{"problem": "1" * n, "answer": "1"} for n in (10, 100, 197, 198, 230)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--max-new-tokens", "40", "--max-prompt-tokens", "216", "--steps", "1")
    monkeypatch.setattr(sys, "argv", ["grpo.py", *command("--dataset", str(path), *more)])
    launch(grpo.main, grpo.Args)
    assert (
        "2 of 5 prompts exceed --max-prompt-tokens 216 and are dropped" in capsys.readouterr().err
    )


# ------------------------------------------------------------------------------- Ctrl-C


def wait_for(path: Path, lines: int, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_text().count("\n") < lines:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_interrupt_then_go_on(command: Command, tmp_path: Path):
    folder = tmp_path / "run"
    arguments = command("--steps", "100000", "--eval-every", "0")
    run = start(arguments)
    wait_for(folder / "metrics.jsonl", 3, run)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert f"--resume {folder}" in err
    before = read_metrics(folder)
    assert [row["step"] for row in before] == list(range(len(before)))
    for line in (folder / "rollouts.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] < len(before)

    steps = str(len(before) + 1)
    again = start(["--resume", str(folder), "--steps", steps])
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    after = read_metrics(folder)
    assert [row["step"] for row in after] == list(range(len(before) + 2))
    assert after[: len(before)] == before
    assert "held-out accuracy after" in out


# ------------------------------------------------------------------------------- the help text


def test_help_shows_every_setting_with_its_text():
    run = start(["--help"], env=os.environ | {"COLUMNS": "100"})
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 0
    assert out.count("GRPO: Group Relative Policy Optimization") == 1
    for field in dataclasses.fields(grpo.Args):
        assert "--" + field.name.replace("_", "-") in out
    assert "ε_low" in out and "{auto,vllm,transformers}" in out
    assert len(out.splitlines()) < 100


# ------------------------------------------------------------------------------- copying


def test_a_script_and_what_it_shares_are_all_it_needs(
    command: Command, tiny_model: Path, tmp_path: Path
):
    """As the README promises: copied into an empty folder, they train there."""
    for name in ("ep_grpo.py", "common.py", "engine.py", "run.py", "data.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "grading", tmp_path / "grading")
    data = ("--dataset", tiny_model / "train.jsonl", "--eval-dataset", tiny_model / "test.jsonl")
    flags = command("--model", tiny_model, *data, "--run-dir", "run", "--max-new-tokens", "16")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "ep_grpo.py", *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
