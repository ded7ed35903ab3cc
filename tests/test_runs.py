"""Runs that are killed, interrupted or resumed, and what they write."""

import errno
import gc
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import (
    ROOT,
    SCRIPTS,
    assert_same_run,
    content,
    fail,
    needs_vllm,
    read_metrics,
    short_settings,
    weights_of,
)
from pytest import MonkeyPatch
from safetensors.torch import load_file, save_file
from torch import nn

import common
import grpo
from grading import WorkerError
from infra import cli, run, vllm_engine
from infra.cli import StopRun
from infra.hf_engine import HFEngine

FULL = {"updates_per_rollout": 2, "lr_schedule": "linear", "warmup_ratio": 0.5}
LORA = {"lora_rank": 4, "lora_dropout": 0.3, "lr": 1e-2}


class Killed(BaseException):
    """Stands for SIGKILL: no code catches it."""


def kill(*_: Any, **__: Any) -> None:
    raise Killed


# ------------------------------------------------------------------ running scripts


def verify(_: Any, groups: list[common.Group]) -> None:
    """Random models solve nothing: here the parity of its tokens' sum decides on a response."""
    for group in groups:
        group.correct = [float(sum(row) % 2) for row in group.tokens]


def start(script: str, args: Any = None, *command: str) -> int:
    """The exit code of a script with these settings, or with this command line."""
    gc.collect()  # a dead process holds no lock
    torch.manual_seed(int.from_bytes(os.urandom(4)))  # as any new process
    module = importlib.import_module(script)
    code = 0
    with MonkeyPatch.context() as patch:
        patch.setattr(common, "verify", verify)
        patch.setattr(sys, "argv", [f"{script}.py", *command])
        if args is not None:
            patch.setattr(cli, "parse_args", lambda _: args)
        try:
            module.common.launch(module.main, module.Args)
        except SystemExit as error:
            code = error.code or 0
        except Killed:
            code = 137
    return code


def resume(folder: Path, *flags: str, script: str = "grpo") -> int:
    return start(script, None, "--resume", str(folder), *flags)


@pytest.fixture(scope="module")
def finished(tied_model, problem_file, tmp_path_factory) -> Callable[..., Path]:
    """The folder of a run of 4 steps with checkpoints at 2 and 4. Each kind of run is made once."""
    runs: dict[str, Path] = {}

    def finished(script: str = "grpo", kind: str = "full") -> Path:
        name = f"{script}-{kind}"
        if name not in runs:
            folder = tmp_path_factory.mktemp("finished") / name
            settings = {"steps": 4, "save_every": 2, "eval_every": 2, "run_dir": str(folder)}
            settings |= {"full": FULL, "lora": LORA}[kind]
            if script == "arca":
                settings.pop("updates_per_rollout", None)
            short = short_settings(tied_model, problem_file)
            assert start(script, importlib.import_module(script).Args(**short | settings)) == 0
            runs[name] = folder
        return runs[name]

    return finished


