"""The command line: what it refuses, how a run is interrupted, and how it goes on."""

import fcntl
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
import torch
from conftest import ROOT, read_metrics, save_model

import grpo
from runs import launch

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

    def refusal(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["grpo.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            launch(grpo.main, grpo.Args)
        assert stop.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = output.err.splitlines()
        return line

    return refusal


# ------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("--group-size", "1", "must be at least 2"),
        ("--prompts-per-step", "0", "must be at least 1"),
        ("--max-new-tokens", "0", "must be at least 1"),
        ("--steps", "0", "must be at least 1"),
        ("--token-budget", "0", "must be at least 1"),
        ("--eval-every", "-1", "must be at least 0"),
        ("--lora-rank", "-1", "must be at least 0"),
        ("--kl", "-1.0", "must be at least 0"),
        ("--overlong-buffer", "-4", "must be at least 0"),
        ("--updates-per-rollout", "3", "must divide --prompts-per-step 2"),
        ("--temperature", "0.0", "must be above 0"),
        ("--lr", "nan", "must be above 0"),
        ("--max-grad-norm", "0.0", "must be above 0"),
        ("--grader-deadline", "0.0", "must be above 0"),
    ],
)
def test_impossible_number(refusal: Callable, command: Command, flag: str, value: str, why: str):
    assert refusal(command(flag, value)) == f"error: {flag} {value}: {why}"


def test_refused_before_anything_is_loaded(command: Command):
    """In a real process: exit code 2, one line, and no time to import a model."""
    run = start(command("--group-size", "1"))
    out, err = run.communicate(timeout=60)
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


def test_a_model_that_changes_its_logits(
    refusal: Callable, command: Command, tied_model: Path, tmp_path: Path
):
    """What the LM head's tiles leave out must not be left out in silence."""
    folder = Path(shutil.copytree(tied_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": 30.0}))
    why = "changes its logits by final_logit_softcapping, which is not supported"
    assert refusal(command("--model", str(folder))) == f"error: --model {folder}: {why}"


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
    assert refusal(command(flag, str(missing))) == f"error: {flag} {missing}: no such file"


def test_8_bit_moments_need_a_gpu(refusal: Callable, command: Command):
    arguments = [*command(), "--adamw-8bit"]
    assert refusal(arguments) == "error: --adamw-8bit on: needs a CUDA device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_with_8_bit_moments_goes_on(command: Command, tmp_path: Path):
    pytest.importorskip("torchao")
    for steps, more in (("2", []), ("3", ["--resume"])):
        run = start([*command("--device", "cuda", "--steps", steps), "--adamw-8bit", *more])
        assert run.wait(timeout=300) == 0
    assert (tmp_path / "run" / "checkpoints" / "step-000003").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no problems"]),
        ('{"frage": 1}\n', ["found: ['frage']", "problem", "question", "answer", "solution"]),
        ('{"problem": "1", "answer": "1"}\n{"problem":\n', ["line 2 is not JSON"]),
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


# ------------------------------------------------------------------------------- the run folder


def test_unwritable_run_folder(refusal: Callable, command: Command, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "run"
    line = refusal(command("--run-dir", str(folder)))
    assert line.startswith(f"error: --run-dir {folder}: cannot be written")


def test_locked_run_folder(refusal: Callable, command: Command, tmp_path: Path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refusal(command())
    assert line == f"error: --run-dir {tmp_path / 'run'}: another run is writing here"


def test_run_folder_with_a_run(refusal: Callable, command: Command, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    line = refusal(command())
    assert line.startswith(f"error: --run-dir {tmp_path / 'run'}: already holds a run")
    assert "--resume" in line


def test_resume_needs_a_folder(refusal: Callable, command: Command):
    assert refusal([*command("--run-dir", ""), "--resume"]).startswith("error: --resume")


# ------------------------------------------------------------------------------- Ctrl-C


def wait_for(path: Path, lines: int, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
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
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert "--resume" in err and str(folder) in err
    before = read_metrics(folder)
    assert [row["step"] for row in before] == list(range(len(before)))
    for line in (folder / "rollouts.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] < len(before)

    steps = str(len(before) + 1)
    again = start([*command("--steps", steps, "--eval-every", "0"), "--resume"])
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    after = read_metrics(folder)
    assert [row["step"] for row in after] == list(range(len(before) + 2))
    assert after[: len(before)] == before
    assert "held-out accuracy after" in out


# ------------------------------------------------------------------------------- the help text


def test_help_shows_every_setting_with_its_text():
    environment = os.environ | {"COLUMNS": "100"}
    run = start(["--help"], env=environment)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    flags = "model dataset eval-dataset steps prompts-per-step group-size max-new-tokens lr seed"
    for flag in [*flags.split(), "engine", "run-dir", "resume"]:
        assert f"--{flag}" in out
    for section in ("data", "rollouts", "engine", "run", "method-and-optimiser"):
        assert f" {section} options " in out
    assert "ε_low" in out and "{auto,vllm,transformers}" in out
    assert len(out.splitlines()) < 150