def killed_after(run: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run as a kill in a later step would have left it."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return copy


# ------------------------------------------------------------------ comparing runs


def scalars(folder: Path, name: str) -> list[int]:
    """The steps that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [event.step for event in events.Scalars(name)]


# ------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    ("script", "kind"),
    [(script, "lora" if script == "arca" else "full") for script in SCRIPTS] + [("grpo", "lora")],
)
def test_two_steps_resumed_equal_four_steps(script, kind, finished, tmp_path):
    alone = finished(script, kind)
    killed = killed_after(alone, 2, tmp_path / "killed")
    middle, end = (weights_of(alone / f"checkpoints/step-00000{n}") for n in (2, 4))
    assert middle != end  # otherwise a run that loads nothing would pass
    assert resume(killed, script=script) == 0
    assert_same_run(alone, killed)
    assert scalars(killed, "reward") == [1, 2, 3, 4]
    assert scalars(killed, "eval/accuracy") == [0, 2, 4]


@needs_vllm
def test_resume_with_vllm(tiny_model, tmp_path):
    """In processes of their own, as in use."""

    def script(*command: str) -> None:
        command = [sys.executable, "grpo.py", *command]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    flags = "--engine vllm --steps 4 --save-every 2 --lr 1e-3 --prompts-per-step 4 --group-size 4"
    flags += " --max-new-tokens 32 --eval-problems 4 --eval-samples 1"
    script(*flags.split(), "--run-dir", str(tmp_path / "alone"))
    killed = killed_after(tmp_path / "alone", 2, tmp_path / "killed")
    script("--resume", str(killed))
    assert_same_run(tmp_path / "alone", killed)


def test_learning_rate_of_each_update(finished):
    """8 updates, 4 of them warm-up. The log has the second update of each step."""
    rows = read_metrics(finished())[1:]
    by_hand = [1 / 4, 3 / 4, 3 / 4, 1 / 4]  # updates 2 and 4 rise; 6 and 8 have 3 and 1 of 4 left
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * share for share in by_hand])


def test_more_steps_after_the_last(make_args, tmp_path, monkeypatch):
    """A kill after the last of them leaves no model/ of fewer steps."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert start("grpo", make_args(steps=4, run_dir=str(once), save_every=0)) == 0
    assert start("grpo", make_args(steps=2, run_dir=str(twice), save_every=0)) == 0
    first = weights_of(twice / "model")
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "finish", kill)
        assert resume(twice, "--steps", "4") == 137
    assert resume(twice) == 0
    assert first != weights_of(once / "model") == weights_of(twice / "model")


def test_killed_before_the_first_checkpoint(make_args, tmp_path, monkeypatch):
    """Steps 0 and 1 are written again, with the same random numbers for dropout."""
    changes = {"steps": 2, "save_every": 2} | LORA
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert start("grpo", make_args(**changes, run_dir=str(alone))) == 0
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "save", kill)
        assert start("grpo", make_args(**changes, run_dir=str(killed))) == 137
    assert [row["step"] for row in read_metrics(killed)] == [0, 1]
    assert resume(killed) == 0
    assert_same_run(alone, killed, "step-000002")
    assert scalars(killed, "eval/accuracy") == [0, 2]


def test_the_engine_of_auto_is_recorded(make_args, tmp_path, monkeypatch, capsys):
    """In args.json, so that a resumed run has the same engine. The reason is printed once."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "why_not_vllm", lambda *_: "of a test")
        assert start("grpo", make_args(engine="auto", steps=1)) == 0
    printed = capsys.readouterr().err
    assert printed.count("--engine auto: transformers is used, because of a test\n") == 1
    assert json.loads((folder / "args.json").read_text())["engine"] == "transformers"
    assert resume(folder, "--steps", "2") == 0
    assert "--engine" not in capsys.readouterr().err


def test_finished_run(finished, tmp_path, capsys):
    folder = shutil.copytree(finished(), tmp_path / "run")
    before = content(folder)
    capsys.readouterr()
    assert resume(folder) == 0
    assert "is finished after 4 steps" in capsys.readouterr().out
    assert content(folder) == before
    shutil.rmtree(folder / "model")  # killed after the last checkpoint
    assert resume(folder) == 0
    assert weights_of(folder) == weights_of(finished())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_others_can_load_a_checkpoint(kind, finished, tied_model):
    """Through transformers and peft alone it computes the same as model/."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    folder = finished("grpo", kind)
    last = folder / "checkpoints" / "step-000004"
    policy = PeftModel.from_pretrained(load(tied_model), last) if kind == "lora" else load(last)
    ids = torch.arange(8)[None]
    models = (load(tied_model), policy, load(folder / "model"))
    before, saved, final = (model.eval()(ids).logits for model in models)
    assert torch.allclose(saved, final, atol=1e-4)
    assert (before - final).abs().max() > 1e-3


def test_sampling_settings_that_transformers_does_not_save(make_args, tied_model, tmp_path):
    """Some published models come with a temperature but without do_sample."""
    model = shutil.copytree(tied_model, tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "top_p": 0.9}))
    assert start("grpo", make_args(model=str(model))) == 0


# ------------------------------------------------------------------ a small policy


class Small(nn.Linear):
    """A policy of four weights that is saved and loaded in the way of transformers."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__(4, 1, bias=False)
        nn.init.ones_(self.weight)

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    @classmethod
    def from_pretrained(cls, folder: Path, **_: Any) -> nn.Module:
        policy = cls()
        json.loads((folder / "config.json").read_text())
        policy.load_state_dict(load_file(folder / "model.safetensors"))
        return policy


class SmallRun:
    """The loop of a script, on four weights. It is its own tokenizer."""

    def __init__(self, args: Any) -> None:
        self.args, self.policy = args, Small()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.1)
        self.problems = common.Problems()
        self.state = {"optimizer": self.optimizer, "problems": self.problems}
        self.run = run.Run(args)
        self.folder = self.run.folder
        self.run.restore(self.policy, **self.state)
        if self.run.step == 0:
            self.run.log(0, {"reward": 0.0})
        assert self.problems.position == self.run.step

    def train(self, steps: int, **metrics: Any) -> None:
        for step in self.run.steps():
            self.update(self.policy.weight.square().sum() * torch.rand(()))
            self.problems.position = step
            self.run.log(step, {"reward": 0.0, "length": 9.0} | metrics, tokens=1)
            self.run.save(step, self.policy, self, **self.state)
            steps -= 1
            if not steps:
                break

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0).item()
        if self.run.update_is_finite(loss.item(), norm):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    def checkpoints(self) -> list[str]:
        return [folder.name.removeprefix("step-00000") for folder in self.run.checkpoints()]

    def state_now(self) -> str:
        return str((self.policy.weight.tolist(), self.optimizer.state_dict()))


@pytest.fixture
def small_run(tmp_path, monkeypatch) -> Iterator[Callable[..., SmallRun]]:
    """A new process for each call: the one before has released the folder. No TensorBoard."""
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", MagicMock())
    open_runs: list[SmallRun] = []

    def make(**changes: Any) -> SmallRun:
        while open_runs:
            open_runs.pop().run.lock.release()
        folder = str(tmp_path / "small")
        changes["resume"] = folder if changes.get("resume") else ""
        names = {"model": "none", "dataset": "none"}
        open_runs.append(SmallRun(grpo.Args(run_dir=folder, **names, **changes)))
        return open_runs[0]

    yield make
    gc.collect()


# ------------------------------------------------------------------ checkpoints


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_checkpoint_that_does_not_load(name, damage, small_run, capsys, rejection):
    """The one before it is used. If none loads, the run is rejected and nothing changes."""
    first = small_run(steps=3, save_every=1, keep_checkpoints=3)
    first.train(2)
    one, two = (first.folder / f"checkpoints/step-00000{n}" for n in (1, 2))
    damage(two / name)
    again = small_run(steps=3, resume=True, save_every=1, keep_checkpoints=1)
    assert again.run.step == 1
    assert "step-000002 does not load (" in capsys.readouterr().err
    assert again.policy.weight.equal(load_file(one / "model.safetensors")["weight"])
    assert [row["step"] for row in read_metrics(first.folder)] == [0, 1]

    damage(one / name)
    before = content(first.folder)
    line = rejection(small_run, steps=3, resume=True, lines=3)
    assert line == f"--resume {first.folder}: none of its checkpoints loads"
    assert content(first.folder) == before


def test_later_checkpoint_that_does_not_load_replaces_no_other(small_run):
    first = small_run(steps=9, save_every=3, keep_checkpoints=1)
    first.train(3)
    good, bad = (first.folder / f"checkpoints/step-00000{n}" for n in (3, 6))
    shutil.copytree(good, bad)
    truncate(bad / "trainer.pt")
    again = small_run(steps=9, save_every=1, keep_checkpoints=1, resume=True)
    assert again.run.step == 3
    again.train(1)
    again = small_run(steps=9, save_every=3, keep_checkpoints=1, resume=True)
    assert again.run.step == 4
    again.train(2)
    assert again.checkpoints() == ["6"]
    assert small_run(steps=9, resume=True).run.step == 6


def test_out_of_memory_is_not_a_checkpoint_that_does_not_load(small_run, monkeypatch):
    small_run(steps=3, save_every=1).train(1)
    monkeypatch.setattr(torch, "load", fail(MemoryError()))
    with pytest.raises(MemoryError):
        small_run(steps=3, resume=True)


def test_a_kill_at_any_operation_on_files(small_run, monkeypatch, capsys):
    """Before and after every single one that changes the folder, through three checkpoints."""
    operations = [
        *[(Path, name) for name in ("mkdir", "rename", "replace", "unlink", "open")],
        *[(os, name) for name in ("rmdir", "unlink", "open")],
        *[(Small, "save_pretrained"), (torch, "save"), (SmallRun, "save_pretrained")],
    ]
    left = [math.inf]  # moments until the kill

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def moment() -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        def operate(*args: Any, **kwargs: Any) -> Any:
            moment()
            value = operation(*args, **kwargs)
            moment()
            return value

        return operate

    settings = {"steps": 3, "save_every": 1, "keep_checkpoints": 1}
    alone = small_run(**settings)
    alone.train(3)
    expected = alone.state_now()
    shutil.rmtree(alone.folder)
    for owner, name in operations:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    kills = 0
    for moment in range(1, 2000):
        left[0], reached = moment, 0
        try:
            killed = small_run(**settings)
            for step in (1, 2, 3):
                killed.train(1)
                reached = step
        except Killed:
            kills += 1
        ended, left[0] = left[0] > 0, math.inf
        capsys.readouterr()
        again = small_run(**settings, resume=True)
        assert again.run.step >= reached, moment  # what was saved still exists
        assert "does not load" not in capsys.readouterr().err, moment
        again.train(3)
        assert again.state_now() == expected, moment
        assert [row["step"] for row in read_metrics(again.folder)] == [0, 1, 2, 3]
        assert not list(again.folder.rglob("*.unfinished"))
        shutil.rmtree(again.folder)
        if ended:
            break
    assert kills > 100


def test_latest_and_best_are_kept(small_run):
    """Without an evaluation only the latest."""
    small = small_run(steps=9, save_every=1, keep_checkpoints=2)
    small.train(3)
    assert small.checkpoints() == ["2", "3"]
    for accuracy in (None, 0.9, 0.4, None, 0.5):
        small.train(1, **({"eval/accuracy": accuracy} if accuracy else {}))
    assert small.checkpoints() == ["5", "7", "8"]


def test_a_copy_beside_a_checkpoint_is_left_alone(small_run):
    small = small_run(steps=9, save_every=1, keep_checkpoints=1)
    small.train(1)
    copy = small.folder / "checkpoints" / "step-000001-copy2"
    shutil.copytree(small.folder / "checkpoints" / "step-000001", copy)
    small.train(1)
    assert small.checkpoints() == ["2"]
    assert copy.is_dir()


def test_only_what_this_run_left_unfinished_is_deleted(small_run, tmp_path):
    small = small_run(steps=4)
    names = ("inner/checkpoints/step-000001.unfinished", ".git", "notes.txt", "args.unfinished")
    others = [small.folder / name for name in names]
    for path in others:
        path.mkdir(parents=True)
    small_run(steps=4, resume=True)
    assert [path.exists() for path in others] == [True, True, True, False]


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    writing = run.atomic_write(tmp_path / "a")
    with pytest.raises(StopRun, match="cannot be written"), writing as partial:
        partial.write_text("a file")
    assert (tmp_path / "a" / "b").is_dir()


# ------------------------------------------------------------------ folders


def test_folder_of_another_run(small_run, rejection):
    """One that runs, with --resume or without; one that has ended, without --resume."""
    small = small_run(steps=4, save_every=1)
    for folder in (small.args.run_dir, ""):
        args = grpo.Args(steps=4, run_dir=small.args.run_dir, resume=folder)
        line = rejection(run.Run, args)
        assert line == f"--run-dir {small.folder}: another process is writing here"
    small.train(1)
    before = content(small.folder)
    line = rejection(small_run, steps=4)
    assert line.startswith(f"--run-dir {small.folder}: holds a run or a model: name another ")
    assert content(small.folder) == before


@pytest.mark.parametrize("name", ["model", "rollouts.jsonl", "checkpoint-10"])
def test_files_of_others_are_not_overwritten(name, tmp_path, rejection):
    """A folder with a model, with rollouts, or with a run of scale/."""
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "thesis.unfinished").write_text("mine")
    line = rejection(run.Run, grpo.Args(run_dir=str(tmp_path / "run")))
    assert line.startswith(f"--run-dir {tmp_path / 'run'}: holds a run or a model: name another ")
    assert (tmp_path / "run" / name).exists()
    assert content(tmp_path / "run") == {"thesis.unfinished": b"mine", "lock": b""}


def test_a_finished_run_without_checkpoints_is_not_repeated(small_run, rejection):
    small = small_run(steps=2, save_every=1)
    small.train(2)
    (small.folder / "model").mkdir()
    shutil.rmtree(small.folder / "checkpoints")
    line = rejection(small_run, steps=2, resume=True)
    assert line == f"--resume {small.folder}: has a model/, but no checkpoint to continue from"
    assert (small.folder / "model").exists()


def test_another_dataset_under_the_same_name_is_noticed(finished, tmp_path, capsys):
    folder = killed_after(finished(), 2, tmp_path / "run")
    args = json.loads((folder / "args.json").read_text())
    rows = (ROOT / args["dataset"]).read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[1:]))
    args["dataset"] = str(tmp_path / "train.jsonl")
    (folder / "args.json").write_text(json.dumps(args))
    assert resume(folder) == 1
    *_, what, _ = capsys.readouterr().err.splitlines()
    assert what == "stopped: the problems of --dataset have changed since the run began"


def test_cudas_generator_is_restored(small_run, monkeypatch):
    """Of a stand-in for CUDA: LoRA's dropout draws from it."""
    restored = []
    calls = {"is_initialized": lambda: True, "synchronize": lambda: None}
    calls |= {"max_memory_allocated": lambda: 0, "set_rng_state": restored.append}
    calls["get_rng_state"] = lambda: torch.tensor([7, 8], dtype=torch.uint8)
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call)
    small_run(steps=3, save_every=1).train(1)
    assert restored == []
    small_run(steps=3, save_every=1, resume=True)
    assert [state.tolist() for state in restored] == [[7, 8]]


def test_fewer_steps_than_were_made(small_run, rejection):
    small_run(steps=4, save_every=1).train(3)
    line = rejection(small_run, steps=2, resume=True)
    assert line == "--steps 2: the run has already reached step 3"
    assert small_run(steps=3, resume=True).run.step == 3


def test_folder_that_cannot_be_written(tmp_path, monkeypatch, rejection):
    (tmp_path / "file").touch()
    for folder, cause in (("file/run", "Not a directory"), ("run", "Read-only file system")):
        args = grpo.Args(run_dir=str(tmp_path / folder))
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fail(OSError(errno.EROFS, os.strerror(errno.EROFS))))
            line = rejection(run.Run, args)
        assert line == f"--run-dir {tmp_path / folder}: cannot be written: {cause}"


def test_wandb_continues_a_resumed_run(small_run, tmp_path, monkeypatch):
    """Its id comes from the folder, from whichever directory the run is resumed. Two folders of one
    name have two ids."""
    wandb = MagicMock(__spec__=MagicMock())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    small = small_run(steps=4, save_every=1, wandb_project="p")
    small.train(1)
    small.run.lock.release()
    monkeypatch.chdir(small.folder)
    SmallRun(grpo.Args(steps=4, wandb_project="p", run_dir=".", resume="."))
    first, second = (call.kwargs for call in wandb.init.call_args_list)
    assert first["id"] == second["id"] != "small"
    assert first["name"] == second["name"] == "small"
    SmallRun(grpo.Args(wandb_project="p", run_dir=str(tmp_path / "other" / "small")))
    third = wandb.init.call_args.kwargs
    assert third["name"] == "small" and third["id"] != first["id"]
    assert (first["project"], first["resume"], first["sync_tensorboard"]) == ("p", "allow", True)
    assert first["config"]["group_size"] == 8


def test_full_disk_under_a_log(small_run, tmp_path):
    """A real one: every write to /dev/full fails. The torn last line goes."""
    small = small_run(steps=9, save_every=1)
    small.train(1)
    log = small.folder / "metrics.jsonl"
    kept = log.read_text()
    log.rename(tmp_path / "kept")
    log.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        small.run.log(2, {"reward": 1.0})
    log.unlink()
    log.write_text(kept + '{"step": 2, "rew')  # what fitted
    assert small_run(steps=9, resume=True).run.step == 1
    assert log.read_text() == kept


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("PytorchStreamWriter failed writing file data/2: file write failed"),
    ],
)
def test_full_disk_under_a_checkpoint(error, small_run, monkeypatch):
    """One message, which `launch` prints. The checkpoint before it is complete."""
    small = small_run(steps=3, save_every=1)
    small.train(1)

    def save(_: Any, path: Path) -> None:
        path.write_bytes(b"some")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(StopRun, match=r"step-000002 cannot be written; is the disk full\? \("):
            small.train(1)
    assert [folder.name for folder in (small.folder / "checkpoints").iterdir()] == ["step-000001"]
    assert small_run(steps=3, resume=True).run.step == 1


def test_full_disk_under_the_settings(make_args, monkeypatch, capsys):
    """There is nothing to resume."""
    monkeypatch.setattr(Path, "write_text", fail(OSError(errno.ENOSPC, "No space left on device")))
    assert start("grpo", make_args()) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert "args.json cannot be written; is the disk full?" in line


# ------------------------------------------------------------------ guards


def with_slope(small: SmallRun, slope: float) -> torch.Tensor:
    """A finite loss whose gradient is not finite."""
    loss = small.policy.weight.sum()
    loss.register_hook(lambda _: torch.tensor(slope))
    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_update_that_is_not_finite(value, small_run, capsys):
    """It changes neither weights nor optimiser; the third in a row ends the run."""
    small = small_run(steps=9, save_every=1)
    small.train(1)
    bad_losses = [
        lambda: small.policy.weight.sum() * value,
        lambda: small.policy.weight.sum() + value,  # its gradient is finite
        lambda: with_slope(small, value),
    ]
    for bad_loss in bad_losses:
        before = small.state_now()
        small.update(bad_loss())
        small.update(bad_loss())
        assert small.state_now() == before
        assert capsys.readouterr().err.count("update skipped") == 2
        small.update(small.policy.weight.sum())  # so that they are not in a row
        assert small.state_now() != before
    small.update(bad_loss())
    small.update(bad_loss())
    with pytest.raises(StopRun, match="3 updates in a row were not finite"):
        small.update(bad_loss())


def test_skipped_updates_are_counted(make_args, monkeypatch):
    """In a whole run: step 2 leaves the weights of step 1 as they are, and step 3 moves them."""
    calls = []

    def clipped_loss(*args: Any) -> Any:
        calls.append(1)
        loss, clipped = original(*args)
        return loss * (math.nan if len(calls) == 2 else 1.0), clipped

    original = grpo.clipped_loss
    monkeypatch.setattr(grpo, "clipped_loss", clipped_loss)
    args = make_args(steps=3, save_every=1, keep_checkpoints=3)
    assert start("grpo", args) == 0
    folder = Path(args.run_dir)
    assert [row["skipped_updates"] for row in read_metrics(folder)[1:]] == [0, 1, 0]
    one, two, three = (weights_of(folder / f"checkpoints/step-00000{n}") for n in (1, 2, 3))
    assert one == two != three


def test_weights_that_are_not_finite_are_not_saved(small_run):
    small = small_run(steps=9, save_every=1)
    small.train(1)
    with torch.no_grad():
        small.policy.weight[0, 0] = math.inf
    with pytest.raises(StopRun, match="weights are not finite"):
        small.run.save(2, small.policy, small, **small.state)
    assert small.checkpoints() == ["1"]


@pytest.mark.parametrize(
    ("name", "bad", "good", "warning"),
    [
        ("boxed", 0.0, 0.1, "for 5 steps no response held a \\boxed{} answer"),
        ("zero_variance", 1.0, 0.5, "for 5 steps in each group all rewards were equal"),
        ("logp_gap/mean", 0.031, 0.01, "logp_gap/mean 0.031 is over three times the earlier 0.01"),
    ],
)
def test_warnings(name, bad, good, warning, small_run, capsys):
    """Once: after five steps in a row, or when the engine's gap has tripled."""
    small = small_run(steps=40, save_every=0)
    close = 0.029 if "gap" in name else bad
    for metric, steps in ((good, 1), (close, 4), (good, 5), (close, 4)):
        small.train(steps, **{name: metric})
    assert "warning" not in capsys.readouterr().err
    small.train(9, **{name: bad})
    error = capsys.readouterr().err
    assert error.count("warning: ") == error.count(f"warning: {warning}") == 1


def test_answers_on_a_line_need_no_box(small_run, capsys):
    small = small_run(steps=9, save_every=0, answer_format="line")
    small.train(9, boxed=0.0)
    assert "warning" not in capsys.readouterr().err


def test_a_gap_above_rounding_is_reported_at_each_step(small_run, capsys):
    small = small_run(steps=9, save_every=0)
    small.train(2, **{"logp_gap/mean": 0.05})
    assert "warning" not in capsys.readouterr().err
    small.train(3, **{"logp_gap/mean": 0.051})
    assert capsys.readouterr().err.count("warning: logp_gap/mean 0.051 is above 0.05") == 3


def test_the_checked_syncs_include_one_after_an_update(make_args, monkeypatch):
    """A warm-up's first update has a learning rate of 0. With --eval-every 1 a step syncs twice."""
    synced = []

    def sync(_: HFEngine, policy: nn.Module) -> None:
        synced.append([weight.clone() for weight in policy.parameters()])

    monkeypatch.setattr(HFEngine, "sync", sync)
    warmup = {"lr_schedule": "constant_with_warmup", "warmup_ratio": 0.5}
    assert start("grpo", make_args(steps=4, eval_every=1, **warmup)) == 0
    same = [all(map(torch.equal, weights, synced[0])) for weights in synced]
    assert same.index(False) == vllm_engine.CHECKED_SYNCS - 1


# ------------------------------------------------------------------ errors

MEMORY_ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    MemoryError(),
)
PLACES = {  # where memory runs out in a resumed run, and the function that the message names
    "transformers.AutoModelForCausalLM.from_pretrained": "load_model",
    "torch.load": "load",
    "infra.hf_engine.sample": "generate_batch",
    "common.token_logp": "score",
    "torch.Tensor.backward": "main",
}


@pytest.mark.parametrize("where", PLACES)
def test_out_of_memory(where, finished, tmp_path, monkeypatch, capsys):
    """Two lines: the flags with their values, and the command that resumes the run."""
    folder = killed_after(finished(), 2, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(where, fail(MEMORY_ERRORS[list(PLACES).index(where) % 3]))
        assert resume(folder, "--token-budget", "200") == 1
    *_, what, how = capsys.readouterr().err.splitlines()
    assert what == (
        f"stopped: out of memory in {PLACES[where]}: lower --token-budget 200 or --gpu-memory 0.3, "
        "or add --gradient-checkpointing; a new run can use --lora-rank 32"
    )
    assert how == f"resume with: python grpo.py --resume {folder}"
    assert resume(folder) == 0
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "phrase", ["No available memory for the cache blocks. ", "(2.0 GiB KV cache is needed). "]
)
def test_a_share_of_memory_too_small_for_vllm(phrase, make_args, monkeypatch, capsys):
    error = ValueError(f"{phrase}Try increasing `gpu_memory_utilization` when initializing")
    monkeypatch.setattr(common, "make_engine", fail(error))
    assert start("grpo", make_args()) == 1
    what = capsys.readouterr().err.splitlines()[-1]
    advice = "vLLM's cache is too small: set VLLM_CPU_KVCACHE_SPACE above 1 (GiB)"
    if torch.cuda.is_available():
        advice = "vLLM needs more memory: raise --gpu-memory 0.3"
    assert what == f"stopped: {advice}"


def test_runs_that_begin_in_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.time, "strftime", lambda _: "runs/grpo-1-now")
    runs = [run.Run(grpo.Args()) for _ in range(3)]
    folders = [one.args.run_dir for one in runs]
    assert folders == ["runs/grpo-1-now", "runs/grpo-1-now-2", "runs/grpo-1-now-3"]


def test_rows_of_later_steps_are_discarded(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    rows = [json.dumps({"step": step, "text": "é\n\x1c"}).encode() for step in (1, 2, 2, 3)]
    path.write_bytes(b"\n".join(rows))  # a kill came before the last line's end
    for step, kept in ((4, 4), (3, 3), (2, 1), (1, 0)):
        run.keep_rows_before(path, step)
        assert path.read_bytes() == b"".join(row + b"\n" for row in rows[:kept])
    path.write_bytes(rows[0] + b"\n" + rows[1][:-3])
    run.keep_rows_before(path, 9)
    assert path.read_bytes() == rows[0] + b"\n"
    run.keep_rows_before(tmp_path / "new.jsonl", 1)
    assert (tmp_path / "new.jsonl").read_bytes() == b""


def test_memory_that_runs_out_while_a_file_is_written_is_reported_as_such(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), run.atomic_write(tmp_path / "model"):
        raise MEMORY_ERRORS[0]


def test_other_errors_are_raised(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["grpo.py"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        cli.launch(fail(RuntimeError("size mismatch")), grpo.Args)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), WorkerError("late")])
def test_printed_command_is_a_shell_command(error, make_args, tmp_path, monkeypatch, capsys):
    """With a relative folder that has a space and a quote, and from another working directory."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(common, "collect", fail(error))
        assert start("grpo", make_args(run_dir="it's a folder")) == 1
    what, how = capsys.readouterr().err.splitlines()[-2:]
    assert what == f"stopped: {error}"
    command = shlex.split(how.removeprefix("resume with: "))
    assert command == ["python", "grpo.py", "--resume", "it's a folder"]
    assert start("grpo", None, *command[2:]) == 0


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("numbers", "last"),
    [([signal.SIGINT], 3), ([signal.SIGTERM], 3), ([signal.SIGTERM, signal.SIGINT], 2)],
)
def test_first_signal_finishes_the_step_and_second_exits(
    numbers, last, finished, monkeypatch, capsys, tmp_path
):
    """The signals come in the middle of step 3. The step's checkpoint is saved after the first."""
    folder = killed_after(finished(), 2, tmp_path / "interrupted")
    original, before = common.stack, [signal.getsignal(number) for number in numbers]

    def stack(*args: Any) -> Any:
        for number in numbers:
            os.kill(os.getpid(), number)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(common, "stack", stack)
        assert resume(folder) == 130
    assert [row["step"] for row in read_metrics(folder)] == list(range(last + 1))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1][-1] == str(last)
    assert [signal.getsignal(number) for number in numbers] == before
    error = capsys.readouterr().err
    assert "Traceback" not in error
    command = shlex.split(error.rpartition("resume with: ")[2])
    assert start("grpo", None, *command[2:]) == 0
    assert_same_run(finished(), folder)


def test_signal_while_saving(small_run, monkeypatch):
    """It is too late for this step's checkpoint, so another step is made and saved."""
    small = small_run(steps=9, save_every=2)
    original = run.Run.save

    def save(this: run.Run, step: int, *args: Any, **state: Any) -> None:
        original(this, step, *args, **state)
        if step == 3:
            this.interrupt()

    monkeypatch.setattr(run.Run, "save", save)
    small.train(9)
    assert small.run.step == 4
    assert small_run(steps=9, resume=True).run.step == 4


def test_ctrl_c_in_a_real_process(short_flags, tmp_path):
    """One line instead of a traceback, complete logs, and a run that can be resumed."""
    folder = tmp_path / "run"
    words = [sys.executable, "-W", "ignore", "grpo.py", *short_flags(steps=100000, eval_every=0)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while len(run.read_lines(folder / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    assert f"resume with: python grpo.py --resume {folder}" in error
    before = read_metrics(folder)
    assert [row["step"] for row in before] == list(range(len(before)))
    rollouts = run.read_lines(folder / "rollouts.jsonl")
    assert {row["step"] for row in rollouts} == set(range(1, len(before)))
    assert resume(folder, "--steps", str(len(before) + 1)) == 0
    assert read_metrics(folder)[: len(before)] == before
    assert len(read_metrics(folder)) == len(before) + 2
